"""`attnguide overlay`: draws maps that lie in Parquet files over their images."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnguide.cli.console import exit_if, note_skipped, warn
from attnguide.cli.options import ADDRESS, PATH, FiniteRange

if TYPE_CHECKING:
    from PIL import Image

    from attnguide.data.maps import MapRow
    from attnguide.models import LoadedModel

__all__ = ["overlay"]

SHEET = "contact_sheet.png"


@click.command(short_help="Draw maps of `explain --format parquet` over their images.")
@click.argument("maps", type=ADDRESS)
@click.option(
    "--where",
    metavar="TEXT",
    help="Condition on the rows, such as \"class = 'hen' and score > .9\".  [default: all rows]",
)
@click.option(
    "--limit", type=click.IntRange(1), default=100, show_default=True, metavar="N", help="Most pictures."
)
@click.option("--sheet", is_flag=True, help="One contact sheet instead of a picture for each map.")
@click.option(
    "--out", type=PATH, default=Path("attnguide-overlays"), show_default=True, metavar="DIR", help="Folder."
)
@click.option("--alpha", type=FiniteRange(0, 1), default=0.5, show_default=True, help="Opacity of the maps.")
@click.option(
    "--model", metavar="NAME", help="Model whose preprocessing to draw on.  [default: that of the maps]"
)
@click.option("--checkpoint", type=PATH, metavar="FILE", help="The same, for a file in the embedded format.")
def overlay(
    maps: str | Path,
    where: str | None,
    limit: int,
    sheet: bool,
    out: Path,
    alpha: float,
    model: str | None,
    checkpoint: Path | None,
) -> None:
    """Draw maps that lie in Parquet files over their images, as the model saw these.

    MAPS is what `attnguide explain --format parquet` wrote: a folder, or an address such as s3://bucket/maps.
    Images are read again from where they lay, also inside tar files and tables.

    Columns for --where are key, class (a name), index (of the class), score, logit, layer, h, w, scale and
    error; they are compared with =, !=, <, <=, >, >=, in (…) and is null, and joined by and, or, not.

    The exit status is 1 if an image could not be read.

    \b
    Examples:
      attnguide overlay maps/ --where "class = 'hen' and score > .9" --sheet
      attnguide overlay s3://bucket/maps --where "score < .2" --limit 20 --out doubtful/
    """  # noqa: D301  (click's mark for "leave these lines as they are")
    from attnguide import visual
    from attnguide.commands.explain.index import writing
    from attnguide.commands.explain.names import class_slugs
    from attnguide.data.files import check_writable
    from attnguide.data.images import save_picture
    from attnguide.data.maps import read_maps
    from attnguide.errors import DataError, InputError

    found = read_maps(maps, where)
    rows = list(islice((row for row in found if row.map is not None), limit + 1))
    if not rows:
        raise InputError(
            f"{maps}: no map fulfils the condition {where!r}. attnguide.read_maps lists all rows."
        )
    if len(rows) > limit:
        warn(f"there are more maps than {limit}, the first of which are drawn; see --limit.")
    check_writable(out)
    loaded = _preprocessing(found.settings, model, checkpoint)
    drawn: list[tuple[MapRow, Image.Image]] = []
    skipped = []
    for row in rows[:limit]:
        try:
            drawn.append((row, _draw(row, loaded, alpha)))
        except DataError as error:
            skipped.append(str(error))
    if drawn and sheet:
        captions = [f"{row.score:.0%}  {row.cls}" for row, _ in drawn]
        page = visual.contact_sheet([picture for _, picture in drawn], captions, cell=192)
        with writing(out, SHEET) as temporary:
            save_picture(page, temporary)
    elif drawn:
        stems = class_slugs([Path(row.key.rpartition("::")[2]).stem for row, _ in drawn])
        for (row, picture), stem in zip(drawn, stems, strict=True):
            with writing(out, f"{stem}_{class_slugs([row.cls or ''])[0]}.png") as temporary:
                save_picture(picture, temporary, compress_level=3)
    _clear(out)
    note_skipped(skipped)
    click.echo(f"{len(drawn)} maps drawn, {len(skipped)} skipped, in {out / SHEET if sheet else out}")
    exit_if(skipped)


def _clear(out: Path) -> None:
    """Remove the folder of temporary files, which is empty."""
    from attnguide.commands.explain.reserving import SCRATCH

    if (out / SCRATCH).is_dir():
        (out / SCRATCH).rmdir()


def _preprocessing(settings: dict[str, Any], model: str | None, checkpoint: Path | None) -> LoadedModel:
    """Load a model of the same preprocessing; its weights do not matter here."""
    from attnguide.dataset import preprocessing_of
    from attnguide.errors import InputError
    from attnguide.models import load

    name = model or settings["model"]
    try:
        loaded = load(None if name.startswith("attnguide/") else name, checkpoint=checkpoint)
    except InputError as error:
        raise InputError(f"the preprocessing of {name} is not known: {error} Give --model NAME.") from error
    if preprocessing_of(loaded) != settings["preprocessing"]:
        raise InputError(
            f"{name} prepares images in another way than the model of the maps. Give --model NAME, or "
            "--checkpoint FILE."
        )
    return loaded


def _draw(row: MapRow, loaded: LoadedModel, alpha: float) -> Image.Image:
    import torch

    from attnguide import functional, visual
    from attnguide.data.images import rgb_image
    from attnguide.data.records import content_of

    image = loaded.prepared(rgb_image(content_of(row.key), row.key), row.key)
    shown = loaded.displayed(image[None])
    raw = torch.from_numpy(row.map)
    sized = functional.resize(raw[None], (shown.shape[-2], shown.shape[-1]))
    return visual.to_pil(visual.overlay(shown, visual.scaled(sized)[None], alpha)[0, 0])
