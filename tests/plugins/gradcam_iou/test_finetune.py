"""Fine-tuning: it learns, it leaves the model as it should, and it refuses what cannot work."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.celeba import make_celeba
from tests.helpers.models import Wrapped, cnn, tiny_vit
from tests.helpers.state import hooks, process
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, StackDataset, Subset
from torchvision.transforms import v2

import attnguide as ag
import attnguide_gradcam_iou as gci
from attnguide import functional
from attnguide.data.celeba import CelebA
from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.errors import DataError, GuidanceError, InputError, UnknownNameError
from attnguide.masks.folders import load_template
from attnguide.priors.mask import MaskPrior
from attnguide_gradcam_iou.finetune import Epoch, WithMasks, finetune, prepare

CLASSES = 4
SIZE = 32
quick = partial(finetune, epochs=1, learning_rate=0.002)


def corner() -> Tensor:
    mask = torch.zeros(SIZE, SIZE)
    mask[:16, :16] = 1
    return mask


def template() -> Tensor:
    """A region for class 1, and none for the others."""
    masks = torch.full((CLASSES, SIZE, SIZE), torch.nan)
    masks[1] = corner()
    return masks


def samples(count: int = 16, masks: bool = False) -> list[tuple[Tensor, ...]]:
    """Images whose attribute k is present where colour k % 3 is strong in the top left corner."""
    generator = torch.Generator().manual_seed(0)
    attributes = (torch.rand(count, CLASSES, generator=generator) < 0.5).float()
    images = torch.rand(count, 3, SIZE, SIZE, generator=generator) * 0.5
    images[:, :, :16, :16] += 0.5 * attributes[:, :3, None, None]
    parts = [images, attributes, corner().expand(count, -1, -1)]
    return list(zip(*parts[: 3 if masks else 2], strict=True))


def weights(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------ it learns


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


def test_one_class_for_each_image() -> None:
    """Class indices mean a softmax: what is reported is what a plain loop computes, and −100 is unknown."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(6, 3, SIZE, SIZE, generator=generator), torch.tensor([0, 1, 2, -100, 1, 0])
    masks = corner().expand(6, -1, -1)
    data = list(zip(images, labels, masks, strict=True))
    model = cnn_without_randomness()
    history = quick(
        model, data, batch_size=6, guidance_weight=0.5, validation=data, epochs=1, measure_before=True
    )
    assert [epoch.number for epoch in history] == [0, 1]
    plain = cnn_without_randomness().eval()
    known = labels >= 0
    with ag.Guide.from_recipe(plain, "gradcam-iou", targets="labels", evidence="logit") as guide:
        right = (plain(images).argmax(dim=1) == labels)[known].float().mean()
        guide.loss(labels, mask=masks)
        overlap = (-functional.iou_loss(guide.records()[0].maps, guide.records()[0].prior)).exp().mean()
        assert history[0].accuracy == pytest.approx(right.item())
        assert history[0].iou == pytest.approx(overlap.item(), rel=1e-4)
        plain.train()
        loss = nn.functional.cross_entropy(plain(images), labels)
        guided = guide.loss(labels, mask=masks)
    assert history[1].attribute_loss == pytest.approx(loss.item(), rel=1e-4)
    assert history[1].guidance_loss == pytest.approx(guided.item(), rel=1e-3)
    assert str(history[0]).startswith("epoch 0, accuracy")


def test_the_loss_is_the_published_one() -> None:
    """One batch, one step: what is reported is what a plain loop computes."""
    data = samples(8)
    history = quick(cnn_without_randomness(), data, template=template(), batch_size=8, guidance_weight=0.5)
    model = cnn_without_randomness().train()
    images, attributes = (torch.stack(part) for part in zip(*data, strict=True))
    with ag.Guide.from_recipe(model, "gradcam-iou", prior=MaskPrior(template()), weight=0.5) as guide:
        attribute = nn.functional.binary_cross_entropy_with_logits(model(images), attributes)
        guided = guide.loss(attributes)
    assert history[0].attribute_loss == pytest.approx(attribute.item(), rel=1e-4)
    assert 0.5 * history[0].guidance_loss == pytest.approx(guided.item(), rel=1e-3)


def cnn_without_randomness() -> nn.Module:
    torch.manual_seed(3)
    return cnn()


def test_weights_of_the_losses() -> None:
    def trained(**options: float) -> list[Tensor]:
        model = cnn_without_randomness()
        quick(model, samples(8), template=template(), batch_size=8, **options)
        return weights(model)

    both = trained()
    assert not same(both, trained(guidance_weight=0))
    assert not same(both, trained(attribute_weight=0))
    untouched = cnn_without_randomness()
    quick(untouched, samples(8), template=template(), batch_size=8, guidance_weight=0, attribute_weight=0)
    parameters = zip(untouched.parameters(), cnn_without_randomness().parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in parameters)


@pytest.mark.parametrize("missing", [torch.nan, -100.0])
def test_unknown_labels_do_not_count(missing: float) -> None:
    data = samples(8)
    unknown = [(image, attributes.clone()) for image, attributes in data]
    for _, attributes in unknown:
        attributes[0] = missing
    (epoch,) = quick(cnn(), unknown, validation=unknown, template=template(), batch_size=4)
    assert np.isfinite([epoch.attribute_loss, epoch.guidance_loss, epoch.accuracy, epoch.iou]).all()


