"""explain: raw maps of the size that was asked for, in every circumstance the same, and cheap."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.models import batch, cnn, tiny_vit
from tests.helpers.parts import standard
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_tensor

import attnguide as ag
from attnguide import visual
from attnguide.errors import InputError, LayerError
from attnguide.interfaces import AttributionSource
from attnguide.models import load
from attnguide.parts.registry import registry

IMAGES, LABELS, _ = batch()


def by_hand(model: nn.Module, images: Tensor, classes: Tensor, layer: str = "block4") -> Tensor:
    """Grad-CAM in a few lines."""
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _m, _a, output: kept.append(output))
    logits = model(images)
    handle.remove()
    score = logits.gather(1, classes[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, kept[0])
    return (gradient.mean(dim=(2, 3), keepdim=True) * kept[0]).sum(dim=1).relu().detach()


def test_values_are_raw_and_resized_bilinearly() -> None:
    model = cnn().eval()
    expected = by_hand(model, IMAGES, LABELS)
    found = ag.explain(model, IMAGES, targets="labels", labels=LABELS, size=None)
    torch.testing.assert_close(found.maps[:, 0], expected)
    assert found.layer == "block4"
    assert found.source == "grad_cam"
    assert found.classes.tolist() == LABELS[:, None].tolist()
    torch.testing.assert_close(found.logits, model(IMAGES).detach())
    torch.testing.assert_close(found.scores[:, 0], found.logits.gather(1, LABELS[:, None])[:, 0])
    resized = interpolate(expected[:, None], 32, mode="bilinear", align_corners=False)
    sized = ag.explain(model, IMAGES, targets="labels", labels=LABELS)
    torch.testing.assert_close(sized.maps, resized)


@pytest.mark.parametrize(
    ("size", "shape"), [("input", (32, 32)), (None, (4, 4)), ((5, 9), (5, 9)), ((2, 2), (2, 2))]
)
def test_sizes(size: Any, shape: tuple[int, int]) -> None:
    found = ag.explain(cnn(), IMAGES, targets="all", size=size)
    assert found.maps.shape == (4, 4, *shape)


def test_scaled_maps_lie_in_0_to_1_and_flat_ones_are_zero() -> None:
    found = ag.explain(cnn(), IMAGES, "layer_attention", "all")
    scaled = found.scaled()
    flat = (found.maps.amax(dim=(2, 3)) == found.maps.amin(dim=(2, 3)))[:, :, None, None]
    torch.testing.assert_close(scaled.amax(dim=(2, 3), keepdim=True), torch.where(flat, 0.0, 1.0))
    torch.testing.assert_close(scaled.amin(dim=(2, 3)), torch.zeros(4, 4))
    constant = ag.Explanation(
        {"": torch.full((1, 1, 3, 3), 7.0)}, None, LABELS[:1, None], found.logits[:1], IMAGES[:1], ""
    )
    assert not bool(constant.scaled().any())


# Those of other libraries have tests of their own.
SOURCES = [name for name in standard("source") if ":" not in name]


@pytest.mark.parametrize("name", SOURCES)
def test_many_classes_at_once_are_those_one_by_one(name: str) -> None:
    reads_attention = registry().create("source", name, AttributionSource).reads_attention
    model = (tiny_vit if reads_attention else cnn)(classes=37).eval()
    found = ag.explain(model, IMAGES[:2], name, "all", size=None)
    assert found.classes.tolist() == [list(range(37))] * 2
    for cls in range(37):
        one = ag.explain(model, IMAGES[:2], name, [cls], size=None)
        torch.testing.assert_close(found.maps[:, cls], one.maps[:, 0], rtol=1e-4, atol=1e-7)


def test_uneven_numbers_of_classes() -> None:
    model = cnn(classes=20).eval()
    labels = torch.zeros(4, 20)
    labels[0, [3, 5]] = 1
    labels[2] = 1
    found = ag.explain(model, IMAGES, targets="labels", labels=labels)
    assert found.maps.shape == (4, 20, 32, 32)
    assert found.classes[0].tolist() == [3, 5] + [-1] * 18
    assert found.classes[1].tolist() == [-1] * 20
    assert found.classes[2].tolist() == list(range(20))
    assert not bool(found.maps[0, 2:].any())
    assert bool(found.scores[1].isnan().all())
    one = ag.explain(model, IMAGES, targets=[(0, 5)])
    torch.testing.assert_close(found.maps[0, 1], one.maps[0, 0])


def test_no_class_at_all() -> None:
    found = ag.explain(cnn(), IMAGES, targets="labels", labels=torch.zeros(4, 4))
    assert found.maps.shape == (4, 0, 32, 32)
    assert found.classes.shape == found.scores.shape == (4, 0)
    assert found.overlay().shape == (4, 0, 3, 32, 32)


# ------------------------------------------------------------------------- cost


@pytest.mark.parametrize(("build", "layer"), [(cnn, "block4"), (cnn, "block2"), (tiny_vit, "blocks.1.norm1")])
def test_nothing_before_the_layer_records_a_graph(build: Any, layer: str) -> None:
    model = build()
    order: list[str] = []
    saved: list[str] = []

    def note(name: str) -> Any:
        return lambda *_: order.append(name)

    handles = [m.register_forward_pre_hook(note(n)) for n, m in model.named_modules() if n]
    ag.layers.find_layers(model, IMAGES, layer)  # the search is not what is measured
    order.clear()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(order[-1]) or tensor, lambda t: t
    ):
        ag.explain(model, IMAGES, layer=layer)
    for handle in handles:
        handle.remove()
    inside = [n for n, _ in model.named_modules() if n == layer or n.startswith(f"{layer}.")]
    start = max(order.index(name) for name in inside)
    before = set(order[: start + 1]) - set(order[start + 1 :])
    assert saved, "the tail records one"
    assert not before & set(saved) - {inside[-1]}
    # Of the layer itself no value is kept for a backward pass either.
    assert all(order.index(name) >= start for name in saved)


def test_a_source_without_gradients_records_nothing_at_all() -> None:
    model, saved = cnn(), []
    ag.layers.find_layers(model, IMAGES, "uncentred")
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(1) or tensor, lambda t: t):
        ag.explain(model, IMAGES, "layer_attention")
    assert not saved


def test_the_model_runs_once() -> None:
    model, calls = cnn(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    ag.explain(model, IMAGES)
    assert len(calls) <= 6  # with those of the probe
    for name in SOURCES:
        calls.clear()
        source = registry().create("source", name, AttributionSource)
        if source.needs_gradient and not source.reads_attention:
            ag.explain(model, IMAGES, name, "all")
            assert len(calls) == 1  # the layer is known now


def test_gradients_of_the_parameters_are_never_touched() -> None:
    model = cnn()
    touched: list[int] = []
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: touched.append(1))
    ag.explain(model, IMAGES, targets="all")
    assert not touched
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------- circumstances


def test_training_mode_with_dropout_and_batch_normalisation() -> None:
    model = nn.Sequential(cnn(), nn.Dropout(0.5))
    expected = ag.explain(model.eval(), IMAGES)
    model.train()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    found = ag.explain(model, IMAGES)
    torch.testing.assert_close(found.maps, expected.maps)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_contexts_without_gradients(context: Any) -> None:
    model = cnn().eval()
    expected = ag.explain(model, IMAGES)
    with context():
        images = IMAGES * 1.0  # an inference tensor
        labels = LABELS.clone()
        found = ag.explain(model, images)
        with_labels = ag.explain(model, images, targets="labels", labels=labels)
    torch.testing.assert_close(found.maps, expected.maps)
    assert not found.maps.is_inference()
    assert with_labels.classes[:, 0].tolist() == LABELS.tolist()


def test_float64_stays_float64() -> None:
    model = cnn().double().eval()
    found = ag.explain(model, IMAGES.double(), targets="all")
    assert found.maps.dtype == torch.float64
    single = ag.explain(model.float(), IMAGES, targets="all")
    torch.testing.assert_close(single.maps.double(), found.maps, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model = cnn().eval()
    expected = ag.explain(model, IMAGES, targets=[1])
    with torch.autocast("cpu", dtype):
        found = ag.explain(model, IMAGES, targets=[1])
    assert found.logits.dtype == dtype
    assert found.maps.dtype == torch.float32
    limit = 0.05 * float(expected.maps.max())
    torch.testing.assert_close(found.maps, expected.maps, rtol=0, atol=limit)


def test_frozen_models() -> None:
    model = cnn().eval()
    expected = ag.explain(model, IMAGES)
    model.requires_grad_(False)
    torch.testing.assert_close(ag.explain(model, IMAGES).maps, expected.maps)


@pytest.mark.parametrize(("side", "grid"), [((48, 80), (6, 10)), ((80, 32), (10, 4)), ((33, 50), (4, 6))])
def test_images_that_are_not_square(side: tuple[int, int], grid: tuple[int, int]) -> None:
    model = cnn().eval()
    images = torch.rand(2, 3, *side)
    assert ag.explain(model, images, size=None).maps.shape == (2, 1, *grid)
    found = ag.explain(model, images)
    assert found.maps.shape == (2, 1, *side)
    torch.testing.assert_close(
        ag.explain(model, images, targets=[1], size=None).maps[:, 0],
        by_hand(model, images, torch.tensor([1, 1])),
    )


def test_one_image_is_enough() -> None:
    model = cnn().eval()
    whole = ag.explain(model, IMAGES, targets=[2])
    torch.testing.assert_close(ag.explain(model, IMAGES[2:3], targets=[2]).maps[0], whole.maps[2])


# --------------------------------------------------------------------- pictures


def test_overlay() -> None:
    found = ag.explain(cnn(), IMAGES, targets=[0, 1])
    pictures = found.overlay()
    assert pictures.shape == (4, 2, 3, 32, 32)
    assert pictures.dtype == torch.uint8
    clear = found.overlay(IMAGES, alpha=0.0)
    torch.testing.assert_close(clear[:, 0], (IMAGES * 255).round().byte())
    larger = found.overlay(torch.rand(4, 3, 50, 70))
    assert larger.shape == (4, 2, 3, 50, 70)
    with pytest.raises(ag.AttnGuideError, match="alpha=2"):
        found.overlay(alpha=2)
    with pytest.raises(ag.AttnGuideError, match=r"\(3, 3, 32, 32\)"):
        found.overlay(IMAGES[:3])


def test_grey_and_many_channelled_images_can_be_shown() -> None:
    for channels in (1, 2, 5):
        model = nn.Sequential(nn.Conv2d(channels, 3, 1), cnn())
        assert ag.explain(model, torch.rand(2, channels, 32, 32)).overlay().shape == (2, 1, 3, 32, 32)


@pytest.mark.parametrize("format", ["png", "npy", "npz"])
def test_save(tmp_path: Path, format: str) -> None:
    found = ag.explain(cnn(), IMAGES[:2], targets=[(0, 3), (1, 0), (1, 2)])
    files = found.save(tmp_path / "new" / "folder", ["a", "b"], format=format)
    assert [file.name for file in files] == [f"a_3.{format}", f"b_0.{format}", f"b_2.{format}"]
    assert sorted(files) == sorted((tmp_path / "new" / "folder").iterdir())
    if format == "png":
        picture = np.asarray(Image.open(files[2]))
        assert picture.shape == (32, 32, 3)
        assert (picture == found.overlay()[1, 1].permute(1, 2, 0).numpy()).all()
    elif format == "npy":
        np.testing.assert_array_equal(np.load(files[2]), found.maps[1, 1].numpy())
    else:
        content = np.load(files[2])
        np.testing.assert_array_equal(content["map"], found.maps[1, 1].numpy())
        assert int(content["cls"]) == 2
        assert float(content["score"]) == pytest.approx(float(found.scores[1, 1]))
    # A second time they are replaced.
    assert found.save(tmp_path / "new" / "folder", ["a", "b"], format=format) == files


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    found = ag.explain(cnn(), IMAGES[:2])
    with pytest.raises(ag.AttnGuideError, match="format='jpg'"):
        found.save(tmp_path, format="jpg")
    with pytest.raises(ag.AttnGuideError, match="2 images need"):
        found.save(tmp_path, ["a"])
    with pytest.raises(ag.AttnGuideError, match="2 images need"):
        found.save(tmp_path, ["a", "a"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ag.AttnGuideError, match="folder"):
        found.save(tmp_path / "file")
    assert [file.name for file in found.save(tmp_path)] == [
        f"image{n}_{int(cls)}.png" for n, cls in enumerate(found.classes[:, 0])
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_image_that_is_not_finite_is_named(value: float) -> None:
    images = torch.rand(3, 3, 16, 16)
    images[1, 2, 3, 4] = value
    with pytest.raises(InputError, match=r"images\[1\] has NaN or infinite values"):
        ag.explain(cnn(), images)


def test_images_of_whole_numbers_and_without_values() -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with pytest.raises(InputError, match=r"does not take images of torch\.uint8"):
        ag.explain(cnn(), images)
    with pytest.raises(InputError, match="on the device meta"):
        ag.explain(cnn(), images.float().to("meta"))


@pytest.mark.parametrize("layer", [3, None, [3], {}, ({},), torch.nn.ReLU()])
def test_a_layer_that_is_not_a_name(layer: Any) -> None:
    images = torch.rand(2, 3, 16, 16)
    with pytest.raises(LayerError, match="must be a name"):
        ag.explain(cnn(), images, layer=layer)
    with pytest.raises(LayerError, match="must be a name"):
        ag.Guide(cnn(), layer=layer)


@pytest.mark.parametrize(
    "names", [["../x", "b"], ["/x", "b"], ["a\\b", "b"], ["", "b"], [1, 2], [[], 2], "ab", 5]
)
def test_names_of_files_stay_in_the_folder(tmp_path: Path, names: Any) -> None:
    found = ag.explain(cnn(), torch.rand(2, 3, 16, 16))
    with pytest.raises(InputError, match="name"):
        found.save(tmp_path / "maps", names)
    assert not list(tmp_path.rglob("*.png"))
    with pytest.raises(InputError, match="folder=''"):
        found.save("")


# ---------------------------------------------------------------- plain results


def test_arrays_and_tables_hold_the_maps() -> None:
    model, images = cnn(), torch.rand(3, 3, 32, 32)
    found = ag.explain(model, images, targets=[(0, 1), (0, 2), (2, 0)], size=None)
    arrays = found.to_numpy()
    torch.testing.assert_close(torch.from_numpy(arrays["maps"]), found.maps)
    assert arrays["logits"].shape == found.logits.shape
    rows = found.to_arrow(["a", "b", "c"], ["x", "y", "z", "u"]).to_pylist()
    assert [(row["key"], row["class"], row["index"]) for row in rows] == [
        ("a", "y", 1),
        ("a", "z", 2),
        ("b", None, None),
        ("c", "x", 0),
    ]
    assert rows[2]["error"] == "no class was to be explained"
    expected = found.maps[0, 1].flatten().tolist()
    assert [value * rows[1]["scale"] for value in rows[1]["map"]] == pytest.approx(
        expected, rel=2**-10, abs=1e-6
    )
    assert rows[1]["score"] == pytest.approx(float(found.logits.softmax(1)[0, 2]), rel=1e-5)
    with pytest.raises(InputError, match="3 images need as many keys, got 1"):
        found.to_arrow(["a"])


@pytest.mark.parametrize("targets", ["predicted", "all", [(0, 1), (1, 2), (1, 0), (2, 2)]])
def test_an_image_that_is_not_finite_is_skipped_and_the_others_are_not(targets: Any) -> None:
    model, images = cnn().eval(), torch.rand(3, 3, 32, 32)
    expected = ag.explain(model, images, targets=targets, size=None)
    given = images.clone()
    given[1, 0, 3, 4] = torch.nan
    found = ag.explain(model, given, targets=targets, size=None, errors="skip")
    assert [*found.skipped] == [1]
    assert "NaN" in found.skipped[1]
    assert bool(found.logits[1].isnan().all())
    assert not found.maps[1].any()
    assert found.classes[1].tolist() == [-1] * found.classes.shape[1]
    torch.testing.assert_close(found.maps[[0, 2], :1], expected.maps[[0, 2], :1])
    assert bool(given[1].isnan().any())  # what was given stays as it is


def test_weights_that_are_not_finite_skip_all_images() -> None:
    model = cnn().eval()
    next(model.parameters()).data.fill_(torch.inf)
    found = ag.explain(model, torch.rand(2, 3, 32, 32), errors="skip", measure=False)
    assert [*found.skipped] == [0, 1]
    with pytest.raises(InputError, match="errors='none'"):
        ag.explain(model, torch.rand(2, 3, 32, 32), errors="none")  # type: ignore[arg-type]


# -------------------------------------------------------------- files and notebooks


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("2 cats.png", "10 dogs.png")]
    for path, image in zip(paths, IMAGES, strict=False):
        visual.to_pil(image).save(path)
    return paths


def test_files_and_pictures_are_what_their_tensors_are(photos: list[Path]) -> None:
    loaded = load()
    tensors = torch.stack([loaded.read(path) for path in photos])
    expected = ag.explain(loaded.model, tensors)
    pictures = [Image.open(path) for path in photos]
    for given in (photos, str(photos[0].parent), str(photos[0].parent / "*.png"), pictures):
        found = ag.explain(loaded, given)
        torch.testing.assert_close(found.maps, expected.maps)
        torch.testing.assert_close(found.images, tensors)
    one = ag.explain(loaded, photos[1])
    torch.testing.assert_close(one.maps[0], expected.maps[1], rtol=1e-4, atol=1e-5)
    assert one.names == ("10 dogs",)
    row = one.to_arrow().to_pylist()[0]
    assert (row["key"], row["class"]) == ("10 dogs", loaded.classes[row["index"]])
    assert one.class_names == loaded.classes
    torch.testing.assert_close(one.displayed, loaded.displayed(tensors[1:]))
    # A tensor, too, is shown as it was before the normalisation of a loaded model.
    torch.testing.assert_close(ag.explain(loaded, tensors).displayed, loaded.displayed(tensors))


def test_files_without_a_known_preprocessing(photos: list[Path]) -> None:
    model = cnn()
    with pytest.raises(InputError, match=r"not known how .* Give transform="):
        ag.explain(model, photos)
    found = ag.explain(model, photos, transform=to_tensor)
    tensors = torch.stack([to_tensor(Image.open(path)) for path in photos])
    torch.testing.assert_close(found.maps, ag.explain(model, tensors).maps)
    with pytest.raises(InputError, match="transform= is for image files"):
        ag.explain(model, IMAGES, transform=to_tensor)
    with pytest.raises(InputError, match="does not exist"):
        ag.explain(model, "nowhere.png", transform=to_tensor)
    with pytest.raises(InputError, match=r"images has 3"):
        ag.explain(model, [photos[0], 3], transform=to_tensor)


def test_an_explanation_shows_itself(photos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = ag.explain(load(), photos, targets="all")
    with Image.open(io.BytesIO(found._repr_png_())) as page:
        assert page.size == found.picture().size
    shown = found._shown(0.5)[0]
    # Of 16 classes the 6 of the highest logits, in order; of a few, all as they were requested.
    assert shown[0] == found.logits[0].topk(6).indices.tolist()
    assert ag.explain(load(), photos, targets=[2, 0])._shown(0.5)[0] == [[0, 1], [0, 1]]
    assert found.class_name(0) == load().classes[0]
    assert ag.explain(cnn(), IMAGES).class_name(2) == "class 2"
    assert repr(found) == "Explanation(grad_cam at block4: 2 images, up to 16 maps each)"
    opened: list[Image.Image] = []
    monkeypatch.setattr(Image.Image, "show", lambda picture: opened.append(picture))
    found.show()
    assert opened[0].size == page.size
    many = ag.explain(cnn(), torch.rand(14, 3, 32, 32))
    assert "2 more images" in many._legend()
    assert many._repr_png_()
    assert ag.explain(cnn(), IMAGES, targets="labels", labels=torch.zeros(4, 4))._repr_png_()


def test_a_figure_has_an_image_for_each_map_and_a_colour_bar() -> None:
    found = ag.explain(cnn(), IMAGES, "input_x_gradient", [0, 1])
    assert found.signed
    figure = found.figure()
    assert len(figure.axes) == 4 * 3 + 1
    assert [label.get_text() for label in figure.axes[-1].get_yticklabels()] == ["against", "0", "for"]


class Slow(AttributionSource):
    """Gives zeros, and says how often it runs the model."""

    needs_gradient = False

    def __call__(self, trace: Any, pairs: Any) -> Tensor:
        return torch.zeros(len(pairs), *self.size(trace))

    def passes(self, trace: Any) -> int:
        return 10**9


def test_a_slow_source_says_so_before_it_begins() -> None:
    with pytest.warns(UserWarning, match=r"Slow\(\) runs the model 1000000000 times for each of 4 maps"):
        ag.explain(cnn(), IMAGES, Slow())


def test_smoothing_is_the_mean_over_copies() -> None:
    model = cnn().eval()
    generator = torch.Generator().manual_seed(0)
    span = IMAGES.amax(dim=(1, 2, 3), keepdim=True) - IMAGES.amin(dim=(1, 2, 3), keepdim=True)
    plain = ag.explain(model, IMAGES, "input_gradient", [2, 0])
    noisy = [IMAGES + 0.1 * span * torch.randn(IMAGES.shape, generator=generator) for _ in range(2)]
    mirrored = ag.explain(model, noisy[0].flip(-1), "input_gradient", [2, 0]).maps.flip(-1)
    other = ag.explain(model, noisy[1], "input_gradient", [2, 0]).maps
    found = ag.explain(model, IMAGES, "input_gradient", [2, 0], smooth=3)
    torch.testing.assert_close(found.maps, (plain.maps + mirrored + other) / 3)
    torch.testing.assert_close(found.logits, plain.logits)
    assert found.classes.tolist() == plain.classes.tolist()
    assert "smoothed over 3" in found.source


def test_smoothing_leaves_out_an_image_that_is_not_finite() -> None:
    model, images = cnn().eval(), torch.rand(3, 3, 32, 32)
    expected = ag.explain(model, images, targets=[0, 2], smooth=1)
    given = images.clone()
    given[1, 2, 0, 0] = torch.inf
    found = ag.explain(model, given, targets=[0, 2], smooth=3, errors="skip")
    assert [*found.skipped] == [1]
    assert found.classes.tolist() == [[0, 2], [-1, -1], [0, 2]]
    assert not found.maps[1].any()
    assert bool(found.maps[[0, 2]].isfinite().all())
    torch.testing.assert_close(found.logits[[0, 2]], expected.logits[[0, 2]])
    assert found._repr_png_()


@pytest.mark.parametrize("wrong", [{"smooth": -1}, {"smooth": 2.5}, {"smooth": 2, "evidence": "decision"}])
def test_smoothing_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="smooth="):
        ag.explain(cnn(), IMAGES, **wrong)
