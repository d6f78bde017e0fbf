"""Processes that train one model together, over gloo on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_START = """
import os, sys, warnings
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel as DDP

torch.set_num_threads(1)


def begin(rank, world, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)


def end(rank, world):
    dist.barrier()
    dist.destroy_process_group()
    print("rank", rank, "agrees", flush=True)
    if world > 1:
        os._exit(0)  # gloo's threads now and then outlive Python, which ends in an abort


def run(rank, world, file, arguments):
    begin(rank, world, file)
    work(rank, world, *arguments)
    end(rank, world)


def same(tensor):
    copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, tensor.contiguous())
    return all(torch.equal(copies[0], other) for other in copies)

"""

_STOP = """

if __name__ == "__main__":
    world, file, arguments = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if world == 1:
        run(0, 1, file, arguments)
    else:
        mp.spawn(run, (world, file, arguments), nprocs=world)
"""


def run_in_processes(work: str, folder: Path, world: int = 2, *arguments: str) -> None:
    """Run the function `work(rank, world, *arguments)` in processes, and check that none of them fails.

    Args:
        work: Code that defines the function. `torch`, `dist`, `DDP` and `same`, which tells whether a tensor
            is the same in all processes, are there.
        folder: An empty folder.
        world: Number of processes.
        *arguments: Further arguments.
    """
    program = folder / "program.py"
    program.write_text(_START + work + _STOP)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(program), str(world), str(folder / "meeting"), *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agrees") == world, done.stdout
