"""Heat maps of action units: they are where the codebook says, and follow the face."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnguide_action_units._heatmaps import Regions, heat_maps
from attnguide_action_units.codebook import Codebook, default
from attnguide_action_units.landmarks import CANONICAL, MIRROR

BOOK = default()
CPU = torch.device("cpu")


def face(side: int, turn: float = 0.0) -> Tensor:
    """The canonical face in an image of so many pixels, `(1, 68, 2)`, turned clockwise by degrees."""
    cosine, sine = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    points = (CANONICAL - torch.tensor([0.0, 0.4])) * 0.4 * side
    return (points @ torch.tensor([[cosine, sine], [-sine, cosine]]) + (side - 1) / 2)[None]


def drawn(landmarks: Tensor, units: list[int], side: int, size: int | None = None) -> Tensor:
    regions = BOOK.regions(units)
    chosen = torch.arange(len(regions)).expand(len(landmarks), -1)
    return heat_maps(landmarks, Regions(regions, CPU), chosen, (size or side, size or side), (side, side))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def by_hand(landmarks: Tensor, book: Codebook, units: list[int], side: int) -> Tensor:
    """The definition, pixel by pixel."""
    right, left = landmarks[36], landmarks[45]
    unit = (left - right).norm()
    along = (left - right) / unit
    down = torch.stack([-along[1], along[0]])
    axes, origin = torch.stack([along, down]), (left + right) / 2
    own = (landmarks - origin) @ axes.T / unit
    result = torch.zeros(side, side)
    for y in range(side):
        for x in range(side):
            place = axes @ (torch.tensor([float(x), float(y)]) - origin) / unit
            for region in book.regions(units):
                points = own[list(region.points)]
                centre, radii = points.mean(0), torch.tensor(region.radii)
                if region.kind == "around":
                    low, high = points.amin(0), points.amax(0)
                    centre, radii = (low + high) / 2, (high - low) / 2 + radii
                away = ((place - centre - torch.tensor(region.offset)) / radii).norm()
                t = float(((away - 0.6) / 0.8).clamp(0, 1))
                result[y, x] = max(float(result[y, x]), 1 - t * t * (3 - 2 * t))
    return result / result.amax()


def test_a_map_is_what_its_definition_says() -> None:
    landmarks = face(56, turn=17)
    torch.testing.assert_close(
        drawn(landmarks, [4, 6, 9, 27], 56)[0],
        by_hand(landmarks[0], BOOK, [4, 6, 9, 27], 56),
        atol=1e-4,
        rtol=0,
    )


#: Where each unit is, in eye distances on the canonical face, and how far its mass may reach.
PLACES: dict[int, tuple[tuple[tuple[float, float], ...], float]] = {
    1: ((tuple(CANONICAL[20].tolist()), tuple(CANONICAL[23].tolist())), 0.25),  # type: ignore[dict-item]
    2: ((tuple(CANONICAL[18].tolist()), tuple(CANONICAL[25].tolist())), 0.25),  # type: ignore[dict-item]
    4: (((0.0, -0.26),), 0.4),
    5: (((-0.35, 0.0), (0.35, 0.0)), 0.3),
    6: (((-0.41, 0.29), (0.41, 0.29)), 0.3),
    7: (((-0.35, 0.0), (0.35, 0.0)), 0.3),
    9: (((-0.14, 0.28), (0.14, 0.28)), 0.25),
    10: (((-0.29, 0.65), (0.29, 0.65)), 0.25),
    12: (((-0.29, 0.78), (0.29, 0.78)), 0.25),
    15: (((-0.29, 0.78), (0.29, 0.78)), 0.25),
    16: (((-0.17, 0.91), (0.17, 0.91)), 0.25),
    17: (((-0.08, 1.08), (0.08, 1.08)), 0.25),
    20: (((-0.46, 0.82), (0.46, 0.82)), 0.25),
    23: (((0.0, 0.81),), 0.5),
    24: (((0.0, 0.81),), 0.5),
    25: (((0.0, 0.68), (0.0, 0.95)), 0.25),
    26: (((0.0, 0.81),), 0.5),
    27: (((0.0, 0.81),), 0.5),
}


@pytest.mark.parametrize("number", BOOK.units)
def test_each_unit_is_where_it_belongs(number: int) -> None:
    side = 112
    landmarks = face(side)[0]
    unit = float((landmarks[45] - landmarks[36]).norm())
    origin = (landmarks[45] + landmarks[36]) / 2
    (found,) = drawn(landmarks[None], [number], side)
    grid = torch.stack(torch.meshgrid(*[torch.arange(side)] * 2, indexing="xy"), dim=2)
    centres, reach = PLACES[number]
    near = torch.stack(
        [((grid - origin) / unit - torch.tensor(centre)).norm(dim=2) < reach for centre in centres]
    )
    assert float(found.amax()) == 1
    assert float((found * near.any(dim=0)).sum() / found.sum()) > 0.99
    for one in near:  # each side of the face has its share
        assert float((found * one).sum() / found.sum()) > 0.9 / len(centres)


@pytest.mark.parametrize("expression", [name for name, units in BOOK.expressions.items() if units])
def test_maps_follow_the_face(expression: str) -> None:
    units = list(BOOK.units_of(expression))
    (plain,) = drawn(face(112), units, 112)
    for side in (56, 80, 224, 448):
        (other,) = drawn(face(side), units, side)
        resized = F.interpolate(other[None, None], size=(112, 112), mode="bilinear", antialias=True)
        assert cosine(plain, resized) >= 0.98, side
    grid = torch.arange(112) - 55.5
    for turn in (-30, -10, 30):
        (turned,) = drawn(face(112, turn), units, 112)
        c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        # Where each place of the upright map is in the turned one.
        x, y = c * grid - s * grid[:, None], s * grid + c * grid[:, None]
        back = F.grid_sample(turned[None, None], torch.stack([x, y], dim=-1)[None] / 56, align_corners=False)
        assert cosine(plain, back) >= 0.98, turn
    flipped = face(112)[:, list(MIRROR)]
    flipped[..., 0] = 111 - flipped[..., 0]
    assert cosine(plain.flip(1), drawn(flipped, units, 112)[0]) >= 0.98


def test_coarse_maps_are_means_of_fine_ones() -> None:
    fine = drawn(face(112), [1, 12], 112, 56)
    coarse = drawn(face(112), [1, 12], 112, 7)
    expected = F.avg_pool2d(fine[:, None], 8)[:, 0]
    torch.testing.assert_close(coarse, expected / expected.amax())


def test_a_batch_is_what_its_samples_are() -> None:
    faces = torch.cat([face(112), face(112, 20), face(96)])
    regions = Regions(BOOK.regions(list(BOOK.units)), CPU)
    chosen = torch.tensor([[0, 1, 1], [4, 5, 6], [7, 7, 7]])
    together = heat_maps(faces, regions, chosen, (28, 20), (112, 80))
    assert together.shape == (3, 28, 20)
    for index in range(3):
        alone = heat_maps(faces[index : index + 1], regions, chosen[index : index + 1], (28, 20), (112, 80))
        torch.testing.assert_close(together[index], alone[0])
    assert heat_maps(faces[:0], regions, chosen[:0], (28, 20), (112, 80)).shape == (0, 28, 20)
