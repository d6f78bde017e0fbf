"""Drawn faces: their statistics, their geometry, and that each pixel is reproducible."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import lru_cache

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from attnguide.data.procedural.faces import (
    ATTRIBUTE_REGIONS,
    ATTRIBUTES,
    EXPRESSIONS,
    HELEN_LABELS,
    PREVALENCE,
    TEMPLATES,
    FaceSample,
    ProceduralFaces,
    template,
)
from attnguide.errors import InputError, UnknownNameError

MANY = 20_000
LIPS = ("upper_lip", "lower_lip")
MOUTH = (*LIPS, "inner_mouth")


def tolerance(p: float, n: int = MANY) -> float:
    """Four and a half standard errors of a proportion, and room for p = 0 and 1."""
    return float(4.5 * (p * (1 - p) / n) ** 0.5 + 1e-9)


def present(faces: ProceduralFaces, name: str) -> Tensor:
    return faces.labels()[:, ATTRIBUTES.index(name)].bool()


def where(segmentation: Tensor, *names: str) -> Tensor:
    codes = torch.tensor([HELEN_LABELS.index(name) for name in names], dtype=torch.uint8)
    return torch.isin(segmentation.as_subclass(Tensor), codes)


@lru_cache
def _some() -> FaceSample:
    return ProceduralFaces(100, seed=6).stack()


# What a sample is


def test_sample_has_the_promised_types_shapes_and_ranges() -> None:
    sample = ProceduralFaces(3, size=48)[1]
    assert isinstance(sample, FaceSample)
    assert isinstance(sample.image, tv_tensors.Image)
    assert sample.image.dtype == torch.float32
    assert sample.image.shape == (3, 48, 48)
    assert 0 <= sample.image.min() < sample.image.max() <= 1
    assert sample.attributes.dtype == torch.float32
    assert sample.attributes.shape == (len(ATTRIBUTES),)
    assert isinstance(sample.segmentation, tv_tensors.Mask)
    assert sample.segmentation.dtype == torch.uint8
    assert sample.segmentation.shape == (48, 48)
    assert isinstance(sample.landmarks, tv_tensors.KeyPoints)
    assert sample.landmarks.shape == (68, 2)
    assert sample.landmarks.dtype == torch.float32
    assert sample.landmarks.canvas_size == (48, 48)
    assert sample.expression.dtype == torch.int64
    assert sample.expression.shape == ()


def test_labels_and_expressions_are_those_of_the_samples() -> None:
    faces = ProceduralFaces(20, size=32)
    stacked = faces.stack()
    assert torch.equal(faces.labels(), stacked.attributes)
    assert torch.equal(faces.expressions(), stacked.expression)
    assert faces.classes == ATTRIBUTES
    assert len(faces) == 20


# Determinism


def test_a_face_depends_on_seed_and_index_alone() -> None:
    few, many = ProceduralFaces(5, seed=7), ProceduralFaces(500, seed=7)
    backwards = {i: few[i] for i in (4, 2, 0, 2, -1)}
    for i, sample in backwards.items():
        for ours, theirs in zip(sample, many[i % 5], strict=True):
            assert torch.equal(ours, theirs)


def test_faces_differ_between_seeds_and_between_indices() -> None:
    images = [ProceduralFaces(2, seed=seed)[i].image for seed in (0, 1) for i in (0, 1)]
    for a, b in itertools.combinations(images, 2):
        assert (a - b).abs().mean() > 0.02


def test_workers_and_default_collate_give_the_same_batches() -> None:
    faces = ProceduralFaces(12, size=32)
    batches = list(DataLoader(faces, batch_size=5, num_workers=2))
    whole = faces.stack()
    assert [len(batch.image) for batch in batches] == [5, 5, 2]
    for field in FaceSample._fields:
        together = torch.cat([getattr(batch, field).as_subclass(Tensor) for batch in batches])
        assert torch.equal(together, getattr(whole, field).as_subclass(Tensor))


def test_the_same_face_looks_the_same_at_any_size() -> None:
    small, large = (ProceduralFaces(4, size=size, noise=0).stack() for size in (64, 256))
    shrunk = torch.nn.functional.avg_pool2d(large.image, 4)
    assert (shrunk - small.image).abs().mean() < 0.01
    # Pixel centres: (x + 0.5) / size is the same place.
    assert torch.allclose((large.landmarks + 0.5) / 4, small.landmarks + 0.5, atol=1e-3)


# Statistics


def test_prevalences_are_kept_by_default() -> None:
    faces = ProceduralFaces(MANY)
    for name, p in PREVALENCE.items():
        assert present(faces, name).float().mean().item() == pytest.approx(p, abs=tolerance(p)), name


def test_unrelated_attributes_are_independent() -> None:
    faces = ProceduralFaces(MANY, seed=1)
    hair = {"black_hair", "blond_hair", "brown_hair", "bald", "bangs"}
    for a, b in itertools.combinations(ATTRIBUTES, 2):
        if {a, b} <= hair:
            continue
        both = PREVALENCE[a] * PREVALENCE[b]
        found = (present(faces, a) & present(faces, b)).float().mean().item()
        assert found == pytest.approx(both, abs=tolerance(both)), (a, b)


@pytest.mark.parametrize(
    ("pairs", "prevalence"),
    [
        ({("lipstick", "heavy_makeup"): 0.98}, {}),
        ({("lipstick", "heavy_makeup"): 0.02}, {}),
        ({("lipstick", "heavy_makeup"): 1.0}, {}),
        ({("smiling", "eyeglasses"): 0.7}, {"eyeglasses": 0.4}),
        (
            {
                ("lipstick", "heavy_makeup"): 0.9,
                ("heavy_makeup", "earrings"): 0.8,
                ("smiling", "earrings"): 0.3,
            },
            {},
        ),
        ({("lipstick", "blond_hair"): 0.7, ("black_hair", "moustache"): 0.9}, {}),
        ({("blond_hair", "bangs"): 0.9, ("bangs", "lipstick"): 0.7}, {}),
        ({("hat", "bald"): 0.9, ("bangs", "bushy_eyebrows"): 0.7}, {}),
    ],
)
def test_pairs_agree_as_often_as_asked_and_prevalences_stay(
    pairs: Mapping[tuple[str, str], float], prevalence: Mapping[str, float]
) -> None:
    faces = ProceduralFaces(MANY, seed=2, cooccurrence=pairs, prevalence=prevalence)
    for (a, b), agreement in pairs.items():
        found = (present(faces, a) == present(faces, b)).float().mean().item()
        assert found == pytest.approx(agreement, abs=tolerance(agreement)), (a, b)
    for name, p in (PREVALENCE | dict(prevalence)).items():
        assert present(faces, name).float().mean().item() == pytest.approx(p, abs=tolerance(p)), name
    assert not (present(faces, "bangs") & present(faces, "bald")).any()


def test_structure_holds_whatever_is_drawn() -> None:
    faces = ProceduralFaces(MANY, seed=3)
    hair = torch.stack([present(faces, name) for name in ("black_hair", "blond_hair", "brown_hair", "bald")])
    assert hair.sum(0).max() == 1
    assert (hair.sum(0) == 0).any()  # red and grey
    assert not (present(faces, "bald") & present(faces, "bangs")).any()
    assert torch.equal(faces.expressions() == EXPRESSIONS.index("happiness"), present(faces, "smiling"))
    assert set(faces.expressions().tolist()) == set(range(len(EXPRESSIONS)))


def test_without_smiles_the_other_expressions_are_equally_likely() -> None:
    faces = ProceduralFaces(MANY, prevalence={"smiling": 0})
    counts = torch.bincount(faces.expressions(), minlength=7) / MANY
    assert counts[EXPRESSIONS.index("happiness")] == 0
    assert counts[counts > 0].tolist() == pytest.approx([1 / 6] * 6, abs=tolerance(1 / 6))


# Force


def test_force_changes_nothing_else() -> None:
    plain = ProceduralFaces(2000, seed=4)
    forced = ProceduralFaces(2000, seed=4, force={"lipstick": True})
    assert present(forced, "lipstick").all()
    others = [k for k, name in enumerate(ATTRIBUTES) if name != "lipstick"]
    assert torch.equal(plain.labels()[:, others], forced.labels()[:, others])
    assert torch.equal(plain.expressions(), forced.expressions())


@pytest.mark.parametrize("name", ATTRIBUTES)
@pytest.mark.parametrize("wanted", [True, False])
def test_any_attribute_can_be_forced_and_hair_stays_possible(name: str, wanted: bool) -> None:
    faces = ProceduralFaces(500, force={name: wanted})
    assert torch.equal(present(faces, name), torch.full((500,), wanted))
    hair = torch.stack([present(faces, h) for h in ("black_hair", "blond_hair", "brown_hair", "bald")])
    assert hair.sum(0).max() <= 1
    assert not (present(faces, "bald") & present(faces, "bangs")).any()


@lru_cache
def _toggled(name: str, n: int = 40) -> tuple[FaceSample, Tensor]:
    """Return faces that have the attribute, and by how much each pixel differs without it."""
    others = {"moustache": False, "goatee": False, "hat": False, "eyeglasses": False} | {name: False}
    off = ProceduralFaces(n, noise=0, force=others).stack()
    on = ProceduralFaces(n, noise=0, force=others | {name: True}).stack()
    return on, (on.image - off.image).as_subclass(Tensor).abs().amax(1)


def test_lipstick_shows_on_the_lips_and_nowhere_else() -> None:
    faces, change = _toggled("lipstick")
    lips = where(faces.segmentation, *LIPS)
    # Pixels on the edge are partly lip, and more than one of them where the lips taper off in a corner.
    near = torch.nn.functional.max_pool2d(lips.float()[:, None], 5, 1, 2)[:, 0].bool()
    assert change[~near].max() == 0
    assert change[lips].mean() > 0.1


def test_heavy_makeup_spares_the_mouth() -> None:
    faces, change = _toggled("heavy_makeup")
    mouth = where(faces.segmentation, *MOUTH)
    inside = -torch.nn.functional.max_pool2d(-mouth.float()[:, None], 3, 1, 1)[:, 0]
    assert change[inside.bool()].max() == 0
    eyes = template("eyes").bool()
    assert change[:, eyes].sum() > 0.6 * change.sum()
    # It outweighs lipstick, so that a network that can choose looks at it.
    assert change.sum() > 1.5 * _toggled("lipstick")[1].sum()


@pytest.mark.parametrize("name", [n for n in ATTRIBUTES if n not in ("smiling", "mouth_open", "bangs")])
def test_an_attribute_shows_where_its_template_says(name: str) -> None:
    _, change = _toggled(name)
    assert change[:, template(name).bool()].sum() > 0.9 * change.sum()
    assert (change.amax((1, 2)) > 0.05).float().mean() > 0.9


# Geometry


@pytest.fixture(scope="module")
def faces() -> FaceSample:
    return ProceduralFaces(40, size=128, seed=5, force={"hat": False, "goatee": False}).stack()


def test_mouth_corners_are_the_ends_of_the_lips(faces: FaceSample) -> None:
    for mask, points in zip(
        where(faces.segmentation, *MOUTH), faces.landmarks.as_subclass(Tensor), strict=True
    ):
        columns = mask.any(0).nonzero()[:, 0]
        assert points[48, 0].item() == pytest.approx(columns[0].item(), abs=2.0)
        assert points[54, 0].item() == pytest.approx(columns[-1].item(), abs=2.0)


@pytest.mark.parametrize(
    ("names", "points"),
    [
        (("right_eye",), slice(36, 42)),
        (("left_eye",), slice(42, 48)),
        (("right_brow",), slice(17, 22)),
        (("left_brow",), slice(22, 27)),
        (MOUTH, slice(48, 60)),
    ],
)
def test_landmarks_frame_their_part(faces: FaceSample, names: tuple[str, ...], points: slice) -> None:
    for mask, marks in zip(
        where(faces.segmentation, *names), faces.landmarks.as_subclass(Tensor), strict=True
    ):
        pixels = mask.nonzero().flip(1).float()
        assert (pixels.amin(0) - marks[points].amin(0)).abs().amax() < 4
        assert (pixels.amax(0) - marks[points].amax(0)).abs().amax() < 4


def test_the_jaw_is_the_edge_of_the_face(faces: FaceSample) -> None:
    head = where(faces.segmentation, *HELEN_LABELS[1:10])
    for mask, points in zip(head, faces.landmarks.as_subclass(Tensor), strict=True):
        chin, nose = points[8], points[33]
        inside, outside = chin + 0.06 * (nose - chin), chin - 0.06 * (nose - chin)
        assert mask[int(inside[1].round()), int(inside[0].round())]
        below = outside[1].round().int().item()
        assert below >= 128 or not mask[below, int(outside[0].round())]


def test_right_is_the_left_of_the_image(faces: FaceSample) -> None:
    x = faces.landmarks.as_subclass(Tensor)[..., 0]
    assert (x[:, 36] < x[:, 45]).all()
    assert (x[:, 0] < x[:, 16]).all()
    across = torch.arange(128.0)
    right, left = (
        (where(faces.segmentation, name) * across).sum((1, 2)) / where(faces.segmentation, name).sum((1, 2))
        for name in ("right_eye", "left_eye")
    )
    assert (right < left).all()


def test_expression_shows_in_the_landmarks() -> None:
    smile = ProceduralFaces(30, pose=0, force={"smiling": True}).stack().landmarks.as_subclass(Tensor)
    sober = ProceduralFaces(30, pose=0, force={"smiling": False}).stack().landmarks.as_subclass(Tensor)

    def lift(points: Tensor) -> Tensor:  # of the corners above the middle of the mouth
        return points[:, [62, 66], 1].mean(1) - points[:, [48, 54], 1].mean(1)

    assert (lift(smile) > lift(sober) + 0.5).all()


@pytest.mark.parametrize("wanted", [True, False])
def test_an_inner_mouth_is_visible_if_it_is_open(wanted: bool) -> None:
    faces = ProceduralFaces(30, size=96, force={"mouth_open": wanted}).stack()
    assert torch.equal(where(faces.segmentation, "inner_mouth").flatten(1).any(1), torch.full((30,), wanted))


def test_the_mouth_has_a_decent_size_at_64_pixels() -> None:
    mouth = where(_some().segmentation, *MOUTH)
    assert 17 <= mouth.any(1).sum(1).float().median() <= 24
    assert 8 <= mouth.any(2).sum(1).float().median() <= 11


# Transforms


def test_a_flip_moves_image_mask_and_landmarks_together() -> None:
    plain = ProceduralFaces(3)[2]
    flipped = ProceduralFaces(3, transform=v2.RandomHorizontalFlip(p=1))[2]
    assert isinstance(flipped, FaceSample)
    assert torch.equal(flipped.image, plain.image.flip(-1))
    assert torch.equal(flipped.segmentation, plain.segmentation.flip(-1))
    assert torch.allclose(flipped.landmarks[:, 0], 63 - plain.landmarks[:, 0])
    assert torch.equal(flipped.attributes, plain.attributes)


def test_a_transform_may_change_the_size() -> None:
    stacked = ProceduralFaces(2, transform=v2.Resize((32, 40))).stack()
    assert stacked.image.shape == (2, 3, 32, 40)
    assert stacked.segmentation.shape == (2, 32, 40)
    assert isinstance(stacked.landmarks, tv_tensors.KeyPoints)
    assert stacked.landmarks.canvas_size == (32, 40)


# Templates


@pytest.mark.parametrize(
    ("region", "names", "least"),
    [
        ("mouth", MOUTH, 0.99),
        ("eyes", ("left_eye", "right_eye"), 0.99),
        ("brows", ("left_brow", "right_brow"), 0.95),
        ("nose", ("nose",), 0.98),
        ("hair", ("hair",), 0.9),
        ("face", ("face_skin",), 0.98),
    ],
)
def test_templates_cover_their_region(region: str, names: tuple[str, ...], least: float) -> None:
    parts = where(_some().segmentation, *names)
    assert parts[:, template(region).bool()].sum() > least * parts.sum()


def test_templates_exist_for_all_names_at_all_sizes() -> None:
    for name in (*TEMPLATES, *ATTRIBUTES):
        for size in (14, 64):
            mask = template(name, size)
            assert mask.shape == (size, size)
            assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert set(ATTRIBUTE_REGIONS) == set(ATTRIBUTES)
    assert {label for labels in ATTRIBUTE_REGIONS.values() for label in labels} <= set(HELEN_LABELS)
    assert torch.equal(ProceduralFaces(1, size=48).region_mask("mouth"), template("mouth", 48))
    assert (template("mouth") * template("eyes")).sum() == 0


# Errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": 1, "size": 31}, "size is 31"),
        ({"n": 1, "size": 64.5}, "size is 64.5"),
        ({"n": 1, "seed": -1}, "seed is -1"),
        ({"n": 1, "pose": -0.5}, "pose is -0.5"),
        ({"n": 1, "clutter": 2}, "clutter is 2"),
        ({"n": 1, "noise": float("nan")}, "noise is nan"),
        ({"n": 1, "prevalence": {"hat": 1.2}}, r"prevalence\['hat'\] is 1.2"),
        ({"n": 1, "prevalence": {"black_hair": 0.7}}, "adds up to"),
        ({"n": 1, "prevalence": {"bangs": 0.95}}, "bangs need hair"),
        ({"n": 1, "cooccurrence": {("hat", "bangs"): -0.1}}, "probability lies between"),
        ({"n": 1, "cooccurrence": {"hat": 0.5}}, "give two attributes"),
        ({"n": 1, "cooccurrence": {("hat", "hat"): 0.5}}, "two different attributes once"),
        (
            {"n": 1, "cooccurrence": {("hat", "bangs"): 0.5, ("bangs", "hat"): 0.5}},
            "two different attributes once",
        ),
        ({"n": 1, "cooccurrence": {("hat", "lipstick"): 0.95}}, "between 0.38 and 0.62"),
        ({"n": 1, "cooccurrence": {("black_hair", "bald"): 0.5}}, "range is 0.64 alone"),
        ({"n": 1, "cooccurrence": {("bald", "bangs"): 0.5}}, "exclude each other"),
        (
            {
                "n": 1,
                "cooccurrence": {
                    ("smiling", "lipstick"): 0.5,
                    ("lipstick", "earrings"): 0.5,
                    ("earrings", "smiling"): 0.5,
                },
            },
            "closes a cycle",
        ),
        ({"n": 1, "cooccurrence": {("bangs", "hat"): 0.7, ("hat", "bald"): 0.85}}, "closes a cycle"),
        ({"n": 1, "force": {"bald": True, "bangs": True}}, "bald and bangs, which exclude each other"),
        ({"n": 1, "force": {"blond_hair": True, "black_hair": True}}, "exclude each other"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ProceduralFaces(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [
        {"prevalence": {"lipstik": 0.5}},
        {"cooccurrence": {("lipstik", "hat"): 0.5}},
        {"force": {"lipstik": True}},
    ],
)
def test_unknown_attributes_are_named(arguments: dict[str, object]) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'lipstick'"):
        ProceduralFaces(1, **arguments)  # type: ignore[arg-type]


def test_other_misuse() -> None:
    faces = ProceduralFaces(3, size=32)
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"no face {index}"):
            faces[index]
    with pytest.raises(InputError, match="indices is empty"):
        faces.stack([])
    with pytest.raises(UnknownNameError, match="mouth"):
        template("mouht")
    with pytest.raises(InputError, match="size is 0"):
        template("mouth", 0)
    assert len(list(faces)) == 3  # iteration ends, as IndexError promises
