"""Metrics of two processes are those of one that sees everything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed

from attnguide import metrics


def work(rank: int, folder: str) -> None:
    """See every second sample."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = [metric.compute() for metric in seen(slice(rank, None, 2))]
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.barrier()
    os._exit(0)  # gloo's threads now and then outlive Python, which ends in an abort


def seen(part: slice) -> list[torch.nn.Module]:
    generator = torch.Generator().manual_seed(5)
    maps, masks = (torch.rand(11, 6, 6, generator=generator) for _ in range(2))
    scores, labels = torch.randn(11, 3, generator=generator), torch.arange(33).view(11, 3) % 2
    groups = torch.arange(11) % 3
    energy, precision, worst = (
        metrics.EnergyInMask(),
        metrics.AveragePrecision(),
        metrics.WorstGroupAccuracy(3),
    )
    energy.update(maps[part], masks[part])
    precision.update(scores[part], labels[part])
    worst.update((scores[:, 0] > 0).long()[part], labels[:, 0][part], groups[part])
    return [energy, precision, worst]


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    expected = [metric.compute() for metric in seen(slice(None))]
    for rank in range(2):
        for found, value in zip(
            torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected, strict=True
        ):
            torch.testing.assert_close(found, value)
