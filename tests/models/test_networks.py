"""The small network has the shape that it promises."""

from __future__ import annotations

import pytest
import torch

from attnguide.errors import InputError
from attnguide.models.networks import small_cnn


@pytest.mark.parametrize(("reduction", "field"), [(4, 25), (8, 37)])
def test_cells_see_as_many_pixels_as_promised(reduction: int, field: int) -> None:
    model = small_cnn(3, width=4, reduction=reduction).eval().double()
    image = torch.rand(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    features = model[:4](image)
    assert features.shape == (1, 16, 128 // reduction, 128 // reduction)
    # The largest span of pixels that any weights could let through: pooling passes one of its cells on.
    seen = torch.zeros(128)
    for _ in range(40):
        image = torch.rand(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
        features = model[:4](image)
        (gradient,) = torch.autograd.grad(
            features[0, :, features.shape[2] // 2, 40 // reduction].sum(), image
        )
        seen += gradient.abs().sum(dim=(0, 1, 2)) > 0
    columns = seen.nonzero()[:, 0]
    assert int(columns[-1] - columns[0]) + 1 <= field
    assert int(columns[-1] - columns[0]) + 1 >= field - 6


def test_channels_and_classes() -> None:
    model = small_cnn(5, width=2, channels=1)
    assert model(torch.rand(3, 1, 16, 20)).shape == (3, 5)
    assert [name for name, _ in model.named_children()][-3:] == ["pool", "flatten", "head"]
    with pytest.raises(InputError, match="reduction=3 must be 4 or 8"):
        small_cnn(5, reduction=3)
