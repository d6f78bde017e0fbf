"""Painted masks are files that the priors read, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.plugins.gradcam_iou.helpers import SIZE, some_mask

from attnguide.errors import DataError, InputError
from attnguide.masks import MaskFolder, load_template
from attnguide.priors.mask import MaskPrior
from attnguide_gradcam_iou.painting.store import MaskStore, recorded_classes


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
    with pytest.raises(InputError, match="lists masks for cat"):
        MaskStore(tmp_path, ["dog"], template=True)
    with pytest.raises(InputError, match="two classes are called"):
        MaskStore(tmp_path, ["Cat", "cat"], template=True)
    (tmp_path / "masks.json").write_text("{}")
    with pytest.raises(DataError, match="does not list the classes"):
        recorded_classes(tmp_path)


def test_masks_of_other_tools(tmp_path: Path) -> None:
    """A mask that was put into the folder is read as everywhere; one that is not the image's is refused."""
    labels = np.zeros((40, 60), dtype=np.uint8)
    labels[10:20, 10:30] = 1
    image = Image.fromarray(labels, "L").convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0])
    image.save(tmp_path / "a.png")
    Image.fromarray(np.where(labels, 7, labels * 0 + (np.arange(60) > 50))).convert("L").save(
        tmp_path / "b.png"
    )
    store = MaskStore(tmp_path, [], template=False)
    np.testing.assert_array_equal(store.read("a", 0), labels == 1)
    np.testing.assert_array_equal(store.read("a", 0, (20, 30)), labels[::2, ::2] == 1)
    with pytest.raises(DataError, match=r"a\.png has 60×40 pixels, but its image has 40×60"):
        store.read("a", 0, (60, 40))
    with pytest.raises(DataError, match=r"b\.png has 3 values"):
        store.read("b", 0)