def test_masks_of_single_images_some_without() -> None:
    data = samples(12, masks=True)
    absent = torch.full((SIZE, SIZE), torch.nan)
    data = [(*sample[:2], sample[2] if index == 7 else absent) for index, sample in enumerate(data)]
    (epoch,) = quick(cnn(), data, validation=data, batch_size=4)
    assert np.isfinite([epoch.guidance_loss, epoch.iou]).all()
    (epoch,) = quick(cnn(), data, validation=samples(4), batch_size=4)
    assert epoch.iou is None
    assert epoch.accuracy is not None


def test_faces_and_loaders_and_streams_go_in_as_they_are() -> None:
    faces = ProceduralFaces(8, SIZE)
    model = cnn(len(faces.classes))
    quick(model, faces, template=faces.region_mask("mouth"), batch_size=4)
    quick(model, DataLoader(faces, 4), validation=DataLoader(faces, 8), template=faces.region_mask("mouth"))

    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter(samples(8))

    quick(cnn(), Stream(), template=template(), batch_size=4, progress=True)


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


def test_a_last_single_image_does_not_break_batch_normalisation() -> None:
    model = nn.Sequential(cnn(8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))  # needs two images at least
    quick(model, samples(9), template=template(), batch_size=4)


# ------------------------------------------------------------ what it leaves


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


def test_loss_that_is_not_finite_names_the_step() -> None:
    data = samples(12)
    data[9][0][:] = torch.nan
    model = cnn()
    with pytest.raises(GuidanceError, match=r"epoch 1, step \d.*learning_rate"):
        quick(model, DataLoader(data, 4), template=template())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert hooks(model) == {}


# -------------------------------------------------------------------- errors


def test_useless_guidance_fails_before_the_first_step() -> None:
    model = cnn()
    model.requires_grad_(False)
    model.head.bias.requires_grad_(True)
    before = weights(model)
    with pytest.raises(GuidanceError, match="arrives at no weight"):
        quick(model, samples(8), template=template(), batch_size=4)
    assert same(before, weights(model))
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


def test_masks_that_are_all_missing() -> None:
    absent = torch.full((SIZE, SIZE), torch.nan)
    data = [(*sample, absent) for sample in samples(4)]
    with pytest.raises(InputError, match="no sample of the training data has a mask"):
        quick(cnn(), data, batch_size=2)


def test_a_frozen_model() -> None:
    with pytest.raises(InputError, match="frozen"):
        quick(cnn().requires_grad_(False), samples(4), template=template())


def test_settings_come_from_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[guide]\nlayer = "block3"\n[train]\nepochs = 2\nlearning_rate = 0.001\nbatch_size = 4\n')
    assert len(finetune(cnn(), samples(8), template=corner(), recipe=file)) == 2
    file.write_text("[train]\nepochs = 2\n")
    with pytest.raises(InputError, match=r"'mine' has no learning_rate.*Give learning_rate="):
        finetune(cnn(), samples(8), template=corner(), recipe=file)
    file.write_text('[train]\nepochs = "many"\n')
    with pytest.raises(InputError, match=r"epochs='many' of recipe 'mine'"):
        finetune(cnn(), samples(8), template=corner(), recipe=file)


# -------------------------------------------------------------------- models


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


# -------------------------------------------------------------------- CelebA


def paint(path: Path, mask: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((mask.numpy() * 255).astype(np.uint8)).save(path)


TO_TENSOR = v2.Compose([v2.Resize((64, 64)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


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


def test_masks_of_single_celeba_images(tmp_path: Path) -> None:
    make_celeba(tmp_path, 6, size=(60, 70))
    data = CelebA(tmp_path, "all", attributes=["Smiling", "Bald"], transform=TO_TENSOR)
    paint(tmp_path / "masks" / "000002.png", corner())
    whole = WithMasks(data, tmp_path / "masks", 16)
    assert len(whole) == 6
    assert whole[1][2].shape == (16, 16)
    assert whole[1][2].sum() == 64
    assert bool(whole[0][2].isnan().all())
    paint(tmp_path / "parts" / "bald" / "000003.png", corner())
    parts = WithMasks(data, tmp_path / "parts", 16, data.classes)
    assert parts[2][2].shape == (2, 16, 16)
    assert parts[0][2].shape == (2, 16, 16)
    model = cnn(2)
    (epoch,) = quick(model, whole, validation=parts, batch_size=2)
    assert epoch.iou is not None
    with pytest.raises(InputError, match=r"0 names for 3 samples.*names="):
        WithMasks(Subset(data, [0, 1, 2]), tmp_path / "masks", 16)
    with pytest.raises(DataError, match=r"none of the images, such as a\.jpg"):
        WithMasks(StackDataset(torch.zeros(1)), tmp_path / "masks", 16, names=["a.jpg"])


# ------------------------------------------------------------------- exports


def test_public_names() -> None:
    for name in gci.__all__:
        assert getattr(gci, name) is not None
        assert name in dir(gci)
    assert gci.prepare is prepare
    assert gci.finetune.finetune is finetune
    with pytest.raises(AttributeError, match=r"attnguide_gradcam_iou.*guidance"):
        _ = gci.guidance


def test_the_package_costs_no_torch() -> None:
    code = "import sys, attnguide_gradcam_iou; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
