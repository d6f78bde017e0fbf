"""What `attnguide annotate` serves and keeps, without a browser."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file
from tests.helpers.browser import annotating

from attnguide import models
from attnguide.cli.main import main
from attnguide.data.procedural.faces import ATTRIBUTES, ProceduralFaces, template
from attnguide.errors import DataError, InputError, UnknownNameError
from attnguide.masks.folders import MaskFolder, load_template, read_coco, read_labelme
from attnguide.masks.shapes import Polygon
from attnguide.models import write_embedded
from attnguide.models.networks import small_cnn
from attnguide.priors.mask import MaskPrior
from attnguide.visual import to_pil
from attnguide_action_units.tables import LandmarkTable
from attnguide_gradcam_iou.painting import import_export
from attnguide_gradcam_iou.painting.parts import LandmarkParts, ParsedParts
from attnguide_gradcam_iou.painting.sheets import AVERAGED, LONGEST, find_sheets, mean_image
from attnguide_gradcam_iou.painting.store import MaskStore, recorded_classes
from attnguide_gradcam_iou.painting.tuning import Answered, FineTuning, read_answers
from attnguide_gradcam_iou.painting.watching import seen_box
from attnguide_segmentation.regions import merged

SIZE = (30, 40)


def picture(path: Path, size: tuple[int, int] = SIZE, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def some_mask(seed: int = 0, size: tuple[int, int] = SIZE) -> npt.NDArray[np.bool_]:
    return np.random.default_rng(seed).random(size) < 0.4


# ------------------------------------------------------------------------ what is painted on


def test_images_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        picture(tmp_path / f"{number}.png", seed=number)
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path, **kwargs: opened.append(path) or real(path, **kwargs))
    sheets = find_sheets([str(tmp_path)], None, tmp_path / "masks-of-it")
    assert len(sheets) == 30
    assert not opened
    for number in (3, 3, 4):
        assert sheets.picture(number).size == (40, 30)
    assert [Path(path).name for path in opened] == ["3.png", "4.png"]
    for number in range(30):
        sheets.picture(number)
    assert len(sheets._kept) == 4


def test_large_images_are_painted_smaller(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (10, 3 * LONGEST))
    assert find_sheets([str(tmp_path / "a.png")], None, tmp_path / "masks-of-it").picture(0).size == (
        LONGEST,
        3,
    )


def test_the_mean_of_images(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{n}.png", seed=n) for n in range(3)]
    (tmp_path / "broken.png").write_bytes(b"nothing")
    mean, skipped = mean_image([*paths, tmp_path / "broken.png"])
    values = np.mean([np.asarray(Image.open(path), dtype=float) for path in paths], axis=0)
    assert np.abs(np.asarray(mean, dtype=float) - values).max() <= 0.5
    assert skipped == 1
    assert (
        find_sheets([str(tmp_path)], "average", tmp_path / "masks-of-it").about
        == "average of 3 images (1 could not be read)"
    )
    assert AVERAGED == 200
    with pytest.raises(DataError, match=r"none of the 1 images.*broken"):
        mean_image([tmp_path / "broken.png"])


def test_what_cannot_be_painted_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to paint on"):
        find_sheets([], None, tmp_path / "masks-of-it")
    with pytest.raises(InputError, match="mean of images"):
        find_sheets([], "average", tmp_path / "masks-of-it")
    picture(tmp_path / "a" / "one.png")
    picture(tmp_path / "b" / "one.jpg")
    with pytest.raises(InputError, match=r"one\.png and .*one\.jpg would share one mask"):
        find_sheets([str(tmp_path)], None, tmp_path / "masks-of-it")


def test_what_lies_where_the_masks_go_is_no_image(tmp_path: Path) -> None:
    picture(tmp_path / "photos" / "one.png")
    picture(tmp_path / "photos" / "masks" / "one.png")
    sheets = find_sheets([str(tmp_path / "photos")], None, tmp_path / "photos" / "masks")
    assert [str(path.relative_to(tmp_path)) for path in sheets.paths] == ["photos/one.png"]
    before = (tmp_path / "photos" / "one.png").read_bytes()
    for arguments in (
        (tmp_path / "photos",),
        ("--template", tmp_path / "photos" / "one.png"),
        ("--template", tmp_path / "photos" / "one.png", tmp_path / "photos"),
    ):
        found = invoke(*arguments, "--out", tmp_path / "photos", "--port", "0")
        assert "where the masks go. Choose another --out." in found.output
    checkpoint = tmp_path / "model.safetensors"
    write_embedded(
        checkpoint,
        small_cnn(2, width=8).eval(),
        classes=["a", "b"],
        size=32,
        width=8,
        mean=[0.5] * 3,
        std=[0.5] * 3,
        multi_label=False,
    )
    picture(tmp_path / "train" / "a" / "x.png")
    picture(tmp_path / "train" / "b" / "y.png")
    options = ("--checkpoint", checkpoint, "--data", tmp_path / "train", "--out", tmp_path / "train")
    found = invoke(tmp_path / "photos" / "one.png", *options, "--port", "0")
    assert "of --data lies in" in found.output
    assert (tmp_path / "photos" / "one.png").read_bytes() == before


def test_links_out_of_a_folder_are_left_out(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "one.png")
    picture(tmp_path / "outside.png")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "outside.png")
    sheets = find_sheets([str(tmp_path / "in")], None, tmp_path / "masks-of-it")
    assert [path.name for path in sheets.paths] == ["one.png"]
    assert sheets.links == 1


# ------------------------------------------------------------------------------ the store


def test_masks_of_a_template_are_what_the_prior_reads(tmp_path: Path) -> None:
    store = MaskStore(tmp_path / "masks", ["Mouth", "left_eye", "nose"], template=True)
    first, second = some_mask(1), some_mask(2)
    store.write("", 0, first)
    store.write("", 1, second)
    found = load_template(tmp_path / "masks", ["mouth", "left eye", "nose"])
    assert found.painted == ("mouth", "left eye")
    np.testing.assert_array_equal(found.masks[0].numpy() > 0, first)
    np.testing.assert_array_equal(found.masks[1].numpy() > 0, second)
    MaskPrior(found.masks)
    again = MaskStore(tmp_path / "masks", ["Mouth", "left_eye", "nose"], template=True)
    np.testing.assert_array_equal(again.read("", 1, SIZE), second)
    assert again.painted("") == [0, 1]
    again.write("", 1, np.zeros(SIZE, dtype=bool))
    assert not (tmp_path / "masks" / "left_eye.png").exists()
    assert again.read("", 1, SIZE) is None


def test_masks_of_images_are_what_the_prior_reads(tmp_path: Path) -> None:
    store = MaskStore(tmp_path / "masks", ["cat", "dog"], template=False)
    store.write("one", 1, some_mask(1))
    store.write("two", 0, some_mask(2))
    masks = MaskFolder(tmp_path / "masks", ["cat", "dog"])
    one = masks.get("one.jpg")
    assert one is not None
    np.testing.assert_array_equal(one[1].numpy() > 0, some_mask(1))
    assert bool(one[0].isnan().all())
    assert store.count(["one", "two", "three"]) == 2
    assert store.next_to_paint(["one", "two", "three"], 0) == 2
    assert store.next_to_paint(["one", "two"], 0) is None
    plain = MaskStore(tmp_path / "plain", [], template=False)
    plain.write("one", 0, some_mask(3))
    whole = MaskFolder(tmp_path / "plain").get("one.png")
    assert whole is not None
    np.testing.assert_array_equal(whole.numpy() > 0, some_mask(3))


def test_a_mask_under_another_spelling_is_gone_on_with(tmp_path: Path) -> None:
    Image.fromarray(some_mask(1).astype(np.uint8) * 255).save(tmp_path / "wearing lipstick.bmp")
    store = MaskStore(tmp_path, ["Wearing_Lipstick"], template=True)
    np.testing.assert_array_equal(store.read("", 0, SIZE), some_mask(1))
    store.write("", 0, some_mask(2))
    assert [path.name for path in tmp_path.iterdir()] == ["Wearing_Lipstick.png"]


@pytest.mark.parametrize("name", ["../out", "a/b", ".hidden", "a\\b", "", "a\nb", "c:d", "x" * 300])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be the name of a file"):
        MaskStore(tmp_path, [name], template=True)


def test_nothing_is_read_or_written_through_links(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "masks"
    outside.mkdir()
    root.mkdir()
    Image.fromarray(some_mask().astype(np.uint8) * 255).save(outside / "secret.png")
    (root / "cat").symlink_to(outside)
    store = MaskStore(root, ["cat"], template=False)
    assert store.read("secret", 0, SIZE) is None
    with pytest.raises(InputError, match="leads out of"):
        store.write("one", 0, some_mask())
    assert [path.name for path in outside.iterdir()] == ["secret.png"]
    before = (outside / "secret.png").read_bytes()
    (root / "dog.png").symlink_to(outside / "secret.png")
    once = MaskStore(root, ["dog"], template=True)
    for action in (lambda: once.read("", 0, SIZE), lambda: once.write("", 0, some_mask(1))):
        with pytest.raises(InputError, match="leads out of"):
            action()
    assert (outside / "secret.png").read_bytes() == before


def test_masks_of_another_kind_are_not_mixed(tmp_path: Path) -> None:
    def kept(folder: Path, *, classes: list[str], template: bool) -> MaskStore:
        store = MaskStore(folder, classes, template=template)
        store.record({"template": "one.png" if template else None})
        return store

    kept(tmp_path / "t", classes=["cat"], template=True).write("", 0, some_mask())
    with pytest.raises(InputError, match=r"cat\.png is a mask of a whole image, or of a template"):
        MaskStore(tmp_path / "t", ["cat"], template=False)
    (tmp_path / "t" / "masks.json").unlink()
    with pytest.raises(InputError, match="a mask of no class"):
        MaskStore(tmp_path / "t", ["dog"], template=True)
    kept(tmp_path / "w", classes=[], template=False).write("one", 0, some_mask())
    with pytest.raises(InputError, match="whole image"):
        MaskStore(tmp_path / "w", ["cat"], template=False)
    kept(tmp_path / "i", classes=["cat"], template=False).write("one", 0, some_mask())
    with pytest.raises(InputError, match="a mask of a class in a single image"):
        MaskStore(tmp_path / "i", ["cat"], template=True)
    (tmp_path / "i" / "masks.json").unlink()
    with pytest.raises(InputError, match="a mask of a class in a single image"):
        MaskStore(tmp_path / "i", [], template=False)
    # The other way in which MaskFolder finds masks of classes is gone on with.
    (tmp_path / "s" / "one").mkdir(parents=True)
    Image.fromarray(some_mask(1).astype(np.uint8) * 255).save(tmp_path / "s" / "one" / "cat.png")
    store = MaskStore(tmp_path / "s", ["cat"], template=False)
    np.testing.assert_array_equal(store.read("one", 0, SIZE), some_mask(1))
    store.write("one", 0, some_mask(2))
    found = MaskFolder(tmp_path / "s", ["cat"]).get("one")
    assert found is not None
    np.testing.assert_array_equal(found[0].numpy() > 0, some_mask(2))


def test_other_classes_need_another_folder(tmp_path: Path) -> None:
    MaskStore(tmp_path, ["cat"], template=True).record({"template": "a.png"})
    assert recorded_classes(tmp_path) == ["cat"]
    MaskStore(tmp_path, ["Cat", "dog"], template=True)
    with pytest.raises(InputError, match="tells of masks for cat"):
        MaskStore(tmp_path, ["dog"], template=True)
    with pytest.raises(InputError, match="two classes are called"):
        MaskStore(tmp_path, ["Cat", "cat"], template=True)
    (tmp_path / "masks.json").write_text("{}")
    with pytest.raises(DataError, match="does not list the classes"):
        recorded_classes(tmp_path)


# ------------------------------------------------------------------------ other tools' files


def test_outlines_hold_exactly_the_pixels() -> None:
    for seed in range(40):
        generator = np.random.default_rng(seed)
        mask = generator.random(generator.integers(1, 30, 2)) < generator.random()
        drawn = np.zeros_like(mask)
        for points in import_export.outlines(mask):
            drawn ^= Polygon(tuple((x, y) for x, y in points)).draw(mask.shape)
        np.testing.assert_array_equal(drawn, mask)
    ring = np.pad(np.pad(np.zeros((3, 3), bool), 2, constant_values=True), 1)
    (only,) = import_export.outlines(ring)
    np.testing.assert_array_equal(Polygon(tuple((x, y) for x, y in only)).draw(ring.shape), ring)


def test_there_and_back(tmp_path: Path) -> None:
    for name in ("one", "two"):
        picture(tmp_path / "images" / f"{name}.png")
    sheets = find_sheets([str(tmp_path / "images")], None, tmp_path / "masks-of-it")
    store = MaskStore(tmp_path / "masks", ["cat", "dog"], template=False)
    store.write("one", 0, some_mask(1))
    store.write("one", 1, some_mask(2))
    store.write("two", 1, some_mask(3))
    labelme, coco = import_export.as_labelme(sheets, store, 0), import_export.as_coco(sheets, store)
    (tmp_path / "labelme.json").write_text(json.dumps(labelme))
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    read = read_labelme(tmp_path / "labelme.json").tensor(["cat", "dog"])
    np.testing.assert_array_equal(read.numpy() > 0, [some_mask(1), some_mask(2)])
    two = read_coco(tmp_path / "coco.json")["two.png"].tensor(["cat", "dog"])
    np.testing.assert_array_equal(two[1].numpy() > 0, some_mask(3))

    other = MaskStore(tmp_path / "other", ["cat", "dog"], template=False)
    found = import_export.read_into(sheets, other, json.dumps(coco).encode(), 0)
    assert found == (3, [])
    np.testing.assert_array_equal(other.read("one", 1, SIZE), some_mask(2))
    labelme["imagePath"] = "elsewhere/unknown.png"
    labelme["shapes"].append({**labelme["shapes"][0], "label": "fish"})
    labelme["shapes"].append({"label": "cat", "shape_type": "point", "points": [[1, 1]]})
    found = import_export.read_into(sheets, other, json.dumps(labelme).encode(), 1)
    assert found == (2, ["1 of kind point", "fish: there is no such class"])
    np.testing.assert_array_equal(other.read("two", 0, SIZE), some_mask(1))
    with pytest.raises(DataError, match="neither a LabelMe nor a COCO"):
        import_export.read_into(sheets, other, b"{}", 0)


def test_an_import_is_all_or_nothing(tmp_path: Path) -> None:
    for name in ("one", "two"):
        picture(tmp_path / "images" / f"{name}.png")
    sheets = find_sheets([str(tmp_path / "images")], None, tmp_path / "masks")
    store = MaskStore(tmp_path / "masks", ["cat"], template=False)
    store.write("one", 0, some_mask(1))
    store.write("two", 0, some_mask(2))
    coco = import_export.as_coco(sheets, store)
    (tmp_path / "images" / "two.png").write_bytes(b"gone")
    assert import_export.as_coco(sheets, store) == coco  # masks are told even where the image is gone
    store.write("one", 0, some_mask(3))
    sheets = find_sheets([str(tmp_path / "images")], None, tmp_path / "masks")
    with pytest.raises(DataError, match=r"two\.png"):
        import_export.read_into(sheets, store, json.dumps(coco).encode(), 0)
    np.testing.assert_array_equal(store.read("one", 0, SIZE), some_mask(3))

    picture(tmp_path / "template.png")
    once = find_sheets([], str(tmp_path / "template.png"), tmp_path / "once")
    united = MaskStore(tmp_path / "once", ["cat"], template=True)
    outside = {**coco["annotations"][0], "id": 9, "segmentation": [[500, 500, 600, 500, 600, 600]]}
    coco["categories"].append({"id": 2, "name": "dog"})
    coco["annotations"] += [outside, {**outside, "id": 10, "category_id": 2}]
    large = {**coco["images"][0], "id": 7, "file_name": "large.png", "width": 400_000, "height": 400}
    coco["images"].append(large)
    coco["annotations"].append({**outside, "id": 11, "image_id": 7})
    found = import_export.read_into(once, united, json.dumps(coco).encode(), 0)
    assert found.masks == 1
    assert found.skipped == ["dog: there is no such class", "400000×400 pixels do not fit an image of 40×30"]
    np.testing.assert_array_equal(united.read("", 0, SIZE), some_mask(1) | some_mask(2))


def test_where_a_transform_looks() -> None:
    loaded = models.load("torchvision/resnet18", num_classes=2)
    left, top, right, bottom = seen_box(loaded, (500, 300))
    # The short side becomes 256 pixels, and 224 of them are cut out of the middle.
    assert (right - left, bottom - top) == pytest.approx((262.5, 262.5), abs=2)
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx((250, 150), abs=1.5)
    assert seen_box(models.load(), (64, 64)) == pytest.approx((0, 0, 64, 64), abs=0.5)


# ---------------------------------------------------------------------------- the server


class Served:
    """A server, and raw requests to it."""

    def __init__(self, process: Any, address: str, out: Path) -> None:
        parts = urlsplit(address)
        assert parts.port is not None
        self.process, self.port, self.out = process, parts.port, out
        self.token = parts.query.removeprefix("token=")

    def ask(
        self, path: str, method: str = "GET", body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {"X-Token": self.token, **named})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content

    def alive(self) -> bool:
        return self.process.poll() is None and self.ask("/api/state")[0] == 200

    def files(self) -> list[str]:
        return sorted(path.name for path in self.out.rglob("*"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    for name in ("one", "two"):
        picture(folder / "images" / f"{name}.png", seed=len(name))
    (folder / "secret.txt").write_text("secret")
    with annotating(folder / "images", "--out", folder / "masks") as (process, address):
        yield Served(process, address, folder / "masks")


def packed(mask: npt.NDArray[np.bool_]) -> bytes:
    return np.packbits(mask).tobytes()


def test_a_mask_is_kept_and_given_back(served: Served) -> None:
    status, content = served.ask("/api/mask/0/0", "PUT", packed(some_mask()))
    assert (status, json.loads(content)) == (200, {"painted": [0], "done": 1})
    np.testing.assert_array_equal(np.asarray(Image.open(served.out / "one.png")) > 0, some_mask())
    assert served.ask("/api/mask/0/0") == (200, packed(some_mask()))
    assert served.ask("/api/mask/1/0") == (204, b"")
    assert json.loads(served.ask("/api/next/0")[1]) == {"sheet": 1}
    status, content = served.ask("/api/image/0")
    assert status == 200
    assert content[:2] == b"\xff\xd8"  # JPEG
    assert json.loads(served.ask("/api/coco")[1])["images"][0]["file_name"] == "one.png"
    page = served.ask(f"/?token={served.token}", X_Token="")[0]
    assert page == 403  # two tokens
    assert served.ask("/")[1].startswith(b"<!doctype html>")


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/api/state", {"X_Token": "guessed"}, 403),
        ("/api/state", {"X_Token": ""}, 403),
        ("/?token=guessed", {"X_Token": "guessed"}, 403),
        ("/api/state", {"Host": "evil.example"}, 403),
        ("/api/state", {"Host": "127.0.0.1:1"}, 403),
        ("/api/state", {"Origin": "http://evil.example"}, 403),
        ("/api/state", {"Origin": "null"}, 403),
        ("/../secret.txt", {}, 404),
        ("/%2e%2e/secret.txt", {}, 404),
        ("/api/image/../../secret.txt", {}, 404),
        ("/api/image/7", {}, 404),
        ("/api/mask/0/3", {}, 404),
        ("/api/mask/-1/0", {}, 404),
        ("/api/map/0/0/before", {}, 404),
        ("/api/part/0/0", {}, 404),
        ("/api/tuning", {}, 404),
        ("/page/app.js", {}, 404),
    ],
)
def test_what_is_refused(served: Served, path: str, headers: dict[str, str], status: int) -> None:
    found, content = served.ask(path, **headers)
    assert found == status, content
    assert b"secret" not in content
    assert served.alive()


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil"}, {"X_Token": "no"}])
def test_nothing_is_written_for_strangers(served: Served, headers: dict[str, str]) -> None:
    before = served.files()
    assert served.ask("/api/mask/1/0", "PUT", packed(some_mask()), **headers)[0] == 403
    assert served.files() == before


@pytest.mark.parametrize(
    ("method", "path", "body", "message"),
    [
        ("PUT", "/api/mask/1/0", b"", "150 bytes, not 0"),
        ("PUT", "/api/mask/1/0", b"x" * 151, "150 bytes, not 151"),
        ("POST", "/api/import/1", b"{", "not valid JSON"),
        ("POST", "/api/import/1", b'{"a": 1, "a": 2}', "occurs twice"),
        ("POST", "/api/import/1", b"[" * 100_000, "not valid JSON"),
        ("POST", "/api/import/1", b'{"shapes": 3}', "the file has no 'imageHeight'"),
        ("POST", "/api/import/1", b"\xff\xfe", "UTF-8"),
    ],
)
def test_bad_bodies(served: Served, method: str, path: str, body: bytes, message: str) -> None:
    before = served.files()
    status, content = served.ask(path, method, body)
    assert status == 400
    assert message in json.loads(content)["error"]
    assert served.files() == before
    assert served.alive()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_a_gigabyte(served: Served, chunked: bool) -> None:
    before, size = served.files(), 2**30
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
        head = f"PUT /api/mask/1/0 HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nX-Token: {served.token}\r\n"
        connection.sendall(f"{head}{length}\r\n\r\n".encode())
        block = b"x" * 2**20
        block = f"{len(block):x}\r\n".encode() + block + b"\r\n" if chunked else block
        sent = 0
        try:
            while sent < size:
                connection.sendall(block)
                sent += len(block)
        except OSError:
            pass  # it hung up, as it should
        assert sent < size / 4
    assert served.files() == before
    assert served.alive()


def test_killed_at_any_moment(tmp_path: Path) -> None:
    size = (400, 400)
    picture(tmp_path / "images" / "one.png", size)
    for wait in (0.0, 0.01, 0.03):
        with annotating(tmp_path / "images", "--out", tmp_path / "masks") as (process, address):
            served = Served(process, address, tmp_path / "masks")
            assert served.ask("/api/mask/0/0", "PUT", packed(some_mask(1, size)))[0] == 200
            connection = http.client.HTTPConnection("127.0.0.1", served.port)
            connection.request("PUT", "/api/mask/0/0", packed(some_mask(2, size)), {"X-Token": served.token})
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            process.wait()
            connection.close()
        mask = np.asarray(Image.open(tmp_path / "masks" / "one.png")) > 0
        assert any((mask == some_mask(seed, size)).all() for seed in (1, 2))


def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "one.png")
    with annotating(tmp_path / "images", "--out", tmp_path / "masks") as (process, address):
        assert Served(process, address, tmp_path).alive()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_without_a_model_no_torch_is_loaded(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "one.png")
    with annotating(tmp_path / "images", "--out", tmp_path / "masks") as (process, _):
        maps = Path(f"/proc/{process.pid}/maps")
        if not maps.exists():
            pytest.skip("needs /proc to see what a process has loaded")
        assert "libtorch" not in maps.read_text()


# ------------------------------------------------------------------------------ the command


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["annotate", *map(str, arguments), "--no-browser"])


def test_mistakes(tmp_path: Path) -> None:
    image, out = picture(tmp_path / "one.png"), tmp_path / "masks"
    (tmp_path / "classes.txt").write_text("a/b\n")
    (tmp_path / "none.txt").write_text("\n\n")
    (tmp_path / "fish.txt").write_text("fish\n")
    (tmp_path / "file").write_text("x")
    for arguments, message in (
        ((), "nothing to paint on"),
        ((tmp_path / "no.png",), "path does not exist"),
        ((image, "--classes", tmp_path / "classes.txt"), "cannot be the name of a file"),
        ((image, "--classes", tmp_path / "none.txt"), "names no class"),
        ((image, "--data", tmp_path), "--data is for fine-tuning"),
        ((image, "--template", tmp_path / "no.png"), "does not exist"),
        ((image, "--checkpoint", models.EMBEDDED, "--classes", tmp_path / "fish.txt"), "none of the classes"),
        (
            (image, "--checkpoint", models.EMBEDDED, "--data", tmp_path),
            "a question for each class: give the answers by --labels",
        ),
        ((image, "--checkpoint", models.EMBEDDED, "--source", "grad_can"), "grad_cam"),
        ((image, "--host", "256.1.1.1"), "cannot listen at"),
    ):
        found = invoke(*arguments, "--out", out, "--port", "0")
        assert found.exit_code != 0
        assert message in found.output, (arguments, found.output)
    found = invoke(image, "--out", tmp_path / "file", "--port", "0")
    assert "cannot be a folder of masks" in found.output
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = invoke(image, "--out", out, "--port", taken.getsockname()[1])
        assert "Choose another --port" in found.output


def test_another_address_needs_asking_and_warns(tmp_path: Path) -> None:
    image = picture(tmp_path / "one.png")
    with annotating(image, "--out", tmp_path / "masks", "--host", "0.0.0.0") as (process, address):
        served = Served(process, address, tmp_path / "masks")
        assert served.alive()
        assert "0.0.0.0" not in address
        assert served.ask("/api/state", Host=f"192.0.2.7:{served.port}")[0] == 200
        assert served.ask("/api/state", Host=f"evil.example:{served.port}")[0] == 403
        assert served.ask("/api/state", Origin=f"http://192.0.2.7:{served.port}")[0] == 403
        process.send_signal(signal.SIGINT)
        process.wait(20)
        assert process.stderr is not None
        assert "Warning: at 0.0.0.0 everyone in the network" in process.stderr.read()


def test_it_needs_what_the_extra_brings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    found = invoke(picture(tmp_path / "one.png"), "--out", tmp_path / "masks")
    assert "pip install 'attnguide[ui]'" in found.output
    assert not (tmp_path / "masks").exists()


# ------------------------------------------------------------------------- parts of faces


def test_parts_that_a_parser_finds(tmp_path: Path) -> None:
    face = ProceduralFaces(1, seed=3)[0]
    to_pil(face.image).save(tmp_path / "face.png")
    sheets = find_sheets([str(tmp_path / "face.png")], None, tmp_path / "masks-of-it")
    parts = ParsedParts(sheets)
    mouth = parts.mask(0, parts.names.index("mouth"))
    truth = merged(face.segmentation.as_subclass(torch.Tensor)).numpy() == parts.names.index("mouth")
    assert (mouth & truth).sum() / (mouth | truth).sum() > 0.5


def test_parts_between_landmarks(tmp_path: Path) -> None:
    points = torch.rand(2, 68, 2, generator=torch.Generator().manual_seed(1)) * 4 + 30
    square = torch.tensor([[10.0, 40], [30, 40], [30, 48], [10, 48]])
    points[:, 48:60] = square.repeat(3, 1)
    points[1] += 2
    points[:, 36:42] = torch.tensor([10.0, 20.0])
    points[:, 42:48] = torch.tensor([30.0, 20.0])
    paths = [picture(tmp_path / f"{name}.png", (60, 50)) for name in ("a", "b")]
    picture(tmp_path / "c.png", (60, 50))
    LandmarkTable(("a.png", "b.png"), points).save(tmp_path / "table.npz")
    lost = LandmarkParts(
        find_sheets([str(tmp_path / "c.png")], None, tmp_path / "masks-of-it"), tmp_path / "table.npz"
    )
    mouth = lost.names.index("mouth")
    y, x = np.mgrid[:60, :50] + 0.5
    for kind, offset in ((None, 0), ("average", 1)):
        sheets = find_sheets(list(map(str, paths)), kind, tmp_path / "masks-of-it")
        found = LandmarkParts(sheets, tmp_path / "table.npz").mask(0, mouth)
        inside = (x > 10 + offset) & (x < 30 + offset) & (y > 40 + offset) & (y < 48 + offset)
        assert found[inside].all()
        assert inside.sum() < found.sum() < inside.sum() + 90  # by the margin of 1.2 pixels
    with pytest.raises(DataError, match=r"no landmarks of c\.png"):
        lost.mask(0, mouth)


# --------------------------------------------------------------------------- fine-tuning


def test_answers_of_attributes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / "images" / f"{name}.png")
    table = tmp_path / "labels.csv"
    table.write_text("file,Big_Nose,hat\na.png,1,-1\n\nb.png, 0,\n")
    found = read_answers(table, tmp_path / "images", ["hat", "smile", "big nose"])
    assert [each.path.name for each in found] == ["a.png", "b.png"]
    assert str(found[0].answer) == "(0.0, nan, 1.0)"
    assert str(found[1].answer) == "(nan, nan, 0.0)"
    for text, message in (
        ("file,hat\n", "tells nothing"),
        ("file,cap\na.png,1\n", "cap"),
        ("file,hat\na.png,yes\n", "line 2: expected a file and 1 answers"),
        ("file,hat\na.png,1,0\n", "line 2"),
        ("file,hat\nc.png,1\nd.png,1\n", r"c\.png, which is no file, and of 1 more"),
    ):
        table.write_text(text)
        with pytest.raises((DataError, UnknownNameError), match=message):
            read_answers(table, tmp_path / "images", ["hat", "smile"])


@pytest.mark.slow
@pytest.mark.parametrize("multi_label", [False, True])
def test_fine_tuning_raises_the_overlap(tmp_path: Path, multi_label: bool) -> None:
    faces = ProceduralFaces(48, seed=2, prevalence={"lipstick": 0.5}).stack()
    lipstick = faces.attributes[:, ATTRIBUTES.index("lipstick")].long().tolist()
    paths = []
    for number, image in enumerate(faces.image):
        paths.append(tmp_path / f"{number}.png")
        to_pil(image).save(paths[-1])
    classes = ["mole", "lipstick"] if multi_label else ["bare", "lipstick"]
    store = MaskStore(tmp_path / "masks", classes, template=True)
    side = faces.image.shape[-1]
    for cls in range(2):
        store.write("", cls, (template("mouth", side) > 0.5).numpy())
    checkpoint = tmp_path / "model.safetensors"
    write_embedded(
        checkpoint,
        small_cnn(2, width=8).eval(),
        classes=classes,
        size=side,
        width=8,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        multi_label=multi_label,
    )
    loaded = models.embedded(checkpoint)
    answers = [
        Answered(p, (float("nan"), float(y)) if multi_label else y)
        for p, y in zip(paths, lipstick, strict=True)
    ]
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    given: list[models.LoadedModel] = []
    out = tmp_path / "masks" / "finetuned.safetensors"
    tuning = FineTuning(loaded, answers, tmp_path / "masks", torch.device("cpu"), given.append, checkpoint)
    tuning.start(epochs=6, weight=1.0, learning_rate=3e-3)
    tuning.wait(120)
    progress = tuning.progress
    assert (progress.state, progress.error) == ("done", "")
    assert progress.step == progress.steps
    assert [epoch.number for epoch in progress.epochs] == list(range(7))
    first, last = progress.epochs[0].iou, progress.epochs[-1].iou
    assert first is not None
    assert last is not None
    assert last > first + 0.05
    json.dumps(progress.as_dict(), allow_nan=False)
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    weights = load_file(out)
    assert models.embedded(out).classes == tuple(classes)
    assert all(torch.equal(value, weights[name]) for name, value in given[0].model.state_dict().items())
    with pytest.raises(InputError, match="learning_rate=0"):
        tuning.start(epochs=1, weight=1.0, learning_rate=0)


def test_a_fine_tuning_that_cannot_be(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{n}.png") for n in range(4)]
    loaded = models.load("torchvision/squeezenet1_1", num_classes=2)
    images = [Answered(path, n % 2) for n, path in enumerate(paths)]
    (tmp_path / "masks").mkdir()
    tuning = FineTuning(loaded, images, tmp_path / "masks", torch.device("cpu"), print)
    tuning.start(epochs=1, weight=1.0, learning_rate=1e-3)
    tuning.wait(60)
    assert tuning.progress.state == "failed"
    assert "holds no mask" in tuning.progress.error
    with pytest.raises(InputError, match="at least two"):
        FineTuning(loaded, images[:1], tmp_path, torch.device("cpu"), print)
