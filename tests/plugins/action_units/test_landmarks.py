"""Schemes of landmarks, and landmarks that are flipped with their image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.errors import InputError
from attnguide_action_units.landmarks import (
    CANONICAL,
    FROM_98,
    FROM_MESH,
    MIRROR,
    FaceLandmarks,
    to_68,
)


def test_the_mirror_names_partners() -> None:
    assert [MIRROR[MIRROR[index]] for index in range(68)] == list(range(68))
    # Drawn faces are nearly symmetric: in the mirror each point meets its partner.
    face = ProceduralFaces(1, 64, pose=0.0)[0].landmarks.as_subclass(Tensor)
    mirrored = face[list(MIRROR)] * torch.tensor([-1.0, 1.0]) + torch.tensor([2 * float(face[27, 0]), 0.0])
    assert float((mirrored - face).norm(dim=1).amax()) < 2.0


def test_other_schemes() -> None:
    for table in (FROM_98, FROM_MESH):
        assert len(table) == len(set(table)) == 68
    points = torch.rand(2, 98, 2)
    assert torch.equal(to_68(points), points[:, list(FROM_98)])
    mesh = torch.rand(478, 3)
    assert torch.equal(to_68(mesh), mesh[list(FROM_MESH), :2])
    assert torch.equal(to_68(mesh[:468]), to_68(mesh))
    assert torch.equal(to_68(CANONICAL.numpy()), CANONICAL)
    for wrong in (torch.rand(67, 2), torch.rand(68), torch.rand(2, 68), torch.rand(68, 4)):
        with pytest.raises(InputError, match="landmarks"):
            to_68(wrong)


def test_five_points_place_a_whole_face() -> None:
    turn = torch.tensor([[0.8, 0.6], [-0.6, 0.8]])
    face = 30 * CANONICAL @ turn + torch.tensor([50.0, 40.0])
    five = torch.stack([face[36:42].mean(0), face[42:48].mean(0), face[30], face[48], face[54]])
    torch.testing.assert_close(to_68(five), face)
    assert bool(to_68(torch.full((2, 5, 2), torch.nan)).isnan().all())
    real = ProceduralFaces(8, 112).stack().landmarks.as_subclass(Tensor)
    picked = torch.stack(
        [real[:, 36:42].mean(1), real[:, 42:48].mean(1), real[:, 30], real[:, 48], real[:, 54]], dim=1
    )
    scale = (real[:, 45] - real[:, 36]).norm(dim=1)
    assert float(((to_68(picked) - real).norm(dim=2).mean(dim=1) / scale).amax()) < 0.2


def test_flips_swap_left_and_right() -> None:
    sample = ProceduralFaces(1, 64)[0]
    points = FaceLandmarks(sample.landmarks, canvas_size=(64, 64))
    for flip in (v2.RandomHorizontalFlip(1.0), v2.RandomVerticalFlip(1.0)):
        image, moved = flip(sample.image, points)
        assert isinstance(moved, FaceLandmarks)
        image, back = flip(image, moved)
        torch.testing.assert_close(back.as_subclass(Tensor), points.as_subclass(Tensor))
        assert torch.equal(image, sample.image)
    flipped = v2.functional.horizontal_flip(points).as_subclass(Tensor)
    assert float(flipped[36, 0]) < float(flipped[45, 0])  # the right eye is on the left of the image still
    _, moved = v2.Compose([v2.RandomRotation((20, 20)), v2.Resize(128)])(
        tv_tensors.Image(sample.image), points
    )
    assert isinstance(moved, FaceLandmarks)
    assert moved.canvas_size == (128, 128)


def test_minus_one_everywhere_is_no_face() -> None:
    points = torch.rand(2, 68, 2) * 60
    points[1] = -1
    assert to_68(points)[1].isnan().all()
    assert not to_68(points)[0].isnan().any()


@pytest.mark.parametrize("five", [[1, 0, 2, 4, 3], [1, 0, 2, 3, 4], [3, 4, 2, 0, 1]])
def test_five_points_in_another_order(five: list[int]) -> None:
    right = torch.tensor([[30.0, 30], [60, 32], [45, 45], [33, 60], [57, 61]])
    assert to_68(right).shape == (68, 2)
    with pytest.raises(InputError, match="not those of an upright face"):
        to_68(right[five])
    with pytest.raises(InputError, match="not those of an upright face"):
        to_68(right.flip(1))
    with pytest.raises(InputError, match="all of them or none"):
        to_68(right.index_fill(0, torch.tensor([2]), torch.nan))
    assert to_68(right * torch.nan).isnan().all()
