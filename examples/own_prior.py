"""A custom prior, in a few lines, guides like any prior of the library.

The prior below says: look near these points. The points are an annotation, which
`guide.loss(labels, points=…)` passes to the prior, because it takes `points` as a keyword.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

import attnguide as ag
from attnguide.data.procedural.faces import ATTRIBUTES, ProceduralFaces
from attnguide.models.networks import small_cnn


class NearPoints(ag.TargetPrior):
    """Highest at the points, and falling off around them."""

    def __init__(self, radius: float = 0.1) -> None:
        self.radius = radius

    def __call__(self, trace: ag.Trace, pairs: ag.Pairs, size: tuple[int, int], *, points: Tensor) -> Tensor:
        """Turn points `(B, n, 2)`, x and y in [0, 1], into maps `(N, h, w)`."""
        rows, columns = ((torch.arange(side) + 0.5) / side for side in size)
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).to(points)  # (h, w, 2)
        distance = (grid[:, :, None] - points[pairs.sample, None, None]).norm(dim=-1).amin(dim=-1)
        return torch.exp(-((distance / self.radius) ** 2))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faces", type=int, default=256, help="number of faces to train on")
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()

    torch.manual_seed(0)
    size = 48
    faces = ProceduralFaces(options.faces, size).stack()
    images, labels = faces.image.as_subclass(Tensor), faces.attributes[:, [ATTRIBUTES.index("smiling")]]
    mouth = faces.landmarks.as_subclass(Tensor)[:, 48:] / size  # the last 20 of 68 landmarks

    model = small_cnn(1, width=12)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    with ag.Guide(model, terms=[ag.Term(prior=NearPoints(), targets="all", evidence="decision")]) as guide:
        print(guide)
        for epoch in range(options.epochs):
            distances = []
            for batch in torch.randperm(len(images)).split(32):
                loss = F.binary_cross_entropy_with_logits(model(images[batch]), labels[batch])
                loss = loss + guide.loss(labels[batch], points=mouth[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                distances.append(guide.records()[0].losses)
            print(f"epoch {epoch + 1}: guidance loss {torch.cat(distances).mean():.3f}")


if __name__ == "__main__":
    main()
