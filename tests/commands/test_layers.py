"""`attnguide layers`: the rows it shows, and sizes that it refuses."""

from __future__ import annotations

import json

import pytest


def test_layers_of_a_convolutional_network(call):
    text = call("layers", "test_resnet").stdout
    chosen = next(line for line in text.splitlines() if line.startswith("▶"))
    assert "layer4" in chosen
    assert "nchw 5×5, measured" in text
    assert "assumed" in call("layers", "test_resnet", "--no-measure").stdout
    rows = json.loads(call("layers", "test_resnet", "--json").stdout)
    assert [row["chosen"] for row in rows].count(True) == 1
    assert len({tuple(row["grid"]) for row in rows}) == len(rows)
    every = json.loads(call("layers", "test_resnet", "--json", "--all").stdout)
    assert len(every) == sum(row["layers"] for row in rows)
    assert [row["name"] for row in every if row["chosen"]] == [row["name"] for row in rows if row["chosen"]]


def test_layers_of_a_transformer_are_blocks(call):
    rows = json.loads(call("layers", "test_vit", "--json").stdout)
    assert [row["layout"] for row in rows[1:]] == ["tokens"] * (len(rows) - 1)
    assert next(row for row in rows if row["chosen"])["prefix"] == 1
    assert rows[-1]["usable"] is False


def test_layers_of_another_size(call, faces):
    rows = json.loads(call("layers", "--checkpoint", faces, "--size", "64x96", "--json").stdout)
    assert rows[-1]["grid"] == [8, 12]
    assert rows[-1]["chosen"]


@pytest.mark.parametrize("size", ["0", "a", "1x2x3", "-5", "²", "99999"])
def test_what_is_not_a_size(call, faces, size):
    assert (
        f"--size {size} is not a size"
        in call("layers", "--checkpoint", faces, "--size", size, status=2).stderr
    )


def test_a_size_that_the_model_refuses(call):
    assert (
        "does not take images of --size 96"
        in call("layers", "test_vit_relpos", "--size", "96", status=2).stderr
    )
