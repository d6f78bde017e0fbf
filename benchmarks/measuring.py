"""Measures calls alternately: their time as ratios to the first, and their peak memory."""

from __future__ import annotations

import gc
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler logs its start and end

Call = Callable[[], object]

#: Seconds that a block of repeated calls must last: in less, a clock measures the scheduler.
BLOCK = 0.1
#: Fewer rounds have no quartiles worth the name, whatever the budget says.
LEAST = 5


# ----------------------------------------------------------------------- time


def seconds(call: Call, device: torch.device, repeats: int = 1) -> float:
    """Seconds a call takes, everything that it started on the device included."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def alternate(
    calls: dict[str, Call], device: torch.device, rounds: int, budget: float
) -> dict[str, list[float]]:
    """Seconds of each call, one number a round.

    Every call has its turn in every round, so that whatever else the machine does meets them all alike, and
    each round begins with another one. There are as many rounds as fit the budget of seconds, but at least
    five, and at most `rounds`.
    """
    estimates = {name: seconds(call, device) for name, call in calls.items()}
    repeats = {name: math.ceil(BLOCK / estimate) for name, estimate in estimates.items()}
    fitting = int(budget / sum(repeats[name] * estimates[name] for name in calls))
    names = list(calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(min(rounds, max(fitting, LEAST))):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()  # here, not in the middle of a call
            found[name].append(seconds(calls[name], device, repeats[name]))
    return found


def compared(found: dict[str, list[float]], base: str) -> dict[str, dict[str, Any]]:
    """Median and quartiles of each call's ratio to the base in the same round."""
    return {
        name: {
            "ratio": (spread := _quartiles([a / b for a, b in zip(times, found[base], strict=True)]))[1],
            "quartiles": [spread[0], spread[2]],
            "seconds": _quartiles(times)[1],
            "rounds": len(times),
        }
        for name, times in found.items()
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Return the device and the number of threads, to be saved with the numbers."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {"device": name, "threads": torch.get_num_threads()}


def describe(record: dict[str, Any]) -> str:
    """Describe the result of `machine` in words."""
    return f"{record['device']}, {record['threads']} thread{'s' if record['threads'] > 1 else ''}"


def _quartiles(values: Sequence[float]) -> list[float]:
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    found: list[float] = torch.tensor(values, dtype=torch.float64).quantile(points).tolist()
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --------------------------------------------------------------------- memory


def peak_bytes(make: Callable[[], tuple[Call, int]], device: torch.device) -> dict[str, int]:
    """Peak of the tensors that exist during a call, with and without those that it needs to begin with.

    Counted is what PyTorch's allocators hand out, to the byte: all tensors and the buffers inside operations,
    but neither NumPy's arrays nor the scratch space of libraries, nor memory that a cache keeps.

    Args:
        make: Makes the model, its inputs and the call, and returns the bytes of the former two. Called here,
            because what it leaves on the device counts.
        device: Device of the call.

    Returns:
        `total`, and `own`: the total less model and inputs.
    """
    total_on = _peak_on_cuda if device.type == "cuda" else _peak_on_cpu
    total, held = total_on(make, device)
    return {"total": total, "own": total - held}


def _peak_on_cuda(make: Callable[[], tuple[Call, int]], device: torch.device) -> tuple[int, int]:
    call, _ = make()
    call()  # libraries take workspaces at their first use, and keep them
    del call
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    call, held = make()
    call()  # finds the layer
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before, held


def _peak_on_cpu(make: Callable[[], tuple[Call, int]], device: torch.device) -> tuple[int, int]:
    """What is held, and the highest sum of the profiler's allocations and releases on top of it.

    What a call releases without having allocated it (gradients or features of the call before) is not among
    the events, so that the sum needs no correction for it.
    """
    call, held = make()
    call()  # finds the layer
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results = profiler.profiler.kineto_results  # the public lists of events add the bytes up by operation
    events = [event for event in results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return held + max(accumulate(changes), default=0), held


def check_peak(device: torch.device) -> None:
    """Check that a known peak is found; on the CPU it is read from an interface that is not public.

    Raises:
        RuntimeError: If it is not.
    """
    mebibyte = 2**20

    def make() -> tuple[Call, int]:
        held = torch.ones(32 * mebibyte // 4, device=device)

        def call() -> object:
            first = held + 1  # 32 MiB
            second = torch.cat([first, first])  # 64 MiB, 96 together
            del first
            return second[: len(second) // 4] * 2  # 16 MiB, 80 together

        return call, held.nbytes

    peak = peak_bytes(make, device)
    for name, expected in {"total": 128, "own": 96}.items():
        if not math.isclose(peak[name], expected * mebibyte, rel_tol=0.01):
            raise RuntimeError(
                f"peak memory: {peak[name] / mebibyte:.1f} MiB {name}, expected {expected}; this version of "
                "PyTorch reports allocations in another way."
            )
