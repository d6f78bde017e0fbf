"""Batches depend on seed, epoch and number alone, and masks move with the images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.helpers.recipes import SIDE, network, pictures
from torch import Tensor

from attnguide import models
from attnguide.errors import DataError, InputError
from attnguide.evaluation import mask_reader
from attnguide.priors import BoxPrior
from attnguide.training import AugmentSettings, Batch, DataSettings, Images, Loader, Sample, list_images


def images(root: Path, augment: AugmentSettings | None = None, **more: object) -> Images:
    listing = list_images(DataSettings(pictures(root) / "photos", validation=0))
    loaded = models.load(checkpoint=network(root))
    pairs = [(sample.path, int(sample.label)) for sample in listing.train]  # type: ignore[arg-type]
    reader = mask_reader(root / "masks", listing.classes, pairs)
    return Images(listing.train, loaded, mask_for=reader, augment=augment, **more)  # type: ignore[arg-type]


def equal(one: Batch, other: Batch) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(
        one.annotations["mask"], other.annotations["mask"]
    )


def joined(batches: list[Batch]) -> Tensor:
    flat = torch.cat([batch.images for batch in batches]).flatten(1)
    return flat[flat[:, :50].sum(dim=1).argsort()]


@pytest.mark.parametrize(("world", "parts"), [(1, 2), (2, 1), (2, 2)])
def test_processes_and_parts_share_the_same_images(tmp_path: Path, world: int, parts: int) -> None:
    data = images(tmp_path, AugmentSettings())
    whole = list(Loader(data, 8, seed=3).epoch(1))
    shares = [list(Loader(data, 8, 3, rank=rank, world=world, parts=parts).epoch(1)) for rank in range(world)]
    assert len(whole) == len(shares[0]) == 3
    for step, (expected,) in enumerate(whole):
        found = [batch for share in shares for batch in share[step]]
        assert len(found) == world * parts
        torch.testing.assert_close(joined(found), joined([expected]), rtol=0, atol=0)


def test_an_epoch_goes_on_from_any_step(tmp_path: Path) -> None:
    loader = Loader(images(tmp_path, AugmentSettings(rotate=10, jitter=0.3)), 8, seed=3)
    before = torch.get_rng_state()
    whole = [batch for (batch,) in loader.epoch(2)]
    later = [batch for (batch,) in loader.epoch(2, start=1)]
    assert all(map(equal, whole[1:], later))
    assert torch.equal(torch.get_rng_state(), before)
    (other,) = next(loader.epoch(3))
    assert not equal(whole[0], other)


@pytest.mark.slow
def test_workers_read_the_same(tmp_path: Path) -> None:
    data = images(tmp_path, AugmentSettings())
    alone, helped = (
        [batch for (batch,) in Loader(data, 8, 3, workers=workers).epoch(0)] for workers in (0, 2)
    )
    assert all(map(equal, alone, helped))


def test_steps_are_even_and_no_image_is_left_out(tmp_path: Path) -> None:
    data = images(tmp_path)
    loader = Loader(data, 10, seed=0)
    sizes = [len(batch.images) for (batch,) in loader.epoch(0)]
    assert (loader.steps, sizes) == (3, [8, 8, 8])
    assert sorted(len(b.images) for (b,) in Loader(data, 7, seed=0).epoch(0)) == [6, 6, 6, 6]
    with pytest.raises(InputError, match="cannot be shared by 2 processes in 8 parts"):
        Loader(data, 8, world=2, parts=8)


def test_masks_follow_the_images(tmp_path: Path) -> None:
    """The square is bright where the mask is 1, wherever crop, flip and rotation have put it."""
    data = images(tmp_path, AugmentSettings(crop=0.4, flip=0.5, rotate=20))
    for (batch,) in Loader(data, 8, seed=0).epoch(0):
        mask = batch.annotations["mask"]
        bright = data.loaded.displayed(batch.images).amax(dim=1) > 0.7
        inside, outside = bright[mask > 0.5].float().mean(), bright[mask < 0.5].float().mean()
        assert inside > 0.85
        assert outside < 0.05


def test_without_variation_it_is_the_models_own_preprocessing(tmp_path: Path) -> None:
    data = images(tmp_path)
    batch = next(Loader(data, 4).single())
    expected = torch.stack([data.loaded.read(sample.path) for sample in data.samples[:4]])
    torch.testing.assert_close(batch.images, expected)
    assert batch.labels.tolist() == [0, 0, 0, 0]


def test_masks_of_several_attributes(tmp_path: Path) -> None:
    pictures(tmp_path)
    path = tmp_path / "photos" / "blue" / "0.png"
    loaded = models.load(checkpoint=network(tmp_path, classes=3, multi_label=True))
    some, every = torch.zeros(SIDE, SIDE), torch.ones(SIDE, SIDE)
    some[:8] = 1
    sample = Sample(path, (1.0, 0.0, 1.0))

    def only_some(_: Path, cls: int) -> Tensor | None:
        return some if cls == 2 else None

    batch = next(Loader(Images([sample], loaded, mask_for=only_some), 1).single())
    (masks,) = batch.annotations["mask"]
    assert list(masks) == [2]
    torch.testing.assert_close(masks[2], some)
    batch = next(Loader(Images([sample], loaded, mask_for=lambda _path, _cls: every), 1).single())
    assert batch.annotations["mask"].shape == (1, SIDE, SIDE)


def test_boxes_move_along(tmp_path: Path) -> None:
    loaded = models.load(checkpoint=network(pictures(tmp_path)))
    path = tmp_path / "photos" / "red" / "0.png"
    sample = Sample(path, 0, annotations={"boxes": torch.tensor([0.0, 0.0, 8.0, 16.0])})
    data = Images([sample], loaded, annotations=["boxes"], reads_masks=False)
    batch = next(Loader(data, 1).single())
    assert batch.annotations["boxes"][0].tolist() == [[0, 0, 8, 16]]
    data = Images(
        [sample], loaded, augment=AugmentSettings(1.0, 1.0), annotations=["boxes"], reads_masks=False
    )
    batch = next(Loader(data, 1).single())
    assert batch.annotations["boxes"][0].tolist() == [[24, 0, 32, 16]]
    assert BoxPrior().annotations.keys() == batch.annotations.keys()


def test_other_annotations_are_batched_as_in_a_loop_of_ones_own(tmp_path: Path) -> None:
    """Values of one shape are a tensor, NaN where there is none; others a list; None if there is none."""
    loaded = models.load(checkpoint=network(pictures(tmp_path, 3)))
    given = {"gaze": [torch.ones(2), None, torch.zeros(2)], "path": [torch.ones(2), None, torch.ones(3)]}
    files = sorted((tmp_path / "photos" / "red").iterdir())
    samples = [
        Sample(file, 0, annotations={name: values[row] for name, values in given.items()})
        for row, file in enumerate(files)
    ]
    data = Images(samples, loaded, annotations=["gaze", "path", "none"], reads_masks=False)
    (batch,) = Loader(data, 3).single()
    assert torch.equal(batch.annotations["gaze"].isnan().all(dim=1), torch.tensor([False, True, False]))
    assert [None if each is None else len(each) for each in batch.annotations["path"]] == [2, None, 3]
    assert batch.annotations["none"] is None


def test_what_cannot_be_moved_is_refused(tmp_path: Path) -> None:
    loaded = models.load(checkpoint=network(pictures(tmp_path)))
    sample = Sample(tmp_path / "photos" / "red" / "0.png", 0, annotations={"gaze": torch.zeros(2)})
    with pytest.raises(InputError, match="cannot move gaze= along"):
        Images([sample], loaded, augment=AugmentSettings(), annotations=["gaze"])


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    data = images(tmp_path)
    data.samples[1].path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"blue/1\.png is not an image"):
        list(Loader(data, 4).epoch(0))
