"""The page of `attnguide annotate` in Chromium; masks are compared with ones that numpy draws."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.measure import grid_points_in_poly
from tests.helpers.browser import annotating, browser, needs_browser
from torchvision.transforms.functional import to_pil_image

from attnguide.data.procedural.faces import ATTRIBUTES, ProceduralFaces
from attnguide.models import write_embedded
from attnguide.models.networks import small_cnn

pytestmark = [needs_browser, pytest.mark.slow]

Mask = npt.NDArray[np.bool_]


class Page:
    """The page, driven by pointer and keys in pixels of the image."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver = driver
        for kind in ("browser", "performance"):
            driver.get_log(kind)  # what came before is not this page's
        self.open(address)

    def open(self, address: str) -> None:
        self.driver.get(address)
        self.until(lambda: self.js("return document.body.dataset.ready === 'true'"))
        self.open_view()

    def open_view(self) -> None:
        """See where the image lies."""
        self.canvas = self.find("canvas")
        frame = self.js("return arguments[0].getBoundingClientRect().toJSON()", self.canvas)
        self.scale, left, top = (
            float(self.canvas.get_attribute(f"data-{name}") or 0) for name in ("scale", "left", "top")
        )
        self.origin = frame["left"] + left, frame["top"] + top

    def js(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def find(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def until(self, holds: Callable[[], Any], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, self.driver.get_log("browser")
            time.sleep(0.05)

    def tool(self, name: str) -> None:
        self.driver.find_element("css selector", f"[data-tool={name}]").click()

    def screen(self, x: float, y: float) -> tuple[int, int]:
        """Whole pixels of the window, which is what a pointer has."""
        return round(self.origin[0] + x * self.scale), round(self.origin[1] + y * self.scale)

    def seen(self, x: float, y: float) -> tuple[float, float]:
        """Where on the image such a pixel lies."""
        a, b = self.screen(x, y)
        return (a - self.origin[0]) / self.scale, (b - self.origin[1]) / self.scale

    def drag(self, *points: tuple[float, float]) -> None:
        self.drag_unsaved(*points)
        self.saved()

    def drag_unsaved(self, *points: tuple[float, float]) -> None:
        from selenium.webdriver.common.actions.action_builder import ActionBuilder

        actions = ActionBuilder(self.driver, duration=0)
        actions.pointer_action.move_to_location(*self.screen(*points[0])).pointer_down()
        for point in points[1:]:
            actions.pointer_action.move_to_location(*self.screen(*point))
        actions.pointer_action.pointer_up()
        actions.perform()

    def click(self, *points: tuple[float, float]) -> None:
        for point in points:
            self.drag(point)

    def keys(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()
        self.saved()

    def chord(self, held: str, key: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).key_down(held).send_keys(key).key_up(held).perform()
        self.saved()

    def press(self, name: str) -> None:
        self.find(name).click()
        self.saved()

    def saved(self) -> None:
        self.until(lambda: self.find("saved").text == "Saved")

    def check_alone(self, address: str) -> None:
        """Nothing was complained about, and nothing but the server was asked."""
        assert self.driver.get_log("browser") == []
        own = address.split("?")[0]
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = {
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        }
        assert asked
        assert all(url.startswith((own, "data:", "blob:")) for url in asked), asked


def test_the_token_leaves_the_address_bar_and_a_reload_works(driver: Any, tmp_path: Path) -> None:
    picture(tmp_path / "one.png", 60, 40)
    with annotating(tmp_path / "one.png", "--out", tmp_path / "masks") as (_, address):
        page = Page(driver, address)
        own = address.split("?")[0]
        assert driver.current_url == own
        driver.refresh()
        page.until(lambda: page.js("return document.body.dataset.ready === 'true'"))
        assert driver.current_url == own


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser() as found:
        yield found


def picture(path: Path, width: int, height: int, seed: int = 0) -> Path:
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def on_disk(path: Path) -> Mask:
    values = np.asarray(Image.open(path))
    assert set(np.unique(values)) <= {0, 255}
    return values > 0


def strokes(shape: tuple[int, int], points: list[tuple[float, float]], radius: float) -> Mask:
    """Pixels whose centre is within the radius of a line, and those that were pointed at."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    inside = np.zeros(shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(points, points[1:] or points, strict=False):
        dx, dy = bx - ax, by - ay
        along = ((x - ax) * dx + (y - ay) * dy) / max(dx * dx + dy * dy, 1e-300)
        along = np.clip(along, 0, 1)
        inside |= np.hypot(x - ax - along * dx, y - ay - along * dy) <= radius
    for px, py in points:
        inside[int(py), int(px)] = True
    return inside


def polygon(shape: tuple[int, int], points: list[tuple[float, float]]) -> Mask:
    found: Mask = grid_points_in_poly(shape, [(y - 0.5, x - 0.5) for x, y in points])
    return found


def test_painting_is_exact_and_lasts(driver: Any, tmp_path: Path) -> None:
    image, out = picture(tmp_path / "one.png", 200, 160), tmp_path / "masks"
    (tmp_path / "classes.txt").write_text("mouth\nright eye\n")
    with annotating(image, "--classes", tmp_path / "classes.txt", "--out", out) as (_, address):
        page = Page(driver, address)
        page.js("document.getElementById('size').value = 20; showSize()")
        line = [(50.0, 40.0), (110.0, 40.0), (110.0, 90.0)]
        page.drag(*line)
        file = out / "mouth" / "one.png"
        painted = strokes((160, 200), [page.seen(*p) for p in line], 10)
        np.testing.assert_array_equal(on_disk(file), painted)

        page.tool("eraser")
        page.drag((80, 30), (80, 60))
        erased = painted & ~strokes((160, 200), [page.seen(80, 30), page.seen(80, 60)], 10)
        np.testing.assert_array_equal(on_disk(file), erased)

        page.press("undo")
        np.testing.assert_array_equal(on_disk(file), painted)
        page.press("redo")
        np.testing.assert_array_equal(on_disk(file), erased)
        page.chord("\ue009", "z")
        np.testing.assert_array_equal(on_disk(file), painted)

        corners = [(20.3, 100.2), (90.4, 110.0), (60.0, 150.0), (30.0, 140.0)]
        page.tool("polygon")
        page.click(*corners)
        page.keys("\ue007")
        whole = painted | polygon((160, 200), [page.seen(*p) for p in corners])
        np.testing.assert_array_equal(on_disk(file), whole)

        page.keys("2")
        page.tool("rectangle")
        page.drag((120, 100), (180, 140))
        (a, b), (c, d) = page.seen(120, 100), page.seen(180, 140)
        y, x = np.mgrid[:160, :200] + 0.5
        box = (a < x) & (x < c) & (b < y) & (y < d)
        np.testing.assert_array_equal(on_disk(out / "right eye" / "one.png"), box)
        page.tool("ellipse")
        page.drag((20, 20), (70, 50))
        (a, b), (c, d) = page.seen(20, 20), page.seen(70, 50)
        round_ = ((x - (a + c) / 2) / ((c - a) / 2)) ** 2 + ((y - (b + d) / 2) / ((d - b) / 2)) ** 2 <= 1
        np.testing.assert_array_equal(on_disk(out / "right eye" / "one.png"), box | round_)
        page.tool("fill")
        page.click((5, 150))
        assert on_disk(out / "right eye" / "one.png").all()

        page.open(address)
        page.keys("1")
        page.until(lambda: page.js("return mask !== null"))
        shown = page.js("return Array.from(mask)")
        np.testing.assert_array_equal(np.array(shown, dtype=bool).reshape(160, 200), whole)
        page.press("clear")
        assert not file.exists()
        page.press("undo")
        np.testing.assert_array_equal(on_disk(file), whole)
        page.check_alone(address)
    assert json.loads((out / "masks.json").read_text())["classes"] == ["mouth", "right eye"]


def test_with_keys_alone(driver: Any, tmp_path: Path) -> None:
    out = tmp_path / "masks"
    with annotating(picture(tmp_path / "one.png", 64, 48), "--out", out) as (_, address):
        page = Page(driver, address)
        page.js("document.getElementById('canvas').focus()")
        page.keys("r", "\ue014")  # the cross appears in the middle, at 32.5, 24.5
        page.keys(*["\ue012"] * 8, " ", *["\ue014"] * 6, *["\ue015"] * 4, " ")
        expected = np.zeros((48, 64), dtype=bool)
        expected[24:29, 24:31] = True  # all pixels that the cross stood on
        np.testing.assert_array_equal(on_disk(out / "one.png"), expected)
        page.chord("\ue009", "z")
        assert not (out / "one.png").exists()
        page.check_alone(address)


def test_fingers(driver: Any, tmp_path: Path) -> None:
    """One finger paints, two move and zoom."""
    out = tmp_path / "masks"
    with annotating(picture(tmp_path / "one.png", 200, 160), "--out", out) as (_, address):
        page = Page(driver, address)

        def touch(kind: str, *points: tuple[float, float]) -> None:
            places = [
                {"id": number, "x": x, "y": y}
                for number, (x, y) in enumerate(page.screen(*point) for point in points)
            ]
            page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})

        page.js("document.getElementById('size').value = 20; showSize()")
        touch("touchStart", (50, 40))
        touch("touchMove", (110, 40))
        touch("touchEnd")
        page.saved()
        painted = strokes((160, 200), [page.seen(50, 40), page.seen(110, 40)], 10)
        np.testing.assert_array_equal(on_disk(out / "one.png"), painted)
        touch("touchStart", (80, 80), (100, 80))
        touch("touchMove", (70, 80), (110, 80))
        touch("touchEnd")
        assert float(page.canvas.get_attribute("data-scale")) == pytest.approx(2 * page.scale, rel=0.02)
        np.testing.assert_array_equal(on_disk(out / "one.png"), painted)
        page.check_alone(address)


def test_nothing_is_painted_into_another_mask(driver: Any, tmp_path: Path) -> None:
    """Whatever is done while the next mask is under way, it is not done to the last one."""
    folder, out = tmp_path / "images", tmp_path / "masks"
    folder.mkdir()
    for number in range(4):
        picture(folder / f"{number}.png", 40 + number, 30, number)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with annotating(folder, "--classes", tmp_path / "classes.txt", "--out", out) as (_, address):
        page = Page(driver, address)
        page.tool("rectangle")
        page.drag((5, 5), (20, 20))
        first = on_disk(out / "a" / "0.png")
        page.js(
            "const real = fetch; window.fetch = async (...asked) => {"
            " if (!asked[1].method) await new Promise((done) => setTimeout(done, 400));"
            " return real(...asked); }"
        )
        page.keys("2", "i", "e", "\ue00f", "i", "\ue017")
        page.drag((5, 5), (20, 20))
        page.until(lambda: page.js("return mask !== null"))
        assert not (out / "b").exists()
        np.testing.assert_array_equal(on_disk(out / "a" / "0.png"), first)
        page.keys("\ue00f", "\ue00f", "1")
        page.until(lambda: page.find("name").text.startswith("3.png"))
        page.until(lambda: page.js("return mask !== null"))
        assert page.find("number").get_attribute("value") == "4"
        assert page.js("return cls") == 0
        assert sorted(path.name for path in out.rglob("*.png")) == ["0.png"]


def test_a_mask_that_is_refused_does_not_stop_the_others(driver: Any, tmp_path: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "masks"
    folder.mkdir()
    for number in range(2):
        picture(folder / f"{number}.png", 40, 30, number)
    with annotating(folder, "--out", out) as (_, address):
        page = Page(driver, address)
        (out / "0.png").symlink_to(tmp_path / "elsewhere.png")
        page.tool("rectangle")
        page.drag_unsaved((5, 5), (20, 20))
        page.until(lambda: "leads out of" in page.find("problem").text)
        assert page.find("saved").text == "Not saved"
        page.find("next").click()
        page.until(lambda: page.find("name").text.startswith("1.png") and page.js("return mask !== null"))
        page.drag((5, 5), (20, 20))
        assert (out / "1.png").exists()
        assert not (tmp_path / "elsewhere.png").exists()


def test_an_image_that_cannot_be_read_is_passed_by(driver: Any, tmp_path: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "masks"
    folder.mkdir()
    (folder / "0.png").write_bytes(b"no image")
    picture(folder / "1.png", 40, 30)
    with annotating(folder, "--out", out) as (_, address):
        page = Page(driver, address)
        assert "0.png" in page.find("problem").text
        page.keys("\ue00f")
        page.until(lambda: page.find("name").text.startswith("1.png") and page.js("return mask !== null"))
        page.open_view()
        page.tool("rectangle")
        page.drag((5, 5), (20, 20))
        assert on_disk(out / "1.png").any()


def test_walking_through_images(driver: Any, tmp_path: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "masks"
    folder.mkdir()
    for number in range(5):
        picture(folder / f"{number}.png", 40 + number, 30, number)
    (folder / "2.png").write_bytes(b"no image")
    with annotating(folder, "--out", out) as (_, address):
        page = Page(driver, address)
        page.tool("rectangle")
        for number in (0, 1):
            page.until(lambda n=number: page.find("name").text.startswith(f"{n}.png"))
            page.open(address)
            page.tool("rectangle")
            page.drag((5, 5), (20, 20))
            assert on_disk(out / f"{number}.png").shape == (30, 40 + number)
            page.keys("n")
        page.until(lambda: "cannot be" in page.find("problem").text or "2.png" in page.find("problem").text)
        page.keys("\ue00f")
        page.until(lambda: page.find("name").text.startswith("3.png"))
        assert page.find("done").text == "2 of 5 painted"


def test_what_the_model_looks_at_and_fine_tuning(driver: Any, tmp_path: Path) -> None:
    data, out = tmp_path / "faces", tmp_path / "masks"
    checkpoint = faces(data, tmp_path / "lips.safetensors")
    options = ("--template", "average", "--checkpoint", checkpoint, "--data", data, "--out", out)
    with annotating(data, *options) as (_, address):
        page = Page(driver, address)
        page.until(lambda: "%" in page.find("overlap").text)
        assert page.js("return Boolean(view.heat)")
        before = share(page)
        for key in ("1", "2"):
            page.keys(key)
            page.tool("ellipse")
            page.drag((21, 40), (43, 53))
        page.until(lambda: share(page) > before)
        page.js("document.getElementById('rate').value = 0.003; document.getElementById('epochs').value = 4")
        page.press("tune")
        page.until(lambda: page.find("tuned").text.startswith("Done"))
        page.until(lambda: page.find("pair").is_displayed())
        page.until(lambda: share(page) > before)
        rows = page.js("return [...document.querySelectorAll('#epochtable tbody tr')].map(r => r.innerText)")
        assert len(rows) == 5
        overlaps = [float(row.split()[-1]) for row in rows]
        assert overlaps[-1] > overlaps[0]
        assert (out / "finetuned.safetensors").is_file()
        page.js("document.getElementById('epochs').value = 500")
        page.press("tune")
        page.until(lambda: page.find("stop").is_displayed())
        page.press("stop")
        page.until(lambda: page.find("tuned").text.startswith("Stopped"))
        page.check_alone(address)


def share(page: Page) -> float:
    text = page.find("overlap").text
    return float(text.split("%")[0]) if "%" in text else 0.0


def faces(folder: Path, checkpoint: Path) -> Path:
    """Drawn faces with and without lipstick, and a network that looks for make-up elsewhere too."""
    drawn = ProceduralFaces(
        80,
        seed=1,
        cooccurrence={("lipstick", "heavy_makeup"): 0.97},
        prevalence={"lipstick": 0.5, "heavy_makeup": 0.5},
    ).stack()
    images = drawn.image.as_subclass(torch.Tensor)
    labels = drawn.attributes[:, ATTRIBUTES.index("lipstick")].long()
    model = small_cnn(2, width=8)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(15):
        for some in torch.randperm(len(images)).split(16):
            loss = F.cross_entropy(model((images[some] - 0.5) / 0.25), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    write_embedded(
        checkpoint,
        model.eval(),
        classes=["bare", "lipstick"],
        size=images.shape[-1],
        width=8,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        multi_label=False,
    )
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / ("lipstick" if label else "bare")
        place.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(place / f"{number}.png")
    return checkpoint
