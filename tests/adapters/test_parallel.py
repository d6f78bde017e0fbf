"""Adapters in several processes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from tests.helpers.models import cnn
from tests.helpers.processes import run_in_processes

from attnguide.adapters import AdapterSet
from attnguide.interfaces import Adapter
from attnguide.testing import hooks
from attnguide.trace import Trace

WORK = """
from contextlib import nullcontext
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from attnguide.interfaces import Adapter


class Scores(Adapter):
    \"\"\"Answers in place of the model; has running statistics, a weight some use, and one nobody does.\"\"\"

    layer = "block4"

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)
        self.rare = nn.Parameter(torch.randn(3))
        self.idle = nn.Parameter(torch.randn(3))

    def forward(self, trace):
        return self.head(self.norm(trace.feature.spatial).mean(dim=(2, 3)))

    def loss(self, trace, labels, *, mask=None):
        return None if mask is None else self.rare.square().sum()


def work(rank, world):
    import attnguide as ag
    from attnguide.adapters import AdapterSet
    from tests.helpers.models import batch, cnn

    images, labels, masks = batch(8)
    own = slice(rank * 4, rank * 4 + 4)
    for guided in (True, False):
        for parts in (1, 2):
            torch.manual_seed(0)
            model = DDP(cnn(), find_unused_parameters=True)
            torch.manual_seed(rank)  # the adapters start differently
            adapters = AdapterSet(model, [Scores()])
            guide = ag.Guide(model, adapters=adapters) if guided else None
            trained = [*model.parameters(), *adapters.parameters()]
            optimizer = torch.optim.AdamW(trained, lr=1e-2)
            (scores,) = adapters
            for step in range(20):
                for part in range(parts):
                    samples = torch.arange(8)[own][part::parts]
                    with nullcontext() if part == parts - 1 else model.no_sync():
                        logits = model(images[samples])
                        loss = cross_entropy(logits, labels[samples])
                        # The first process never uses one of the weights.
                        mask = masks[samples] if rank else None
                        loss = loss + (guide or adapters).loss(labels[samples], mask=mask)
                        (loss / parts).backward()
                assert scores.idle.grad is None
                optimizer.step()
                optimizer.zero_grad()
                if rank == 0 and step == 10:
                    # A pass of one process alone waits for nobody.
                    ag.explain(model, images[:2])
                    with torch.no_grad():
                        model.module.eval()(images[:2])
                    model.module.train()
            for name, value in adapters.modules.state_dict().items():
                assert same(value), (name, guided, parts)
            assert bool((scores.rare.detach() != 0).all())
            (guide or adapters).remove()

    # The gradient is that of the joint batch.
    torch.manual_seed(1)
    adapters = AdapterSet(model.eval(), [Scores()])
    weights = {name: value.clone() for name, value in adapters.modules.state_dict().items()}
    found = []
    for parts in (1, 2):
        for part in range(parts):
            samples = torch.arange(8)[own][part::parts]
            with nullcontext() if part == parts - 1 else model.no_sync():
                (cross_entropy(model(images[samples]), labels[samples]) / parts).backward()
        found.append([None if p.grad is None else p.grad.clone() for p in adapters.parameters()])
        adapters.modules.zero_grad()
    model.module.zero_grad()
    cross_entropy(model.module(images), labels).backward()
    for name, p in adapters.modules.named_parameters():
        for gradients in found:
            gradient = gradients.pop(0)
            assert (gradient is None) == (p.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(gradient, p.grad, rtol=1e-5, atol=1e-7, msg=name)
"""


@pytest.mark.slow
def test_adapters_are_equal_in_all_processes(tmp_path: Path) -> None:
    run_in_processes(WORK, tmp_path)


class Scale(Adapter):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, trace: Trace) -> torch.Tensor:
        return trace.logits * self.scale


def test_a_copy_of_the_model_has_no_adapters_to_synchronize() -> None:
    model = cnn()
    adapters = AdapterSet(model, [Scale()])
    images = torch.rand(2, 3, 32, 32)
    model(images).sum().backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(images).sum().backward()
    adapters.remove()
    assert not hooks(model)
