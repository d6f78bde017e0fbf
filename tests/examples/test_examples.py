"""Every script in `examples/` runs offline, and shows what it claims."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.helpers.celeba import make_celeba
from tests.helpers.helen import make_helen

from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.visual import to_pil
from attnguide_segmentation.metrics import region_iou
from attnguide_segmentation.parser import Parser, load_parser, save_parser
from attnguide_segmentation.parsing import ParsingNetwork
from attnguide_segmentation.regions import REGIONS, merged

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run_script(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_script


def numbers(pattern: str, text: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, text)]


def test_two_lines(run: Callable[..., str]) -> None:
    printed = run("two_lines.py")
    plain, guided = numbers(r"on the mouth: (\d+)%", printed)
    assert guided > 1.3 * plain
    losses = numbers(r"loss ([\d.]+)", printed)
    half = len(losses) // 2
    assert losses[half - 1] < 0.5 * losses[0]
    assert losses[-1] < 0.9 * losses[half]


def test_own_prior(run: Callable[..., str]) -> None:
    printed = run("own_prior.py")
    assert "NearPoints()" in printed
    losses = numbers(r"guidance loss ([\d.]+)", printed)
    assert losses[-1] < 0.8 * losses[0]


def test_a_watermark_on_a_photograph(run: Callable[..., str], tmp_path: Path) -> None:
    """The steps without their effect, which needs pretrained weights and minutes."""
    network = timm.create_model("tf_efficientnet_lite0")
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    printed = run(
        "watermark.py", "--weights", tmp_path / "weights.safetensors", "--steps", 1, "--out", tmp_path
    )
    assert len(numbers(r"other class: ([\d.]+)%", printed)) == 2
    with Image.open(tmp_path / "watermark.jpg") as picture:
        assert picture.size == (3 * 384 + 2 * 12, 384 + 26)


def test_celeba_lipstick_on_drawn_faces(run: Callable[..., str]) -> None:
    printed = run("celeba_lipstick.py", "--epochs", 4)
    before, after = numbers(r"in the template: (\d+)%", printed)
    assert after > 1.3 * before
    overlaps = numbers(r"IoU ([\d.]+)", printed)
    assert overlaps[-1] > overlaps[3] + 0.1


def test_celeba_lipstick_on_celeba(run: Callable[..., str], tmp_path: Path) -> None:
    make_celeba(tmp_path, 6, size=(60, 70))
    mask = np.zeros((70, 60), dtype=np.uint8)
    mask[45:60, 15:45] = 255
    (tmp_path / "regions").mkdir()
    Image.fromarray(mask).save(tmp_path / "regions" / "Wearing_Lipstick.png")
    printed = run(
        *(
            "celeba_lipstick.py",
            "--data",
            tmp_path,
            "--template",
            tmp_path / "regions",
            "--arch",
            "resnet10t",
        ),
        *("--random", "--epochs", 1, "--batch-size", 3, "--limit", 3, "--device", "cpu"),
    )
    assert len(numbers(r"guidance loss ([\d.]+), accuracy [\d.]+%, IoU", printed)) == 2


def test_explain_a_model(run: Callable[..., str], tmp_path: Path) -> None:
    printed = run("explain_a_model.py", "--out", tmp_path / "out")
    assert "attnguide/faces: looked at layer block4" in printed
    assert "as it was" in printed
    (picture,) = (tmp_path / "out").iterdir()
    assert picture.name in printed
    with Image.open(picture) as image:
        assert image.size == (64, 64)
    again = run(
        "explain_a_model.py",
        picture,
        "--model",
        "resnet10t",
        "--source",
        "hires_cam",
        "--out",
        tmp_path / "two",
    )
    assert "resnet10t: looked at layer" in again


def test_fer_on_drawn_faces(run: Callable[..., str], tmp_path: Path) -> None:
    settings = ("--faces", 96, "--folds", 1, "--size", 48, "--epochs", 4, "--model", "test_resnet")
    printed = run("fer.py", *settings, "--out", tmp_path)
    unguided, guided = numbers(r"ATT-COS \S+ ([\d.]+),", printed)
    assert guided > unguided + 0.05
    assert "| accuracy | " in printed
    assert (tmp_path / "expressions.png").is_file()
    assert (tmp_path / "result.json").is_file()


def test_fer_on_a_folder(run: Callable[..., str], tmp_path: Path) -> None:
    faces = ProceduralFaces(60, 48).stack()
    (tmp_path / "images").mkdir()
    files = [f"{index}.png" for index in range(60)]
    for file, image in zip(files, faces.image, strict=True):
        to_pil((255 * image).byte()).save(tmp_path / "images" / file)
    np.savez(
        tmp_path / "table.npz",
        files=np.array(files),
        labels=(faces.expression == 1).numpy(),
        classes=np.array(["neutral", "happiness"]),
        landmarks68=faces.landmarks.numpy(),
    )
    settings = ("--folds", 2, "--size", 48, "--epochs", 1, "--batch", 8, "--model", "test_vit")
    printed = run("fer.py", "--data", tmp_path, *settings, "--out", tmp_path / "out")
    assert len(re.findall(r"run \d, auto", printed)) == 2


def test_fer_tells_what_is_wrong(
    run: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*options: object) -> str:
        with pytest.raises(SystemExit) as stopped:  # anything else would be a traceback
            run("fer.py", *options, "--out", tmp_path / "out")
        assert stopped.value.code
        # Python itself prints a text that a program exits with.
        code = stopped.value.code
        return capsys.readouterr().err + (code if isinstance(code, str) else "")

    assert "nowhere is not a folder" in said("--data", tmp_path / "nowhere")
    assert "0 tables *.npz; expected one" in said("--data", tmp_path)
    np.savez(tmp_path / "a.npz", files=np.array(["1.png"]), landmarks68=np.zeros((1, 68, 2)))
    assert "a.npz has no labels, classes; it has files, landmarks68" in said("--data", tmp_path)
    assert "--batch 99 is more than the 48 faces" in said("--faces", 48, "--size", 32, "--batch", 99)


@pytest.mark.nightly
def test_celeba_attributes_on_drawn_faces(run: Callable[..., str], tmp_path: Path) -> None:
    settings = ("--faces", 64, "--size", 48, "--width", 4, "--iterations", 4)
    printed = run(
        "celeba_attributes.py", *settings, "--out", tmp_path, "--methods", "average pooling", "SSG", "SSP"
    )
    assert len(re.findall(r"^seed 0, .*: classification error", printed, re.M)) == 4
    assert "| SSP + SSG | " in printed
    assert {file.name for file in tmp_path.iterdir()} == {
        "channels.png", "regions.png", "result.json", "weights.png",
    }  # fmt: skip


@pytest.mark.nightly
def test_where_ssp_looks(run: Callable[..., str], tmp_path: Path) -> None:
    printed = run("where_ssp_looks.py", "--faces", 64, "--epochs", 1, "--out", tmp_path)
    assert "lipstick" in printed
    assert re.search(r"counts most for \d+ % of the attributes that have one", printed)
    weights = torch.tensor(json.loads((tmp_path / "result.json").read_text())["runs"][0]["weights"])
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(16), rtol=1e-3, atol=1e-3)
    assert (tmp_path / "weights.png").stat().st_size > 5000


@pytest.mark.nightly
def test_celeba_multichannel(run: Callable[..., str], tmp_path: Path) -> None:
    printed = run("celeba_multichannel.py", "--faces", 64, "--epochs", 1, "--size", 32, "--out", tmp_path)
    assert "| average |" in printed
    assert "| 70% | random |" in printed
    result = json.loads((tmp_path / "result.json").read_text())
    flops = {row["share"]: row["flops"] for row in result["pruning"]}
    assert flops[0.7] < flops[0.5] < flops[0.3] < flops[0.1] < flops[0.0]
    assert set(result["structure"]) == {"independent", "together"}
    assert (tmp_path / "report.html").stat().st_size > 100_000


@pytest.mark.nightly
def test_masks_are_compared(run: Callable[..., str], tmp_path: Path) -> None:
    small = ("--faces", 32, "--epochs", 1, "--size", 32, "--width", 4)
    printed = run("celeba_multichannel.py", "--compare-masks", *small, "--out", tmp_path)
    assert "full masks: accuracy" in printed
    found = json.loads((tmp_path / "result.json").read_text())
    # Of 16 attributes and 16 channels: W, its bias, the classifiers and theirs.
    assert found["shared"]["rank"] <= 32
    assert found["full"]["parameters"] == 16 * 16 * 16 + 2 * 16 * 16 + 16
    assert all(len(found[masks]["energy"]) == 16 for masks in ("shared", "full"))


def test_celeba_multichannel_on_celeba(run: Callable[..., str], tmp_path: Path) -> None:
    make_celeba(tmp_path)
    settings = ["--model", "resnet10t", "--size", 32, "--epochs", 1, "--limit", 4]
    settings += ["--masks", "full"]
    printed = run("celeba_multichannel.py", "--data", tmp_path, *settings, "--out", tmp_path / "out")
    assert re.search(r"^\| Wearing_Lipstick \|.*\| 92\.5 \|$", printed, re.M)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(result["accuracy"]["plain head"]) == 40
    assert "structure" not in result


def test_celeba_attributes_on_celeba(run: Callable[..., str], tmp_path: Path) -> None:
    make_celeba(tmp_path, 70)
    settings = ("--size", 32, "--width", 4, "--iterations", 1, "--methods", "BBox")
    with pytest.raises(SystemExit) as stopped:  # the embedded parser is not for photographs
        run("celeba_attributes.py", "--data", tmp_path, *settings, "--out", tmp_path / "out")
    assert stopped.value.code == 2
    save_parser(tmp_path / "parser.safetensors", Parser(ParsingNetwork(4), size=32))
    settings += ("--parser", tmp_path / "parser.safetensors")
    printed = run("celeba_attributes.py", "--data", tmp_path, *settings, "--out", tmp_path / "out")
    assert "| BBox | " in printed


def test_face_parsing_on_drawn_faces(run: Callable[..., str], tmp_path: Path) -> None:
    settings = ("--labelled", 16, "--faces", 16, "--size", 32, "--width", 4, "--iterations", 12, "--seeds", 2)
    printed = run("face_parsing.py", *settings, "--out", tmp_path)
    assert len(re.findall(r"^\| (?:hair|nose|average) \| [\d.]+ ± [\d.]+ \| [\d.]+ ± ", printed, re.M)) == 3
    runs = json.loads((tmp_path / "result.json").read_text())["runs"]
    assert runs["without attributes"] != runs["with attributes"]
    parser = load_parser(tmp_path / "parser.safetensors")
    assert parser.size == 32
    best = max(mean(overlaps) for way in runs.values() for overlaps in way)
    assert f"mean IoU of {best:.3f} is {tmp_path / 'parser.safetensors'}" in printed
    # The file is the network of the first seed or the second: on that seed's test faces it has that overlap.
    found = []
    for seed in (0, 1):
        faces = ProceduralFaces(300, 32, seed=3 * seed + 2, pose=2.0, clutter=1.0, noise=0.08).stack()
        images = (faces.image.as_subclass(torch.Tensor) * 255).round() / 255
        truth = merged(faces.segmentation.as_subclass(torch.Tensor))
        found.append(float(region_iou(parser(images).argmax(dim=1), truth).mean()))
    assert min(abs(one - best) for one in found) < 2e-3  # saved in half precision


def test_face_parsing_on_helen_and_celeba(run: Callable[..., str], tmp_path: Path) -> None:
    make_helen(tmp_path / "helen", "exemplars", ("a", "b"))
    make_helen(tmp_path / "helen", "testing", ("c",))
    make_celeba(tmp_path / "celeba", 6)
    folders = ("--helen", tmp_path / "helen", "--celeba", tmp_path / "celeba", "--out", tmp_path / "out")
    printed = run("face_parsing.py", *folders, "--size", 32, "--width", 4, "--iterations", 1)
    assert "| average | " in printed
    assert load_parser(tmp_path / "out" / "parser.safetensors").labels == REGIONS


def test_every_example_is_tested() -> None:
    tested = set(re.findall(r"\w+\.py", Path(__file__).read_text(encoding="utf-8")))
    assert {path.name for path in EXAMPLES.glob("*.py")} <= tested
    assert torch.get_num_threads() == 1
