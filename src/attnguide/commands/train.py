"""`attnguide train`: trains a classifier with guidance, from a file of settings."""

from __future__ import annotations

import json
import os
import tomllib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnguide.cli.console import note
from attnguide.cli.options import PATH, FiniteRange, device_option, pick_device
from attnguide.errors import InputError

if TYPE_CHECKING:
    import torch

    from attnguide.training import Settings, Trained

__all__ = ["train"]

_EXAMPLE = """\
attnguide train trains a classifier, and guides it to look where masks say. Three lines are enough:

  # photos.toml; paths are relative to this file
  data = "photos"                    # a subfolder of images for each class
  model = "resnet18.a1_in1k"         # a model of timm, or torchvision/NAME
  masks = "masks"                    # PNG files named like the images, white where to look

  $ attnguide train photos.toml --out run --dry-run   shows a batch, and checks the guidance
  $ attnguide train photos.toml --out run             trains
  $ attnguide train --resume --out run                goes on, after Ctrl-C or a crash

The same with options alone: attnguide train --data photos --model resnet18.a1_in1k --masks masks --out run

More of what a file can say; all of it is optional:

  recipe = "right-for-real"          # or another method: `attnguide plugins` lists recipes
  augment = { crop = 0.7, flip = 0.5 }

  [data]
  path = "labels.csv"                # columns file, label (or attributes), split, mask; Parquet; CelebA
  validation = 0.2                   # a share, or another folder or table

  [model]
  name = "resnet18.a1_in1k"
  freeze = ["conv1", "bn1", "layer1"]

  [guide]                            # by maps instead; a prior of any installed plugin
  source = "hires_cam"
  prior = "mask"
  weight = "auto"                    # chosen by validation images with exchanged surroundings

  [train]
  epochs = 10
  batch_size = 32
  learning_rate = 3e-4
  precision = "bf16"

`attnguide train --help` lists the options; docs/train.md explains all settings.
"""

#: Options that stand for a setting.
_SETTINGS = {
    "data": "data.path",
    "validation": "data.validation",
    "model": "model.name",
    "checkpoint": "model.checkpoint",
    "masks": "masks.path",
    "inside": "masks.inside",
    "complete": "masks.complete",
    "prior": "guide.prior",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "learning_rate": "train.learning_rate",
    "accumulate": "train.accumulate",
    "precision": "train.precision",
    "workers": "train.workers",
    "select": "train.select",
    "seed": "train.seed",
}


