"""Probes: where each place of an output looks, measured by perturbing the images."""

from __future__ import annotations

import torch
from tests.helpers.models import batch, cnn, tiny_vit
from torch import nn

from attnguide.capture.calls import Tap
from attnguide.layers._probe import Subject, first_pass, measure
from attnguide.testing import snapshot

IMAGES = batch()[0]


def test_places_of_a_convolution_look_where_they_are() -> None:
    model = cnn().eval()
    before = snapshot(model)
    found = measure(Subject(model, IMAGES), [Tap("block2")])[Tap("block2")]["nchw"]
    assert {**snapshot(model), "process": 0} == {**before, "process": 0}
    rows, columns = found.rows.view(8, 8), found.columns.view(8, 8)
    expected = torch.arange(8.0)
    for across, along in ((rows, 1), (columns, 0)):
        line = across.mean(dim=along)
        assert float(torch.corrcoef(torch.stack([line.double(), expected.double()]))[0, 1]) > 0.98


def test_the_first_pass_lists_outputs_and_their_gradients() -> None:
    model = tiny_vit().eval()
    seen = first_pass(Subject(model, IMAGES))
    # The last block and the sequence of blocks give the same tensor: the outermost names it.
    assert {"patch_embed", "blocks.0", "blocks"} <= {output.name for output in seen.outputs}
    shapes = {output.name: output.shape for output in seen.outputs}
    assert shapes["blocks.0"] == (17, 12)  # without the batch axis


def test_a_subject_is_run_as_it_is() -> None:
    class Scaled(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean(dim=(2, 3))

    subject = Subject(Scaled(), IMAGES)
    assert subject.size == (32, 32)
    torch.testing.assert_close(subject.run(IMAGES[:2]), IMAGES[:2].mean(dim=(2, 3)))
