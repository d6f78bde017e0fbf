"""`attnguide landmarks`: find the landmarks of many faces."""

from __future__ import annotations

import warnings
from pathlib import Path

import click

from attnguide.cli.console import exit_if, note_skipped, track
from attnguide.cli.options import PATH

__all__ = ["landmarks"]


@click.command(short_help="Find facial landmarks in images.")
@click.argument("images", nargs=-1, required=True)
@click.option(
    "--out",
    type=PATH,
    default=Path("landmarks.npz"),
    show_default=True,
    help="Table to write.",
)
@click.option(
    "--model-file",
    type=PATH,
    help="face_landmarker.task, for versions of mediapipe without a model.",
)
def landmarks(images: tuple[str, ...], out: Path, model_file: Path | None) -> None:
    r"""Find the 68 landmarks of the foremost face in each of IMAGES, files or folders.

    Writes a table that read_landmarks reads, and that data sets take as landmarks=. Images without a face are
    reported as skipped; they stay in the table, without landmarks, and the exit status is 1. Needs mediapipe:
    pip install 'attnguide[landmarks]'. Versions from 0.10.30 on contain no model: download
    face_landmarker.task from ai.google.dev/edge/mediapipe/solutions/vision/face_landmarker.

    \b
    Examples:
      attnguide landmarks photos/
      attnguide landmarks photos/ --out faces.npz --model-file face_landmarker.task
    """
    from attnguide.data import check_target, find_images
    from attnguide.errors import InputError
    from attnguide_action_units.extraction import extract, face_mesh

    if out.suffix != ".npz":
        raise InputError(
            f"--out {out} must end in .npz; read_landmarks reads other formats, but only .npz is written."
        )
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.absolute().parent}; make it first.")
    check_target(out)
    # mediapipe warns for each image.
    warnings.filterwarnings("ignore", message="SymbolDatabase.GetPrototype", category=UserWarning)
    files = find_images(images)
    extractor = face_mesh(model_file)
    root = Path(images[0]) if len(images) == 1 and Path(images[0]).is_dir() else None
    table, failures = extract(track(files, "Finding landmarks", unit="images", keep=True), extractor, root)
    table.save(out)
    note_skipped(f"{name}: {reason}" for name, reason in failures.items())
    click.echo(f"{out}: landmarks of {len(table) - len(failures)} of {len(table)} images")
    exit_if(failures)
