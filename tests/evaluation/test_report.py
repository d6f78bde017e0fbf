"""`attnguide report`, against `attnguide evaluate` and against explanations put together by hand."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.helpers.animals import CLASSES, COUNTS, SIDE, animals, painted, weights
from tests.helpers.pictures import no_leftovers, picture

import attnguide as ag
from attnguide import models
from attnguide.cli.main import main
from attnguide.errors import DataError, InputError
from attnguide.evaluation import read_groups
from attnguide.models import checkpoints

MEASURES = ("accuracy", "energy", "iou", "pointing", "witness")
EVIL = "<script>alert(1)</script>"


@dataclass
class Page(HTMLParser):
    """What a page says, as far as it is tables, galleries and attributes."""

    text: str
    tables: list[list[list[str]]] = field(default_factory=list)
    galleries: dict[str, list[str]] = field(default_factory=dict)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open.append(tag)
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag == "h3":
            self._title = ""
        elif tag == "bdi":
            self.galleries.setdefault(self._title.strip(), []).append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self._open or "script" in self._open:
            return
        self.words.append(data)
        if self._open and self._open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data
        elif self._open and self._open[-1] == "h3":
            self._title += data
        elif "bdi" in self._open:
            self.galleries[self._title.strip()][-1] += data

    def row(self, name: str) -> list[str]:
        return next(row for table in self.tables for row in table if row[0] == name)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def __contains__(self, text: str) -> bool:
        return text in " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights(tmp_path_factory.mktemp("before") / "before.safetensors", seed=4)


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights(tmp_path_factory.mktemp("after") / "after.safetensors", seed=8)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return animals(tmp_path / "data")


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    return painted(tmp_path / "mask.png", slice(4, 20), slice(8, 32))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def made(folder: Path, *arguments: object, status: int = 0) -> Page:
    out = folder / "report.html"
    result = call(*arguments, "--out", out)
    assert result.exit_code == status, result.output
    return Page(out.read_text(encoding="utf-8"))


def evaluated(data: Path, checkpoint: Path, mask: Path) -> dict[str, Any]:
    arguments = [data, "--checkpoint", checkpoint, "--masks", mask, "--threshold", 0.3, "--json"]
    return json.loads(CliRunner().invoke(main, ["evaluate", *map(str, arguments)]).stdout)


def shares(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    cells = []
    for key in MEASURES:
        change = f"{100 * (after[key] - before[key]):+.1f}".replace("-", "−")
        change = "0.0" if change in ("+0.0", "−0.0") else change
        cells += [f"{100 * before[key]:.1f}", f"{100 * after[key]:.1f}", change]
    return cells


def by_hand(data: Path, checkpoint: Path) -> dict[str, tuple[float, float, bool]]:
    """Energy in the mask of `mask`, probability of the true class, and whether that is the answer."""
    loaded, truth = models.embedded(checkpoint), torch.zeros(SIDE, SIDE)
    truth[4:20, 8:32] = 1
    found = {}
    for cls, name in enumerate(COUNTS):
        for path in (data / name).glob("*.png"):
            shown = ag.explain(loaded.model, loaded.read(path)[None], "grad_cam", [cls])
            energy = float(ag.metrics.energy_in_mask(shown.maps[:, 0], truth))
            answer = shown.logits.softmax(dim=1)[0]
            found[f"{name}/{path.name}"] = energy, float(answer[cls]), int(answer.argmax()) == cls
    return found


def test_numbers_are_those_of_evaluate(
    before: Path, after: Path, data: Path, mask: Path, tmp_path: Path
) -> None:
    page = made(tmp_path, data, "--before", before, "--after", after, "--masks", mask, "--threshold", 0.3)
    one, other = evaluated(data, before, mask), evaluated(data, after, mask)
    for name in CLASSES:
        was, now = one["classes"][name], other["classes"][name]
        area = f"{100 * was['area']:.1f}"
        assert page.row(name) == [name, str(was["images"]), *shares(was, now), area]
    mean = "mean of the classes"
    assert page.row(mean)[2:-1] == shares(one[mean], other[mean])
    assert page.row("all images")[1:-1] == ["9", *shares(one["all"], other["all"])]
    lowest = [
        {key: min(row[key] for row in each["classes"].values()) for key in MEASURES} for each in (one, other)
    ]
    assert page.row("worst class")[2:-1] == shares(*lowest)


def test_galleries_are_sorted(before: Path, after: Path, data: Path, mask: Path, tmp_path: Path) -> None:
    old, new = by_hand(data, before), by_hand(data, after)
    energy = {name: new[name][0] - old[name][0] for name in old}
    surer = {name: new[name][1] - old[name][1] for name in old}
    kinds = {
        "Energy in the mask rose most": sorted((n for n in old if energy[n] > 0), key=lambda n: -energy[n]),
        "Energy in the mask fell most": sorted((n for n in old if energy[n] < 0), key=energy.__getitem__),
        "Predictions that became right": sorted(
            (n for n in old if new[n][2] > old[n][2]), key=lambda n: -surer[n]
        ),
        "Predictions that became wrong": sorted(
            (n for n in old if new[n][2] < old[n][2]), key=surer.__getitem__
        ),
    }
    assert all(kinds.values()), "the networks of this test change in every way"
    page = made(tmp_path, data, "--before", before, "--after", after, "--masks", mask)
    shown = {re.sub(r" \d+( of \d+)?$", "", title): names for title, names in page.galleries.items()}
    assert shown == {title: names[:6] for title, names in kinds.items()}
    page = made(tmp_path, data, "--before", before, "--after", after, "--masks", mask, "--examples", 1)
    assert list(page.galleries.values()) == [names[:1] for names in kinds.values()]
    rose = kinds["Energy in the mask rose most"]
    assert f"1 of {len(rose)}" in page
    card = page.tables[-len(page.galleries)]
    name = rose[0]
    expected = [f"{100 * value[name][0]:.1f}" for value in (old, new)]
    assert next(row for row in card if row[0] == "energy in mask")[1:3] == expected
    page = made(tmp_path, data, "--before", before, "--after", after, "--masks", mask, "--examples", 0)
    assert not page.galleries
    assert not page.all("img")


def decoded(source: str) -> np.ndarray:
    content = base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)), dtype=float)


def test_pictures_and_their_dividers(
    before: Path, after: Path, data: Path, mask: Path, tmp_path: Path
) -> None:
    page = made(tmp_path, data, "--before", before, "--after", after, "--masks", mask, "--examples", 1)
    name = next(iter(page.galleries.values()))[0]
    for checkpoint, picture_of in zip((before, after), page.all("img"), strict=False):
        loaded = models.embedded(checkpoint)
        image = loaded.read(data / name)[None]
        cls = list(COUNTS).index(name.partition("/")[0])
        map_ = ag.functional.unit(ag.explain(loaded.model, image, "grad_cam", [cls]).maps[:, 0])
        drawn = ag.visual.overlay(loaded.displayed(image), map_[:, None])[0, 0]
        expected = ag.visual.data_uri(ag.visual.to_pil(drawn), "jpeg")
        assert np.abs(decoded(str(picture_of["src"])) - decoded(expected)).mean() < 1
    numbers = [float(each) for each in re.findall(r"[\d.]+", str(page.all("path")[0]["d"]))]
    assert (min(numbers[::2]), max(numbers[::2])) == pytest.approx((8, 32), abs=0.51)
    assert (min(numbers[1::2]), max(numbers[1::2])) == pytest.approx((4, 20), abs=0.51)
    ranges = [each for each in page.all("input") if "aria-label" in each]
    assert len(ranges) == len(page.galleries)
    assert all(each["type"] == "range" for each in ranges)
    assert name in str(ranges[0]["aria-label"])


def test_groups(before: Path, after: Path, data: Path, mask: Path, tmp_path: Path) -> None:
    names = [path.relative_to(data).as_posix() for path in sorted(data.rglob("*.png"))]
    groups = {name: "odd & even"[:3] if number % 2 else "even <2>" for number, name in enumerate(names[:-1])}
    (tmp_path / "groups.csv").write_text(
        "file,group\n" + "".join(f"{name},{group}\n" for name, group in groups.items())
    )
    (tmp_path / "groups.json").write_text(json.dumps(groups))
    old, new = by_hand(data, before), by_hand(data, after)
    arguments = [data, "--before", before, "--after", after, "--masks", mask]
    for file in ("groups.csv", "groups.json"):
        out = tmp_path / "report.html"
        result = call(*arguments, "--groups", tmp_path / file, "--out", out)
        assert result.exit_code == 0, result.output
        assert f"1 of 9 images have no group in {tmp_path / file}" in result.stderr
        page, worst = Page(out.read_text()), []
        for group in ("odd", "even <2>"):
            mine = [name for name in groups if groups[name] == group]
            expected = [sum(each[name][2] for name in mine) / len(mine) for each in (old, new)]
            worst.append(expected)
            assert page.row(group)[1:4] == [str(len(mine)), *(f"{100 * value:.1f}" for value in expected)]
            energies = [sum(each[name][0] for name in mine) / len(mine) for each in (old, new)]
            assert page.row(group)[5:7] == [f"{100 * value:.1f}" for value in energies]
        lowest = [f"{100 * min(pair):.1f}" for pair in zip(*worst, strict=True)]
        assert page.row("worst group")[2:4] == lowest
        assert "1 of 9 images have no group" in page


def test_names_are_text(tmp_path: Path, mask: Path) -> None:
    """A class that nothing else but an answer names, a folder, and a file, all of which look like HTML."""
    classes = ('<b onclick="x">dog', EVIL, "fish")
    before = weights(tmp_path / "before.safetensors", 4, classes=classes)
    after = weights(tmp_path / "after.safetensors", 8, classes=classes, favourite=1)
    for number, name in enumerate((classes[0], "fish")):
        for index in range(4):
            picture(tmp_path / "data" / name / f"<i>' {index}&amp;.png", 10 * number + index, (SIDE, SIDE))
    page = made(tmp_path, tmp_path / "data", "--before", before, "--after", after, "--masks", mask)
    assert EVIL not in page.text
    assert EVIL in page
    assert classes[0] in page
    assert any(f"{classes[0]}/<i>' 0&amp;.png" in names for names in page.galleries.values())
    assert len(page.all("script")) == 1
    assert not page.all("b") or all("onclick" not in each for each in page.all("b"))
    assert all("style" in each or "class" in each for each in page.all("i"))


def test_a_name_that_is_not_unicode(before: Path, after: Path, mask: Path, tmp_path: Path) -> None:
    data = animals(tmp_path / "data")
    try:
        (data / "cat" / "cat0.png").rename(data / "cat" / "\udcff.png")
    except OSError:
        pytest.skip("this file system takes no such name")
    page = made(tmp_path, data, "--before", before, "--after", after, "--masks", mask)
    assert sum(len(names) for names in page.galleries.values())


def test_nothing_is_loaded_from_elsewhere(
    before: Path, after: Path, data: Path, mask: Path, tmp_path: Path
) -> None:
    page = made(tmp_path, data, "--before", before, "--after", after, "--masks", mask)
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert str(attributes.get(name, "data:")).startswith("data:")
    for text in ("http:", "https:", "url(", "@import", "//cdn"):
        assert text not in page.text
    assert not page.all("link")
    policy = str(page.all("meta")[1]["content"])
    assert policy.startswith("default-src 'none'; img-src data:;")
    script = re.findall(r"<script>(.*?)</script>", page.text, re.S)
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_settings_and_versions(before: Path, after: Path, data: Path, mask: Path, tmp_path: Path) -> None:
    page = made(tmp_path, data, "--before", before, "--after", after, "--masks", mask, "--threshold", 0.25)
    for checkpoint in (before, after):
        assert f"{checkpoint} (SHA-256 {checkpoints.digest(checkpoint)[:12]}…)" in page
    for text in (str(data), str(mask), "grad_cam", "0.25", ag.__version__, torch.__version__, "timm", "cpu"):
        assert text in page
    assert re.search(r"\w+ \(auto\)", " ".join(page.words))


def test_files_that_cannot_be_read(before: Path, after: Path, data: Path, mask: Path, tmp_path: Path) -> None:
    (data / "cat" / "broken.png").write_text("no image")
    out = tmp_path / "report.html"
    arguments = [data, "--before", before, "--after", after, "--masks", mask, "--out", out]
    result = call(*arguments)
    assert result.exit_code == 1
    assert result.stderr.count("broken.png") == 1
    page = Page(out.read_text())
    assert "1 file left out" in page
    assert "broken.png is not an image" in page
    assert page.row("all images")[1] == "9"
    out.unlink()
    for path in data.rglob("*.png"):
        path.write_text("no image")
    result = call(*arguments)
    assert result.exit_code == 1
    assert "no image could be read" in result.stderr
    assert not out.exists()
    assert no_leftovers(tmp_path)


def test_images_without_a_mask(before: Path, after: Path, data: Path, tmp_path: Path) -> None:
    painted(tmp_path / "template" / "fish.png", slice(0, 16), slice(0, 32))
    page = made(tmp_path, data, "--before", before, "--after", after, "--masks", tmp_path / "template")
    assert page.row("fish")[-1] == "50.0"
    assert page.row("cat")[5:] == [""] * (len(page.row("cat")) - 5)
    assert "9 images, 2 of them with a mask" in page
    painted(tmp_path / "other" / "bird.png", slice(0, 16), slice(0, 32))
    page = made(tmp_path, data, "--before", before, "--after", after, "--masks", tmp_path / "other")
    assert len(page.row("cat")) == 5
    assert "9 images, 0 of them with a mask" in page


def test_a_model_by_name(data: Path, mask: Path, tmp_path: Path) -> None:
    import timm

    for seed, name in enumerate(("before", "after")):
        torch.manual_seed(seed)
        model = timm.create_model("test_resnet", num_classes=3)
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    files = ("--before", tmp_path / "before.safetensors", "--after", tmp_path / "after.safetensors")
    page = made(tmp_path, data, "--model", "test_resnet", *files, "--masks", mask)
    assert [page.row(name)[1] for name in ("Fish", "big_dog", "cat")] == ["2", "4", "3"]
    assert "test_resnet, before and after" in page


def test_nothing_changed(before: Path, data: Path, mask: Path, tmp_path: Path) -> None:
    page = made(tmp_path, data, "--before", before, "--after", before, "--masks", mask)
    assert not page.galleries
    assert "Energy in the mask rose in 0 of 9 images" in page
    assert set(page.row("all images")[4:-1:3]) == {"0.0"}


def test_what_it_prints(before: Path, after: Path, data: Path, mask: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    result = call(data, "--before", before, "--after", after, "--masks", mask, "--out", out)
    was, now = (evaluated(data, each, mask)["all"]["accuracy"] for each in (before, after))
    assert f"accuracy: {was:.1%} → {now:.1%}" in result.stdout
    assert f"Report: {out}" in result.stdout


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--out": "FOLDER/nowhere/report.html", "--before": "nothing.safetensors"}, "there is no folder"),
        ({"--out": "FOLDER/report.txt"}, "Let it end in .html"),
        ({"--before": "nothing.safetensors"}, "nothing.safetensors does not exist"),
        ({"--after": "nothing.safetensors"}, "nothing.safetensors does not exist"),
        ({"--after": "FOLDER/mask.png"}, "mask.png is not a classifier that attnguide saved"),
        ({"--after": "FOLDER/birds.safetensors"}, "birds.safetensors have different classes"),
        ({"--after": "FOLDER/nan.safetensors"}, "nan.safetensors: "),
        ({"--masks": "nothing.png"}, "nothing.png does not exist"),
        ({"--groups": "nothing.csv"}, "nothing.csv does not exist"),
        ({"--groups": "FOLDER/others.csv"}, "names none of the images"),
        ({"--source": "grad_kam"}, "grad_cam"),
        ({"--num-classes": "3"}, "--num-classes needs a model to be named"),
        ({"--model": "test_resnet"}, "before.safetensors does not fit"),
    ],
)
def test_bad_input(
    changed: dict[str, str],
    message: str,
    before: Path,
    after: Path,
    data: Path,
    mask: Path,
    tmp_path: Path,
) -> None:
    weights(tmp_path / "birds.safetensors", 4, classes=("hawk", "wren", "fish"))
    values = load_file(before)
    next(each for each in values.values() if each.is_floating_point()).fill_(torch.nan)
    with safe_open(before, "pt") as file:
        save_file(values, tmp_path / "nan.safetensors", metadata=file.metadata())
    (tmp_path / "others.csv").write_text("dog/1.png,here\n")
    given = {"--before": before, "--after": after, "--masks": mask, "--out": tmp_path / "report.html"}
    given |= {name: value.replace("FOLDER", str(tmp_path)) for name, value in changed.items()}
    result = call(data, *(each for pair in given.items() for each in pair))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "report.html").exists()


def test_a_multi_label_model(data: Path, mask: Path, tmp_path: Path) -> None:
    faces = models.EMBEDDED
    result = call(data, "--before", faces, "--after", faces, "--masks", mask, "--out", tmp_path / "r.html")
    assert result.exit_code == 2
    assert "is multi-label; a folder for each class needs a model that gives each image one" in result.stderr


def test_help_is_light() -> None:
    code = (
        "import sys\nfrom attnguide.cli.main import main\nmain(['report', '--help'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "attnguide report photos/" in shown.stdout


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "x", "groups are a .csv or a .json file"),
        ("a.json", "[1]", "must map files to groups"),
        ("a.json", '{"cat/1.png": [1]}', "the group of 'cat/1.png' must be a name"),
        ("a.json", "{}", "names no image"),
        ("a.csv", "file,group\n", "names no image"),
        ("a.csv", "cat/1.png\n", "must hold a file and its group"),
        ("a.csv", "cat/1.png,\n", "the group of 'cat/1.png' must be a name"),
        ("a.csv", "cat/1.png,a\n./cat/1.png,b\n", "into two groups, 'a' and 'b'"),
    ],
)
def test_groups_that_cannot_be_read(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises((DataError, InputError), match=re.escape(message)):
        read_groups(tmp_path / name)


def test_forms_of_groups(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('./cat/1.png, "in, doors"\n\ncat/2.PNG,2\n')
    assert read_groups(tmp_path / "a.csv") == {"cat/1.png": "in, doors", "cat/2.PNG": "2"}
    (tmp_path / "a.json").write_text('{"cat/1.png": 3}')
    assert read_groups(tmp_path / "a.json") == {"cat/1.png": "3"}
