"""Several threads explain one model, while another one runs it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch import Tensor, nn

import attnguide as ag
from attnguide.layers import forget
from attnguide.models import small_cnn


def cnn() -> nn.Module:
    return small_cnn(5, width=8)


def zero_scales() -> nn.Module:
    """A network with zero weights, for which others stand in while its layers are found."""
    return timm.create_model("resnet10t", num_classes=5, zero_init_last=True)


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=64, depth=2)


def state_of(model: nn.Module) -> list[tuple[bool, int]]:
    return [
        (module.training, len(module._forward_hooks) + len(module._forward_pre_hooks))
        for module in model.modules()
    ]


BATCHES = torch.rand(6, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(
    ("make", "source"),
    [
        (cnn, "grad_cam"),
        (zero_scales, "grad_cam"),
        (vit, "grad_cam"),
        (vit, "transformer_relevance"),
        (cnn, "input_gradient"),
    ],
    ids=["cnn", "zero weights", "vit", "vit, relevance", "cnn, gradient of the images"],
)
def test_each_thread_gets_its_own_maps(make: Callable[[], nn.Module], source: str, train: bool) -> None:
    torch.manual_seed(0)
    model = make().train(train)
    expected = [ag.explain(copy.deepcopy(model), images, source).maps for images in BATCHES]
    forget()  # so that the threads find the layer, too
    before = state_of(model)

    def explained(number: int) -> Tensor:
        return ag.explain(model, BATCHES[number % len(BATCHES)], source).maps

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(explained, range(40)))
    for number, maps in enumerate(found):
        torch.testing.assert_close(maps, expected[number % len(BATCHES)])
    assert state_of(model) == before


@pytest.mark.parametrize("make", [cnn, zero_scales, vit], ids=["cnn", "zero weights", "vit"])
def test_another_thread_runs_the_model_meanwhile(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        expected = [model(images) for images in BATCHES]
    forget()
    done, outputs = threading.Event(), []

    def infer() -> None:
        while not done.is_set():
            number = len(outputs) % len(BATCHES)
            with torch.no_grad():
                outputs.append(model(BATCHES[number]))

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(infer)
        for images in [*BATCHES] * 2:
            ag.explain(model, images)
        done.set()
        running.result()
    assert len(outputs) > 1
    for number, logits in enumerate(outputs):
        torch.testing.assert_close(logits, expected[number % len(BATCHES)])


def test_a_map_in_one_thread_leaves_the_recording_of_a_guide_in_another() -> None:
    torch.manual_seed(0)
    model, labels, mask = cnn(), torch.tensor([0, 3]), torch.rand(2, 16, 16).round()
    with ag.Guide(model) as guide:
        model(BATCHES[0])
        expected = guide.loss(labels, mask=mask)
        model(BATCHES[0])
        thread = threading.Thread(target=ag.explain, args=(model, BATCHES[1]))
        thread.start()
        thread.join()
        torch.testing.assert_close(guide.loss(labels, mask=mask), expected)
