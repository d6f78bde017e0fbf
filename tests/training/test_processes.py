"""Two processes train what one does with the joint batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from tests.helpers.recipes import recipe

from attnguide.training import read_settings, train

pytest.importorskip("accelerate")

#: Batch normalization would see the parts of a batch, so it stays as it is. Every third image has a mask.
TEXT = """
[guide]
loss = "outside"
weight = 3.0
[train]
epochs = 10
batch_size = 10
learning_rate = 0.05
optimizer = "sgd"
tensorboard = false
"""
FROZEN = '"network.safetensors", freeze = ["block1.1", "block2.1", "block3.1", "block4.1"]'


def work(rank: int, path: str, port: int, accumulate: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    settings = read_settings(path, {"train.accumulate": accumulate})
    train(settings, Path(path).parent / f"two{accumulate}", device=torch.device("cpu"))
    os._exit(0)  # gloo's threads now and then outlive Python, which ends in an abort


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.nightly), 4])
def test_two_processes_train_as_one(tmp_path: Path, accumulate: int) -> None:
    path = recipe(tmp_path, TEXT)
    path.write_text(path.read_text().replace('"network.safetensors"', FROZEN))
    for mask in (tmp_path / "masks").rglob("*.png"):
        if int(mask.stem) % 3:
            mask.unlink()
    one = train(read_settings(path), tmp_path / "one", device=torch.device("cpu"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(str(path), port, accumulate), nprocs=2)
    before, alone, together = (
        load_file(
            tmp_path / name / "model.safetensors" if name != "start" else tmp_path / "one/start.safetensors"
        )
        for name in ("start", "one", f"two{accumulate}")
    )
    assert one.epochs[-1].steps == 20
    assert not torch.equal(before["head.weight"], alone["head.weight"])
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(
    "launcher",
    ["torch.distributed.run --nproc-per-node 2", "accelerate.commands.launch --num_processes 2 --cpu"],
)
def test_launchers_start_and_end(tmp_path: Path, launcher: str) -> None:
    path = recipe(tmp_path, TEXT.replace("epochs = 10", "epochs = 1"))
    module, *options = launcher.split()
    command = [sys.executable, "-m", module, *options, "-m", "attnguide", "train", path, "--device", "cpu"]
    done = subprocess.run(
        [*map(str, command), "--out", str(tmp_path / "run")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Weights: ") == 1  # of one process
    assert load_file(tmp_path / "run/model.safetensors")
