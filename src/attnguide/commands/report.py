"""`attnguide report`: writes a page that shows what guidance changed in a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnguide.cli.console import exit_if, note_skipped, progress, warn, warn_of_empty_masks
from attnguide.cli.options import (
    ADDRESS,
    PATH,
    ModelChoice,
    class_options,
    inside_option,
    layers_of,
    measuring_options,
    pick_device,
)

if TYPE_CHECKING:
    import torch

    from attnguide.evaluation.compare import Comparison
    from attnguide.evaluation.evaluate import LabeledImage
    from attnguide.models import LoadedModel

__all__ = ["report"]

_SUFFIXES = (".html", ".htm")
#: Number of hexadecimal digits of the SHA-256 that identify a checkpoint in practice.
_DIGITS = 12


@click.command(short_help="Show what guidance changed in a model, as one HTML file.")
@click.argument("data", type=PATH)
@click.option(
    "--before",
    required=True,
    type=PATH,
    metavar="FILE",
    help="Weights before guidance: .safetensors, or a PyTorch checkpoint that holds tensors only.",
)
@click.option("--after", required=True, type=PATH, metavar="FILE", help="Weights after guidance.")
@click.option(
    "--masks",
    required=True,
    type=PATH,
    metavar="PATH",
    help="Masks of where to look: one image for all, or a folder with one per class or per image.",
)
@inside_option
@click.option(
    "--maps",
    type=(ADDRESS, ADDRESS),
    metavar="DIR DIR",
    help="Maps before and after, of `explain --format parquet --target all`; no model is run again.",
)
@click.option(
    "--groups",
    type=PATH,
    metavar="FILE",
    help="Groups of images, such as those with a shortcut: CSV or JSON of file and group.",
)
@click.option(
    "--out",
    required=True,
    type=PATH,
    metavar="FILE",
    help="The page to write, .html; its folder must exist.",
)
@click.option(
    "--examples",
    type=click.IntRange(0),
    default=6,
    show_default=True,
    metavar="N",
    help="Images in each gallery.",
)
@click.option(
    "--model",
    metavar="NAME",
    help="Model of timm, torchvision/NAME, or hf:NAME_OR_FOLDER.  "
    "[default: the small network, in the embedded format]",
)
@class_options
@measuring_options
def report(
    choice: ModelChoice,
    data: Path,
    before: Path,
    after: Path,
    masks: Path,
    inside: str | None,
    maps: tuple[Path | str, Path | str] | None,
    groups: Path | None,
    out: Path,
    examples: int,
    source: str,
    layer: str,
    threshold: float,
    batch_size: int,
    device: str,
) -> None:
    """Show what guidance changed in a model: numbers, and the images that changed most, before and after.

    DATA is a folder with a subfolder of images for each class. Both checkpoints are measured on it as by
    attnguide evaluate. The page holds accuracy, energy in the mask, IoU, pointing game, and the gradient of
    the images, which guidance at a layer does not optimise: class by class, and group by group with --groups.
    Its galleries show the images whose energy in the mask rose and fell most, and the predictions that became
    right and wrong; a divider uncovers the map after guidance.

    The page is one file that loads nothing from the network. Open it in a browser, send it, or print it.

    Groups are rows of CSV such as 'cat/1.png,indoors', or JSON: {"cat/1.png": "indoors"}. Files are relative
    to DATA.

    With --maps the figures are those of stored maps, without the gradient of the images. An image that is no
    longer there counts with its prediction; its maps are shown alone, and not compared with masks.

    Images that cannot be read are listed, and the exit status is then 1.

    \b
    Examples:
      attnguide report photos/ --model resnet18 --before plain.safetensors --after guided.safetensors \\
        --masks masks/ --out report.html
      attnguide report photos/ --model resnet18 --before plain.safetensors --after guided.safetensors \\
        --masks masks/ --groups groups.csv --examples 12 --out report.html
      attnguide report photos/ --model resnet18 --before plain.safetensors --after guided.safetensors \\
        --masks masks/ --maps maps-plain/ maps-guided/ --out report.html
    """  # noqa: D301  (click's mark for "leave these lines as they are")
    from attnguide.data.files import check_target
    from attnguide.data.maps import read_maps
    from attnguide.errors import InputError
    from attnguide.evaluation.compare import ChangeKind, check_comparable, compare_folder, draw_overlays
    from attnguide.evaluation.evaluate import mask_reader, single_label_images
    from attnguide.evaluation.report import write_report
    from attnguide.evaluation.stored import compare_maps, draw_maps, missing_images
    from attnguide.parts.registry import registry

    if out.suffix.lower() not in _SUFFIXES:
        raise InputError(f"--out {out} is not the name of a page. Let it end in .html.")
    check_target(out)
    registry().find("source", source)
    stored = None if maps is None else (read_maps(maps[0]), read_maps(maps[1]))
    used_device = pick_device(device)
    old, new = (_load(choice, file) for file in (before, after))
    check_comparable(old, new, [before, after])
    old, images = single_label_images(old, data)
    new = new.renamed(old.classes)
    if stored is not None:
        images = images + missing_images(stored[0], old, data)
    group_of = _group_of(groups, data, images)
    reader = mask_reader(masks, old.classes, [(image.path, image.cls) for image in images], inside=inside)
    how: dict[str, Any] = {"source": source, "layer": layers_of(layer), "batch_size": batch_size}
    with progress("Comparing", len(images) * (1 if stored is None else 2), unit="images") as advance:
        measured: dict[str, Any] = {"group_of": group_of, "threshold": threshold, "advance": advance}
        if stored is None:
            comparison = compare_folder(old, new, images, reader, device=used_device, **measured, **how)
        else:
            comparison = compare_maps(*stored, (old, new), images, reader, **measured)
            source, layer = stored[0].settings["source"], ",".join(map(str, stored[0].settings["layer"]))
    if comparison.gone:
        warn(
            f"{len(comparison.gone)} of {len(images)} images are no longer there, such as "
            f"{comparison.gone[0]}; their predictions count, their maps are not compared with masks."
        )
    note_skipped(comparison.failures.values())
    warn_of_empty_masks(comparison.before.empty)
    if not comparison.changes:
        raise click.ClickException("no image could be read.")
    kinds: tuple[ChangeKind, ...] = ("rose", "fell", "righted", "wronged")
    chosen = {kind: comparison.largest(kind)[:examples] for kind in kinds}
    shown = {change.image.path: change.image for changes in chosen.values() for change in changes}
    if stored is None:
        drawn = draw_overlays(old, new, list(shown.values()), reader, **how)
    else:
        drawn = draw_maps(*stored, old, list(shown.values()), reader)
    used_layer = next((drawing.layer for drawing in drawn.values()), layer)
    settings = {
        "model": choice.name or "small network",
        "before": _named(before),
        "after": _named(after),
        "data": f"{data} ({len(comparison.changes)} of {len(images)} images)",
        "masks": masks,
        **({} if stored is None else {"maps": f"{stored[0].address}, {stored[1].address}"}),
        **({} if groups is None else {"groups": groups}),
        "source": source,
        "layer": used_layer if layer == used_layer else f"{used_layer} ({layer})",
        "threshold of the IoU": threshold,
        **_versions(used_device),
    }
    write_report(out, comparison, chosen, drawn, settings, root=data)
    _print(comparison, out)
    exit_if(comparison.failures)


def _load(choice: ModelChoice, file: Path) -> LoadedModel:
    """Load one state of the model, and refuse weights that are not finite."""
    from attnguide.errors import DataError

    chosen = replace(choice, checkpoint=file)
    chosen.check()
    loaded = chosen.load()
    for name, values in loaded.model.state_dict().items():
        if not bool(values.isfinite().all()):
            raise DataError(
                f"{file}: {name} holds values that are not finite. Use a checkpoint from before the "
                "training diverged."
            )
    return loaded


def _group_of(groups: Path | None, data: Path, images: list[LabeledImage]) -> Callable[[Path], str | None]:
    if groups is None:
        return lambda path: None

    from attnguide.errors import InputError
    from attnguide.evaluation.groups import read_groups

    known = read_groups(groups)
    group_of = {image.path: known.get(image.path.relative_to(data).as_posix()) for image in images}
    missing = [path for path, group in group_of.items() if group is None]
    if len(missing) == len(images):
        raise InputError(
            f"{groups} names none of the images in {data}, but {next(iter(known))!r}. Name files relative to "
            f"{data}: {missing[0].relative_to(data).as_posix()!r}."
        )
    if missing:
        where = f"have no group in {groups}, such as {missing[0]}"
        warn(f"{len(missing)} of {len(images)} images {where}.")
    return group_of.get


def _named(file: Path) -> str:
    from attnguide.models.checkpoints import digest

    return f"{file} (SHA-256 {digest(file)[:_DIGITS]}…)"


def _versions(device: torch.device) -> Mapping[str, str]:
    import platform
    from datetime import datetime
    from importlib import import_module

    import torch

    names = ("attnguide", "torch", "timm", "torchvision")
    return {
        **{name: import_module(name).__version__ for name in names},
        "Python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    }


def _print(comparison: Comparison, out: Path) -> None:
    from attnguide.evaluation.evaluate import COLUMNS

    before, after = comparison.before.whole.summary(), comparison.after.whole.summary()
    for key, value in before.items():
        if key not in ("images", "masks", "area"):
            click.echo(f"{COLUMNS[key]}: {value:.1%} → {after[key]:.1%}")
    righted, wronged = (len(comparison.largest(kind)) for kind in ("righted", "wronged"))
    click.echo(f"{righted} predictions became right, {wronged} wrong. Report: {out}")
