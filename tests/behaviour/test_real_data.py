"""Real photographs and digits, with a network that knows what they show."""

from __future__ import annotations

import copy
import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tests.helpers.pictures import index_of
from tests.helpers.real_data import BESIDE, RealData
from timm.data import ImageNetInfo
from torch import Tensor, nn

import attnguide as ag
from attnguide.cli.main import main
from attnguide.data.decoy import DecoyMNIST
from attnguide.data.images import find_images, read_image
from attnguide.masks import MaskFolder
from attnguide.models.loading import LoadedModel, load

NETWORK = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def network(real_data: RealData) -> LoadedModel:
    return load(NETWORK, checkpoint=real_data.path(f"weights/{NETWORK}.safetensors"))


@pytest.fixture(scope="module")
def photographs(real_data: RealData) -> list[Path]:
    paths = find_images([real_data.path("imagenet_samples")])
    assert len(paths) == 40
    return paths


@pytest.fixture(scope="module")
def images(network: LoadedModel, photographs: list[Path]) -> Tensor:
    return torch.stack([network.read(path) for path in photographs])


def known_classes(paths: list[Path]) -> Tensor:
    """ImageNet's number of each photograph, from the synset in its name."""
    synsets = ImageNetInfo().label_names()
    return torch.tensor([synsets.index(path.name.partition("_")[0]) for path in paths])


# -------------------------------------------------------------------- photographs


def test_photographs_are_read_as_pillow_shows_them(photographs: list[Path]) -> None:
    for path in photographs:
        image = read_image(path)
        assert image.mode == "RGB"
        assert max(image.size) <= 320
        with Image.open(path) as plain:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(plain.convert("RGB")))


def test_the_network_knows_what_they_show(
    network: LoadedModel, photographs: list[Path], images: Tensor
) -> None:
    with torch.no_grad():
        logits = torch.cat([network.model(part) for part in images.split(20)])
    assert bool(logits.isfinite().all())
    classes = known_classes(photographs)
    right = logits.argmax(dim=1) == classes
    in_top = (logits.topk(5).indices == classes[:, None]).any(dim=1)
    assert (int(right.sum()), int(in_top.sum())) == (33, 39)  # as the data's own page has it
    named = [network.classes[cls].partition(",")[0].casefold() for cls in classes.tolist()]
    assert "hen" in named
    assert named[photographs.index(next(path for path in photographs if path.stem.endswith("_hen")))] == "hen"


def test_maps_are_those_of_pytorch_grad_cam(
    network: LoadedModel, photographs: list[Path], images: Tensor
) -> None:
    peer = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    some, classes = images[:6], known_classes(photographs)[:6]
    explanation = ag.explain(network.model, some, "grad_cam", "labels", labels=classes)
    assert explanation.maps.shape == (6, 1, *network.size)
    assert bool(explanation.maps.isfinite().all())
    assert bool((explanation.maps.flatten(2).amax(dim=2) > 0).all())
    layer = network.model.get_submodule(explanation.layer)
    with peer.GradCAM(network.model, [layer]) as cam:
        expected = cam(some, [ClassifierOutputTarget(cls) for cls in classes.tolist()])
    # The peer scales each map between its least and its greatest value.
    scaled = ag.functional.min_max(explanation.maps[:, 0])
    torch.testing.assert_close(scaled, torch.from_numpy(expected), rtol=1e-3, atol=1e-4)


def test_other_sources_see_something_in_photographs(network: LoadedModel, images: Tensor) -> None:
    for source in ("cam", "layer_cam", "hires_cam", "xgrad_cam", "layer_attention", "input_gradient"):
        maps = ag.explain(network.model, images[:2], source).maps
        assert bool(maps.isfinite().all()), source
        assert bool((maps.flatten(2).std(dim=2) > 0).all()), source


def test_the_command_line_writes_a_map_of_each_photograph(
    real_data: RealData, photographs: list[Path], tmp_path: Path
) -> None:
    weights = real_data.path(f"weights/{NETWORK}.safetensors")
    arguments = ["explain", *map(str, photographs[:3]), "--model", NETWORK, "--checkpoint", str(weights)]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    index = index_of(tmp_path)
    assert [Path(line["image"]).name for line in index] == [path.name for path in photographs[:3]]
    assert all((tmp_path / file).is_file() for line in index for file in line["files"])


# --------------------------------------------------------------------------- birds


@pytest.fixture(scope="module")
def birds(real_data: RealData) -> tuple[Path, list[dict[str, str]]]:
    folder = real_data.path("birds")
    with (folder / "metadata.csv").open(newline="") as file:
        return folder, list(csv.DictReader(file))


