"""The callback for Lightning, against the loop written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.processes import run_in_processes
from tests.helpers.training import (
    LR,
    STEPS,
    Sparse,
    assert_same_weights,
    network,
    plain_exchanging,
    plain_loop,
    terms,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import attnguide as ag
from attnguide.testing import hooks

lightning = pytest.importorskip("lightning.pytorch")
from attnguide.lightning import Guidance  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


class Module(lightning.LightningModule):  # type: ignore[misc]
    """A module as people write it; it knows nothing of guidance."""

    def __init__(self, parts: bool = False) -> None:
        super().__init__()
        model = network()
        if parts:
            self.body, self.head = model[:-1], model[-1]
        else:
            self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) if hasattr(self, "model") else self.head(self.body(images))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch[0], batch[1]
        return {"loss": nn.functional.cross_entropy(self(images), labels), "more": batch_idx}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=LR)


class TwoOnly(Module):
    """Unpacks batches of images and labels."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)


def fit(module: Any, folder: Path, callback: Any, steps: int = STEPS, **options: Any) -> Any:
    resumed = options.pop("ckpt_path", None)
    loader = DataLoader(Sparse(), batch_size=options.pop("size", 8))
    trainer = lightning.Trainer(
        max_epochs=-1,
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback],
        use_distributed_sampler=False,
        num_sanity_val_steps=1,
        limit_val_batches=1,
        **options,
    )
    trainer.fit(module, loader, loader, ckpt_path=resumed)
    return trainer


@pytest.mark.parametrize(("every", "parts"), [(1, False), (2, True), (4, False)])
def test_weights_are_those_of_the_plain_loop(tmp_path: Path, every: int, parts: bool) -> None:
    module = Module(parts)
    steps = STEPS if every == 1 else 6
    options = {"size": 8 // every, "accumulate_grad_batches": every}
    trainer = fit(module, tmp_path, Guidance(terms=terms()), steps, **options)
    assert "guidance" in trainer.callback_metrics
    assert_same_weights(module, plain_loop(8, steps, every))
    assert not hooks(module)
    assert "training_step" not in vars(module)


class InADict(nn.Module):
    """Answers as classifiers of other libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.network(images)}


class OfDicts(Module):
    """A module whose classifier gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.model = InADict()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)["logits"]


@pytest.mark.parametrize(
    ("every", "make"), [(1, Module), (2, lambda: Module(parts=True)), (4, Module), (1, OfDicts)]
)
def test_weights_of_an_intervention_are_those_of_the_plain_loop(
    tmp_path: Path, every: int, make: Callable[[], Any]
) -> None:
    module, guidance = make(), Guidance(recipe="right-for-real")
    options = {"size": 16 // every, "accumulate_grad_batches": every}
    trainer = fit(module, tmp_path, guidance, 3, **options)  # an epoch
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert trainer.callback_metrics["guidance"] > 0
    module, guidance = make(), Guidance(recipe="right-for-real")
    fit(module, tmp_path, guidance, STEPS, **options, ckpt_path=str(tmp_path / "run.ckpt"))
    assert guidance.state_dict() == {"step": STEPS * every, "layer": "input"}
    assert_same_weights(module, plain_exchanging(16, STEPS, every))
    assert not vars(module).keys() & {"training_step", "forward"}


class Twice(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self(batch[0]) + self(batch[0]), batch[1])


def test_an_intervention_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ag.errors.GuidanceError, match="called Sequential 2 times"):
        fit(Twice(), tmp_path, Guidance(recipe="right-for-real"))
    with pytest.raises(ag.errors.InputError, match="no 'mask', only images, labels"):
        fit(
            Module(),
            tmp_path,
            Guidance(lambda batch: {"images": batch[0], "labels": batch[1]}, recipe="right-for-real"),
        )
    with pytest.raises(ag.errors.InputError, match="no setting 'wieght'"):
        fit(Module(), tmp_path, Guidance(recipe="right-for-real", wieght=1))


