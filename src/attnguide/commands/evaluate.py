"""`attnguide evaluate`: measures how good a model is, and whether it looks where it should."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnguide.cli.console import (
    exit_if,
    note,
    note_default_model,
    note_skipped,
    print_json,
    progress,
    table_console,
    warn_of_empty_masks,
    warn_of_random_weights,
)
from attnguide.cli.options import (
    ADDRESS,
    PATH,
    ModelChoice,
    inside_option,
    layers_of,
    measuring_options,
    pick_device,
    single_label_options,
)

if TYPE_CHECKING:
    from attnguide.evaluation.evaluate import Evaluation

__all__ = ["evaluate"]


@click.command(short_help="Measure how good a model is, and whether it looks where it should.")
@click.argument("data", type=PATH)
@click.option(
    "--masks",
    type=PATH,
    metavar="PATH",
    help="Masks of where to look: one image for all, or a folder with one per class or per image.",
)
@inside_option
@click.option(
    "--maps",
    type=ADDRESS,
    metavar="DIR",
    help="Maps of `explain --format parquet --target all`; the model is then not run again.",
)
@click.option(
    "--model",
    metavar="NAME",
    help="Model of timm, torchvision/NAME, or hf:NAME_OR_FOLDER.  [default: the small embedded one]",
)
@single_label_options
@measuring_options
@click.option(
    "--metrics",
    metavar="NAMES",
    help="Further measures, which need no mask, with commas between them: deletion, insertion, road, "
    "confidence_change, sensitivity. They run the model often.",
)
@click.option("--json", "as_json", is_flag=True, help="Write JSON, for other programs.")
def evaluate(
    choice: ModelChoice,
    data: Path,
    masks: Path | None,
    inside: str | None,
    maps: Path | str | None,
    source: str,
    layer: str,
    threshold: float,
    batch_size: int,
    device: str,
    metrics: str | None,
    as_json: bool,
) -> None:
    """Measure how good a model is, and whether it looks where it should, class by class.

    DATA is a folder with a subfolder of images for each class. With --masks, the map of each image's class is
    compared with its mask: energy in the mask (the share of the attribution inside it), IoU, pointing game,
    and the energy of the gradient of the images, which guidance at a layer does not optimise. Masks are
    cropped and resized like the images. The energy of a uniform map is the mask's share of the area.

    --metrics adds measures of the maps that need no mask. Deletion and insertion are areas under curves; ROAD
    and the change of the confidence are computed by pytorch-grad-cam (pip install 'attnguide[grad-cam]'), the
    sensitivity by captum. Lower is better of deletion and sensitivity, higher of the others.

    Images that cannot be read are listed. The exit status is then 1, and also if no image has a mask.

    \b
    Examples:
      attnguide evaluate photos/ --model resnet18 --checkpoint mine.safetensors --masks masks/
      attnguide evaluate photos/ --model resnet18 --checkpoint mine.safetensors --json
      attnguide evaluate photos/ --model resnet18 --checkpoint mine.safetensors --masks masks/ --maps maps/
    """  # noqa: D301  (click's mark for "leave these lines as they are")
    from attnguide.data.maps import read_maps
    from attnguide.evaluation.evaluate import evaluate_folder, mask_reader, single_label_images
    from attnguide.evaluation.stored import evaluate_maps
    from attnguide.parts.registry import registry

    registry().find("source", source)
    further = [name.strip() for name in metrics.split(",")] if metrics else []
    if maps is not None and further:
        raise click.UsageError("--metrics runs the model, which --maps does not. Give one of the two.")
    stored = None if maps is None else read_maps(maps)
    used_device = pick_device(device)
    loaded, images = single_label_images(choice.load(), data)
    warn_of_random_weights(loaded)
    note_default_model(choice, loaded)
    reader = mask_reader(masks, loaded.classes, [(image.path, image.cls) for image in images], inside=inside)
    with progress("Evaluating", len(images), unit="images") as advance:
        if stored is None:
            result = evaluate_folder(
                loaded,
                images,
                reader,
                source=source,
                layer=layers_of(layer),
                threshold=threshold,
                batch_size=batch_size,
                device=used_device,
                advance=advance,
                metrics=further,
            )
        else:
            result = evaluate_maps(stored, loaded, images, reader, threshold=threshold, advance=advance)
            source, layer = stored.settings["source"], ",".join(map(str, stored.settings["layer"]))
    note_skipped(result.failures.values())
    warn_of_empty_masks(result.empty)
    if not result.whole.images:
        raise click.ClickException("no image could be read.")
    settings = {"source": source, "layer": layer, "threshold": threshold, "model": loaded.name}
    if as_json:
        print_json(_as_json(result, settings))
    else:
        _print(result)
    no_masks = masks is not None and not result.whole.masked
    if no_masks:
        note(
            f"None of the {result.whole.images} images has a mask in {masks}: masks are named like the "
            "images, or like the classes."
        )
    exit_if(result.failures or no_masks)


def _as_json(result: Evaluation, settings: dict[str, Any]) -> dict[str, Any]:
    name, accuracy = result.worst
    return {
        "settings": settings,
        "all": result.whole.summary(),
        "mean of the classes": result.balanced,
        "worst class": {"name": name, "accuracy": accuracy},
        "classes": {name: scores.summary() for name, scores in result.classes.items() if scores.images},
        "skipped": {str(path): reason for path, reason in result.failures.items()},
        "empty masks": [str(path) for path in result.empty],
    }


def _print(result: Evaluation) -> None:
    from rich.table import Table

    from attnguide.evaluation.evaluate import COLUMNS

    whole = result.whole
    measured = [key for key in COLUMNS if key in whole.summary() and (whole.masked or key != "masks")]
    table = Table()
    table.add_column("class")
    for key in measured:
        table.add_column(COLUMNS[key], justify="right")
    for name, scores in result.classes.items():
        if scores.images:
            table.add_row(name, *(_cell(scores.summary().get(key)) for key in measured))
    table.add_section()
    table.add_row("mean of the classes", *(_cell(result.balanced.get(key)) for key in measured))
    table.add_row("all images", *(_cell(whole.summary().get(key)) for key in measured))
    table_console().print(table)
    name, accuracy = result.worst
    click.echo(f"Worst class: {name}, {accuracy:.1%}.")
    missing = whole.images - whole.masked
    if whole.masked and missing:
        click.echo(f"{missing} of {whole.images} images have no mask.")


def _cell(value: float | int | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.1%}"
