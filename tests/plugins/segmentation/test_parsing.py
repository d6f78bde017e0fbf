"""The parsing network, parsers of all kinds, the prior, and the data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tests.helpers.helen import make_helen
from tests.helpers.models import cnn
from torch import Tensor, nn
from torchvision.transforms import v2

import attnguide as ag
from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.errors import AttnGuideError
from attnguide_segmentation.datasets import LabelMaps, celebamask, helen, lapa, read_labels
from attnguide_segmentation.lfwa import LFWA
from attnguide_segmentation.metrics import region_iou
from attnguide_segmentation.network import JointNetwork, attribute_network
from attnguide_segmentation.parser import EMBEDDED, Parser, load_parser, save_parser, standardized
from attnguide_segmentation.parsing import ParsingNetwork, parsing_loss
from attnguide_segmentation.prior import SegmentationPrior
from attnguide_segmentation.regions import REGIONS, SCHEMES, as_masks, merged

# ----------------------------------------------------------------------- network


def test_the_network_is_that_of_table_1() -> None:
    network = ParsingNetwork().eval()
    shapes: list[tuple[int, ...]] = []
    for stage in (*network.encoder, *reversed(list(network.decoder))):
        for layer in stage:  # type: ignore[attr-defined]
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                layer.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:])))
    with torch.no_grad():
        scores = network(torch.rand(1, 3, 218, 178))
    encoder = [(64, 218, 178)] * 2 + [(128, 109, 89)] * 2 + [(256, 55, 45)] * 2 + [(512, 28, 23)] * 2
    decoder = [(512, 28, 23)] * 2 + [(256, 55, 45)] * 2 + [(128, 109, 89)] * 2 + [(64, 218, 178)] * 2
    assert shapes == encoder + decoder
    assert [tuple(one.shape[1:]) for one in scores] == [(7, 28, 23), (7, 55, 45), (7, 109, 89), (7, 218, 178)]


def test_the_basic_network_has_twelve_convolutions_and_24_million_weights() -> None:
    network = attribute_network(40)
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 12
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(24e6, rel=0.02)
    small = attribute_network(5, width=4).eval()
    assert small(torch.rand(2, 3, 50, 40)).shape == (2, 5)
    features = small[:-3](torch.rand(1, 3, 218, 178))
    assert features.shape == (1, 64, 14, 12)


def test_the_loss_is_the_mean_over_the_scales() -> None:
    labels = torch.randint(0, 7, (2, 16, 16))
    scores = [torch.randn(2, 7, side, side) for side in (2, 4, 8, 16)]
    expected = [
        F.cross_entropy(
            one, F.interpolate(labels[:, None].float(), one.shape[-1], mode="nearest-exact")[:, 0].long()
        )
        for one in scores
    ]
    assert parsing_loss(scores, labels).item() == pytest.approx(float(sum(expected)) / 4, rel=1e-5)


def test_both_tasks_move_what_they_share() -> None:
    network = JointNetwork(3, width=4)
    logits, scores = network(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 3)
    shared = network.parser.encoder[0][0].weight  # type: ignore[index, union-attr]
    assert shared is network.attributes.block1[0].weight  # type: ignore[index, union-attr]
    for loss in (logits.sum(), parsing_loss(scores, torch.zeros(2, 32, 32).long())):
        (gradient,) = torch.autograd.grad(loss, shared, retain_graph=True)
        assert gradient.abs().sum() > 0
    assert len(set(network.parameters())) == len(list(network.parameters()))


# ----------------------------------------------------------------------- parsers


def parser(side: int = 32) -> Parser:
    torch.manual_seed(0)
    return Parser(ParsingNetwork(4), size=side)


def test_a_parser_is_frozen_and_gives_shares() -> None:
    made = parser()
    made.train()
    assert not any(module.training for module in made.modules())
    assert not any(p.requires_grad for p in made.parameters())
    masks = made(torch.rand(2, 3, 50, 40, requires_grad=True))
    assert masks.shape == (2, 7, 32, 32)
    assert not masks.requires_grad
    torch.testing.assert_close(masks.sum(dim=1), torch.ones(2, 32, 32))


def test_normalisation_does_not_matter() -> None:
    made, images = parser(), torch.rand(2, 3, 32, 32)
    as_trained = v2.functional.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(made(images), made(as_trained), atol=1e-4, rtol=1e-4)
    assert bool(standardized(torch.ones(1, 3, 8, 8)).isfinite().all())


class Foreign(nn.Module):
    """A segmenter as torchvision's are: 19 labels, in a dictionary."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {
            "out": images.mean(dim=1, keepdim=True) * torch.linspace(-9, 9, 19)[:, None, None],
            "aux": images,
        }


