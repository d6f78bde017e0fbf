"""One call explains a classifier that it has never seen, and leaves no trace in it.

Takes any model of timm, or of torchvision as `torchvision/NAME`, finds the layer to look at, and writes an
overlay for each image. Without images it draws a face, without `--model` it takes the classifier of faces
that comes with the library, and without `--pretrained` weights are random, so that nothing is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

import attnguide as ag
from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.models import load
from attnguide.visual import to_pil


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="*", type=Path, help="image files")
    parser.add_argument("--model", help="such as resnet50 or torchvision/alexnet")
    parser.add_argument("--pretrained", action="store_true", help="download the published weights")
    parser.add_argument("--source", default="grad_cam", help="such as hires_cam or layer_cam")
    parser.add_argument("--out", type=Path, default=Path("attnguide-explained"), help="folder for overlays")
    options = parser.parse_args()

    loaded = load(options.model, pretrained=options.pretrained)
    if options.images:
        names, images = [path.stem for path in options.images], [loaded.read(path) for path in options.images]
    else:
        face: Image.Image = to_pil(ProceduralFaces(1, size=224)[0].image)
        names, images = ["face"], [loaded.transform(face)]
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}

    seen = ag.explain(loaded.model, torch.stack(images), options.source)

    print(f"{loaded.name}: looked at layer {seen.layer}")
    for name, cls, score in zip(names, seen.classes[:, 0].tolist(), seen.scores[:, 0].tolist(), strict=True):
        print(f"{name}: {loaded.classes[cls]}, logit {score:.2f}")
    for path in seen.save(options.out, names):
        print(f"wrote {path}")
    state = loaded.model.state_dict()
    same = all(torch.equal(value, state[name]) for name, value in before.items())
    hooks = sum(len(module._forward_hooks) for module in loaded.model.modules())
    print(f"the model is {'as it was' if same and not hooks else 'CHANGED'}")


if __name__ == "__main__":
    main()
