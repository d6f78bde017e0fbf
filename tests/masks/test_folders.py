from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from skimage.draw import polygon2mask

from attnguide.errors import DataError, InputError, UnknownNameError
from attnguide.masks import MaskFolder, load_template, read_coco, read_labelme, read_mask
from attnguide.masks._shapes import Circle, Polygon, RunLengths
from attnguide.masks.class_names import ClassNames, resize

CLASSES = ["Smiling", "Wearing_Lipstick", "Bald"]


def paint(path, values, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = values if isinstance(values, Image.Image) else Image.fromarray(np.asarray(values, dtype=np.uint8))
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def region(height=4, width=6, rows=slice(0, 2), columns=slice(0, 3), value=255):
    values = np.zeros((height, width), dtype=np.uint8)
    values[rows, columns] = value
    return values


def write(path, document):
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


# One mask -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P"])
def test_luminance(tmp_path, mode):
    mask = read_mask(paint(tmp_path / "a.png", region(), mode))
    assert mask.dtype == torch.float32
    assert np.array_equal(mask, region() / 255)


def test_grey_is_graded(tmp_path):
    grey = np.array([[0, 51, 255]], dtype=np.uint8)
    assert np.allclose(read_mask(paint(tmp_path / "a.png", grey)), grey / 255)
    deep = Image.fromarray(np.array([[0, 13107, 65535]], dtype=np.uint16))
    assert np.allclose(read_mask(paint(tmp_path / "b.png", deep)), grey / 255)


def test_opacity_wins_whatever_the_colour(tmp_path):
    rgba = np.zeros((1, 3, 4))
    rgba[0, :, 3] = 0, 51, 255
    assert np.allclose(read_mask(paint(tmp_path / "a.png", rgba)), [[0, 0.2, 1]])


def test_full_opacity_says_nothing(tmp_path):
    rgba = np.stack([region()] * 3 + [np.full((4, 6), 255)], axis=-1)
    assert np.array_equal(read_mask(paint(tmp_path / "a.png", rgba)), region() / 255)


def test_transparent_palette_entry(tmp_path):
    image = Image.fromarray(region(value=1))
    image.putpalette([255, 255, 255, 0, 0, 0])
    assert np.array_equal(read_mask(paint(tmp_path / "a.png", image, transparency=0)), region() / 255)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_labels_0_and_1(tmp_path, dtype):
    image = Image.fromarray(region(value=1).astype(dtype))
    assert np.array_equal(read_mask(paint(tmp_path / "a.png", image)), region() / 255)


def test_mask_that_is_no_image(tmp_path):
    with pytest.raises(DataError, match=r"a\.png"):
        read_mask(write(tmp_path / "a.png", "hello"))


def test_shrinking_averages_and_growing_repeats():
    mask = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    assert resize(mask, (1, 2)).tolist() == [[0.75, 0.0]]
    assert torch.equal(resize(mask, (4, 8)), mask.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert resize(mask, 3).shape == (3, 3)
    assert resize(mask, None) is mask


@pytest.mark.parametrize("size", [0, -1, (0, 3), (1, 2, 3), (1.5, 2), "ab"])
def test_sizes_that_are_none(tmp_path, size):
    with pytest.raises(InputError, match="size must be"):
        read_mask(paint(tmp_path / "a.png", region()), size)


# Templates ----------------------------------------------------------------------------------------------


def test_folder_template(tmp_path):
    paint(tmp_path / "wearing lipstick.png", region(rows=slice(2, 4)))
    paint(tmp_path / "SMILING.PNG", region())
    (tmp_path / "notes.txt").write_text("painted by hand")
    paint(tmp_path / "._Bald.png", region())
    masks, painted = load_template(tmp_path, CLASSES)
    assert painted == ("Smiling", "Wearing_Lipstick")
    assert np.array_equal(masks[0], region() / 255)
    assert np.array_equal(masks[1], region(rows=slice(2, 4)) / 255)
    assert masks[2].isnan().all()
    assert masks.shape == (3, 4, 6)


def test_folder_of_several_sizes(tmp_path):
    paint(tmp_path / "Bald.png", region())
    paint(tmp_path / "Smiling.png", region(8, 12, slice(0, 4), slice(0, 6)))
    masks, _ = load_template(tmp_path, CLASSES)
    assert torch.equal(masks[0], masks[2])
    assert load_template(tmp_path, CLASSES, 2).masks.shape == (3, 2, 2)
    assert load_template(tmp_path, CLASSES, (5, 9)).masks.shape == (3, 5, 9)


def test_folder_names_an_unknown_class(tmp_path):
    paint(tmp_path / "Smilling.png", region())
    with pytest.raises(UnknownNameError, match=r"Smilling\.png.*Did you mean 'Smiling'"):
        load_template(tmp_path, CLASSES)


def test_folder_without_a_template(tmp_path):
    with pytest.raises(DataError, match="holds no image"):
        load_template(tmp_path, CLASSES)
    paint(tmp_path / "Bald.png", region())
    paint(tmp_path / "bald.png", region())
    with pytest.raises(DataError, match="both for 'Bald'"):
        load_template(tmp_path, CLASSES)
    with pytest.raises(InputError, match="Leave it out"):
        load_template(tmp_path, CLASSES, legend=tmp_path / "legend.json")
    with pytest.raises(DataError, match="does not exist"):
        load_template(tmp_path / "nothing", CLASSES)


def test_empty_region_in_a_folder(tmp_path):
    paint(tmp_path / "Bald.png", region(value=0))
    with pytest.raises(DataError, match=r"Bald\.png: the region of 'Bald' is empty"):
        load_template(tmp_path, CLASSES)


@pytest.mark.parametrize("classes", [[], "Bald"])
def test_classes_that_are_none(tmp_path, classes):
    paint(tmp_path / "Bald.png", region())
    with pytest.raises(InputError, match="classes must be"):
        load_template(tmp_path, classes)


LABELS = np.array([[0, 1, 1, 2], [0, 3, 3, 2]])
PALETTE = [0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255]
LEGENDS = {
    ".json": '{"1": "smiling", "2": ["Bald", "Smiling"], "3": "wearing lipstick", "0": []}',
    ".toml": '1 = "smiling"\n2 = ["Bald", "Smiling"]\n3 = "wearing lipstick"\n',
    ".csv": "value,class\n1,smiling\n2,Bald,Smiling\n3, wearing lipstick\n0,\n\n",
}


def palette_image():
    image = Image.fromarray(LABELS.astype(np.uint8))
    image.putpalette(PALETTE)
    return image


def check_labels(template):
    assert template.painted == tuple(CLASSES)
    assert np.array_equal(template.masks[0], np.isin(LABELS, (1, 2)))
    assert np.array_equal(template.masks[1], LABELS == 3)
    assert np.array_equal(template.masks[2], LABELS == 2)


@pytest.mark.parametrize("suffix", LEGENDS)
@pytest.mark.parametrize("stem", ["face", "legend"])
def test_indexed_template(tmp_path, suffix, stem):
    write(tmp_path / f"{stem}{suffix}", LEGENDS[suffix])
    check_labels(load_template(paint(tmp_path / "face.png", palette_image()), CLASSES))
    check_labels(load_template(paint(tmp_path / "face.png", LABELS), CLASSES))
    deep = Image.fromarray(LABELS.astype(np.uint16))
    check_labels(load_template(paint(tmp_path / "face.png", deep), CLASSES))


def test_legend_of_the_same_name_comes_first(tmp_path):
    template = paint(tmp_path / "face.png", LABELS)
    write(tmp_path / "legend.json", {"1": "Bald"})
    write(tmp_path / "face.json", LEGENDS[".json"])
    check_labels(load_template(template, CLASSES))
    given = load_template(template, CLASSES, legend=tmp_path / "legend.json")
    assert given.painted == ("Bald",)
    write(tmp_path / "face.csv", LEGENDS[".csv"])
    with pytest.raises(DataError, match="2 legends"):
        load_template(template, CLASSES)


@pytest.mark.parametrize("mode", ["P", "RGB", "RGBA"])
def test_colours(tmp_path, mode):
    write(
        tmp_path / "face.json", {"#ff0000": "smiling", "#00FF00": ["Bald", "smiling"], "#0000ff": CLASSES[1]}
    )
    check_labels(load_template(paint(tmp_path / "face.png", palette_image(), mode), CLASSES))


def test_colours_and_indices_together(tmp_path):
    write(tmp_path / "face.json", {"1": "smiling", "#00ff00": ["Bald", "smiling"], "3": CLASSES[1]})
    check_labels(load_template(paint(tmp_path / "face.png", palette_image()), CLASSES))


def test_transparent_pixels_have_no_colour(tmp_path):
    rgba = np.array([[[0, 0, 0, 255], [0, 0, 0, 0]]])
    write(tmp_path / "face.json", {"#000000": "Bald"})
    masks, _ = load_template(paint(tmp_path / "face.png", rgba), CLASSES)
    assert masks[2].tolist() == [[1, 0]]


@pytest.mark.parametrize("suffix", [".json", ".toml", ".csv"])
def test_unknown_class_in_a_legend(tmp_path, suffix):
    write(tmp_path / f"face{suffix}", LEGENDS[suffix].replace("Bald", "Bold"))
    with pytest.raises(UnknownNameError, match=rf"face{suffix}, entry '2'.*Did you mean 'Bald'"):
        load_template(paint(tmp_path / "face.png", LABELS), CLASSES)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("face.json", "[]", "must map"),
        ("face.json", "{}", "without entries"),
        ("face.json", '{"1": 2}', "'1' must name a class"),
        ("face.json", '{"1": null}', "'1' must name a class"),
        ("face.json", '{"1": "Bald", "1": "Smiling"}', "'1' occurs twice"),
        ("face.json", '{"one": "Bald"}', "'one' is neither"),
        ("face.json", '{"-1": "Bald"}', "'-1' is neither"),
        ("face.json", '{"#ff": "Bald"}', "'#ff' is neither"),
        ("face.json", '{"0": []}', "names no class"),
        ("face.json", '{"9": "Bald"}', "region of 'Bald' is empty: no pixel has the value 9"),
        ("face.json", '{"#123456": "Bald"}', "region of 'Bald' is empty"),
        ("face.toml", "1 = ", "not valid TOML"),
        ("face.toml", "a = 1979-05-27", "'a' is neither"),
        ("face.csv", "value,class\n", "without entries"),
        ("face.csv", "value,class\nx,Bald\n", "'x' is neither"),
    ],
)
def test_malformed_legends(tmp_path, name, text, message):
    write(tmp_path / name, text)
    with pytest.raises(DataError, match=message) as error:
        load_template(paint(tmp_path / "face.png", LABELS), CLASSES)
    assert str(tmp_path / name) in str(error.value)