def test_any_segmenter_will_do() -> None:
    images = torch.rand(2, 3, 16, 16)
    masks = Parser(Foreign(), labels=SCHEMES["celebamask"], prepare=None)(images)
    shares = Foreign()(images)["out"].softmax(dim=1)
    shared = [sum(shares[:, i] for i, n in enumerate(SCHEMES["celebamask"]) if n == name) for name in REGIONS]
    torch.testing.assert_close(masks, torch.stack(shared, dim=1))  # type: ignore[arg-type]
    with pytest.raises(AttnGuideError, match="but 11 labels were named"):
        Parser(Foreign(), labels=SCHEMES["helen"], prepare=None)(images)
    with pytest.raises(AttnGuideError, match="region 'beard'"):
        Parser(Foreign(), labels=["beard"])


def test_parsers_are_saved_and_loaded(tmp_path: Path) -> None:
    made, images = parser(), torch.rand(1, 3, 32, 32)
    made.network.half().float()  # they are kept in half precision
    save_parser(tmp_path / "mine.safetensors", made)
    torch.testing.assert_close(load_parser(tmp_path / "mine.safetensors")(images), made(images))
    plain = Parser(ParsingNetwork(4), prepare=None)
    save_parser(tmp_path / "plain.safetensors", plain)
    again = load_parser(tmp_path / "plain.safetensors")
    assert (again.size, again.prepare) == (None, None)
    with pytest.raises(AttnGuideError, match="cannot be saved"):
        save_parser(tmp_path / "own.safetensors", Parser(ParsingNetwork(4), prepare=lambda image: image))
    with pytest.raises(AttnGuideError, match="only a ParsingNetwork is saved"):
        save_parser(tmp_path / "other.safetensors", Parser(Foreign(), labels=SCHEMES["celebamask"]))
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    with pytest.raises(AttnGuideError, match="not a parser that attnguide saved"):
        load_parser(tmp_path / "bad.safetensors")


def test_the_parser_that_comes_along_knows_drawn_faces() -> None:
    faces = ProceduralFaces(80, 96, seed=5).stack()
    image, truth = faces.image.as_subclass(Tensor), merged(faces.segmentation.as_subclass(Tensor))
    overlap = region_iou(load_parser()(image).argmax(dim=1), truth)
    assert overlap.mean() > 0.85
    assert overlap.min() > 0.68
    # In warm light, with contrast, a little aside.
    changed = (image.roll(3, dims=3) ** 0.8 * torch.tensor([1.1, 0.95, 0.8])[:, None, None]).clamp(0, 1)
    assert region_iou(load_parser()(changed).argmax(dim=1), truth.roll(3, dims=2)).mean() > 0.8
    assert EMBEDDED.stat().st_size < 2e6


