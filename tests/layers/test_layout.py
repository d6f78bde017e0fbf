"""Layouts: every arrangement of an output is viewed as rows and columns."""

from __future__ import annotations

import pytest
import torch

from attnguide.layers._layout import (
    Layout,
    agreement,
    assume,
    codes,
    decode,
    fit,
    grids_of,
    is_informative,
    needed,
)

MAPS = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
#: The same maps as models arrange them.
ARRANGED = {
    "nchw": (MAPS, Layout("nchw", (4, 6))),
    "nhwc": (MAPS.permute(0, 2, 3, 1), Layout("nhwc", (4, 6))),
    "tokens": (
        torch.cat([torch.zeros(2, 1, 3), MAPS.flatten(2).transpose(1, 2), torch.ones(2, 2, 3)], dim=1),
        Layout("tokens", (4, 6), 1, 2),
    ),
    "nct": (MAPS.flatten(2), Layout("nct", (4, 6))),
    "columns first": (
        MAPS.transpose(2, 3),
        Layout("nchw", (4, 6), order=tuple(column * 4 + row for row in range(4) for column in range(6))),
    ),
    "windows": (
        MAPS.view(2, 3, 2, 2, 3, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 6, 4, 3),
        Layout(
            "windows",
            (4, 6),
            order=tuple(
                (row // 2 * 3 + column // 2) * 4 + row % 2 * 2 + column % 2
                for row in range(4)
                for column in range(6)
            ),
        ),
    ),
}


@pytest.mark.parametrize("name", ARRANGED)
def test_maps_come_back(name: str) -> None:
    output, layout = ARRANGED[name]
    assert layout.fits(tuple(output.shape))
    assert torch.equal(layout.spatial(output), MAPS)
    assert torch.equal(layout.flat(output), MAPS.flatten(2))


@pytest.mark.parametrize("name", ["nchw", "nhwc", "tokens"])
def test_shapes_tell_what_is_usual(name: str) -> None:
    layout = ARRANGED[name][1] if name != "tokens" else Layout("tokens", (4, 6), 1)
    shape = {"nchw": (2, 64, 4, 6), "nhwc": (2, 4, 6, 64), "tokens": (2, 25, 64)}[name]
    assert assume(shape, (32, 48)) == layout
    assert assume((2, 64), (32, 48)) is None


@pytest.mark.parametrize("name", ["nchw", "columns first", "windows"])
def test_measured_positions_are_fitted(name: str) -> None:
    output, layout = ARRANGED[name]
    places = tuple(output.shape[2:]) if layout.channels_first else tuple(output.shape[1:-1])
    rows, columns = torch.empty(24), torch.empty(24)
    order = torch.tensor(layout.order or range(24))
    rows[order] = torch.arange(4.0).repeat_interleave(6) / 4
    columns[order] = torch.arange(6.0).repeat(4) / 6
    assert agreement(layout, rows, columns) == pytest.approx(1)
    found = fit(layout.kind, places, rows, columns, (32, 48))
    assert found is not None
    assert found[0] == pytest.approx(1)
    assert torch.equal(found[1].spatial(output), MAPS)


def test_binary_codes_number_the_patches() -> None:
    patterns = codes((4, 6), (32, 48))
    assert patterns.shape == (1 + 2 + 3, 32, 48)
    answers = torch.nn.functional.avg_pool2d(patterns[:, None], 8)[:, 0].flatten(1)
    shuffled = torch.randperm(24)
    layout = decode("tokens", (4, 6), 0, answers[:, shuffled])
    assert layout is not None
    tokens = MAPS.flatten(2).transpose(1, 2)[:, shuffled]
    assert torch.equal(layout.spatial(tokens), MAPS)
    assert decode("tokens", (4, 6), 0, torch.ones(6, 24)) is None


def test_another_image_size() -> None:
    layout = Layout("tokens", (4, 6), 1)
    assert layout.resized((32, 48), (2, 1 + 8 * 12, 5), (64, 96)) == Layout("tokens", (8, 12), 1)
    assert layout.resized((32, 48), (2, 77, 5), (64, 96)) is None
    assert Layout("nchw", (4, 6)).resized((32, 48), (2, 5, 7, 9), (56, 72)) == Layout("nchw", (7, 9))


def test_thresholds() -> None:
    assert grids_of(24, (32, 48))[0] == (4, 6)
    assert all(rows * columns == 24 for rows, columns in grids_of(24, (32, 48)))
    assert needed(4) == 0.95
    assert needed(10_000) == 0.3
    assert is_informative(torch.tensor([0.0, 1.0]))
    assert not is_informative(torch.full((5,), 0.3))
    assert str(Layout("tokens", (4, 6), 1, 2)) == "tokens 4×6, 1 prefix, 2 suffix"
