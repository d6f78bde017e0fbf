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


def test_the_models_own_names_decide_what_is_a_prefix(tmp_path: Path) -> None:
    model, other = cnn(), cnn()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    trainer = {f"net.{name}": value for name, value in model.state_dict().items()}
    trainer |= {"criterion.weight": torch.ones(3), "net_ema_decay": torch.tensor(0.9)}
    for saved in (averaged.state_dict(), trainer):
        torch.save(saved, tmp_path / "w.pt")
        load_into(other, read_weights(tmp_path / "w.pt"), "w.pt")
        assert all(torch.equal(other.state_dict()[name], value) for name, value in model.state_dict().items())
        torch.nn.init.zeros_(next(other.parameters()))
    trainer |= {f"teacher.{name}": value for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"2 sets of weights that fit, 'net\.', 'teacher\.'"):
        load_into(other, trainer, "w.pt")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2, 3, device="meta"), "has no values"),
        (torch.zeros(2, 3).to_sparse(), "sparse"),
        (torch.zeros(2, 3, dtype=torch.complex64), r"torch\.complex64, not torch\.float32"),
        (torch.tensor([[0.0, 1, 2], [3, float("nan"), 5]]), "contains NaN"),
        (torch.tensor(1.0), r"is \(\), not \(2, 3\)"),
    ],
    ids=["meta", "sparse", "complex", "NaN", "scalar"],
)
def test_values_that_are_no_weights(value: torch.Tensor, message: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2, bias=False)
    torch.save({"weight": value}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=message):
        load_into(model, read_weights(tmp_path / "w.pt"), "w.pt")


def test_a_checkpoint_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, object] = {"epoch": 1}
    content["model"] = content
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(DataError, match=r"w\.pt holds no weights"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("\n<!DOCTYPE html><html>Sign in</html>", "an HTML page"),
        ("version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ('{"message": "not found"}', "a JSON file"),
    ],
)
def test_what_a_failed_download_leaves(text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_text(text)
    with pytest.raises(DataError, match=rf"w\.pth is {what}"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_programs_are_not_weights(tmp_path: Path) -> None:
    model, images = cnn(3).eval(), torch.rand(2, 3, 32, 32)
    torch.jit.trace(model, images).save(tmp_path / "traced.pt")
    torch.export.save(torch.export.export(model, (images,)), tmp_path / "exported.pt2")
    for file, kind in (("traced.pt", "scripted or traced"), ("exported.pt2", "exported")):
        with pytest.raises(DataError, match=f"{file} holds a program, as of a {kind} model") as refused:
            read_weights(tmp_path / file)
        assert "weights_only" not in str(refused.value)
