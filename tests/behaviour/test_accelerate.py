"""Guidance in a loop of Accelerate: as the plain loop, over accumulated batches, processes and a resume."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import pytest
import torch
from tests.helpers.processes import run_in_processes
from tests.helpers.training import LR, STEPS, Sparse, assert_same_weights, network, plain_loop, terms
from torch import nn
from torch.utils.data import DataLoader

import attnguide as ag

accelerate = pytest.importorskip("accelerate")


def train(steps: int, every: int, size: int, state: Path | None = None, resume: bool = False) -> nn.Module:
    """Train as the documentation does; save the state at the end, or go on from it."""
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    parallel, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(Sparse(), size))
    guide = ag.Guide(model, terms=terms())
    accelerator.register_for_checkpointing(guide)
    done = 0
    if resume:
        accelerator.load_state(str(state))
        done = guide.state_dict()["step"] // every
    while done < steps:
        rest = iter(batches)
        while done < steps and (window := list(islice(rest, every))):
            whole = None
            for number, (images, labels, masks) in enumerate(window, start=1):
                with nullcontext() if number == len(window) else accelerator.no_sync(parallel):
                    loss = nn.functional.cross_entropy(parallel(images), labels) / len(window)
                    if whole is None and every > 1:
                        counts = [guide.count(i, label, mask=mask) for i, label, mask in window]
                        whole = [sum(each) for each in zip(*counts, strict=True)]
                    accelerator.backward(loss + guide.loss(labels, mask=masks, normalize_by=whole))
            optimizer.step()
            optimizer.zero_grad()
            done += 1
    if state is not None and not resume:
        accelerator.save_state(str(state))
    guide.remove()
    return model


@pytest.mark.parametrize("every", [1, 4])
def test_weights_are_those_of_the_plain_loop(every: int) -> None:
    steps = STEPS if every == 1 else 6
    assert_same_weights(train(steps, every, 8 // every), plain_loop(8, steps, every))


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    train(6, 1, 8, tmp_path / "state")  # an epoch, within the warm-up
    assert_same_weights(train(12, 1, 8, tmp_path / "state", resume=True), plain_loop(8, 12))


PARALLEL = """
import os, warnings
warnings.filterwarnings("ignore")


def work(rank, world):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost",
                      MASTER_PORT="29556")
    from tests.behaviour.test_accelerate import STEPS, assert_same_weights, plain_loop, train

    for every in (1, 4):
        assert_same_weights(train(STEPS, every, 8 // every // world), plain_loop(8, STEPS, every))
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    run_in_processes(PARALLEL, tmp_path)
