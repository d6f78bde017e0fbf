"""How much explaining and guiding cost, as ratios to plain inference and to a plain training step.

    python benchmarks/speed.py              # all cases; an hour or two on a small machine
    python benchmarks/speed.py --only guide --models resnet18
    python benchmarks/speed.py --summary    # tables of what was measured, in Markdown

Weights are random, images 224 pixels wide. The ways of doing the same thing are alternated in one run, so
that a ratio compares calls of the same minute. It is given as the median over the rounds, with the quartiles.
Plain is run twice in each round: what its second run differs by is noise. Peak memory is measured in
separate runs; see `measuring.peak_bytes`. A finished case is not run again, unless `--again`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import attnguide as ag
from measuring import alternate, check_peak, compared, peak_bytes, seconds
from ways import Batch, Case, Settings, build, explain, infer, layer_of, make_way, ways

#: What is explained and what is guided, unless `--models` names others.
EXPLAINED = (
    "resnet18",
    "resnet50",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "mobilenetv3_large_100",
)
GUIDED = EXPLAINED[:3]
#: Layers in the middle, to be guided too.
MIDDLE = {
    "resnet50": "layer3",
    "vit_tiny_patch16_224": "blocks.8",
    "tf_efficientnet_lite0": "blocks.4",
    "mobilenetv3_small_100": "blocks.3",
    "efficientnet_b0": "blocks.4",
    "convnext_atto": "stages.2",
}
#: Networks with depthwise convolutions, guided in the middle and at the images.
DEPTHWISE = ("tf_efficientnet_lite0", "mobilenetv3_small_100", "efficientnet_b0", "convnext_atto")
MANY = 40
SECTIONS = ("explain", "many", "guide", "memory")
#: Kinds of tables, in the order in which they are printed, and what is in them.
KINDS = {
    "explain": "One class for each image: time in plain inferences, median over the rounds (quartiles).",
    "first call": "A model's first explanation, which finds the layer, and a later one: time in inferences.",
    "many": f"{MANY} classes for each image: time in plain inferences.",
    "loops": f"{MANY} classes for each image by all libraries, once: time in plain inferences.",
    "guide": "A training step: time in plain steps, median over the rounds (quartiles).",
    "memory, explain": "One class for each image: peak memory, model and inputs included (without them).",
    "memory, many": f"{MANY} classes for each image: peak memory, model and inputs included (without them).",
    "memory, guide": "A training step: peak memory, model and inputs included (without them).",
}
#: What calls fail with; a way that fails is reported, and the others go on.
FAILURES = (RuntimeError, TypeError, ValueError, AssertionError, ag.AttnGuideError)
RESULTS = Path(__file__).parent / "results" / "speed.json"


# ------------------------------------------------------------------- measuring


def measure_time(case: Case, settings: Settings) -> dict[str, Any]:
    calls, failed = {}, {}
    for name, maker in ways(case, settings).items():
        try:
            call, _ = make_way(maker, case, settings)
            call()  # finds the layer, fills caches, chooses kernels
        except FAILURES as error:
            if name == "plain":
                raise
            failed[name] = failure(error)
        else:
            calls[name] = call
    # What loops over the classes takes a hundred times as long as the rest: once has to do.
    rounds = 1 if case.section == "loops" else settings.rounds
    found = alternate(calls, settings.device, rounds, settings.seconds)
    return {"ways": compared(found, "plain"), "failed": failed}


def measure_memory(case: Case, settings: Settings) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    failed = {}
    for name, maker in ways(case, settings).items():
        try:
            peak = peak_bytes(lambda maker=maker: make_way(maker, case, settings), settings.device)
        except FAILURES as error:
            failed[name] = failure(error)
            continue
        plain = found.get("plain", peak)
        ratios = {"ratio": peak["total"] / plain["total"], "own_ratio": peak["own"] / plain["own"]}
        found[name] = {**peak, **ratios}
    return {"ways": found, "failed": failed}


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def measure_first_call(case: Case, settings: Settings) -> dict[str, Any]:
    """A model's first explanation and a later one, in forwards of the same images."""
    found: dict[str, list[float]] = {"plain": [], "first": [], "later": []}
    for attempt in range(1 + min(settings.rounds, 5)):
        torch.manual_seed(0)
        model, batch = build(case, settings.device), Batch.of(case, settings.device)
        ag.layers.memory.forget()  # models of the same kind share what was found
        plain, ours = (maker(case, settings, model, batch) for maker in (infer, explain))
        plain()
        times = {
            name: seconds(call, settings.device)
            for name, call in (("plain", plain), ("first", ours), ("later", ours))
        }
        if attempt:  # the first imports modules
            for name, value in times.items():
                found[name].append(value)
    return {"ways": compared(found, "plain"), "failed": {}}


def key_of(case: Case, settings: Settings) -> str:
    """Name a result in the file: what was measured, and where."""
    return f"{case.kind} | {case.subject} | {' | '.join(environment(settings).values())}"


def finished(result: dict[str, Any] | None, case: Case, settings: Settings) -> bool:
    """Whether a case was measured, in all the ways that there are by now."""
    if result is None or case.section == "first call":
        return result is not None
    return {*ways(case, settings)} <= {*result["ways"], *result["failed"]}


