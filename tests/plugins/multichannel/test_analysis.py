"""What the masks tell, against masks that were made in full."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from attnguide.cli.main import main
from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.errors import InputError
from attnguide.models.networks import small_cnn
from attnguide.visual import to_pil
from attnguide_multichannel.adapted import attach, multichannel_of
from attnguide_multichannel.analysis import Analysis, MaskStatistics, analyze, clustered
from attnguide_multichannel.attention import Masks, MultiChannel
from attnguide_multichannel.figures import correlation_figure, reconstruction_sheet
from attnguide_multichannel.masking import SharedMasks
from attnguide_multichannel.report import write_report


@pytest.fixture(params=["shared", "full"])
def adapter(request: pytest.FixtureRequest) -> MultiChannel:
    torch.manual_seed(0)
    adapter = MultiChannel(6, 4, masks=request.param, maps=5 if request.param == "shared" else None)
    with torch.no_grad():
        if isinstance(adapter.masking, SharedMasks):
            adapter.masking.deviation.normal_(std=2)
            adapter.masking.places.weight.mul_(4)
        else:
            adapter.masking.weight.normal_()
            adapter.masking.bias.normal_(std=2)
    return adapter


def batches() -> list[Tensor]:
    return list(torch.randn(10, 6, 4, 3, generator=torch.Generator().manual_seed(3)).split(4))


def test_statistics_are_those_of_the_masks_themselves(adapter: MultiChannel) -> None:
    statistics = MaskStatistics(adapter)
    for batch in batches():
        statistics.update(batch)
    analysis = statistics.result("abcd")
    features = torch.cat(batches())
    masks = adapter.masks(features).detach()
    by_attribute = np.corrcoef(masks.transpose(0, 1).flatten(1).double().numpy())
    by_channel = np.corrcoef(masks.permute(2, 0, 1, 3, 4).flatten(1).double().numpy())
    np.testing.assert_allclose(analysis.attributes, by_attribute, atol=1e-5)
    np.testing.assert_allclose(analysis.channels, by_channel, atol=1e-5)
    scores = adapter.scores(adapter.attended(features)).detach()
    np.testing.assert_allclose(analysis.scores, np.corrcoef(scores.T.double().numpy()), atol=1e-5)
    torch.testing.assert_close(analysis.likeness(), (analysis.attributes + analysis.scores.abs()) / 2)
    through = (features[:, None] * masks).sum(dim=(3, 4))
    added = (through if isinstance(adapter.masking, SharedMasks) else through / (4 * 3)) * adapter.weight
    torch.testing.assert_close(
        analysis.importance, added.detach().std(dim=0, correction=0), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(analysis.maps, masks.mean(dim=(0, 2)))
    assert analysis.samples == 10


def test_lists_and_rankings() -> None:
    correlation = torch.tensor([[1, 0.9, -0.5], [0.9, 1, 0.2], [-0.5, 0.2, 1.0]])
    importance = torch.tensor([[0.0, 3, 1], [0, 1, 1], [0, 1, 0]])
    scores = torch.tensor([[1, 0, -0.9], [0, 1, 0], [-0.9, 0, 1]])
    analysis = Analysis(
        ("a", "b", "c"), correlation, scores, torch.eye(3), importance, torch.rand(3, 2, 2), 5
    )
    assert [name for name, _ in analysis.correlated(1)["a"]] == ["b"]
    assert [name for name, _ in analysis.correlated(9, by="masks")["c"]] == ["b", "a"]
    assert [name for name, _ in analysis.correlated(9, by="scores")["c"]] == ["a", "b"]
    with pytest.raises(InputError, match="'mask' must be one of masks, scores, both"):
        analysis.correlated(by="mask")  # type: ignore[arg-type]
    assert analysis.matters("a", 2) == [(1, 0.75), (2, 0.25)]
    assert analysis.ranking.tolist() == [0, 2, 1]
    with pytest.raises(InputError, match="no attribute 'd'; there are a, b, c"):
        analysis.matters("d")


def test_what_is_alike_stands_together() -> None:
    base = torch.tensor([0, 1, 0, 1, 0, 1])
    correlation = torch.where(base[:, None] == base, 0.9, -0.2).fill_diagonal_(1)
    order, tree = clustered(correlation)
    assert sorted(order) == list(range(6))
    assert len({int(base[index]) for index in order[:3]}) == 1
    assert tree.shape == (5, 4)
    assert clustered(torch.ones(1, 1))[0] == [0]


def test_models_are_analysed_as_they_evaluate() -> None:
    torch.manual_seed(0)
    model, images = small_cnn(classes=3, width=4), torch.rand(6, 3, 32, 32)
    model.train()
    with attach(model, images[:2]) as adapted:
        found = analyze(adapted, images.split(4), "abc")
        again = analyze(adapted, images.split(3), "abc")
        assert model.training
        torch.testing.assert_close(found.attributes, again.attributes)
        torch.testing.assert_close(found.importance, again.importance)
        with pytest.raises(InputError, match="2 names were given for 3"):
            analyze(adapted, [images], "ab")
        with pytest.raises(InputError, match="there are no images to analyze"):
            analyze(adapted, [], "abc")
        with pytest.raises(InputError, match="images of one size"):
            analyze(adapted, [images, torch.rand(1, 3, 48, 48)], "abc")


@pytest.mark.parametrize("masks", ["shared", "full"])
def test_a_single_attribute_and_channel(masks: Masks, tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 1, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 1)
    )
    images = torch.rand(4, 3, 32, 32)
    with attach(model, images, layer="1", masks=masks) as adapted:
        analysis = analyze(adapted, [images], ["only"])
        assert analysis.correlated() == {"only": []}
        assert analysis.attributes.tolist() == analysis.channels.tolist() == [[1]]
        write_report(adapted, analysis, images, tmp_path / "report.html")
    text = "mixtures of 32 shared maps" if masks == "shared" else "one for each attribute and channel"
    assert f"<td>masks</td><td>{text}</td>" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_reconstructions_are_shown_below_their_images() -> None:
    images = torch.rand(2, 3, 8, 8)
    sheet = reconstruction_sheet(images, images[..., ::2, ::2])
    assert sheet.shape == (3, 16, 16)
    assert correlation_figure(torch.eye(3), ["a", "b", "c"]).axes


@pytest.mark.parametrize("masks", ["shared", "full"])
def test_the_command_analyses_a_folder(masks: Masks, tmp_path: Path) -> None:
    faces = ProceduralFaces(10, size=64)
    for number in range(10):
        to_pil(faces[number].image.as_subclass(Tensor)).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "names.json").write_text(json.dumps(["smile", "hat <b>", "beard"]))
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with attach(model, torch.rand(2, 3, 64, 64), masks=masks) as adapted:
        adapted.save(tmp_path / "attention.safetensors")
        assert multichannel_of(adapted).masking.channels == 512
    options = ["--model", "resnet10t", "--checkpoint", str(tmp_path / "model.pt")]
    options += ["--adapters", str(tmp_path / "attention.safetensors"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(
        main,
        ["analyze", str(tmp_path), *options, "--class-names", str(tmp_path / "names.json"), "--top", "1"],
    )
    assert result.exit_code == 1, result.output
    assert "broken.png" in result.output
    assert "of 10 of 11 images" in result.output
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert found["classes"] == ["smile", "hat <b>", "beard"]
    assert all(len(others) == 1 for others in found["correlated"].values())
    assert sorted(found["ranking"]) == list(range(512))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "hat &lt;b&gt;" in page
    assert page.count("data:image/png;base64,") == 6
    assert "http" not in page.replace("http-equiv", "")
