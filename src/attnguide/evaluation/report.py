"""Writes one HTML file that shows what guidance changed in a model.

The page loads nothing: pictures are data URIs, and its policy forbids it to load anything or to run any
script but its own. Names of files and classes are always escaped.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
import torch
from skimage.measure import approximate_polygon, find_contours
from torch import Tensor

from attnguide import visual
from attnguide.data.files import atomic_write, natural_key
from attnguide.evaluation.compare import Change, ChangeKind, Comparison, Overlays
from attnguide.evaluation.evaluate import COLUMNS

__all__ = ["write_report"]

#: Measures that are compared; `area` depends on the mask alone.
_MEASURES = tuple(key for key in COLUMNS if key not in ("images", "masks", "area"))
_GALLERIES: dict[ChangeKind, str] = {
    "rose": "Energy in the mask rose most",
    "fell": "Energy in the mask fell most",
    "righted": "Predictions that became right",
    "wronged": "Predictions that became wrong",
}
#: Bars of the histogram, an odd number: the middle one stands for hardly any change.
_BARS = 41

_GONE = '<p class="note">The image is no longer there: the maps alone.</p>'

Summary = Mapping[str, Any]


class _Row(NamedTuple):
    name: str
    images: int | None
    before: Summary
    after: Summary


def write_report(
    path: str | Path,
    comparison: Comparison,
    examples: Mapping[ChangeKind, Sequence[Change]],
    drawn: Mapping[Path, Overlays],
    settings: Mapping[str, object],
    *,
    root: Path,
) -> None:
    """Write the report.

    Args:
        path: The HTML file, written atomically.
        comparison: Results of at least one image.
        examples: Changes that the galleries show.
        drawn: Overlays of the examples; an example without them is left out.
        settings: Settings of the comparison, in the order in which they are shown.
        root: The folder of the data, to which names of files are relative.

    Raises:
        InputError: If the file cannot be written.
    """
    script, assets = _asset("report.js"), Template(_asset("report.html"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    whole = comparison.before.whole
    page = assets.substitute(
        policy="default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        style=_asset("report.css"),
        script=script,
        title=f"What guidance changed: {_text(settings.get('model', ''))}",
        lead=f"{_text(settings.get('model', ''))}, before and after, on {_count(whole.images, 'image')}"
        + (f", {whole.masked} of them with a mask" if whole.masked < whole.images else "")
        + f" of {_count(len(_by_class(comparison)), 'class', 'classes')}. Shares are in per cent.",
        tiles=_tiles(comparison),
        hint=_hint(whole.summary()),
        tables=_tables(comparison),
        spread=_spread(comparison),
        galleries=_galleries(comparison, examples, drawn, root),
        failures=_gone(comparison.gone) + _failures(comparison.failures),
        settings="\n".join(
            f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in settings.items()
        ),
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _asset(name: str) -> str:
    return files("attnguide.evaluation").joinpath("assets", name).read_text(encoding="utf-8")


# -------------------------------------------------------------------- text


def _text(value: object) -> str:
    # A file name need not be valid Unicode, but a page must be.
    return html.escape(str(value).encode("utf-8", "replace").decode())


def _count(number: int, singular: str, plural: str = "") -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _change(before: float | None, after: float | None) -> tuple[str, str]:
    """Return the change of a share as text, and its CSS class."""
    if before is None or after is None:
        return "", ""
    text = f"{100 * (after - before):+.1f}"
    if not text.strip("+-0."):
        return "0.0", ""
    return text.replace("-", "−"), "up" if after > before else "down"


# ----------------------------------------------------------------- figures


def _by_class(comparison: Comparison) -> list[_Row]:
    pairs = zip(comparison.before.classes.items(), comparison.after.classes.values(), strict=True)
    return [_Row(name, old.images, old.summary(), new.summary()) for (name, old), new in pairs if old.images]


def _by_group(comparison: Comparison) -> list[_Row]:
    return [
        _Row(name, old.images, old.summary(), new.summary())
        for name, (old, new) in sorted(comparison.groups.items(), key=lambda item: natural_key(item[0]))
    ]


def _worst(rows: Sequence[_Row], name: str) -> _Row:
    """Return the lowest value of each measure over all rows."""

    def lowest(summaries: Iterable[Summary]) -> Summary:
        lowest_values: dict[str, float] = {}
        for summary in summaries:
            for key in _MEASURES:
                if (value := summary.get(key)) is not None:
                    lowest_values[key] = min(value, lowest_values.get(key, value))
        return lowest_values

    return _Row(name, None, lowest(row.before for row in rows), lowest(row.after for row in rows))


def _tiles(comparison: Comparison) -> str:
    rows, groups = _by_class(comparison), _by_group(comparison)
    before, after = comparison.before.whole.summary(), comparison.after.whole.summary()
    what = "group" if groups else "class"
    worst = _worst(groups or rows, what)
    area = before.get("area")
    tiles = [
        _tile("Accuracy", before["accuracy"], after["accuracy"]),
        _tile(f"Accuracy, worst {what}", worst.before["accuracy"], worst.after["accuracy"]),
    ]
    for key in _MEASURES[1:]:
        if key in before:
            chance = area if key in ("energy", "witness") else None
            name = COLUMNS[key][0].upper() + COLUMNS[key][1:]
            tiles.append(_tile(name, before[key], after[key], chance))
    return "\n".join(tiles)


def _hint(whole: Summary) -> str:
    if "witness" not in whole:
        return ""
    return (
        "Upper bars: before; lower bars: after. The tick is the mask's area, the energy of a map that is the "
        "same everywhere. Guidance at a layer does not optimise the gradient of the images: it is a witness."
    )


def _tile(name: str, before: float | None, after: float | None, chance: float | None = None) -> str:
    change, colour = _change(before, after)
    bars = "".join(f'<i style="width:{_share(value)}%"></i>' for value in (before, after))
    tick = "" if chance is None else f'<b style="left:{_share(chance)}%"></b>'
    return (
        f'<div class="tile"><h3>{_text(name)}</h3><p class="value">{_share(after)}</p>'
        f'<p class="was">from {_share(before)} <span class="{colour}">{change}</span></p>'
        f'<div class="bars" aria-hidden="true">{bars}{tick}</div></div>'
    )


def _tables(comparison: Comparison) -> str:
    classes, groups = _by_class(comparison), _by_group(comparison)
    before, after = comparison.before, comparison.after
    whole = _Row("all images", before.whole.images, before.whole.summary(), after.whole.summary())
    mean = _Row("mean of the classes", None, before.balanced, after.balanced)
    (old, _), (new, _) = before.worst, after.worst
    named = f"{_text(old)}, before and after" if old == new else f"{_text(old)} before, {_text(new)} after"
    parts = [
        "<section><h2>Class by class</h2>",
        _table("class", classes, [mean, _worst(classes, "worst class"), whole]),
        '<p class="note">The worst class is the lowest figure of each column; by accuracy that is '
        f"{named}.</p></section>",
    ]
    if groups:
        counted = sum(row.images or 0 for row in groups)
        rest = f" {whole.images - counted} of {whole.images} images have no group." if whole.images else ""
        parts += [
            "<section><h2>Group by group</h2>",
            _table("group", groups, [_worst(groups, "worst group")]),
            '<p class="note">The worst group is the lowest figure of each column.'
            f"{rest if counted < (whole.images or 0) else ''}</p></section>",
        ]
    return "\n".join(parts)


def _table(what: str, rows: Sequence[_Row], summaries: Sequence[_Row]) -> str:
    keys = [key for key in _MEASURES if any(key in row.before for row in rows)]
    area = any("area" in row.before for row in rows)
    top = "".join(f'<th colspan="3" scope="colgroup">{COLUMNS[key]}</th>' for key in keys)
    below = '<th class="first" scope="col">before</th><th scope="col">after</th><th scope="col">change</th>'
    last = f'<th class="first" rowspan="2" scope="col">{_text(COLUMNS["area"])}</th>' if area else ""
    head = (
        f'<tr><th rowspan="2" scope="col">{what}</th><th rowspan="2" scope="col">images</th>{top}{last}</tr>'
        f"<tr>{below * len(keys)}</tr>"
    )

    def line(row: _Row) -> str:
        cells = [f'<th scope="row" title="{_text(row.name)}">{_text(row.name)}</th>']
        cells.append(f"<td>{'' if row.images is None else row.images}</td>")
        for key in keys:
            before, after = row.before.get(key), row.after.get(key)
            change, colour = _change(before, after)
            cells.append(f'<td class="first was">{_share(before)}</td><td>{_share(after)}</td>')
            cells.append(f'<td class="{colour}">{change}</td>')
        if area:
            cells.append(f'<td class="first">{_share(row.before.get("area"))}</td>')
        return f"<tr>{''.join(cells)}</tr>"

    bodies = "".join(f"<tbody>{''.join(map(line, part))}</tbody>" for part in (rows, summaries))
    # Where it is cut off, the keyboard scrolls it.
    return f'<div class="scroll" tabindex="0"><table><thead>{head}</thead>{bodies}</table></div>'


def _spread(comparison: Comparison) -> str:
    """Return the section about all images, since the examples are the extremes."""
    flips = [(change.before.right, change.after.right) for change in comparison.changes]
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td>{flips.count((was, True))}</td>'
        f"<td>{flips.count((was, False))}</td></tr>"
        for name, was in (("right before", True), ("wrong before", False))
    )
    table = (
        '<table class="flips"><thead><tr><th></th><th scope="col">right after</th>'
        f'<th scope="col">wrong after</th></tr></thead><tbody>{rows}</tbody></table>'
    )
    moved = [change.energy for change in comparison.changes if change.energy is not None]
    if not moved:
        return f"<section><h2>Image by image</h2>{table}</section>"
    rose, fell = sum(by > 0 for by in moved), sum(by < 0 for by in moved)
    counts, _ = np.histogram(moved, bins=_BARS, range=(-1, 1))
    middle = _BARS // 2
    colours = ["less"] * middle + ["none"] + ["more"] * middle
    bars = "".join(
        f'<rect class="{colour}" x="{index + 0.06:.2f}" y="{100 - height:.2f}" width="0.88" '
        f'height="{height:.2f}"/>'
        for index, (colour, height) in enumerate(zip(colours, 100 * counts / counts.max(), strict=True))
    )
    summary = f"Energy in the mask rose in {rose} of {_count(len(moved), 'image')}, and fell in {fell}"
    return (
        '<section><h2>Image by image</h2><div class="spread"><div>'
        f"<p>{summary}.</p>{table}</div>"
        f'<div role="img" aria-label="Histogram. {summary}."><svg viewBox="0 0 {_BARS} 100" '
        f'preserveAspectRatio="none" aria-hidden="true">{bars}</svg>'
        '<p class="axis" aria-hidden="true"><span>−100</span>'
        "<span>change of the energy in the mask</span><span>+100</span></p></div></div>"
        "</section>"
    )


# ---------------------------------------------------------------- examples


def _galleries(
    comparison: Comparison,
    examples: Mapping[ChangeKind, Sequence[Change]],
    drawn: Mapping[Path, Overlays],
    root: Path,
) -> str:
    names = comparison.names
    parts = [_key()] if drawn else []
    for kind, title in _GALLERIES.items():
        total = len(comparison.largest(kind))
        chosen = [change for change in examples.get(kind, ()) if change.image.path in drawn]
        cards = "".join(_card(change, drawn[change.image.path], names, root) for change in chosen)
        count = f"{len(chosen)} of {total}" if len(chosen) < total else str(total or "none")
        body = f'<div class="cards">{cards}</div>' if cards else ""
        parts.append(f'<section><h3>{title} <span class="note">{count}</span></h3>{body}</section>')
    return "\n".join(parts)


def _key() -> str:
    """Return the key of the pictures, with one divider that moves all of them."""
    colours = (255 * visual.colorize(torch.linspace(0, 1, 7)[None])[:, 0]).round().int().T.tolist()
    stops = ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in colours)
    return (
        '<section><h2>Examples</h2><p class="note key"><span>Maps of the true class: low '
        f'<i class="scale" style="background:linear-gradient(to right, {stops})"></i> high</span>'
        '<span><i class="ring"></i> outline of the mask</span><span class="moving"><label for="all">All '
        'dividers</label> <input id="all" type="range" min="0" max="100" value="50"></span></p></section>'
    )


def _card(change: Change, pictures: Overlays, names: Sequence[str], root: Path) -> str:
    path, cls = change.image.path, names[change.image.cls]
    file = _text(path.relative_to(root).as_posix())
    width, height = pictures.before.size
    outline = _outline(pictures.mask)
    drawing = (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">'
        f'<path d="{outline}"/><path d="{outline}"/></svg>'
        if outline
        else ""
    )
    layers = "".join(
        f'<div class="layer"><img alt="Map {when} guidance" src="{visual.data_uri(picture, "jpeg")}">'
        f"{drawing}<small>{when}</small></div>"
        for when, picture in (("before", pictures.before), ("after", pictures.after))
    )
    predictions = "".join(
        f'<span class="{"up" if record.right else "down"}"><span class="unseen">{when}: '
        f"{'right' if record.right else 'wrong'}, </span>{'✓' if record.right else '✗'} "
        f'<em title="{_text(names[record.predicted])}">{_text(names[record.predicted])}</em> '
        f"{_share(record.confidence)}</span>"
        for when, record in (("before", change.before), ("after", change.after))
    )
    rows = [(f"probability of {cls}", change.before.probability, change.after.probability)]
    rows += [
        (COLUMNS[key], change.before.scores[key], change.after.scores[key])
        for key in _MEASURES
        if key in change.before.scores
    ]
    return (
        f'<article class="card"><header><strong title="{_text(cls)}">{_text(cls)}</strong>'
        f'<span title="{file}"><bdi>{file}</bdi></span></header><div class="stage">{layers}'
        '<input type="range" min="0" max="100" value="50" '
        f'aria-label="Divider between before and after, {file}"></div>'
        f"{_GONE if pictures.gone else ''}"
        f'<p class="answers">{predictions}</p><table><thead><tr><th></th><th scope="col">before</th>'
        '<th scope="col">after</th><th scope="col">change</th></tr></thead>'
        f"<tbody>{''.join(_line(*row) for row in rows)}</tbody></table></article>"
    )


def _line(name: str, before: float, after: float) -> str:
    change, colour = _change(before, after)
    return (
        f'<tr><th scope="row">{_text(name)}</th><td class="was">{_share(before)}</td><td>{_share(after)}</td>'
        f'<td class="{colour}">{change}</td></tr>'
    )


def _outline(mask: Tensor | None) -> str:
    """Return the border of the region above 0.5 as a path of SVG in pixels."""
    if mask is None:
        return ""
    # A rim of zeros closes the border where the mask reaches that of the image.
    rimmed = np.pad(mask.cpu().numpy(), 1)
    borders = find_contours(rimmed, 0.5)  # type: ignore[no-untyped-call]
    lines = (approximate_polygon(border, 0.5) - 0.5 for border in borders)  # type: ignore[no-untyped-call]
    return "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for y, x in line) + "Z" for line in lines)


# ---------------------------------------------------------------- failures


def _gone(gone: Sequence[Path]) -> str:
    if not gone:
        return ""
    return (
        f"<section><h2>{_count(len(gone), 'image')} no longer there</h2><p>Their predictions "
        "count; their maps are shown alone, and not compared with masks.</p></section>"
    )


def _failures(failures: Mapping[Path, str]) -> str:
    if not failures:
        return ""
    lines = "".join(f"<li>{_text(reason)}</li>" for reason in failures.values())
    return f"<section><h2>{_count(len(failures), 'file')} left out</h2><ul>{lines}</ul></section>"