def test_legends_that_do_not_fit(tmp_path):
    template = paint(tmp_path / "face.png", LABELS)
    with pytest.raises(DataError, match=r"has no legend. Write .*face\.json"):
        load_template(template, CLASSES)
    with pytest.raises(InputError, match=r"\.yaml"):
        load_template(template, CLASSES, legend=tmp_path / "face.yaml")
    write(tmp_path / "face.json", LEGENDS[".json"])
    with pytest.raises(DataError, match="is a colour image"):
        load_template(paint(template, palette_image(), "RGB"), CLASSES)
    write(tmp_path / "face.json", {"#ffffff": "Bald"})
    with pytest.raises(DataError, match="has no colours"):
        load_template(paint(template, Image.fromarray(LABELS.astype(np.uint16))), CLASSES)


def test_names_match_across_spellings():
    names = ClassNames(["café_au lait", "b"])
    for name in ("Café au_lait", "cafe\u0301 AU  LAIT", " café_au_lait"):
        assert names.find(name) == "café_au lait"
    assert names.find("caféaulait") is None


# Masks for each image -----------------------------------------------------------------------------------


def test_one_mask_for_each_image(tmp_path):
    paint(tmp_path / "cat.1.png", region())
    masks = MaskFolder(tmp_path)
    assert len(masks) == 1
    assert "photos/cat.1.jpg" in masks
    assert np.array_equal(masks.get("photos/cat.1.jpg"), region() / 255)
    assert masks.get("cat.jpg") is None
    assert MaskFolder(tmp_path, size=2).get("cat.1.jpg").shape == (2, 2)
    assert torch.equal(MaskFolder(tmp_path, CLASSES).get("cat.1.jpg"), masks.get("cat.1.jpg").repeat(3, 1, 1))


