"""Two lines in a plain training loop, and the classifier looks at the mouth.

On drawn faces, those who wear lipstick nearly always wear heavy make-up too. A classifier of lipstick learns
to look all over the face. The same loop with two lines more, marked below, makes it look at the mouth: the
share of Grad-CAM that lies there grows.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnguide as ag
from attnguide.data.procedural.faces import ATTRIBUTES, ProceduralFaces, template
from attnguide.metrics import energy_in_mask
from attnguide.models.networks import small_cnn
from attnguide.priors.mask import MaskPrior

SIZE = 48
LIPSTICK = ATTRIBUTES.index("lipstick")


def train(images: Tensor, labels: Tensor, mouth: Tensor, epochs: int, *, guided: bool) -> nn.Module:
    """Train a small network, in the way that everybody does."""
    torch.manual_seed(0)
    model = small_cnn(1, width=12)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    weight = 0.3 if guided else 0.0
    guide = ag.Guide.from_recipe(model, "gradcam-iou", prior=MaskPrior(mouth), weight=weight)  # line 1
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(images)).split(32):
            loss = F.binary_cross_entropy_with_logits(model(images[batch]), labels[batch])
            loss = loss + guide.loss(labels[batch])  # line 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        print(f"  epoch {epoch + 1}: loss {total / len(images):.3f}")
    guide.remove()
    return model


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faces", type=int, default=400, help="number of faces to train on")
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()

    mouth = template("lipstick", SIZE)
    biased = {("lipstick", "heavy_makeup"): 0.98}
    faces = ProceduralFaces(options.faces, SIZE, cooccurrence=biased).stack()
    images, labels = faces.image.as_subclass(Tensor), faces.attributes[:, [LIPSTICK]]
    # Faces on which make-up says nothing about lipstick.
    fair = ProceduralFaces(150, SIZE, seed=1).stack()
    for guided in (False, True):
        print("guided" if guided else "plain")
        model = train(images, labels, mouth, options.epochs, guided=guided)
        seen = ag.explain(model, fair.image.as_subclass(Tensor), targets=[0], evidence="decision")
        share = energy_in_mask(seen.maps[:, 0], mouth).mean()
        right = ((seen.logits > 0) == (fair.attributes[:, [LIPSTICK]] > 0.5)).float().mean()
        print(f"  Grad-CAM on the mouth: {share:.0%}; accuracy without the bias: {right:.0%}")


if __name__ == "__main__":
    main()