@click.command(short_help="Train a classifier that looks where it should.")
@click.argument("recipe", required=False)
@click.option("--data", type=PATH, metavar="PATH", help="Folder with a subfolder for each class, or a table.")
@click.option(
    "--validation", metavar="SHARE|PATH", help="Share to hold out, or other images.  [default: 0.2]"
)
@click.option("--model", metavar="NAME", help="Model of timm, or torchvision/NAME.")
@click.option("--pretrained/--random", default=None, help="Begin with the published weights, or at random.")
@click.option("--checkpoint", type=PATH, metavar="FILE", help="Weights to begin with.")
@click.option("--masks", type=PATH, metavar="PATH", help="Masks of where to look, as for evaluate.")
@click.option("--inside", metavar="VALUES", help="What is inside, in masks of several values.")
@click.option(
    "--complete", is_flag=True, default=None, help="Predict the masks that images lack from those of others."
)
@click.option("--prior", metavar="NAME", help="Guide by maps with this prior, one of any installed plugin.")
@click.option("--weight", metavar="X|auto", help="λ, the weight of the guidance.")
@click.option(
    "--select", type=click.Choice(["auto", "last", "accuracy", "swapped"]), help="Which epoch is kept."
)
@click.option("--epochs", type=click.IntRange(1), metavar="N", help="Passes through the images.")
@click.option("--batch-size", type=click.IntRange(1), metavar="N", help="Images of a step, in all processes.")
@click.option(
    "--learning-rate", type=FiniteRange(0, 10, min_open=True), metavar="X", help="Highest learning rate."
)
@click.option("--accumulate", type=click.IntRange(1), metavar="N", help="Parts in which a step is computed.")
@click.option("--precision", type=click.Choice(["no", "bf16", "fp16"]), help="Reduced precision.")
@click.option("--workers", type=click.IntRange(0), metavar="N", help="Processes that read images.")
@click.option("--seed", type=click.IntRange(0), metavar="N", help="Seed of everything that is random.")
@click.option(
    "--set",
    "more",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any setting: train.optimizer=sgd; may be repeated.",
)
@device_option
@click.option("--out", type=PATH, metavar="FOLDER", help="Folder of all that is written.")
@click.option("--resume", is_flag=True, help="Go on with the training in the folder --out.")
@click.option(
    "--dry-run", is_flag=True, help="Train nothing: show a batch with its masks, and check the guidance."
)
@click.option("--json", "as_json", is_flag=True, help="Write the result as JSON, for other programs.")
def train(
    recipe: str | None,
    pretrained: bool | None,
    weight: str | None,
    more: tuple[str, ...],
    device: str,
    out: Path | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a classifier, guided to look where masks or any other prior say.

    RECIPE is a file of settings (.toml), or the name of a recipe that `attnguide plugins` lists; options
    replace what it says. Without arguments the command shows an example.

    λ with --weight auto, and the epoch with --select swapped, are chosen by validation images whose
    surroundings are exchanged: no clean test set is needed to see a shortcut there.

    The folder --out gets model.safetensors, which explain, evaluate and report take as --checkpoint without
    --model; recipe.toml with all settings; log.jsonl. Ctrl-C ends after the current step with a checkpoint.
    For several processes: torchrun --nproc-per-node 2 -m attnguide train …, or accelerate launch.

    \b
    Examples:
      attnguide train photos.toml --out run
      attnguide train --data photos --model resnet18.a1_in1k --masks masks --weight auto --out run
      attnguide train --resume --out run
    """  # noqa: D301  (click's mark for "leave these lines as they are")
    given = {name: value for name, value in options.items() if value is not None}
    if recipe is None and not given and not resume:
        click.echo(_EXAMPLE, nl=False)
        return
    if out is None:
        raise InputError("there is no folder for what is written. Give --out FOLDER.")
    from attnguide.training import read_settings, running

    overrides = {_SETTINGS[name]: _option(name, value) for name, value in given.items()}
    if pretrained is not None:
        overrides["model.pretrained"] = pretrained
    overrides |= dict(map(_setting, more))
    if recipe is None and resume and not overrides and (out / running.RECIPE).exists():
        recipe = str(out / running.RECIPE)
    if weight is not None:
        overrides |= _weight(recipe, weight, overrides)
    settings = read_settings({} if recipe is None else recipe, overrides)
    place = None if device == "auto" else pick_device(device)
    if dry_run:
        _dry_run(settings, out, place)
        return
    try:
        with _reserved(out):
            result = running.train(
                settings, out, resume=resume, device=place, progress=True, on_epoch=note, on_note=note
            )
    except KeyboardInterrupt:
        note(f"\nStopped. Go on with: attnguide train --resume --out {out}")
        raise
    if result.main:
        _tell(settings, result, out, as_json)


def _reserved(out: Path) -> AbstractContextManager[None]:
    """Keep the folder for this run; of several processes the first does so."""
    from attnguide.commands.explain.reserving import reserved
    from attnguide.data.files import check_writable

    if os.environ.get("RANK", "0") != "0":
        return nullcontext()
    check_writable(out)
    return reserved(out)


def _option(name: str, value: Any) -> Any:
    """Return the value of an option as a file of settings has it."""
    if name == "validation":
        try:
            return float(value)
        except ValueError:
            return Path(value)
    return value


def _setting(text: str) -> tuple[str, Any]:
    """Read `train.optimizer=sgd`; anything that TOML does not know is text."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise InputError(f"--set {text!r:.60} must be NAME=VALUE, such as train.optimizer=sgd.")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return name.strip(), value.strip()


def _weight(recipe: str | None, text: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Say λ of the method that a recipe, or else the options, choose."""
    from attnguide.training import method_of, read_settings

    try:
        value: Any = text if text == "auto" else float(text)
    except ValueError as error:
        raise InputError(f"--weight {text!r:.40} must be a number, or auto.") from error
    method = method_of(read_settings({} if recipe is None else recipe, overrides))
    if method.kind == "none":
        raise InputError("--weight is the weight of a guidance, and there is none. Give --masks or --prior.")
    return {f"{method.kind}.weight": value}


def _tell(settings: Settings, result: Trained, out: Path, as_json: bool) -> None:
    """Say what was chosen, and what to do next."""
    from dataclasses import asdict

    if as_json:
        click.echo(json.dumps({**asdict(result), "folder": str(out)}, indent=2))
        return
    how = {
        "last": "the last",
        "accuracy": "the most accurate",
        "swapped": "the best with exchanged surroundings",
    }
    click.echo(f"{result.epochs[result.chosen - 1]}; {how[result.select]} of {len(result.epochs)} epochs.")
    click.echo(
        f"Weights: {out / 'model.safetensors'}" + (f", with λ = {result.weight:g}" if result.weight else "")
    )
    if settings.data.path.is_dir() and settings.masks is not None and settings.masks.path is not None:
        first = out / "search" / "0" / "model.safetensors" if result.tried else out / "start.safetensors"
        first = first if first.exists() else out / "start.safetensors"
        click.echo(
            f"What changed: attnguide report {settings.data.path} --before {first} --after "
            f"{out / 'model.safetensors'} --masks {settings.masks.path} --out {out / 'report.html'}"
        )


def _dry_run(settings: Settings, out: Path, device: torch.device | None) -> None:
    """Draw a batch with its masks, and check that the guidance reaches the weights."""
    from attnguide.data.files import check_writable
    from attnguide.training.dry_run import dry_run

    check_writable(out)
    click.echo(dry_run(settings, out / "dry-run.png", device))
