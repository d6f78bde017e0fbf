"""Fine-tuning: it learns, it leaves the model as it should, and it refuses what cannot work."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.helpers.celeba import make_celeba
from tests.helpers.models import Wrapped, cnn, tiny_vit
from tests.plugins.gradcam_iou.samples import (
    CLASSES,
    SIZE,
    TO_TENSOR,
    corner,
    paint,
    quick,
    same,
    samples,
    template,
    weights,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import attnguide as ag
from attnguide.data.celeba import CelebA
from attnguide.errors import InputError, UnknownNameError
from attnguide.masks import load_template
from attnguide.priors.mask import MaskPrior
from attnguide.testing import hooks, process
from attnguide_gradcam_iou.finetune import Epoch, finetune, prepare


def test_losses_fall_and_history_tells() -> None:
    model = cnn(width=8)
    seen: list[Epoch] = []
    history = finetune(
        model,
        samples(64),
        template=template(),
        validation=samples(20),
        epochs=8,
        learning_rate=0.003,
        batch_size=16,
        guidance_weight=0.3,
        on_epoch=seen.append,
    )
    assert history == seen
    assert [epoch.number for epoch in history] == list(range(1, 9))
    first, last = history[0], history[-1]
    assert last.attribute_loss < 0.9 * first.attribute_loss
    assert last.guidance_loss < 0.6 * first.guidance_loss
    assert first.iou is not None
    assert last.iou is not None
    assert last.iou > first.iou
    assert 0.6 < last.accuracy <= 1
    assert "IoU" in str(last)


@pytest.mark.parametrize(
    "model",
    [lambda: tiny_vit(), lambda: Wrapped(lambda logits, images: {"logits": logits})],
    ids=["transformer", "dictionary"],
)
def test_other_models(model) -> None:  # type: ignore[no-untyped-def]
    (epoch,) = quick(model(), samples(8), template=template(), batch_size=4, amp=True)
    assert np.isfinite(epoch.guidance_loss)


def test_frozen_parts_stay() -> None:
    model = cnn()
    model.block1.requires_grad_(False)
    before = [p.clone() for p in model.block1.parameters()]
    quick(model, samples(8), template=template(), batch_size=4, optimizer=torch.optim.SGD)
    assert same(before, list(model.block1.parameters()))


def test_same_seed_same_weights_and_other_state_untouched() -> None:
    def trained(seed: int) -> list[Tensor]:
        torch.manual_seed(5)
        model = nn.Sequential(cnn(8), nn.Dropout(), nn.Linear(8, CLASSES))
        before = process()
        quick(model, samples(16), template=template(), batch_size=4, seed=seed)
        assert process() == before
        return weights(model)

    assert same(trained(0), trained(0))
    assert not same(trained(0), trained(1))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, None])
def test_flags_hooks_and_gradients_afterwards(error: type[BaseException] | None) -> None:
    model = cnn().eval()
    model.block2.train()
    flags = [module.training for module in model.modules()]

    def interrupt(epoch: Epoch) -> None:
        if error is not None:
            raise error

    if error is None:
        quick(model, samples(8), template=template(), batch_size=4, on_epoch=interrupt)
        assert all(p.grad is None for p in model.parameters())
    else:
        with pytest.raises(error):
            quick(model, samples(8), template=template(), batch_size=4, on_epoch=interrupt)
    assert [module.training for module in model.modules()] == flags
    assert hooks(model) == {}


class Strange:
    def __init__(self, sample: object) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> object:
        return self.sample


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"epochs": 0}, InputError, "epochs=0 must be a number above 0"),
        ({"epochs": 1.5}, InputError, r"epochs=1\.5 must be a whole"),
        ({"learning_rate": float("nan")}, InputError, "learning_rate=nan"),
        ({"attribute_weight": -1}, InputError, "attribute_weight=-1"),
        ({"guidance_weight": -1}, InputError, "weight=-1"),
        ({"recipe": "gradcam-uoi"}, UnknownNameError, "mean 'gradcam-iou'"),
        ({"template": None}, InputError, "no regions.*template="),
        ({"template": torch.full((CLASSES, 4, 4), torch.nan)}, InputError, "no region"),
        ({"template": "absent"}, InputError, "Give classes="),
        ({"train": []}, InputError, "train must be a data set"),
        ({"train": samples(4, masks=True)}, InputError, "Give one of them"),
        ({"validation": 3}, InputError, "validation must be a data set"),
        ({"train": DataLoader(samples(4), 4)}, InputError, "leave|Leave out batch_size"),
        ({"train": Strange({"image": 1})}, InputError, "give dict, expected"),
        ({"train": Strange((torch.zeros(3, 8, 8),))}, InputError, "give 1 parts"),
        ({"train": Strange((torch.zeros(3, 8, 8), "x"))}, InputError, "transform"),
        (
            {"train": Strange((torch.zeros(3, SIZE, SIZE), torch.ones(3)))},
            InputError,
            r"with_head\(model, 3\)",
        ),
        (
            {"train": Strange((torch.zeros(3, SIZE, SIZE), torch.tensor(7)))},
            InputError,
            r"class 7.*with_head\(model, 8\)",
        ),
        ({"train": Strange((torch.rand(3, SIZE, SIZE), -torch.ones(4)))}, InputError, "labels out of range"),
    ],
)
def test_mistakes(options: dict[str, object], kind: type[Exception], message: str) -> None:
    model = cnn()
    arguments = {"train": samples(4), "template": template(), "batch_size": 2, **options}
    with pytest.raises(kind, match=message):
        quick(model, arguments.pop("train"), **arguments)
    assert hooks(model) == {}


def test_a_frozen_model() -> None:
    with pytest.raises(InputError, match="frozen"):
        quick(cnn().requires_grad_(False), samples(4), template=template())


def test_prepare(tmp_path: Path) -> None:
    names = ["smiling", "bald"]
    for model in ("torchvision/squeezenet1_1", "resnet10t"):
        one, two = prepare(model, names), prepare(model, names)
        assert one.classes == ("smiling", "bald")
        assert one.multi_label
        assert not any(module.training for module in one.model.modules())
        assert one.model(torch.rand(1, 3, 64, 64)).shape == (1, 2)
        assert same(weights(one.model), weights(two.model))
    torch.save(one.model.state_dict(), tmp_path / "two.pt")
    again = prepare("resnet10t", names, checkpoint=tmp_path / "two.pt")
    assert same(weights(one.model), weights(again.model))
    other = prepare("resnet10t", [*names, "hat"], checkpoint=tmp_path / "two.pt")
    assert other.model(torch.rand(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(InputError, match="'smiling'"):
        prepare("resnet10t", "smiling")


def test_alexnet_on_celeba_with_a_painted_folder(tmp_path: Path) -> None:
    make_celeba(tmp_path, 12, size=(60, 70))
    paint(tmp_path / "regions" / "wearing lipstick.png", corner())
    train, valid = (CelebA(tmp_path, split, transform=TO_TENSOR) for split in ("train", "valid"))
    loaded = prepare("torchvision/alexnet", train.classes)
    before = weights(loaded.model)
    (epoch,) = finetune(
        loaded.model,
        train,
        template=tmp_path / "regions",
        validation=valid,
        epochs=1,
        learning_rate=1e-3,
        batch_size=3,
        optimizer=partial(torch.optim.SGD, momentum=0.9),
    )
    assert np.isfinite([epoch.attribute_loss, epoch.guidance_loss]).all()
    assert epoch.accuracy is not None
    assert epoch.iou is not None
    assert not same(before, weights(loaded.model))


def test_the_recipe_by_name_in_a_loop_of_ones_own(tmp_path: Path) -> None:
    make_celeba(tmp_path, 4, size=(60, 70))
    paint(tmp_path / "regions" / "Wearing_Lipstick.png", corner())
    classes = ["Smiling", "Wearing_Lipstick", "Bald"]
    data = CelebA(tmp_path, "all", attributes=classes, transform=TO_TENSOR)
    masks = load_template(tmp_path / "regions", data.classes).masks
    model = prepare("torchvision/alexnet", data.classes).model
    images, attributes = next(iter(DataLoader(data, 4)))
    with ag.Guide.from_recipe(model, "gradcam-iou", prior=MaskPrior(masks)) as guide:
        model(images)
        guide.loss(attributes).backward()
        (seen,) = guide.records()
    assert seen.pairs.cls.tolist() == [1] * 4
    assert seen.layer.startswith("features")
    assert bool((model.features[0].weight.grad != 0).any())
