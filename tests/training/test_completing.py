"""Predicted masks are those of the objects, stand in files, and take nobody's place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.recipes import SIDE, network, pictures, recipe

from attnguide.errors import InputError
from attnguide.masks import read_mask
from attnguide.training import Trained, read_settings, train
from attnguide.training._completing import FOLDER
from attnguide.training.dry_run import dry_run

pytest.importorskip("accelerate")

CPU = torch.device("cpu")
LOOP = "[train]\nepochs = 1\nbatch_size = 8\ntensorboard = false\n"


def run(path: Path, out: str, **options: Any) -> tuple[Trained, list[str]]:
    notes: list[str] = []
    result = train(read_settings(path), path.parent / out, device=CPU, on_note=notes.append, **options)
    return result, notes


def few_masks(root: Path, given: int = 6, *, empty: bool = False) -> dict[Path, torch.Tensor]:
    """Write a training whose images have few masks; return those that were taken away."""
    path = recipe(root, LOOP)
    path.write_text(path.read_text().replace('"masks"', '{ path = "masks", complete = true }'))
    network(root, width=16)
    hidden = {}
    for file in sorted((root / "masks").rglob("*.png")):
        if int(file.stem) >= given:
            hidden[root / "photos" / file.parent.name / file.name] = read_mask(file)
            file.unlink()
    if empty:
        noise = np.random.default_rng(1).integers(0, 120, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "photos/red/11.png")
    return hidden


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    both, either = (one * other).sum(), torch.maximum(one, other).sum()
    return float(both / either)


def test_images_without_a_mask_get_that_of_their_object(tmp_path: Path) -> None:
    hidden = few_masks(tmp_path, empty=True)
    _, notes = run(tmp_path / "photos.toml", "out")
    found = {path: tmp_path / "out" / FOLDER / path.parent.name / f"{path.name}.png" for path in hidden}
    assert sorted(found.values()) == sorted((tmp_path / "out" / FOLDER).rglob("*.png"))
    red = found.pop(tmp_path / "photos/red/11.png")
    assert Image.open(red).getextrema() == (0, 0)  # there is nothing in it
    overlaps = [overlap(read_mask(file), hidden[path]) for path, file in found.items()]
    assert np.median(overlaps) > 0.7
    report = json.loads((tmp_path / "out" / FOLDER / "report.json").read_text())
    assert (report["given"], report["completed"], report["nothing"]) == (12, 11, 1)
    assert report["overlap"] == pytest.approx(np.mean(overlaps), abs=0.15)
    assert notes[0].startswith(
        "Masks: 12 images have one, 11 got a predicted one, and in 1 nothing was found."
    )
    assert f"held out: {report['overlap']:.0%}" in notes[0]


def test_masks_of_the_same_settings_are_used_again(tmp_path: Path) -> None:
    few_masks(tmp_path)
    path = tmp_path / "photos.toml"
    out = tmp_path / "out"
    text = dry_run(read_settings(path), out / "dry-run.png", CPU)
    assert text.startswith("Masks: 12 images have one, 12 got a predicted one")
    changed = out / FOLDER / "red" / "11.png.png"
    black = Image.new("L", (SIDE, SIDE))
    black.save(changed)
    run(path, "out")
    assert Image.open(changed).getextrema() == (0, 0)
    few = read_settings(path, {"model.freeze": ("block1",)})
    dry_run(few, out / "dry-run.png", CPU)
    assert Image.open(changed).getextrema() == (0, 255)


def test_boxes_are_narrowed(tmp_path: Path) -> None:
    """The boxes are four pixels larger than the objects on each side."""
    pictures(tmp_path)
    network(tmp_path)
    rows, masks = [], {}
    for file in sorted((tmp_path / "masks").rglob("*.png")):
        image = tmp_path / "photos" / file.parent.name / file.name
        masks[image] = read_mask(file)
        rows_, columns = (masks[image].amax(dim=side).nonzero()[[0, -1], 0] for side in (1, 0))
        box = [columns[0] - 4, rows_[0] - 4, columns[1] + 5, rows_[1] + 5]
        rows.append(f"{image},{image.parent.name},{' '.join(str(int(each)) for each in box)}")
    (tmp_path / "labels.csv").write_text("file,label,boxes\n" + "\n".join(rows) + "\n")
    (tmp_path / "photos.toml").write_text(
        'data = "labels.csv"\nmodel = { checkpoint = "network.safetensors" }\nmasks = { complete = true }\n'
        + LOOP
    )
    result, notes = run(tmp_path / "photos.toml", "out")
    assert "0 images have one, 24 got a predicted one" in notes[0]
    assert "Overlap with boxes that were held out" in notes[0]
    assert result.epochs[0].guidance
    found = {
        image: read_mask(tmp_path / "out" / FOLDER / image.parent.name / f"{image.name}.png")
        for image in masks
    }
    boxed = 12**2 / 20**2
    assert np.mean([overlap(found[image], mask) for image, mask in masks.items()]) > boxed + 0.2
    guided = read_settings(tmp_path / "photos.toml", {"guide.prior": "boxes", "guide.loss": "outside"})
    maps = train(guided, tmp_path / "maps", device=CPU)
    assert maps.epochs[0].guidance
    assert (tmp_path / "maps" / FOLDER / "red" / "0.png.png").exists()


def test_nothing_to_complete(tmp_path: Path) -> None:
    few_masks(tmp_path, given=12)
    _, notes = run(tmp_path / "photos.toml", "out")
    assert notes[0].startswith("Masks: 24 images have one, 0 got a predicted one, and in 0 nothing was")


def test_what_cannot_be_completed(tmp_path: Path) -> None:
    few_masks(tmp_path, given=1)
    for file in (tmp_path / "masks").rglob("*.png"):
        Image.new("L", (SIDE, SIDE)).save(file)
    with pytest.raises(
        InputError, match=r"none of the 20 training images has a mask to learn from.*annotate"
    ):
        run(tmp_path / "photos.toml", "out")
    settings = read_settings(tmp_path / "photos.toml", {"guide.prior": "landmarks"})
    with pytest.raises(InputError, match=r"the prior Landmark.* reads none"):
        train(settings, tmp_path / "out", device=CPU)


def test_masks_of_single_classes_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path, 6)
    network(tmp_path, classes=2, multi_label=True)
    rows = [f"photos/red/{n}.png,1,{n % 2}" for n in range(6)]
    (tmp_path / "labels.csv").write_text("file,red,odd\n" + "\n".join(rows) + "\n")
    for number in range(6):
        folder = tmp_path / "of-attributes" / str(number)
        folder.mkdir(parents=True)
        mask = Image.open(tmp_path / "masks/red" / f"{number}.png")
        mask.save(folder / "red.png")
        mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "odd.png")
    path = tmp_path / "photos.toml"
    path.write_text(
        'data = "labels.csv"\nmodel = { checkpoint = "network.safetensors" }\n'
        'masks = { path = "of-attributes", complete = true }\n[guide]\nprior = "mask"\n' + LOOP
    )
    with pytest.raises(InputError, match="needs one mask for each image"):
        run(path, "out")