def record(case: Case, settings: Settings) -> dict[str, Any]:
    """Measure a case, and record the device and the versions."""
    by_section = {"first call": measure_first_call}
    measure = measure_memory if case.memory else by_section.get(case.section, measure_time)
    return {
        "kind": case.kind,
        "subject": case.subject,
        "case": asdict(case),
        "found_layer": layer_of(case.model),
        "environment": environment(settings),
        "versions": versions(),
        **measure(case, settings),
    }


# ----------------------------------------------------------------------- cases


def cases(
    only: Sequence[str], models: Sequence[str] | None, batch: int, *, peers_many: bool
) -> Iterator[Case]:
    explained, guided, inner = models or EXPLAINED, models or GUIDED, models or (*GUIDED, *DEPTHWISE)
    one = [Case("explain", model, n) for model in explained for n in sorted({1, batch})]
    many = [Case("many", model, batch, MANY) for model in explained]
    guiding = [
        *(Case("guide", model, batch) for model in guided),
        *(Case("guide", model, batch, layer=MIDDLE[model]) for model in inner if model in MIDDLE),
        *(Case("guide", model, batch, layer="input") for model in inner if model in DEPTHWISE),
        *(Case("guide", model, batch, MANY) for model in guided),
    ]
    if "explain" in only:
        yield from (Case("first call", model, 2) for model in explained)
        yield from one
    if "many" in only:
        yield from many
        yield from (Case("loops", model, min(batch, 2), MANY) for model in explained if peers_many)
    if "guide" in only:
        yield from guiding
    if "memory" in only:
        for case in (*one, *many, *guiding):
            if case.batch == batch:
                yield replace(case, memory=True)


@cache
def environment(settings: Settings) -> dict[str, str]:
    threads = torch.get_num_threads()
    cpu = f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"
    cuda = settings.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(settings.device) if cuda else cpu,
        "dtype": str(settings.dtype).removeprefix("torch."),
    }


def versions() -> dict[str, str]:
    found = {}
    for package in ("attnguide", "torch", "timm", "captum", "torchcam", "grad-cam"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(results, indent=1) + "\n")
    fresh.replace(path)  # whole or not at all


# --------------------------------------------------------------------- summary


def summary(results: dict[str, Any]) -> str:
    """Markdown tables: one for each kind of case, on each device."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(results.values(), key=lambda result: list(KINDS).index(result["kind"])):
        title = f"{result['kind']}; {', '.join(result['environment'].values())}"
        tables.setdefault(title, []).append(result)
    return "\n\n".join(
        f"### {title}\n\n{KINDS[rows[0]['kind']]}\n\n{_table(rows)}" for title, rows in tables.items()
    )


def _table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in (*row["ways"], *row["failed"])))
    lines = [["", *names], ["---", *["--:"] * len(names)]]
    for row in rows:
        cells = (_cell(name, row) for name in names)
        lines.append([row["subject"], *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(name: str, row: dict[str, Any]) -> str:
    found = row["ways"].get(name)
    if found is None:
        return "failed" if name in row["failed"] else ""
    if "own" in found:
        if name == "plain":
            return f"{found['total'] / 2**20:.0f} MiB ({found['own'] / 2**20:.0f})"
        return f"{_short(found['ratio'])} ({_short(found['own_ratio'])})"
    if name == "plain":
        return f"{1000 * found['seconds']:.0f} ms"
    spread = f" ({'–'.join(map(_short, found['quartiles']))})" if found["rounds"] > 1 else ""
    return _short(found["ratio"]) + spread


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


# ------------------------------------------------------------------------ main


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of autocast")
    parser.add_argument("--threads", type=int, help="of the CPU; by default PyTorch's own choice")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="names in timm")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30, help="at most")
    parser.add_argument(
        "--seconds", type=float, default=120, help="for the rounds of a case; 5 are always run"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--peers-many", action="store_true", help="many classes by all libraries, once")
    parser.add_argument("--compile", action="store_true", help="compiled training steps too")
    parser.add_argument("--quick", action="store_true", help="one small model, two rounds, nothing written")
    parser.add_argument("--out", type=Path, help=f"by default {RESULTS.name} in {RESULTS.parent.name}/")
    parser.add_argument("--again", action="store_true", help="run finished cases too")
    parser.add_argument("--summary", action="store_true", help="run nothing, print what was measured")
    options = parser.parse_args()
    if options.quick:
        options.models, options.batch, options.rounds, options.seconds = ["test_resnet"], 2, 2, 0
    elif options.out is None:
        options.out = RESULTS
    return options


def main() -> None:
    options = parse()
    results = read(options.out) if options.out else {}
    if options.summary:
        print(summary(results))
        return
    os.environ["ATTNGUIDE_CACHE"] = "off"  # the first call finds the layer
    if options.threads:
        torch.set_num_threads(options.threads)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if options.device == "auto" else options.device)
    dtype = getattr(torch, options.dtype)
    settings = Settings(device, dtype, options.rounds, options.seconds, options.compile)
    if "memory" in options.only:
        check_peak(device)
    for case in cases(options.only, options.models, options.batch, peers_many=options.peers_many):
        key = key_of(case, settings)
        if options.again or not finished(results.get(key), case, settings):
            results[key] = record(case, settings)
            if options.out:
                write(options.out, results)
        print(f"{case.kind}\n{_table([results[key]])}\n", flush=True)


if __name__ == "__main__":
    main()