def test_weighted_regions_count_more() -> None:
    scores, labels = (torch.randn(2, 7, 8, 8), torch.randn(2, 7, 4, 4)), torch.randint(7, (2, 8, 8))
    weight = torch.rand(7) + 0.1
    expected = []
    for one, step in zip(scores, (1, 2), strict=True):
        # The nearest pixel of a coarser grid is the one right below its centre.
        target = labels[:, step // 2 :: step, step // 2 :: step]
        chosen = one.log_softmax(dim=1).gather(1, target[:, None])[:, 0] * weight[target]
        expected.append(-chosen.sum() / weight[target].sum())
    torch.testing.assert_close(parsing_loss(scores, labels, weight), sum(expected) / 2)


# ------------------------------------------------------------------------- prior

CLASSES = ("lipstick", "black_hair", "young", "eyeglasses")


def guided(regions: Tensor | None, prior: SegmentationPrior) -> tuple[Tensor, list[tuple[int, str]]]:
    """Return the maps that guided, and whose they are."""
    model = cnn(len(CLASSES))
    faces = ProceduralFaces(2, 32).stack()
    labels = torch.ones(2, len(CLASSES))
    with ag.Guide(model, prior=prior, loss="energy") as guide:
        model(faces.image.as_subclass(Tensor))
        guide.loss(labels, regions=regions).backward()
        (record,) = guide.records()
    pairs = zip(record.pairs.sample.tolist(), record.pairs.cls.tolist(), strict=True)
    return record.prior, [(sample, CLASSES[cls]) for sample, cls in pairs]


def test_attributes_are_where_their_regions_are() -> None:
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    labels[:, 16:, :16] = REGIONS.index("mouth")
    labels[0, :16, 16:] = REGIONS.index("hair")
    drawn, pairs = guided(labels, SegmentationPrior(classes=CLASSES))
    half = drawn.shape[-1] // 2
    # Nobody shows youth, or glasses without eyes.
    assert pairs == [(0, "lipstick"), (0, "black_hair"), (1, "lipstick")]
    assert drawn[0, half:, :half].eq(1).all()
    assert drawn[0].sum() == half * half
    assert drawn[1, :half, half:].eq(1).all()


def test_regions_are_found_in_the_images() -> None:
    seen = []

    def mouths(images: Tensor) -> Tensor:
        seen.append(images.shape)
        return as_masks(torch.full((len(images), 8, 8), REGIONS.index("mouth")))

    _, pairs = guided(None, SegmentationPrior(classes=CLASSES, parser=mouths))
    assert seen == [(2, 3, 32, 32)]
    assert pairs == [(0, "lipstick"), (1, "lipstick")]


def test_a_prior_for_other_classes() -> None:
    with pytest.raises(AttnGuideError, match="the model has 4 classes, the prior knows 40"):
        guided(torch.zeros(2, 32, 32).long(), SegmentationPrior())
    with pytest.raises(AttnGuideError, match="regions have 1 entries, the batch has 2"):
        guided(torch.zeros(1, 32, 32).long(), SegmentationPrior(classes=CLASSES))
    with pytest.raises(AttnGuideError, match=r"attribute 'lipstik'.*Did you mean"):
        SegmentationPrior(classes=["lipstik"])


# --------------------------------------------------------------------- data sets


def picture(path: Path, side: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), "red").save(path)


