"""The Trainer of transformers with guidance, against the loop written by hand."""

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
from torch.utils.data import Dataset

import attnguide as ag

transformers = pytest.importorskip("transformers")
from attnguide.transformers import GuidedTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


class Samples(Dataset[dict[str, Any]]):
    """The small data set as `transformers` wants it."""

    def __init__(self, order: list[int] | None = None) -> None:
        self.data = Sparse()
        self.order = order or list(range(len(self.data)))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label, mask = self.data[self.order[index]]
        return {"pixel_values": image, "labels": label, "mask": mask}


class Own(nn.Module):
    """A classifier of one's own, whose loss is the mean of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


class Logits(nn.Module):
    """A classifier of transformers as the plain loop calls it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def vit() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: nn.Module = transformers.ViTForImageClassification(config)
    nn.init.normal_(model.classifier.weight, std=0.5)  # type: ignore[union-attr, arg-type]
    return model.double()


MODELS: dict[str, Callable[[], nn.Module]] = {"own": Own, "vit": vit}


def train(model: nn.Module, folder: Path, every: int = 1, size: int = 8, **options: Any) -> Any:
    order = options.pop("order", None)
    resume = options.pop("resume", None)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=options.pop("steps", STEPS), use_cpu=True, report_to=[],
        per_device_train_batch_size=size, gradient_accumulation_steps=every, disable_tqdm=True,
        optim="sgd", learning_rate=LR, lr_scheduler_type="constant", max_grad_norm=0.0, logging_strategy="no",
        save_strategy=options.pop("save_strategy", "no"), save_steps=options.pop("save_steps", 500),
    )  # fmt: skip
    guide = options.pop("guide", None) or ag.Guide(model, terms=terms())
    trainer = InOrder(guide, model=model, args=arguments, train_dataset=Samples(order), **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class InOrder(GuidedTrainer):
    """Takes the samples in order, as the plain loop does."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def expected(kind: str, every: int, steps: int = STEPS) -> nn.Module:
    return plain_loop(8, steps, every, model=network() if kind == "own" else Logits(vit()))


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("every", [1, 2, 4])
def test_weights_are_those_of_the_plain_loop(tmp_path: Path, kind: str, every: int) -> None:
    model = MODELS[kind]()
    steps = STEPS if every == 1 else 6
    trainer = train(model, tmp_path, every, 8 // every, steps=steps)
    assert_same_weights(model, expected(kind, every, steps))
    metrics = trainer.evaluate(Samples([*range(8)]))
    assert metrics["eval_loss"] > 0
    assert trainer.predict(Samples([*range(8)])).predictions.shape == (8, 4)


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("every", [1, 2, 4])
def test_weights_of_an_intervention_are_those_of_the_plain_loop(
    tmp_path: Path, kind: str, every: int
) -> None:
    options = {"every": every, "size": 16 // every, "save_strategy": "steps", "save_steps": 4}
    model = MODELS[kind]()
    train(model, tmp_path, steps=4, guide=ag.Intervention.from_recipe(model), **options)
    model = MODELS[kind]()
    guide = ag.Intervention.from_recipe(model)
    trainer = train(model, tmp_path, guide=guide, resume=str(tmp_path / "checkpoint-4"), **options)
    assert trainer.guide.state_dict() == {"step": STEPS * every, "layer": "input"}
    assert_same_weights(
        model, plain_exchanging(16, STEPS, every, network() if kind == "own" else Logits(vit()))
    )
    assert trainer.evaluate(Samples([*range(8)]))["eval_loss"] > 0


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    train(MODELS["vit"](), tmp_path, steps=4, save_strategy="steps", save_steps=4)
    model = MODELS["vit"]()
    trainer = train(model, tmp_path, resume=str(tmp_path / "checkpoint-4"))
    assert_same_weights(model, expected("vit", 1))
    assert trainer.guide.state_dict()["step"] == STEPS
    (tmp_path / "checkpoint-4/guide.safetensors").unlink()
    with pytest.raises(ag.errors.DataError, match="not that of a guided run"):
        train(MODELS["vit"](), tmp_path, resume=str(tmp_path / "checkpoint-4"))


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    model = Own()
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ag.errors.InputError, match="is not on this Own"):
        GuidedTrainer(ag.Guide(network()), model=model, args=arguments)
    several = [{"pixel_values": torch.zeros(3, 32, 32), "labels": torch.ones(4), "mask": torch.ones(32, 32)}]
    trainer = GuidedTrainer(ag.Intervention(model), model=model, args=arguments, train_dataset=several)
    with pytest.raises(ag.errors.InputError, match=r"needs class indices as labels \(B,\), got \(1, 4\)"):
        trainer.train()
    with pytest.raises(ag.errors.InputError, match="needs model="):
        GuidedTrainer(ag.Guide(model), model_init=Own, args=arguments)


PARALLEL = """
import os, warnings
warnings.filterwarnings("ignore")


def work(rank, world, every):
    from pathlib import Path
    from tests import test_transformers as own
    from tests.helpers.training import Sparse, assert_same_weights

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost",
                      MASTER_PORT="29555")
    every = int(every)
    size = 8 // every // world
    for kind in own.MODELS:
        model = own.MODELS[kind]()
        own.train(model, Path("."), every, size)  # batches are dealt out in turn
        assert_same_weights(model, own.expected(kind, every))
"""


@pytest.mark.slow
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_two_processes(tmp_path: Path, every: int) -> None:
    run_in_processes(PARALLEL, tmp_path, 2, str(every))


EXCHANGING = """
import os, warnings
warnings.filterwarnings("ignore")


def work(rank, world):
    from pathlib import Path
    import attnguide as ag
    from tests import test_transformers as own
    from tests.helpers.training import Sparse, assert_same_weights, plain_exchanging

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost",
                      MASTER_PORT="29557")
    data = Sparse().part(torch.arange(48).view(-1, world, 8)[:, rank].flatten())
    expected = plain_exchanging(8, model=DDP(own.Logits(own.vit())), data=data)
    model = own.vit()
    own.train(model, Path("."), guide=ag.Intervention.from_recipe(model))  # batches are dealt out in turn
    assert_same_weights(model, expected)
"""


@pytest.mark.slow
@pytest.mark.nightly
def test_two_processes_with_an_intervention(tmp_path: Path) -> None:
    run_in_processes(EXCHANGING, tmp_path)
