"""What processes that train one model together share."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.helpers.models import cnn
from tests.helpers.processes import run_in_processes

from attnguide.capture.parallel import joint_sum, parallel_of
from attnguide.errors import GuidanceError

WORK = """
def work(rank, world):
    from attnguide.capture.parallel import joint_sum, parallel_of
    from tests.helpers.models import cnn

    model, other = cnn(), cnn()
    wrapped = DDP(torch.nn.Sequential(model))
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append((parallel_of(model), parallel_of(other))))
    images = torch.rand(2, 3, 32, 32)
    wrapped(images)
    wrapped.module(images)
    assert seen == [(wrapped, None), (None, None)], seen

    values = torch.tensor([1.0, rank + 1.0], requires_grad=True)
    total = joint_sum(values, dist.group.WORLD)
    assert total.tolist() == [2, 3]
    assert not total.requires_grad
    assert values.tolist() == [1, rank + 1]
"""


@pytest.mark.slow
def test_passes_and_sums(tmp_path: Path) -> None:
    run_in_processes(WORK, tmp_path)


def test_processes_that_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Timed out.")

    monkeypatch.setattr(dist, "all_reduce", fail)
    monkeypatch.setattr(dist, "get_world_size", lambda _: 2)
    message = "the 2 processes did not meet in guide.loss: Timed out. Call it in each process"
    with pytest.raises(GuidanceError, match=re.escape(message)):
        joint_sum(torch.ones(1), None)  # type: ignore[arg-type]
    assert parallel_of(cnn()) is None