def test_masks_of_birds_are_zeros_and_ones(birds: tuple[Path, list[dict[str, str]]]) -> None:
    folder, rows = birds
    masks = MaskFolder(folder / "masks")
    assert len(masks) == len(rows) == 1728
    for row in rows[::50]:
        mask = masks.get(row["image"])
        assert mask is not None
        assert mask.shape == (160, 160)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert 0.02 <= round(float(mask.mean()), 2) <= 0.36
        with Image.open(folder / row["mask"]) as image:
            assert torch.equal(mask.bool(), torch.from_numpy(np.array(image.convert("1"))))


def test_pretrained_maps_find_birds_better_than_chance(
    network: LoadedModel, birds: tuple[Path, list[dict[str, str]]]
) -> None:
    folder, rows = birds
    some = [row for row in rows if row["split"] == "test"][::25]
    masks = MaskFolder(folder / "masks")
    # The network crops what it reads: masks go the same way, as pictures.
    pictures = torch.stack([network.read(folder / row["image"]) for row in some])
    found = [masks.get(row["image"]) for row in some]
    cropped = torch.stack([_cropped(network, mask) for mask in found if mask is not None])
    maps = ag.explain(network.model, pictures).maps[:, 0]
    shares = ag.metrics.energy_in_mask(maps, cropped)
    assert bool(((shares >= 0) & (shares <= 1)).all())
    chance = cropped.mean(dim=(1, 2))
    assert 0 < float(chance.mean()) < float(shares.mean()) < 1


def _cropped(network: LoadedModel, mask: Tensor) -> Tensor:
    grey = Image.fromarray((mask.numpy() * 255).astype(np.uint8)).convert("RGB")
    red = network.prepared(grey, "a mask")[:1] * network.std[0] + network.mean[0]
    return red[0].clamp(0, 1)


def test_guiding_on_birds_lowers_the_energy_outside(
    network: LoadedModel, birds: tuple[Path, list[dict[str, str]]]
) -> None:
    folder, rows = birds
    some = [row for row in rows if row["split"] == "train"][::150]
    pictures = torch.stack([network.read(folder / row["image"]) for row in some])
    masks = MaskFolder(folder / "masks")
    shapes = torch.stack(
        [_cropped(network, mask) for row in some if (mask := masks.get(row["image"])) is not None]
    )
    labels = torch.tensor([int(row["label"]) for row in some])
    model = copy.deepcopy(network.model)
    model.classifier = nn.Linear(model.num_features, 2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("classifier", "conv_head", "bn2")))
    model.eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    with ag.Guide(model, loss="energy", weight=1.0) as guide:
        for _ in range(6):
            optimizer.zero_grad()
            entropy = nn.functional.cross_entropy(model(pictures), labels)
            guidance = guide.loss(labels, mask=shapes)
            (entropy + guidance).backward()
            optimizer.step()
            losses.append(float(guidance.detach()))
    assert losses[-1] < 0.8 * losses[0], losses


# --------------------------------------------------------------------------- digits


@pytest.mark.parametrize("protocol", ["xil", "cdep"])
def test_a_network_falls_for_the_patches_of_real_digits(real_data: RealData, protocol: str) -> None:
    root = real_data.path("mnist.npz")
    train = DecoyMNIST(root, protocol=protocol)  # type: ignore[arg-type]
    test = DecoyMNIST(root, "test", protocol=protocol)  # type: ignore[arg-type]
    assert (len(train), len(test)) == (60000, 10000)
    assert train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    plain = DecoyMNIST(root, "test", protocol=protocol, decoy=False)  # type: ignore[arg-type]
    inside = test.masks[:, None].bool()
    assert torch.equal(test.images[inside], plain.images[inside])  # nothing is changed but the patches
    # The grey of the patch alone tells each digit in training, and misleads in the test.
    shares = []
    for data in (train, test):
        forbidden = data.images[:, 0].masked_fill(data.masks.bool(), -torch.inf).flatten(1).amax(dim=1)
        low = float(train.images.min())
        grey = (forbidden - low) / (1 - low) * 255
        guess = ((255 - grey) / 25).round().long()
        shares.append(float((guess == data.labels).float().mean()))
    assert shares[0] > 0.98  # a stroke that reaches the corner of another patch hides a few
    assert shares[1] < 0.3


# ------------------------------------------------------------------------ where it is


def test_where_the_data_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNGUIDE_TEST_DATA", str(tmp_path))
    assert RealData.find().folder == (BESIDE if BESIDE.is_dir() else tmp_path)
    monkeypatch.setattr("tests.helpers.real_data.BESIDE", tmp_path / "nowhere")
    found = RealData.find()
    assert found.folder == tmp_path
    with pytest.raises(pytest.skip.Exception, match=r"there is no mnist\.npz in"):
        found.path("mnist.npz")
    (tmp_path / "mnist.npz").touch()
    assert found.path("mnist.npz") == tmp_path / "mnist.npz"
    monkeypatch.delenv("ATTNGUIDE_TEST_DATA")
    with pytest.raises(pytest.skip.Exception, match="ATTNGUIDE_TEST_DATA names none"):
        RealData.find().path("birds")