@pytest.mark.parametrize("layout", ["{name}/{stem}.png", "{stem}/{name}.png"])
def test_masks_for_classes(tmp_path, layout):
    paint(tmp_path / layout.format(name="smiling", stem="7"), region())
    paint(tmp_path / layout.format(name="Bald", stem="7"), region(8, 12, slice(0, 4), slice(0, 6)))
    paint(tmp_path / layout.format(name="Bald", stem="8"), region())
    masks = MaskFolder(tmp_path, CLASSES, size=(4, 6))
    assert len(masks) == 2
    assert "7.jpg" in masks
    expected = torch.from_numpy(region() / 255).float()
    seven = masks.get("7.jpg")
    assert torch.equal(seven[0], expected)
    assert seven[1].isnan().all()
    assert torch.equal(seven[2], expected)
    assert masks.get("8.jpg")[0].isnan().all()
    assert masks.get("9.jpg") is None


def test_mask_folders_that_are_wrong(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        MaskFolder(tmp_path / "nothing")
    with pytest.raises(DataError, match="holds no mask"):
        MaskFolder(tmp_path)
    paint(tmp_path / "Smilling" / "7.png", region())
    with pytest.raises(UnknownNameError, match=r"Smilling/7\.png"):
        MaskFolder(tmp_path, CLASSES)
    with pytest.raises(InputError, match="Pass classes"):
        MaskFolder(tmp_path)
    (tmp_path / "Smilling").rename(tmp_path / "Smiling")
    paint(tmp_path / "7.png", region())
    with pytest.raises(DataError, match=r"Keep one kind"):
        MaskFolder(tmp_path, CLASSES)
    paint(tmp_path / "7.bmp", region())
    with pytest.raises(DataError, match=r"7\.png and .*7\.bmp are both for '7'|7\.bmp.*7\.png"):
        MaskFolder(tmp_path, CLASSES)


# Shapes -------------------------------------------------------------------------------------------------


def star(rng, corners, centre, radius):
    angles = np.sort(rng.uniform(0, 2 * math.pi, corners))
    radii = rng.uniform(0.4, 1, corners) * radius
    x, y = centre[0] + radii * np.cos(angles), centre[1] + radii * np.sin(angles)
    return np.stack([x, y], axis=1)


def polygon(points):
    return Polygon(tuple((float(x), float(y)) for x, y in points))


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools' decode
@pytest.mark.parametrize("seed", range(20))
def test_polygons_agree_with_coco_and_skimage(seed):
    rng = np.random.default_rng(seed)
    height, width = 150, 200
    points = star(rng, int(rng.integers(5, 30)), rng.uniform(40, 110, 2), rng.uniform(35, 80))
    mask = polygon(points).draw((height, width))
    # skimage puts pixel centres at whole coordinates. No random edge runs through one, so they agree exactly.
    assert np.array_equal(mask, polygon2mask((height, width), points[:, ::-1] - 0.5))
    encoded = coco.merge(coco.frPyObjects([points.ravel().tolist()], height, width))
    assert iou(mask, coco.decode(encoded).astype(bool)) >= 0.97


def test_rectangle_covers_its_area():
    assert np.array_equal(
        polygon([(1, 0), (4, 0), (4, 2), (1, 2)]).draw((4, 6)), region(columns=slice(1, 4)) > 0
    )


def test_neighbours_share_no_pixel_and_leave_no_gap():
    left = polygon([(0, 0), (3.5, 0), (2.5, 8), (0, 8)]).draw((8, 8))
    right = polygon([(3.5, 0), (8, 0), (8, 8), (2.5, 8)]).draw((8, 8))
    assert (left ^ right).all()
    assert not (left & right).any()


def test_self_intersection_is_even_odd():
    mask = polygon([(0, 0), (9, 0), (9, 9), (0, 9), (0, 0), (3, 3), (3, 6), (6, 6), (6, 3), (3, 3)]).draw(
        (9, 9)
    )
    assert mask.sum() == 81 - 9


def test_parts_outside_are_cut_off():
    assert polygon([(-1e6, -1e6), (1e6, -1e6), (1e6, 1e6), (-1e6, 1e6)]).draw((3, 5)).all()
    assert not polygon([(10, 10), (20, 10), (20, 20)]).draw((3, 5)).any()
    assert not Circle((50, 50), 10).draw((3, 5)).any()


def test_circle_has_its_area():
    mask = Circle((50.3, 60.8), 30).draw((120, 100))
    assert mask.sum() == pytest.approx(math.pi * 30**2, rel=0.005)
    rows, columns = mask.nonzero()
    assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx((50.3, 60.8), abs=0.1)


@pytest.mark.parametrize("seed", range(20))
def test_run_lengths_agree_with_pycocotools(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 300, 2).tolist()
    mask = rng.random((height, width)) < rng.choice([0, 0.001, 0.5, 0.999, 1])
    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    runs = RunLengths.parse(encoded["counts"].decode(), (height, width), "test")
    assert np.array_equal(runs.draw((height, width)), mask)
    columns = np.concatenate([[0], mask.T.ravel(), [0]]).astype(int)
    edges = np.concatenate([[0], np.abs(np.diff(columns)).nonzero()[0], [mask.size]])
    plain = np.diff(edges).tolist()
    assert np.array_equal(RunLengths.parse(plain, (height, width), "test").draw((height, width)), mask)


def test_corrupt_run_length_strings_are_data_errors():
    rng = np.random.default_rng(0)
    good = coco.encode(np.asfortranarray(rng.random((40, 50)) < 0.2, dtype=np.uint8))["counts"].decode()
    for _ in range(300):
        characters = list(good)
        for place in rng.integers(0, len(good), 3):
            characters[place] = chr(rng.integers(32, 127))
        try:
            assert RunLengths.parse("".join(characters), (40, 50), "f").draw((40, 50)).shape == (40, 50)
        except DataError as error:
            assert str(error).startswith("f: ")  # noqa: PT017 - some changes cancel out


# LabelMe ------------------------------------------------------------------------------------------------


def labelme(*shapes, height=20, width=30):
    return {"version": "5.4.1", "shapes": list(shapes), "imageHeight": height, "imageWidth": width}


def shape(label, kind, points):
    return {"label": label, "shape_type": kind, "points": points, "group_id": None, "flags": {}}


BOX = shape("bald", "rectangle", [[10, 5], [2, 1]])


def test_labelme(tmp_path):
    document = labelme(
        BOX,
        shape("Smiling", "polygon", [[20, 10], [30, 10], [30, 20], [20, 20]]),
        shape("Smiling", "circle", [[5, 15], [5, 18]]),
        shape("Smiling", "point", [[1, 1]]),
        shape("Bald", "linestrip", [[1, 1], [2, 2]]),
        shape("Bald", "linestrip", [[1, 1], [2, 2], [3, 3]]),
    )
    read = read_labelme(write(tmp_path / "a.json", document))
    assert read.size == (20, 30)
    assert read.labels == ("bald", "Smiling")
    assert read.skipped == {"point": 1, "linestrip": 2}
    bald, smiling = torch.zeros(20, 30), torch.zeros(20, 30)
    bald[1:5, 2:10] = 1
    assert torch.equal(read.masks["bald"], bald)
    smiling[10:, 20:] = 1
    smiling += torch.from_numpy(Circle((5, 15), 3).draw((20, 30)))
    masks = read.tensor(CLASSES)
    assert masks.dtype == torch.float32
    assert torch.equal(masks[0], smiling)
    assert masks[1].isnan().all()
    assert torch.equal(masks[2], bald)
    assert read.tensor(CLASSES, size=10).shape == (3, 10, 10)


def test_labelme_of_old_has_no_types(tmp_path):
    old = shape("Bald", None, [[0, 0], [4, 0], [4, 4], [0, 4]])
    del old["shape_type"]
    assert read_labelme(write(tmp_path / "a.json", labelme(old))).masks["Bald"].sum() == 16


def test_labels_beyond_the_classes(tmp_path):
    read = read_labelme(write(tmp_path / "a.json", labelme(BOX, {**BOX, "label": "Smilling"})))
    with pytest.raises(UnknownNameError, match=r"a\.json.*'Smilling'. Did you mean 'Smiling'"):
        read.tensor(CLASSES)
    assert read.tensor(CLASSES, strict=False)[0].isnan().all()


def test_regions_without_a_pixel_are_no_annotation(tmp_path):
    outside = {**BOX, "points": [[100, 100], [200, 200]]}
    assert read_labelme(write(tmp_path / "a.json", labelme(outside))).tensor(CLASSES).isnan().all()


def test_no_shapes(tmp_path):
    read = read_labelme(write(tmp_path / "a.json", labelme()))
    assert read.masks == {}
    assert read.tensor(CLASSES).shape == (3, 20, 30)
    assert read.tensor(CLASSES).isnan().all()


def without(entry, key):
    return {name: value for name, value in entry.items() if name != key}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "not valid JSON"),
        ([], "must be a JSON object"),
        (without(labelme(), "shapes"), "no 'shapes'"),
        (without(labelme(), "imageHeight"), "no 'imageHeight'"),
        (labelme(height=None), "'imageHeight' must be of type int, got None"),
        (labelme(height=-3), "must be positive"),
        (labelme(height=10**6, width=10**6), "at most"),
        (labelme(height=10**400), "at most"),
        (labelme(height=True), "must be of type int"),
        (labelme(BOX, "shape"), r"shapes\[1\] must be a JSON object"),
        (labelme(without(BOX, "label")), r"shapes\[0\] has no 'label'"),
        (labelme(without(BOX, "points")), r"shapes\[0\] has no 'points'"),
        (labelme({**BOX, "shape_type": "polygn"}), r"shapes\[0\]: unknown shape_type 'polygn'. Did you mean"),
        (labelme({**BOX, "shape_type": "polygon"}), "a polygon has at least 3 points, got 2"),
        (labelme({**BOX, "points": [[1, 2]]}), "a rectangle has 2 points, got 1"),
        (labelme({**BOX, "points": [[1, 2], [3]]}), "a point must be two numbers"),
        (labelme({**BOX, "points": [[1, 2], [3, "4"]]}), "a point must be two numbers"),
        (labelme({**BOX, "points": [[1, 2], [3, math.nan]]}), "a point must be two numbers"),
        (labelme({**BOX, "points": [[1, 2], [3, 1e300]]}), "a point must be two numbers"),
        (labelme({**BOX, "points": [[1, 2], [3, 10**400]]}), "a point must be two numbers"),
    ],
)
def test_malformed_labelme(tmp_path, document, message):
    path = write(tmp_path / "a.json", document)
    with pytest.raises(DataError, match=message) as error:
        read_labelme(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 600


# COCO ---------------------------------------------------------------------------------------------------

TRIANGLE = [1.0, 1.0, 9.0, 1.0, 1.0, 9.0]


def annotation(**fields):
    return {"id": 1, "image_id": 7, "category_id": 3, "iscrowd": 0, "segmentation": [TRIANGLE], **fields}


def coco_file(*annotations, **fields):
    return {
        "images": [{"id": 7, "file_name": "a.jpg", "height": 10, "width": 12}],
        "categories": [{"id": 3, "name": "bald"}, {"id": 5, "name": "smiling"}],
        "annotations": list(annotations),
        **fields,
    }


def test_coco(tmp_path):
    rng = np.random.default_rng(0)
    blobs = rng.random((2, 10, 12)) < 0.1
    compressed = coco.encode(np.asfortranarray(blobs[0], dtype=np.uint8))
    columns = np.concatenate(
        [[0], np.abs(np.diff(blobs[1].T.ravel().astype(int), prepend=0)).nonzero()[0], [120]]
    )
    document = coco_file(
        annotation(),
        annotation(segmentation=[[0, 9, 3, 9, 3, 10, 0, 10], [9, 9, 12, 9, 12, 10, 9, 10]]),
        annotation(category_id=5, segmentation={"size": [10, 12], "counts": compressed["counts"].decode()}),
        annotation(
            category_id=5, iscrowd=1, segmentation={"size": [10, 12], "counts": np.diff(columns).tolist()}
        ),
        annotation(segmentation=[]),
        without(annotation(), "segmentation"),
        images=[
            {"id": 7, "file_name": "a.jpg", "height": 10, "width": 12},
            {"id": "x", "file_name": "sub/b.jpg", "height": 5, "width": 5},
        ],
    )
    path = write(tmp_path / "coco.json", document)
    read = read_coco(path)
    assert list(read) == ["a.jpg", "sub/b.jpg"]
    assert read["sub/b.jpg"].labels == ()
    assert read["a.jpg"].skipped == {"no segmentation": 2}
    masks = read["a.jpg"].tensor(CLASSES)
    assert masks.shape == (3, 10, 12)
    assert np.array_equal(masks[0], blobs.any(axis=0))
    assert masks[2, 9].tolist() == [1, 1, 1, *[0] * 6, 1, 1, 1]
    assert masks[2, :9].sum() == pytest.approx(32, abs=4)

    alone = read_coco(path, crowd=False)["a.jpg"]
    assert np.array_equal(alone.masks["smiling"], blobs[0])
    assert alone.skipped == {"crowd": 1, "no segmentation": 2}


def rle(counts, size=(10, 12)):
    return coco_file(annotation(segmentation={"size": size, "counts": counts}))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("hello", "not valid JSON"),
        (without(coco_file(), "images"), "no 'images'"),
        (without(coco_file(), "categories"), "no 'categories'"),
        (without(coco_file(), "annotations"), "no 'annotations'"),
        (coco_file(images={}), "'images' must be of type list"),
        (
            coco_file(images=[{"id": 7, "file_name": "a", "height": -1, "width": 5}]),
            r"images\[0\]: .* positive",
        ),
        (
            coco_file(images=[{"id": 7, "file_name": "a", "height": 10**9, "width": 5}]),
            r"images\[0\]: .* at most",
        ),
        (
            coco_file(images=[{"id": [], "file_name": "a", "height": 1, "width": 5}]),
            "must be of type int or str",
        ),
        (coco_file(images=coco_file()["images"] * 2), r"images\[1\]: another entry has the id 7"),
        (
            coco_file(images=[*coco_file()["images"], {**coco_file()["images"][0], "id": 8}]),
            "the file_name 'a.jpg'",
        ),
        (coco_file(categories=[{"id": 3}]), r"categories\[0\] has no 'name'"),
        (coco_file(5), r"annotations\[0\] must be a JSON object"),
        (coco_file(annotation(), without(annotation(), "image_id")), r"annotations\[1\] has no 'image_id'"),
        (coco_file(annotation(image_id=8)), "image_id 8 is the id of no entry"),
        (coco_file(annotation(category_id=8)), "category_id 8 is the id of no entry"),
        (coco_file(annotation(iscrowd=2)), "iscrowd must be 0 or 1"),
        (coco_file(annotation(segmentation="polygon")), "must be polygons or RLE"),
        (coco_file(annotation(segmentation=[TRIANGLE[:5]])), "list .x, y, x, y, …. of at least 3 points"),
        (coco_file(annotation(segmentation=[[*TRIANGLE, 1]])), "at least 3 points"),
        (coco_file(annotation(segmentation=TRIANGLE)), "at least 3 points, got 1.0"),
        (coco_file(annotation(segmentation=[[*TRIANGLE, 1, math.inf]])), "a point must be two numbers"),
        (coco_file(annotation(segmentation={"counts": [120]})), "has no 'size'"),
        (coco_file(annotation(segmentation={"size": [10, 12]})), "has no 'counts'"),
        (rle([120], (12, 10)), "is of size"),
        (rle([119]), r"add up to 119, but the image has 10 rows of 12 pixels: 120"),
        (rle([100, 40, -20]), "integers from 0 to 120"),
        (rle([60.0, 60.0]), "integers from 0 to 120"),
        (rle([9 * 10**4299] * 2), "integers from 0 to 120"),
        (coco_file(annotation(image_id=9 * 10**4200)), "is the id of no entry"),
        (rle(120), "'counts' must be of type str or list"),
        (rle("0" * 5), "add up to"),
        (rle("~~"), "corrupt at '~'"),
        (rle("é"), "corrupt at 'é'"),
        (rle("o" * 5), "ends in the middle"),
        (rle("o" * 50), "corrupt at 'o'"),
    ],
)
def test_malformed_coco(tmp_path, document, message):
    path = write(tmp_path / "coco.json", document)
    with pytest.raises(DataError, match=message) as error:
        read_coco(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 600


def test_duplicate_category_names_are_one_class(tmp_path):
    categories = [{"id": 3, "name": "bald"}, {"id": 4, "name": "Bald"}]
    document = coco_file(
        annotation(),
        annotation(category_id=4, segmentation=[[0, 9, 12, 9, 12, 10, 0, 10]]),
        categories=categories,
    )
    read = read_coco(write(tmp_path / "coco.json", document))["a.jpg"]
    assert read.labels == ("bald", "Bald")
    assert torch.equal(read.tensor(CLASSES)[2], read.masks["bald"] + read.masks["Bald"])
