"""Guidance under DistributedDataParallel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, warnings
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel as DDP

torch.set_num_threads(1)


def work(rank, world, file, unused):
    import attnguide as ag
    from tests.helpers.models import batch, cnn
    from tests.helpers.state import hooks

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = DDP(cnn().eval(), find_unused_parameters=unused)
    images, labels, masks = batch(8)
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    guide = ag.Guide(model, weight=0.5)
    if rank == world - 1:
        # One process may look alone: nothing waits for the others.
        guide.check(images[part], labels[part], mask=masks[part])
        ag.explain(model, images[part])
    for _ in range(3):
        model.zero_grad()
        logits = model(images[part])
        criterion = torch.nn.functional.cross_entropy(logits, labels[part])
        (criterion + guide.loss(labels[part], mask=masks[part])).backward()
    found = {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}
    guide.remove()
    assert not hooks(model.module)
    for name, gradient in found.items():
        copies = [torch.empty_like(gradient) for _ in range(world)]
        dist.all_gather(copies, gradient)
        assert all(torch.equal(copies[0], other) for other in copies), name

    # The same in one process, without any wrapper.
    torch.manual_seed(0)
    alone = cnn().eval()
    guide = ag.Guide(alone, weight=0.5)
    logits = alone(images)
    (torch.nn.functional.cross_entropy(logits, labels) + guide.loss(labels, mask=masks)).backward()
    for name, p in alone.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)
    # A process without any annotation still takes part.
    guide = ag.Guide(model)
    model.zero_grad()
    logits = model(images[part])
    (logits.sum() + guide.loss(labels[part], mask=masks[part] if rank == 0 else None)).backward()
    dist.barrier()
    dist.destroy_process_group()
    print("rank", rank, "agrees", flush=True)
    if world > 1:
        os._exit(0)  # gloo's threads now and then outlive Python, which ends in an abort


if __name__ == "__main__":
    world, file, unused = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "unused"
    if world == 1:
        work(0, 1, file, unused)
    else:
        mp.spawn(work, (world, file, unused), nprocs=world)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("world", "unused"), [(1, "used"), (1, "unused"), (2, "used"), (2, "unused")])
def test_gradients_are_those_of_the_whole_batch_on_every_rank(
    tmp_path: Path, world: int, unused: str
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(program), str(world), str(tmp_path / "meeting"), unused],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agrees") == world