def grey(path: Path, values: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def test_lapa(tmp_path: Path) -> None:
    labels = np.arange(64, dtype=np.uint8).reshape(8, 8) % 11
    picture(tmp_path / "train/images/7.png")
    grey(tmp_path / "train/labels/7.png", labels)
    sample = lapa(tmp_path, transform=v2.RandomHorizontalFlip(p=1))[0]
    assert sample.image.shape == (3, 8, 8)
    expected = [[SCHEMES["helen"][label] for label in row[::-1]] for row in labels.tolist()]
    assert [[REGIONS[region] for region in row] for row in sample.regions.tolist()] == expected
    with pytest.raises(AttnGuideError, match="split of LaPa 'dev'"):
        lapa(tmp_path, "dev")
    with pytest.raises(AttnGuideError, match="is not a folder"):
        lapa(tmp_path, "val")


def test_helen(tmp_path: Path) -> None:
    make_helen(tmp_path)
    data = helen(tmp_path)
    assert len(data) == 1
    assert [REGIONS[row[0]] for row in data[0].regions.tolist()] == list(SCHEMES["helen"][:8])
    # Where two labels claim a pixel as much, the first stands.
    twice = np.full((8, 8), 200, dtype=np.uint8)
    grey(tmp_path / "labels/a_1/a_1_lbl10.png", twice)
    assert [REGIONS[row[0]] for row in data[0].regions.tolist()] == list(SCHEMES["helen"][:8])


def test_celebamask(tmp_path: Path) -> None:
    picture(tmp_path / "CelebA-HQ-img/2001.jpg", 16)
    half = np.zeros((8, 8), dtype=np.uint8)
    half[:, :4] = 255
    folder = tmp_path / "CelebAMask-HQ-mask-anno/1"
    grey(folder / "02001_skin.png", np.full((8, 8), 255, dtype=np.uint8))
    grey(folder / "02001_hair.png", half)
    regions = celebamask(tmp_path)[0].regions
    assert regions.shape == (16, 16)
    assert regions[:, :8].eq(REGIONS.index("hair")).all()
    assert regions[:, 8:].eq(REGIONS.index("face_skin")).all()
    (folder / "02001_skin.png").unlink()
    with pytest.raises(AttnGuideError, match=r"has no mask 02001_skin\.png"):
        celebamask(tmp_path)


def test_bad_label_maps(tmp_path: Path) -> None:
    picture(tmp_path / "images/1.png")
    grey(tmp_path / "labels/1.png", np.full((8, 8), 44, dtype=np.uint8))
    data = LabelMaps.in_folders(tmp_path / "images", tmp_path / "labels")
    with pytest.raises(AttnGuideError, match=r"1\.png: the label map holds \[44\]"):
        data[0]
    grey(tmp_path / "labels/1.png", np.zeros((4, 8), dtype=np.uint8))
    with pytest.raises(AttnGuideError, match="is 4×8 pixels, the image 8×8"):
        data[0]
    picture(tmp_path / "labels/1.png")
    with pytest.raises(AttnGuideError, match="of mode RGB; a label map is grey"):
        read_labels(tmp_path / "labels/1.png")
    (tmp_path / "labels/1.png").unlink()
    with pytest.raises(AttnGuideError, match="1 files are missing"):
        LabelMaps.in_folders(tmp_path / "images", tmp_path / "labels")


def lfwa(root: Path, *, labels: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    """Write a folder as LFWA is released, with the tables that MATLAB 7.3 writes."""
    h5py = pytest.importorskip("h5py")
    names = ["A_B\\A_B_0001.jpg", "C\\C_0002.jpg", "C\\C_0001.jpg"]
    for name in names:
        picture(root / "lfw" / name.replace("\\", "/"))
    with h5py.File(root / "lfw_att_40.mat", "w") as file:
        file["label"] = labels.T

        def cells(key: str, texts: list[str]) -> None:
            references = []
            for index, text in enumerate(texts):
                cell = file.create_dataset(
                    f"#refs#/{key}{index}", data=np.array([[ord(c)] for c in text], np.uint16)
                )
                references.append([cell.ref])
            file.create_dataset(key, data=np.array(references, dtype=h5py.ref_dtype).T, dtype=h5py.ref_dtype)

        cells("name", names)
        cells("AttrName", ["Male", "Smiling"])
    with h5py.File(root / "indices_train_test.mat", "w") as file:
        file["indices_img_train"] = np.array([[3.0, 1.0]]).T
        file["indices_img_test"] = np.array([[2.0]])


def test_lfwa(tmp_path: Path) -> None:
    lfwa(tmp_path, labels=np.array([[1.0, 0], [0, 0], [1, 1]]))
    data = LFWA(tmp_path, transform=v2.PILToTensor())
    assert data.classes == ("Male", "Smiling")
    assert [file.name for file in data.files] == ["C_0001.jpg", "A_B_0001.jpg"]
    assert data[0][0].shape == (3, 8, 8)
    assert [labels.tolist() for _, labels in (data[0], data[1])] == [[1, 1], [1, 0]]
    assert len(LFWA(tmp_path, "test")) == 1
    (tmp_path / "lfw/C/C_0002.jpg").unlink()
    with pytest.raises(AttnGuideError, match="1 of 1 images are missing"):
        LFWA(tmp_path, "test")
    (tmp_path / "lfw_att_40.mat").write_bytes(b"MATLAB 5.0")
    with pytest.raises(AttnGuideError, match="is not the table of LFWA"):
        LFWA(tmp_path)


def test_lfwa_with_too_few_labels(tmp_path: Path) -> None:
    lfwa(tmp_path, labels=np.zeros((2, 2)))
    with pytest.raises(AttnGuideError, match=r"labels of shape \(2, 2\) for 3 images and 2 attributes"):
        LFWA(tmp_path)
