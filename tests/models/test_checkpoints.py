"""Weights are read from every usual wrapping, and never run code."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.helpers.models import cnn

from attnguide.errors import DataError, InputError
from attnguide.models.checkpoints import digest, load_into, read_weights

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_wrappers_and_prefixes_are_taken_off(wrapper: str | None, prefix: str, tmp_path: Path) -> None:
    named = {prefix + name: value for name, value in WEIGHTS.items()}
    torch.save(named if wrapper is None else {wrapper: named, "epoch": 3}, tmp_path / "w.pt")
    save_file(named, tmp_path / "w.safetensors")
    for file in ("w.pt", "w.safetensors"):
        read = read_weights(tmp_path / file)
        assert read.keys() == WEIGHTS.keys()
        assert all(torch.equal(read[name], value) for name, value in WEIGHTS.items())


def test_weights_fit_exactly_or_not_at_all(tmp_path: Path) -> None:
    model, other = cnn(), cnn()
    load_into(other, model.state_dict(), "w.pt")
    assert all(torch.equal(other.state_dict()[name], value) for name, value in model.state_dict().items())
    wrong = {**model.state_dict(), "head.bias": torch.zeros(9), "extra": torch.zeros(1)}
    del wrong["block1.0.weight"]
    with pytest.raises(
        InputError, match=r"w\.pt does not fit Sequential: .*block1\.0\.weight missing"
    ) as error:
        load_into(model, wrong, "w.pt")
    assert "extra unexpected" in str(error.value)
    assert "head.bias is (9,), not (4,)" in str(error.value)


def test_the_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"abc" * 1000)
    assert digest(tmp_path / "w.pt") == hashlib.sha256(b"abc" * 1000).hexdigest()
    with pytest.raises(DataError, match="does not exist"):
        digest(tmp_path / "nowhere.pt")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_programs_are_not_weights(tmp_path: Path) -> None:
    model, images = cnn(3).eval(), torch.rand(2, 3, 32, 32)
    torch.jit.trace(model, images).save(tmp_path / "traced.pt")
    torch.export.save(torch.export.export(model, (images,)), tmp_path / "exported.pt2")
    for file, kind in (("traced.pt", "scripted or traced"), ("exported.pt2", "exported")):
        with pytest.raises(DataError, match=f"{file} holds a program, as of a {kind} model") as refused:
            read_weights(tmp_path / file)
        assert "weights_only" not in str(refused.value)
