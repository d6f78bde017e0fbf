"""`attnguide explain`: shows where a model looks, for many images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from attnguide import __version__
from attnguide.cli.console import (
    exit_if,
    note,
    note_default_model,
    note_skipped,
    progress,
    warn_of_random_weights,
)
from attnguide.cli.options import (
    ADDRESS,
    FiniteRange,
    ModelChoice,
    batch_size_option,
    device_option,
    layers_of,
    model_options,
    pick_device,
)

__all__ = ["explain"]

_FORMATS = ("png", "npz", "npy")
#: A format for data sets of any size, in a way of its own.
_PARTS = "parquet"


@click.command(short_help="Show where a model looks, for many images.")
@click.argument("images", nargs=-1, required=True, metavar="IMAGES...")
@click.option(
    "--model",
    metavar="NAME",
    help="Model of timm (resnet50.a1_in1k), of torchvision (torchvision/resnet50) or of transformers "
    "(hf:OWNER/NAME, or hf:FOLDER).  "
    "[default: the small embedded one]",
)
@model_options
@click.option(
    "--source",
    default="grad_cam",
    show_default=True,
    metavar="NAME",
    help="Attribution source; see `attnguide plugins`.",
)
@click.option(
    "--target",
    default="predicted",
    show_default=True,
    metavar="TEXT",
    help="Classes to explain: predicted, all, top:3, or indices and names separated by commas.",
)
@click.option(
    "--layer",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Layer to look at: auto, stage:-2, a name, a pattern such as 'layer*', or several separated by "
    "commas; see `attnguide layers`.",
)
@click.option(
    "--evidence",
    type=click.Choice(["logit", "decision"]),
    default="logit",
    show_default=True,
    help="decision: for a class with a negative logit, the evidence against it.",
)
@click.option(
    "--out",
    type=ADDRESS,
    default=Path("attnguide-maps"),
    show_default=True,
    metavar="DIR",
    help="Folder for the results.",
)
@click.option(
    "--format",
    "formats",
    type=click.Choice([*_FORMATS, "all", _PARTS]),
    multiple=True,
    default=("png",),
    show_default=True,
    help="png: overlays; npz, npy: raw maps. May be repeated. parquet, alone: tables, for data sets.",
)
@click.option(
    "--size",
    type=click.Choice(["input", "layer"]),
    default="input",
    show_default=True,
    help="Size of raw maps: that of the model's input, or of the layer.",
)
@click.option("--alpha", type=FiniteRange(0, 1), default=0.5, show_default=True, help="Opacity of overlays.")
@device_option
@batch_size_option(16)
@click.option("--resume", is_flag=True, help="Continue a run with the same settings.")
@click.option(
    "--workers",
    type=click.IntRange(0),
    metavar="N",
    help="Processes that read images.  [default: one less than there are processors]",
)
@click.option(
    "--rows",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    metavar="N",
    help="Images in each file of --format parquet.",
)
@click.option(
    "--engine",
    type=click.Choice(["processes", "ray"]),
    default="processes",
    show_default=True,
    help="What --format parquet runs on: processes that you start, or a Ray cluster.",
)
def explain(
    choice: ModelChoice,
    images: Sequence[str],
    source: str,
    target: str,
    layer: str,
    evidence: Any,
    out: Path | str,
    formats: Sequence[str],
    size: str,
    alpha: float,
    device: str,
    batch_size: int,
    resume: bool,
    workers: int | None,
    rows: int,
    engine: Any,
) -> None:
    """Show where a model looks, for many images.

    IMAGES are files, folders (with their subfolders) and patterns such as 'photos/*.jpg'. For each image and
    class there is an overlay, NAME_CLASS.png, drawn on the image as the model saw it. The folder also holds
    index.jsonl, with a line for each map, and contact_sheet.png.

    Without --resume, index.jsonl starts empty; files of an earlier run stay until they are overwritten.
    With --resume, images that are done are skipped; the settings must be the same.

    With --format parquet, IMAGES may also be CSV and Parquet tables, WebDataset tar files and addresses
    such as s3://bucket/photos. DIR then holds files of maps at the layer's size, each of --rows images. What
    is there is not made again, whoever made it; RANK and WORLD_SIZE in the environment divide the work among
    processes. `attnguide overlay` draws such maps.

    The exit status is 1 if an image could not be explained, and 2 if the whole run failed.

    \b
    Examples:
      attnguide explain photos/
      attnguide explain 'train-{000..099}.tar' --model resnet18 --pretrained --format parquet --out maps/
      attnguide explain photos/ --model resnet50.a1_in1k --pretrained --target top:3
      attnguide explain cat.jpg --model resnet18 --checkpoint mine.safetensors --class-names names.txt
    """  # noqa: D301  (click's mark for "leave these lines as they are")
    # Checks that fail at once come first; loading torch and the model takes seconds.
    from attnguide.commands.explain.index import Index
    from attnguide.commands.explain.names import image_names
    from attnguide.commands.explain.reserving import reserved
    from attnguide.data.files import check_writable
    from attnguide.data.images import find_images
    from attnguide.parts.registry import registry

    registry().find("source", source)
    if _PARTS in formats:
        _explain_parts(
            choice,
            images,
            out,
            formats,
            engine,
            source=source,
            targets=target,
            layer=layers_of(layer),
            evidence=evidence,
            batch_size=batch_size,
            device=device,
            workers=workers,
            rows=rows,
        )
        return
    out = _local(out)
    paths = find_images(images)
    check_writable(out)
    chosen = tuple(name for name in _FORMATS if name in formats or "all" in formats)
    settings = {
        **choice.settings(),
        "source": source,
        "target": target,
        "layer": layer,
        "evidence": evidence,
        "formats": chosen,
        "size": size,
        "alpha": alpha,
        "attnguide": __version__,
    }
    with reserved(out):
        index = Index(out, settings, resume=resume)
        known = index.names
        names = image_names(paths, known)
        done = set(known.values())
        left = [(path, name) for path, name in names.items() if name not in done]
        skipped = _run(choice, left, index, target, device, settings, batch_size, workers)
    _report(index, len(paths) - len(left), skipped)
    exit_if(skipped)


def _local(out: Path | str) -> Path:
    """Return a folder that pictures are written to.

    Raises:
        InputError: If it is an address.
    """
    from attnguide.errors import InputError

    if isinstance(out, str):
        raise InputError(f"--out {out} is an address, to which only --format parquet writes. Give a folder.")
    return out


def _explain_parts(
    choice: ModelChoice,
    images: Sequence[str],
    out: Path | str,
    formats: Sequence[str],
    engine: Any,
    **settings: Any,
) -> None:
    """Explain a data set into tables of maps."""
    from attnguide.dataset import explain_dataset
    from attnguide.errors import InputError

    if set(formats) != {_PARTS}:
        raise InputError("--format parquet stands alone: its maps are drawn by `attnguide overlay`.")
    model: Any = choice.load  # the actors of Ray load it themselves
    if engine != "ray":
        model = choice.load()
        warn_of_random_weights(model)
        note_default_model(choice, model)
    done = explain_dataset(list(images), out, model=model, engine=engine, **settings)
    note_skipped(done.reasons)
    if done.failed > len(done.reasons):
        note(f"… and {done.failed - len(done.reasons)} more; see the rows whose error is not null.")
    left = f" {done.missing} parts are left for other processes." if done.missing else ""
    click.echo(f"{done.images} images in {done.parts} parts, {done.failed} with an error, in {out}.{left}")
    exit_if(done.failed)


def _run(
    choice: ModelChoice,
    left: Sequence[tuple[Path, str]],
    index: Any,
    target: str,
    device: str,
    settings: dict[str, Any],
    batch_size: int,
    workers: int | None,
) -> list[tuple[Path, str]]:
    from attnguide.commands.explain.run import Request, explain_files, read_files
    from attnguide.commands.explain.sheet import NAME, write_sheet
    from attnguide.dataset import count_workers
    from attnguide.models._targets import parse_target

    if not left and (index.folder / NAME).exists():
        return []
    used_device = pick_device(device)
    loaded = choice.load()
    warn_of_random_weights(loaded)
    note_default_model(choice, loaded)
    request = Request(
        source=settings["source"],
        target=parse_target(target, loaded.classes, loaded.multi_label),
        layer=layers_of(settings["layer"]),
        evidence=settings["evidence"],
        formats=settings["formats"],
        full_size=settings["size"] == "input",
        alpha=settings["alpha"],
        batch_size=batch_size,
        device=used_device,
        workers=count_workers(workers),
    )
    index.begin()
    # An interruption must not leave the page of an earlier run, which lacks what this one adds.
    (index.folder / NAME).unlink(missing_ok=True)
    skipped = []
    if left:
        loaded.model.to(used_device)
        batches = read_files(loaded, left, request)  # starts processes, and so before the thread of the bar
        with progress("Explaining", len(left), unit="images", keep=True) as advance:
            skipped = explain_files(loaded, left, batches, request, index, advance)
    if index.lines:
        loaded.model.cpu()
        write_sheet(index.folder, index.lines, loaded, request.alpha)
    return skipped


def _report(index: Any, done: int, skipped: Sequence[tuple[Path, str]]) -> None:
    note_skipped(reason for _, reason in skipped)
    already = f" ({done} images were done before)" if done else ""
    click.echo(f"{len(index.lines)} maps{already}, {len(skipped)} images skipped, in {index.folder}")