def test_the_last_batches_of_an_epoch_are_fewer(tmp_path: Path) -> None:
    """48 samples in batches of 8, of which 4 are accumulated: the second step of an epoch has 2."""
    module = Module()
    fit(module, tmp_path, Guidance(terms=terms()), steps=2, size=8, accumulate_grad_batches=4)
    data, model = Sparse(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with ag.Guide(model, terms=terms()) as guide:
        for parts in (range(4), range(4, 6)):
            chosen = torch.arange(parts[0] * 8, parts[-1] * 8 + 8)
            annotated = float((~data.masks[chosen].isnan().all(dim=(1, 2))).sum())
            for part in chosen.chunk(len(parts)):
                loss = nn.functional.cross_entropy(model(data.images[part]), data.labels[part]) / 4
                guidance = guide.loss(data.labels[part], mask=data.masks[part], normalize_by=annotated)
                (loss + guidance).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(module, model)


def test_a_module_that_unpacks_two(tmp_path: Path) -> None:
    module = TwoOnly()
    fit(module, tmp_path, Guidance(terms=terms(), hide_masks=True), 3)
    assert_same_weights(module, plain_loop(8, 3))


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    first = fit(Module(), tmp_path, Guidance(terms=terms()), steps=6)  # an epoch, within the warm-up
    first.save_checkpoint(tmp_path / "run.ckpt")
    module, guidance = Module(), Guidance(terms=terms())
    fit(module, tmp_path, guidance, 9, ckpt_path=str(tmp_path / "run.ckpt"))
    assert_same_weights(module, plain_loop(8, 9))
    assert guidance.state_dict()["step"] == 9


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(ag.errors.InputError, match="Did you mean 'weight'"):
        Guidance(wieght=1.0)
    with pytest.raises(ag.errors.InputError, match="AdapterSet"):
        Guidance(adapters=[])
    with pytest.raises(ag.errors.InputError, match=r"no submodule 'modle'.*'model'"):
        fit(Module(), tmp_path, Guidance(model="modle"))
    manual = Module()
    manual.automatic_optimization = False
    with pytest.raises(ag.errors.GuidanceError, match="optimizes by itself"):
        fit(manual, tmp_path, Guidance())
    module = Module()
    with pytest.raises(ag.errors.InputError, match=r"not \(images, labels, masks\)"):
        fit(module, tmp_path, Guidance(lambda batch: _refuse(batch)))
    assert not hooks(module)


def _refuse(batch: Any) -> Any:
    from attnguide.lightning import _read

    return _read(batch[:2])


PARALLEL = """
import os, warnings
warnings.filterwarnings("ignore")


def work(rank, world, every, parts):
    import lightning.pytorch as lightning
    from pathlib import Path
    from torch.utils.data import DataLoader, Subset
    from tests import test_lightning as own
    from tests.helpers.training import Sparse, assert_same_weights, plain_loop, terms

    os.environ.update(TORCHELASTIC_RUN_ID="1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                      LOCAL_WORLD_SIZE=str(world), GROUP_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="0")
    every = int(every)
    size = 8 // every // world
    # Each process has its part of every batch of the plain loop.
    data = Sparse()
    order = torch.arange(len(data)).view(-1, world, size)[:, rank].flatten()
    own.Sparse = lambda: Subset(data, order.tolist())
    module = own.Module(parts == "parts")
    own.fit(module, Path("."), own.Guidance(terms=terms()), size=size, accumulate_grad_batches=every,
            strategy="ddp", devices=world)
    assert_same_weights(module, plain_loop(8, every=every))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("every", "parts"), [(1, "parts"), (2, "whole")])
def test_two_processes(tmp_path: Path, every: int, parts: str) -> None:
    run_in_processes(PARALLEL, tmp_path, 2, str(every), parts)


EXCHANGING = """
import os, warnings
warnings.filterwarnings("ignore")


def work(rank, world):
    from pathlib import Path
    from tests import test_lightning as own
    from tests.helpers.training import Sparse, assert_same_weights, network, plain_exchanging

    os.environ.update(TORCHELASTIC_RUN_ID="1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                      LOCAL_WORLD_SIZE=str(world), GROUP_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="0")
    data = Sparse().part(torch.arange(48).view(-1, world, 8)[:, rank].flatten())
    expected = plain_exchanging(8, model=DDP(network()), data=data)
    own.Sparse = lambda: data
    module = own.Module()
    own.fit(module, Path("."), own.Guidance(recipe="right-for-real"), strategy="ddp", devices=world)
    assert_same_weights(module, expected)
"""


@pytest.mark.slow
@pytest.mark.nightly
def test_two_processes_with_an_intervention(tmp_path: Path) -> None:
    run_in_processes(EXCHANGING, tmp_path)
