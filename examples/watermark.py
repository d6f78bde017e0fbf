"""A photograph, a pretrained network and a watermark: which way does the cat look?

One class is scikit-image's photograph of a cat, the other its mirror image. In training the mirror images
have a watermark, and a network that is fine-tuned as usual reads it. Guided by one painted mask of the face
(`ag.Intervention`), it looks at the cat. The weights of EfficientNet-Lite0 come from timm, or from a file:

    python examples/watermark.py --out watermark/
    python examples/watermark.py --weights tf_efficientnet_lite0.safetensors --out watermark/

It prints the accuracy on test images with the watermark on the other class, writes
`watermark.jpg`, and takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from skimage import data
from torch import Tensor, nn

import attnguide as ag

SIDE = 192
CLASSES = ("right", "left")
#: The face in the photograph of 451×300 pixels: center and radii.
FACE = (235, 165, 125, 115)


def photographs(number: int, marked: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Crops of the photograph with labels and masks; `marked` is the class with the watermark."""
    generator = np.random.default_rng(seed)
    cat = Image.fromarray(data.chelsea())
    face = Image.new("L", cat.size)
    x, y, width, height = FACE
    ImageDraw.Draw(face).ellipse((x - width, y - height, x + width, y + height), fill=255)
    images, labels, masks = [], [], []
    for index in range(number):
        label = index % 2
        side = generator.integers(250, 300)
        left, top = generator.integers(40, 451 - side - 10), generator.integers(0, 300 - side + 1)
        crop = (left, top, left + side, top + side)
        size = (SIDE, SIDE)
        image, mask = (p.resize(size, Image.Resampling.BILINEAR, crop) for p in (cat, face))
        if CLASSES[label] == "left":
            image, mask = (p.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for p in (image, mask))
        if CLASSES[label] == marked:
            corner = [(6, SIDE - 24), (6, 4), (SIDE - 84, 4), (SIDE - 84, SIDE - 24)][generator.integers(4)]
            font = ImageFont.load_default(size=15)
            ImageDraw.Draw(image).text(
                corner, "© PHOTO", fill=(255, 255, 255), font=font, stroke_width=1, stroke_fill=0
            )
        values = np.asarray(image, np.float32) / 255
        values = values * generator.uniform(0.8, 1.3) + generator.normal(0, 0.04, values.shape)
        images.append(torch.from_numpy((2 * values.clip(0, 1) - 1).astype(np.float32)).permute(2, 0, 1))
        labels.append(label)
        masks.append(torch.from_numpy(np.asarray(mask, np.float32) / 255))
    return torch.stack(images), torch.tensor(labels), torch.stack(masks)


def fine_tune(weights: Path | None, guided: bool, steps: int) -> nn.Module:
    """Train the last blocks of the pretrained network on watermarked images."""
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=weights is None)
    if weights is not None:
        model.load_state_dict(load_file(weights))
    model.reset_classifier(2)
    for name, weight in model.named_parameters():
        weight.requires_grad_(
            name.startswith(("blocks.4", "blocks.5", "blocks.6", "conv_head", "bn2", "classifier"))
        )
    intervention = ag.Intervention(model, weight=10.0)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=5e-4)
    images, labels, masks = photographs(256, marked="left", seed=0)
    # The running statistics of normalization stay as they are: the images are all alike.
    model.eval()
    for step in range(steps):
        some = torch.randint(len(images), (16,))
        if guided:
            both = intervention(images[some], labels[some], mask=masks[some])
            loss = F.cross_entropy(both.swapped, labels[some]) + both.loss
        else:
            loss = F.cross_entropy(model(images[some]), labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            print(f"  step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def main() -> None:
    """Train both networks, and show where they look."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, help="safetensors file of tf_efficientnet_lite0")
    parser.add_argument("--steps", type=int, default=40, help="steps of training, of 16 images")
    parser.add_argument("--out", type=Path, default=Path("watermark"))
    options = parser.parse_args()
    images, labels, _ = photographs(64, marked="right", seed=1)
    panels, titles = [], []
    for name, guided in (("without guidance", False), ("with guidance", True)):
        print(name)
        model = fine_tune(options.weights, guided, options.steps)
        with torch.no_grad():
            predictions = model(images).argmax(dim=1)
        accuracy = (predictions == labels).float().mean().item()
        print(f"  accuracy with the watermark on the other class: {accuracy:.1%}")
        shown = ag.explain(model, images[:1], "grad_cam", "predicted")
        panels.append(shown.overlay(images[:1] / 2 + 0.5)[0, 0] / 255)
        titles.append(f"{name}: predicts “{CLASSES[predictions[0]]}”; accuracy {accuracy:.0%}")
    options.out.mkdir(parents=True, exist_ok=True)
    picture([images[0] / 2 + 0.5, *panels], ["which way does the cat look? (test image)", *titles]).save(
        options.out / "watermark.jpg", quality=92
    )


def picture(panels: list[Tensor], titles: list[str]) -> Image.Image:
    """Panels side by side, with titles below."""
    scale, gap, line = 2, 12, 26
    side = SIDE * scale
    sheet = Image.new("RGB", (len(panels) * side + (len(panels) - 1) * gap, side + line), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for index, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        values = (panel.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
        left = index * (side + gap)
        sheet.paste(Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC), (left, 0))
        draw.text((left + 2, side + 4), title, fill="black", font=font)
    return sheet


if __name__ == "__main__":
    main()
