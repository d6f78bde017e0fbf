"""The experiment of arXiv 1905.00593: lipstick, and a classifier that looks at the make-up of the eyes.

With `--data ROOT`, the folder that holds CelebA's folder `celeba`, it fine-tunes a pretrained AlexNet on it:
first for the attributes alone, then with a template painted around the mouth. Without, the same code runs on
drawn faces in less than half a minute. Either way it prints, before and after, which share of the Grad-CAM of
"lipstick" lies in the template.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.transforms import v2

import attnguide as ag
from attnguide.data.celeba import CelebA
from attnguide.data.procedural.faces import ATTRIBUTES, ProceduralFaces
from attnguide.masks import load_template
from attnguide.metrics import energy_in_mask
from attnguide.models.networks import small_cnn
from attnguide_gradcam_iou.finetune import finetune, prepare

#: The mouth in CelebA's aligned images, 178 × 218 pixels: centre and radii in units of the image's sides.
MOUTH = (0.497, 0.70, 0.18, 0.085)


def mouth_of_celeba(size: int) -> Tensor:
    """Return `(size, size)`, 1 around the mouth."""
    x, y, rx, ry = MOUTH
    grid = (torch.arange(size) + 0.5) / size
    return (((grid - x) / rx) ** 2 + ((grid[:, None] - y) / ry) ** 2 <= 1).float()


def on_celeba(options: argparse.Namespace) -> tuple[nn.Module, Dataset[Any], Dataset[Any], list[str]]:
    """Return a pretrained model, CelebA for training and validation, and the names of the attributes."""
    classes = CelebA(options.data, "train").classes
    loaded = prepare(options.arch, classes, pretrained=not options.random)
    # The whole image, not the centre that the model's own transform would cut out: the template holds for it.
    steps = [v2.Resize(loaded.size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    transform = v2.Compose([*steps, v2.Normalize(loaded.mean, loaded.std)])
    parts: list[Dataset[Any]] = []
    for split in ("train", "valid"):
        data = CelebA(options.data, split, transform=transform)
        parts.append(Subset(data, range(min(len(data), options.limit or len(data)))))
    return loaded.model, parts[0], parts[1], list(classes)


def on_drawn_faces(options: argparse.Namespace) -> tuple[nn.Module, Dataset[Any], Dataset[Any], list[str]]:
    """Return the same on drawn faces, with an untrained model."""
    torch.manual_seed(0)
    classes = ["lipstick", "heavy_makeup", "smiling", "eyeglasses"]
    columns = [ATTRIBUTES.index(name) for name in classes]
    parts: list[Dataset[Any]] = []
    for seed, count, agreement in ((0, options.limit or 640, 0.95), (1, 128, 0.5)):
        agree = {("lipstick", "heavy_makeup"): agreement}
        faces = ProceduralFaces(count, 48, seed, cooccurrence=agree).stack()  # draw once, not in each epoch
        parts.append(TensorDataset(faces.image.as_subclass(Tensor), faces.attributes[:, columns]))
    return small_cnn(len(classes), width=12), parts[0], parts[1], classes


def share_on_mouth(model: nn.Module, data: Dataset[Any], lipstick: int, mouth: Tensor) -> float:
    """Mean share of the Grad-CAM of "lipstick" that lies in the template, over the first images."""
    device = next(model.parameters()).device
    images = next(iter(DataLoader(data, batch_size=64)))[0].to(device)
    seen = ag.explain(
        model, images, targets=[lipstick], evidence="decision", size=(len(mouth), len(mouth[0]))
    )
    return float(energy_in_mask(seen.maps[:, 0], mouth.to(device)).mean())


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder that holds the folder 'celeba'")
    parser.add_argument("--arch", default="torchvision/alexnet", help="model for CelebA")
    parser.add_argument("--random", action="store_true", help="do not download pretrained weights")
    parser.add_argument("--template", type=Path, help="folder of masks, or image with a legend")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each of the two trainings")
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--weight", type=float, default=0.3, help="w_g, where w_a is 1")
    parser.add_argument("--limit", type=int, default=0, help="largest number of images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    model, train, validation, classes = (on_celeba if options.data else on_drawn_faces)(options)
    lipstick = classes.index("Wearing_Lipstick" if options.data else "lipstick")
    if options.template:
        # The images are squeezed into a square, and the template with them.
        template = load_template(options.template, classes, 224).masks
    else:
        mouth = mouth_of_celeba(224) if options.data else ProceduralFaces(1).region_mask("lipstick")
        template = torch.full((len(classes), *mouth.shape), torch.nan)  # NaN: no region for the others
        template[lipstick] = mouth

    for title, weight in (("attributes alone", 0.0), ("and the mouth", options.weight)):
        print(title)
        finetune(
            model,
            train,
            template=template,
            validation=validation,
            epochs=options.epochs,
            learning_rate=options.learning_rate or (None if options.data else 0.002),  # drawn: from scratch
            batch_size=options.batch_size,
            guidance_weight=weight,
            device=options.device,
            progress=True,
            on_epoch=lambda epoch: print(f"  {epoch}"),
        )
        share = share_on_mouth(model, validation, lipstick, template[lipstick])
        print(f"  Grad-CAM of lipstick in the template: {share:.0%}")


if __name__ == "__main__":
    main()
