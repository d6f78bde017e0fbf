"""`attnguide analyze`: what has multi-channel attention learned?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click

from attnguide.cli.options import device_option, pick_device, read_class_names

__all__ = ["analyze"]


@click.command(short_help="Tell which attributes are alike, and which channels matter.")
@click.argument("images", nargs=-1, required=True, metavar="IMAGES...")
@click.option("--model", required=True, metavar="NAME", help="Model of timm, or torchvision/NAME.")
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The model's weights.",
)
@click.option(
    "--adapters",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The multi-channel attention, as adapted.save wrote it.",
)
@click.option(
    "--class-names",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Names of the attributes, in order: one a line, or a JSON list; numbers without.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("attnguide-analysis"),
    show_default=True,
    metavar="DIR",
    help="Where to write.",
)
@click.option(
    "--top", type=click.IntRange(1), default=5, show_default=True, help="Attributes listed for each."
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=32, show_default=True, metavar="N", help="Images at once."
)
@device_option
def analyze(
    images: tuple[str, ...],
    model: str,
    checkpoint: Path,
    adapters: Path,
    class_names: Path | None,
    out: Path,
    top: int,
    batch_size: int,
    device: str,
) -> None:
    r"""Tell which attributes are alike, and which channels matter to them.

    IMAGES are files, folders (with their subfolders) and patterns such as 'photos/*.jpg'. The model and its
    multi-channel attention, trained by attnguide_multichannel.adapted.attach, are looked at over all of them.
    Prints for each attribute those that are most alike, by their masks and their scores, and writes
    analysis.json and report.html (which needs matplotlib: pip install 'attnguide[figures]').

    Images that cannot be read are listed, and the exit status is 1 then.

    \b
    Example:
      attnguide analyze photos/ --model resnet18 --checkpoint model.safetensors \
        --adapters attention.safetensors --class-names names.txt
    """
    import torch
    from rich.console import Console
    from rich.progress import track

    from attnguide import models
    from attnguide.data.files import atomic_write, check_file
    from attnguide.data.images import find_images
    from attnguide.errors import DataError, InputError
    from attnguide_multichannel.adapted import load_adapters, multichannel_of
    from attnguide_multichannel.analysis import analyze
    from attnguide_multichannel.report import write_report

    paths = find_images(images)
    for file in (checkpoint, adapters):
        check_file(file)
    names = None if class_names is None else read_class_names(class_names)
    loaded = models.load(model, checkpoint=checkpoint, class_names=names, multi_label=True)
    place = pick_device(device)
    network = loaded.model.to(place)
    adapted = load_adapters(network, adapters)
    count = len(multichannel_of(adapted).weight)
    classes = loaded.classes if len(loaded.classes) == count else [str(number) for number in range(count)]
    if names is not None and len(names) != count:
        raise InputError(f"--class-names {class_names} has {len(names)} names for {count} attributes.")
    failures: dict[Path, str] = {}
    some: list[torch.Tensor] = []

    def batches() -> Iterator[torch.Tensor]:
        waiting: list[torch.Tensor] = []
        for path in track(paths, "analysing", console=Console(stderr=True), transient=True):
            try:
                waiting.append(loaded.read(path))
            except DataError as error:
                failures[path] = str(error)
                continue
            if len(some) < 8:
                some.append(waiting[-1])
            if len(waiting) == batch_size:
                yield torch.stack(waiting).to(place)
                waiting = []
        if waiting:
            yield torch.stack(waiting).to(place)

    try:
        analysis = analyze(adapted, batches(), classes)
    finally:
        for path, reason in failures.items():
            click.echo(f"{path}: {reason}", err=True)
    out.mkdir(parents=True, exist_ok=True)
    correlated = analysis.correlated(top)
    found = {
        "samples": analysis.samples,
        "classes": list(classes),
        "correlated": correlated,
        "masks": analysis.attributes.tolist(),
        "scores": analysis.scores.tolist(),
        "importance": analysis.importance.tolist(),
        "ranking": analysis.ranking.tolist(),
    }
    with atomic_write(out / "analysis.json") as temporary:
        temporary.write_text(json.dumps(found) + "\n", encoding="utf-8")
    for name, others in correlated.items():
        click.echo(f"{name}: {', '.join(f'{other} ({value:.2f})' for other, value in others)}")
    write_report(adapted, analysis, torch.stack(some).to(place), out / "report.html", about={"model": model})
    click.echo(f"{out}: analysis.json and report.html, of {analysis.samples} of {len(paths)} images")
    if failures:
        raise click.exceptions.Exit(1)
