"""`attnguide masks` writes what the priors find, of the images' names and sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from tests.helpers.clip import SIDE, clip, folder, tokenizer
from tests.helpers.models import export_onnx
from tests.helpers.recipes import network, pictures
from torch import Tensor

from attnguide import PriorMaps
from attnguide.cli.main import main
from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.masks import MaskFolder
from attnguide.models import load
from attnguide.priors import TeacherPrior, TextPrior, TokenCutPrior
from attnguide.visual import to_pil


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["masks", *map(str, arguments)])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    faces = ProceduralFaces(3, size=64)
    for index in range(3):
        file = folder / "more" / "2.png" if index == 2 else folder / f"{index}.png"
        to_pil(faces[index].image).resize((80, 100)).save(file)
    return folder


def test_a_teachers_masks_are_those_of_the_prior(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "masks"
    result = call(
        photos, "--prior", "teacher", "--source", "cam", "--threshold", 0.4, "--out", out, "--sheet"
    )
    assert result.exit_code == 0, result.output
    assert "3 masks" in result.output
    assert (tmp_path / "masks.png").is_file()
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
    assert files == ["0.png", "1.png", "more/2.png"]
    loaded = load()
    image = Image.open(photos / "0.png").convert("RGB").resize((64, 64))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (loaded.mean, loaded.std))
    pixels = (pixels - mean) / std
    with torch.no_grad():
        cls = loaded.model(pixels).argmax(dim=1)
    prior = TeacherPrior(loaded, source="cam", threshold=0.4)
    maps = torch.nn.functional.interpolate(prior.find(pixels, cls).maps[None], (100, 80), mode="bilinear")
    mask = np.asarray(Image.open(out / "0.png"))
    assert mask.shape == (100, 80)
    np.testing.assert_array_equal(mask > 0, (maps[0, 0] >= 0.5).numpy())
    folder = MaskFolder(out, ["more"])  # a subfolder is a class
    assert folder.get("0.png") is not None
    assert folder.get_class("more/2.png", "more") is not None


def test_existing_masks_are_kept(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "masks"
    out.mkdir()
    Image.new("L", (80, 100), 255).save(out / "0.png")
    painted = (out / "0.png").read_bytes()
    arguments = (photos, "--prior", "teacher", "--source", "cam", "--out", out)
    result = call(*arguments)
    assert "2 masks" in result.output
    assert "1 existed and were kept" in result.output
    assert (out / "0.png").read_bytes() == painted
    assert "3 masks" in call(*arguments, "--overwrite").output
    assert (out / "0.png").read_bytes() != painted


def test_what_goes_wrong(photos: Path, tmp_path: Path) -> None:
    (photos / "broken.png").write_bytes(b"no image")
    result = call(photos, "--prior", "teacher", "--source", "cam", "--out", tmp_path / "masks")
    assert result.exit_code == 1
    assert "broken.png" in result.output
    (photos / "broken.png").unlink()
    assert "folder of the images" in call(photos, "--out", photos).output
    to_pil(torch.rand(3, 8, 8)).save(photos / "0.jpg")
    same = call(photos, "--out", tmp_path / "other")
    assert same.exit_code == 2
    assert "would have one mask" in same.output
    assert call(photos, "--source", "grad_kam").exit_code == 2


def test_narrowed_regions_are_nearer_to_the_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(prior: TokenCutPrior, images: Tensor, classes: Tensor) -> PriorMaps:
        """The squares, red or blue, with four pixels around them."""
        square = (images[:, 0] - images[:, 2]).abs() > 3
        grown = torch.nn.functional.max_pool2d(square[:, None].float(), 9, 1, 4)[:, 0]
        return PriorMaps(grown, torch.ones(len(grown)))

    monkeypatch.setattr(TokenCutPrior, "find", coarse)
    pictures(tmp_path)
    checkpoint = network(tmp_path, width=16)

    def written(name: str, *options: str) -> np.ndarray:
        result = call(tmp_path / "photos", "--checkpoint", checkpoint, "--out", tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        files = sorted((tmp_path / name).rglob("*.png"))
        return np.stack([np.asarray(Image.open(file)) > 0 for file in files])

    found, narrowed = written("found"), written("narrowed", "--narrow")
    true = np.stack(
        [np.asarray(Image.open(file)) > 0 for file in sorted((tmp_path / "masks").rglob("*.png"))]
    )
    assert found.shape == narrowed.shape == true.shape == (24, 32, 32)
    assert not (narrowed & ~found).any()
    before, after = (
        ((some & true).sum((1, 2)) / (some | true).sum((1, 2))).mean() for some in (found, narrowed)
    )
    assert before < 0.45
    assert after > before + 0.1
    refused = call(tmp_path / "photos", "--prior", "segmenter", "--narrow")
    assert refused.exit_code == 2
    assert "--narrow is for" in refused.output


def test_a_segmenter_from_a_file(photos: Path, tmp_path: Path) -> None:
    class Bright(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 40 * images.mean(dim=1, keepdim=True)

    file = tmp_path / "bright.onnx"
    export_onnx(Bright(), torch.zeros(1, 3, 320, 320), file)
    result = call(photos, "--prior", "segmenter", "--segmenter", file, "--out", tmp_path / "masks")
    assert result.exit_code == 0, result.output
    with Image.open(photos / "0.png") as image, Image.open(tmp_path / "masks" / "0.png") as mask:
        pixels = np.asarray(image.convert("RGB"), dtype=float).mean(axis=2) / 255
        inside = np.asarray(mask) > 0
    clear = abs(pixels - 0.45) > 0.1  # ImageNet's mean
    assert (inside == (pixels > 0.45))[clear].mean() > 0.95
    assert call(photos, "--segmenter", file).exit_code == 2


def test_words_by_a_model_in_a_folder(photos: Path, tmp_path: Path) -> None:
    out, where = tmp_path / "masks", folder(tmp_path / "clip")
    result = call(photos, "--prior", "text", "--words", "a bird", "--clip", f"hf:{where}", "--out", out)
    assert result.exit_code == 0, result.output
    assert "3 masks" in result.output
    image = Image.open(photos / "0.png").convert("RGB").resize((SIDE, SIDE))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    prior = TextPrior(
        "a bird",
        model=clip(),
        tokenizer=tokenizer(),
        threshold=0.5,
        normalization=([0.0] * 3, [1.0] * 3),
        own_normalization=([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]),
    )
    maps = torch.nn.functional.interpolate(
        prior.find(pixels, torch.tensor([0])).maps[None], (100, 80), mode="bilinear"
    )
    np.testing.assert_array_equal(np.asarray(Image.open(out / "0.png")) > 0, (maps[0, 0] >= 0.5).numpy())
    none = call(
        photos, "--prior", "text", "--words", "zeppelin", "--clip", f"hf:{where}", "--out", tmp_path / "n"
    )
    assert none.exit_code == 1
    assert "3 images without a region" in none.output
    assert "needs words" in call(photos, "--prior", "text").output
    assert call(photos, "--words", "a bird").exit_code == 2
    assert call(photos, "--prior", "text", "--words", "a", "--clip", f"hf:{tmp_path / 'no'}").exit_code == 2
