"""What explaining a data set costs: time beside plain inference, bytes, memory; and what kills do to it.

python benchmarks/scale.py speed --photos photos/     # 1,000 photographs, resnet18, in alternation
python benchmarks/scale.py start --photos photo.jpg   # processor time to the first map, beside imports
python benchmarks/scale.py bytes --photos photos/ --weights tf_efficientnet_lite0.safetensors
                                                      # bytes a row, by size of the map
python benchmarks/scale.py memory                     # peak memory of 2,000 and of 200,000 images
python benchmarks/scale.py kills                      # processes killed at random moments, and resumed
python benchmarks/scale.py table                      # the results in Markdown
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results" / "scale.json"
MODEL = "resnet18"


def keep(name: str, found: dict[str, Any]) -> None:
    """Keep the result of one measurement, and print it."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = found
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(found, indent=1))


# ------------------------------------------------------------------------- speed


class Files(torch.utils.data.Dataset[Tensor]):
    """Photographs as anyone would read them for inference."""

    def __init__(self, paths: list[Path], transform: Callable[[Any], Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image

        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def speed(photos: Path, count: int, rounds: int, workers: int) -> None:
    """Time the commands and a plain pipeline, each once a round, one after the other."""
    import timm

    model = timm.create_model(MODEL).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    files = sorted(each for each in photos.rglob("*") if each.suffix.lower() in (".jpg", ".jpeg", ".png"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "photos")
        folder.mkdir()
        for index in range(count):  # few photographs stand for many
            file = files[index % len(files)]
            shutil.copy(file, folder / f"{index:05}{file.suffix}")
        paths = sorted(folder.iterdir())

        def plain() -> None:
            loader = torch.utils.data.DataLoader(Files(paths, transform), 16, num_workers=workers)
            with torch.inference_mode():
                for images in loader:
                    model(images).argmax(1)

        def command(*options: str) -> Callable[[], None]:
            def call() -> None:
                from click.testing import CliRunner

                from attnguide.cli.main import main

                out = Path(scratch, "out")
                shutil.rmtree(out, ignore_errors=True)
                given = [
                    str(folder),
                    "--model",
                    MODEL,
                    "--out",
                    str(out),
                    "--workers",
                    str(workers),
                    *options,
                ]
                result = CliRunner().invoke(main, ["explain", *given])
                if result.exit_code:
                    raise RuntimeError(result.output)

            return call

        calls = {
            "plain inference": plain,
            "explain --format parquet": command("--format", "parquet", "--batch-size", "16"),
            "explain (overlays)": command("--format", "png"),
            **peers(model, paths, transform, scratch),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds + 1):
            names = list(calls)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                start = time.perf_counter()
                calls[name]()
                if turn:  # the first round warms up
                    times[name].append(time.perf_counter() - start)
                    print(f"{name}: {times[name][-1]:.1f} s", flush=True)
    base = times["plain inference"]
    ratios = {
        name: round(statistics.median(a / b for a, b in zip(each, base, strict=True)), 3)
        for name, each in times.items()
    }
    found = {
        "model": MODEL,
        "photographs": count,
        "processors": os.cpu_count(),
        "workers": workers,
        "rounds": rounds,
        "seconds": {name: round(statistics.median(each), 1) for name, each in times.items()},
        "ratios": ratios,
    }
    keep("speed", found)


def peers(
    model: nn.Module, paths: list[Path], transform: Callable[[Any], Tensor], scratch: str
) -> dict[str, Callable[[], None]]:
    """Scripts of other libraries, as their READMEs have them: one image after another, an overlay each."""
    import numpy as np
    from PIL import Image

    calls: dict[str, Callable[[], None]] = {}
    out = Path(scratch, "peers")
    out.mkdir()
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.image import show_cam_on_image
    except ImportError:
        print("pytorch-grad-cam is not installed")
    else:

        def grad_cam() -> None:
            with GradCAM(model=model, target_layers=[model.layer4]) as cam:
                for path in paths:
                    image = Image.open(path).convert("RGB").resize((224, 224))
                    shown = np.asarray(image, dtype=np.float32) / 255
                    maps = cam(input_tensor=transform(image)[None], targets=None)
                    picture = show_cam_on_image(shown, maps[0], use_rgb=True)
                    Image.fromarray(picture).save(out / f"{path.stem}.png")

        calls["pytorch-grad-cam's script"] = grad_cam
    try:
        from torchcam.methods import GradCAM as TorchCam
        from torchcam.utils import overlay_mask
        from torchvision.transforms.functional import to_pil_image
    except ImportError:
        print("torchcam is not installed")
    else:

        def torch_cam() -> None:
            with TorchCam(model, target_layer="layer4") as extractor:
                for path in paths:
                    image = Image.open(path).convert("RGB").resize((224, 224))
                    logits = model(transform(image)[None])
                    maps = extractor(logits.squeeze(0).argmax().item(), logits)
                    shown = overlay_mask(image, to_pil_image(maps[0].squeeze(0), mode="F"))
                    shown.save(out / f"{path.stem}.png")

        calls["torch-cam's script"] = torch_cam
    return calls


# ------------------------------------------------------------------------- start


def start(photo: Path, rounds: int) -> None:
    """Time from nothing to the first map, beside importing torch and timm alone, one after the other.

    Processor time: what a process waits for, others on the machine decide. The layer is known from before.
    """
    with tempfile.TemporaryDirectory() as out:
        attnguide = ["-c", "from attnguide.cli.main import main; main()"]
        given = [*attnguide, "explain", str(photo), "--model", MODEL, "--out"]
        calls = {
            "import torch, timm": ["-c", "import torch, timm"],
            "explain": [*given, f"{out}/overlays"],
            "explain --format parquet": [*given, f"{out}/maps", "--format", "parquet"],
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds + 1):
            for name, arguments in calls.items():
                shutil.rmtree(f"{out}/maps", ignore_errors=True)
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                if turn:  # the first round warms up
                    times[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    base = times["import torch, timm"]
    found = {
        "model": MODEL,
        "rounds": rounds,
        "seconds": {name: round(statistics.median(each), 2) for name, each in times.items()},
        "ratios": {
            name: round(statistics.median(a / b for a, b in zip(each, base, strict=True)), 2)
            for name, each in times.items()
        },
    }
    keep("start", found)


# ------------------------------------------------------------------------- bytes


def drawn(side: int, index: int) -> Tensor:
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(index))


class Drawn:
    """Images that are made when they are asked for."""

    def __init__(self, count: int, side: int = 32) -> None:
        self.count, self.side = count, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return drawn(self.side, index)


def bytes_of_rows(photos: Path, weights: Path, count: int) -> None:
    """Bytes that a row takes in the files, by column, and the fewest that its map could take.

    Maps are those of a trained network: of random weights they are noise.
    """
    import numpy as np
    import pyarrow.parquet as pq

    import attnguide as ag
    from attnguide import models

    loaded = models.load("tf_efficientnet_lite0", checkpoint=weights)
    files = sorted(each for each in photos.rglob("*") if each.suffix.lower() in (".jpg", ".jpeg", ".png"))
    chosen = [str(each) for each in files[:: max(1, len(files) // count)]][:count]
    found: dict[str, Any] = {}
    for layer in ("auto", "blocks.4"):
        with tempfile.TemporaryDirectory() as scratch:
            report = ag.explain_dataset(chosen, scratch, model=loaded, layer=layer, progress=False)
            (file,) = Path(scratch).glob("*.parquet")
            metadata, columns = pq.read_metadata(file), {}
            for number in range(metadata.num_columns):
                column = metadata.row_group(0).column(number)
                name = column.path_in_schema.partition(".")[0]
                columns[name] = column.total_compressed_size / metadata.num_rows
            # Of a whole part: what stands once in a file counts for each of its 4,096 rows.
            once = (file.stat().st_size - sum(columns.values()) * metadata.num_rows) / 4096
            maps = np.stack([row.map for row in report.maps() if row.map is not None]).astype(np.float16)
            grid = "×".join(map(str, maps.shape[1:]))
            found[f"{loaded.name} {grid}"] = {
                "grid": grid,
                "rows": report.images,
                "share of zeros": round(float((maps == 0).mean()), 3),
                "bytes a row": round(sum(columns.values()) + once, 1),
                "by column": {name: round(size, 1) for name, size in columns.items()},
                "fewest of a map": round(fewest_bytes(maps), 1),
            }
    keep("bytes", found)


def fewest_bytes(maps: Any) -> float:
    """Bytes that a map of float16 takes at least: the entropy of its upper bytes, and its lower bytes.

    The upper byte has the exponent, and follows from its neighbours to the left and above as far as it does.
    The lower one has the last eight bits of the fraction, which are noise wherever the value is not 0.
    """
    import numpy as np

    def entropy(values: Any) -> float:
        counts = np.unique(values, return_counts=True)[1] / values.size
        return float(-(counts * np.log2(counts)).sum())

    upper = (maps.view(np.uint16) >> 8).astype(np.int64)
    left, above = np.zeros_like(upper), np.zeros_like(upper)
    left[:, :, 1:], above[:, 1:] = upper[:, :, :-1] // 4, upper[:, :-1] // 4
    context = left * 64 + above
    values = maps[0].size
    bits = entropy(context * 256 + upper) - entropy(context) + 8 * float((maps != 0).mean())
    return values * bits / 8


# ------------------------------------------------------------------------- memory


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def one_run(count: int, out: str, rows: int) -> None:
    """Explain drawn images in this process, and print its peak memory in MiB."""
    import attnguide as ag

    ag.explain_dataset(Drawn(count), out, model=tiny(), rows=rows, batch_size=64, workers=0, progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def memory(counts: tuple[int, int]) -> None:
    """Peak memory of few and of many images, each in a process of its own."""
    found = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, __file__, "run", "--count", str(count), "--out", scratch]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[str(count)] = round(float(done.stdout.split()[-1]), 1)
    few, many = (found[str(count)] for count in counts)
    keep("memory", {"peak MiB by number of images": found, "ratio": round(many / few, 4)})


# ------------------------------------------------------------------------- kills


def kills(count: int, times: int, seed: int) -> None:
    """Kill one of four processes, then all, again and again at random moments; then finish with two."""
    import attnguide as ag

    draw = random.Random(seed)

    def started(out: str, rank: int, size: int) -> subprocess.Popen[str]:
        command = [sys.executable, __file__, "run", "--count", str(count), "--out", out, "--rows", "100"]
        return subprocess.Popen(
            command,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )

    def done(out: str) -> int:
        return len(list(Path(out).glob("part-*.parquet")))

    with tempfile.TemporaryDirectory() as out:
        for turn in range(times):
            processes = [started(out, rank, 4) for rank in range(4)]
            before = done(out)
            while done(out) == before and any(process.poll() is None for process in processes):
                time.sleep(0.01)  # libraries are imported
            time.sleep(draw.uniform(0, 0.3))
            victims = processes if turn % 2 else draw.sample(processes, 1)
            for process in victims:
                process.send_signal(signal.SIGKILL)
            for process in processes:
                if process not in victims:
                    time.sleep(draw.uniform(0, 0.1))
                    process.kill()
                process.wait()
            print(f"{turn + 1}: {done(out)} parts", flush=True)
        for process in [started(out, rank, 2) for rank in range(2)]:
            if process.wait():
                raise RuntimeError("a process that resumed the work failed")
        counts = Counter(row.key for row in ag.read_maps(out))
        parts = done(out)
        left = [each.name for each in Path(out).iterdir() if each.name.startswith(".")]
    found = {
        "images": count,
        "kills": times,
        "images that are there once": sum(value == 1 for value in counts.values()),
        "images that are there more often": sum(value > 1 for value in counts.values()),
        "parts": parts,
        "temporary files left": len(left),
    }
    keep("kills", found)


# ------------------------------------------------------------------------- table


def table() -> None:
    """Print what was measured, in Markdown."""
    results = json.loads(RESULTS.read_text())
    if "speed" in results:
        found = results["speed"]
        print(f"| {found['photographs']} photographs, {found['model']} | seconds | beside plain inference |")
        print("|---|---|---|")
        for name, seconds in found["seconds"].items():
            print(f"| {name} | {seconds} | {found['ratios'][name]:.2f} |")
        print()
    if "bytes" in results:
        print("| map | zeros | bytes a row | of which the map | fewest | a billion rows |")
        print("|---|---|---|---|---|---|")
        for found in results["bytes"].values():
            print(
                f"| {found['grid']} | {found['share of zeros']:.0%} | {found['bytes a row']:.0f} | "
                f"{found['by column']['map']:.0f} | {found['fewest of a map']:.0f} | "
                f"{found['bytes a row']:.0f} GB |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["speed", "start", "bytes", "memory", "kills", "table", "run"])
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--count", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out")
    given = parser.parse_args()
    if given.what == "speed":
        if given.photos is None:
            parser.error("speed needs --photos, a folder of photographs")
        speed(given.photos, given.count or 1000, given.rounds, given.workers)
    elif given.what == "start":
        if given.photos is None:
            parser.error("start needs --photos, one photograph")
        start(given.photos, given.rounds)
    elif given.what == "bytes":
        if given.photos is None or given.weights is None:
            parser.error("bytes needs --photos, and --weights of tf_efficientnet_lite0")
        bytes_of_rows(given.photos, given.weights, given.count or 1000)
    elif given.what == "memory":
        memory((2_000, given.count or 200_000))
    elif given.what == "kills":
        kills(given.count or 20_000, given.times, given.seed)
    elif given.what == "run":
        one_run(given.count, given.out, given.rows)
    else:
        table()


if __name__ == "__main__":
    main()
