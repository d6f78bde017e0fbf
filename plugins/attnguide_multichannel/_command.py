"""`attnguide analyze`: similar attributes and important channels of a multi-channel attention."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click

from attnguide.cli.console import exit_if, note_skipped, track
from attnguide.cli.options import PATH, device_option, pick_device, read_class_names

__all__ = ["analyze"]

#: The results.
_ANALYSIS, _REPORT = "analysis.json", "report.html"


@click.command(short_help="Find similar attributes, and the channels that matter to them.")
@click.argument("images", nargs=-1, required=True, metavar="IMAGES...")
@click.option(
    "--model",
    required=True,
    metavar="NAME",
    help="Model of timm, torchvision/NAME, or hf:NAME_OR_FOLDER.",
)
@click.option(
    "--checkpoint",
    required=True,
    type=PATH,
    metavar="FILE",
    help="The model's weights.",
)
@click.option(
    "--adapters",
    required=True,
    type=PATH,
    metavar="FILE",
    help="The multi-channel attention, as adapted.save wrote it.",
)
@click.option(
    "--class-names",
    type=PATH,
    metavar="FILE",
    help="Names of the attributes, in order: one per line, or a JSON list.  [default: numbers]",
)
@click.option(
    "--out",
    type=PATH,
    default=Path("attnguide-analysis"),
    show_default=True,
    metavar="DIR",
    help="Folder of the results.",
)
@click.option(
    "--top",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Number of similar attributes listed for each.",
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
    r"""Find similar attributes, and the channels that matter to them.

    IMAGES are files, folders (with their subfolders) and patterns such as 'photos/*.jpg'. The masks and
    scores of the multi-channel attention, attached by attnguide_multichannel.attach, are compared over all
    images.
    Prints for each attribute the most similar ones, by masks and scores, and writes analysis.json and
    report.html (which needs matplotlib: pip install 'attnguide[figures]').

    Images that cannot be read are reported as skipped, and the exit status is then 1.

    \b
    Example:
      attnguide analyze photos/ --model resnet18 --checkpoint model.safetensors \
        --adapters attention.safetensors --class-names names.txt
    """
    import torch

    from attnguide import models
    from attnguide.data import atomic_write, check_file, check_target, check_writable
    from attnguide.data.images import find_images
    from attnguide.errors import DataError, InputError
    from attnguide_multichannel.adapted import load_adapters, multichannel_of
    from attnguide_multichannel.analysis import analyze
    from attnguide_multichannel.report import write_report

    paths = find_images(images)
    check_writable(out)
    for name in (_ANALYSIS, _REPORT):
        check_target(out / name)
    for file in (checkpoint, adapters):
        check_file(file)
    place = pick_device(device)
    names = None if class_names is None else read_class_names(class_names)
    loaded = models.load(model, checkpoint=checkpoint, class_names=names, multi_label=True)
    network = loaded.model.to(place)
    adapted = load_adapters(network, adapters)
    count = len(multichannel_of(adapted).weight)
    classes = loaded.classes if len(loaded.classes) == count else [str(number) for number in range(count)]
    if names is not None and len(names) != count:
        raise InputError(f"--class-names {class_names} has {len(names)} names for {count} attributes.")
    failures: dict[Path, str] = {}
    samples: list[torch.Tensor] = []

    def batches() -> Iterator[torch.Tensor]:
        waiting: list[torch.Tensor] = []
        for path in track(paths, "Analyzing", unit="images"):
            try:
                waiting.append(loaded.read(path))
            except DataError as error:
                failures[path] = str(error)
                continue
            if len(samples) < 8:
                samples.append(waiting[-1])
            if len(waiting) == batch_size:
                yield torch.stack(waiting).to(place)
                waiting = []
        if waiting:
            yield torch.stack(waiting).to(place)

    try:
        analysis = analyze(adapted, batches(), classes)
    finally:
        note_skipped(f"{path}: {reason}" for path, reason in failures.items())
    correlated = analysis.correlated(top)
    results = {
        "samples": analysis.samples,
        "classes": list(classes),
        "correlated": correlated,
        "masks": analysis.attributes.tolist(),
        "scores": analysis.scores.tolist(),
        "importance": analysis.importance.tolist(),
        "ranking": analysis.ranking.tolist(),
    }
    with atomic_write(out / _ANALYSIS) as temporary:
        temporary.write_text(json.dumps(results) + "\n", encoding="utf-8")
    for name, others in correlated.items():
        click.echo(f"{name}: {', '.join(f'{other} ({value:.2f})' for other, value in others)}")
    write_report(adapted, analysis, torch.stack(samples).to(place), out / _REPORT, about={"model": model})
    click.echo(f"{out}: {_ANALYSIS} and {_REPORT}, of {analysis.samples} of {len(paths)} images")
    exit_if(failures)
