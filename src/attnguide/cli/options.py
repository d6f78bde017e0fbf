"""Options that commands share, commands of plugins too: the model, its weights, and how to measure."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnguide.data.files import check_file, read_json, read_text
from attnguide.errors import DataError, InputError

if TYPE_CHECKING:
    import torch

    from attnguide.models import LoadedModel

__all__ = [
    "ADDRESS",
    "PATH",
    "FiniteRange",
    "ModelChoice",
    "batch_size_option",
    "class_options",
    "device_option",
    "inside_option",
    "layers_of",
    "measuring_options",
    "model_options",
    "pair_of_sizes",
    "pick_device",
    "read_class_names",
    "single_label_options",
    "structure_options",
]


class _NamedPath(click.Path):
    """A path that is not empty: `pathlib` takes an empty one, such as a variable of a script, for `.`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path of a text."""
        if value == "":
            self.fail("the path is empty. Give a name; '.' is the current folder.", param, ctx)
        return super().convert(value, param, ctx)


#: Type of an option or argument that is a file or folder.
PATH = _NamedPath(path_type=Path)


class _Address(_NamedPath):
    """A path, or an address such as `s3://bucket/photos`, whose slashes a path would lose."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path of a text, or the text if it is an address."""
        return value if "://" in str(value) else super().convert(value, param, ctx)


#: Type of an option or argument that is a folder, or its address.
ADDRESS = _Address(path_type=Path)


class FiniteRange(click.FloatRange):
    """A range of numbers, without NaN, which is neither below nor above any bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number of a text."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return number


@dataclass(frozen=True)
class ModelChoice:
    """The options about the model; see [`models.load`][attnguide.models.load]."""

    name: str | None
    checkpoint: Path | None
    pretrained: bool
    num_classes: int | None
    class_names: Path | None
    multi_label: bool
    logits: str | int | None = None

    def check(self) -> None:
        """Check the options before anything slow begins.

        Raises:
            InputError: If the options contradict each other.
            DataError: If a file is missing.
        """
        if self.name is None and (self.pretrained or self.num_classes is not None):
            option = "--pretrained" if self.pretrained else "--num-classes"
            raise InputError(f"{option} needs a model to be named: --model NAME.")
        if self.pretrained and self.checkpoint:
            raise InputError("--pretrained and --checkpoint exclude each other. Leave one of them out.")
        for path in (self.checkpoint, self.class_names):
            if path is not None:
                check_file(path)

    def load(self) -> LoadedModel:
        """Load the chosen model."""
        from attnguide import models

        names = None if self.class_names is None else read_class_names(self.class_names)
        return models.load(
            self.name,
            checkpoint=self.checkpoint,
            pretrained=self.pretrained,
            num_classes=self.num_classes,
            class_names=names,
            multi_label=self.multi_label,
            logits=self.logits,
        )

    def settings(self) -> dict[str, Any]:
        """Return what identifies the model: equal settings give equal predictions."""
        from attnguide.models import checkpoints

        return {
            "model": self.name,
            **({"weights": folder} if (folder := _digests(self.name)) else {}),
            "checkpoint": self.checkpoint and checkpoints.digest(self.checkpoint),
            "pretrained": self.pretrained,
            "num_classes": self.num_classes,
            "class_names": self.class_names and read_class_names(self.class_names),
            "multi_label": self.multi_label,
            "logits": self.logits,
        }


def _digests(name: str | None) -> dict[str, str]:
    """Digests of the weights in the folder that a name such as `hf:FOLDER` means; none for other names."""
    from attnguide.models import checkpoints

    prefix, _, where = (name or "").partition(":")
    if prefix not in ("hf", "local-dir"):
        return {}
    return {file.name: checkpoints.digest(file) for file in sorted(Path(where).glob("*.safetensors"))}


_CHECKPOINT = click.option(
    "--checkpoint",
    type=PATH,
    metavar="FILE",
    help="Weights: .safetensors, or a PyTorch checkpoint that holds tensors only.",
)
_PRETRAINED = click.option(
    "--pretrained", is_flag=True, help="Use the published weights of the model; downloaded once."
)
_NUM_CLASSES = click.option(
    "--num-classes",
    type=click.IntRange(1),
    metavar="N",
    help="Number of classes.  [default: that of the checkpoint]",
)
_CLASS_NAMES = click.option(
    "--class-names",
    type=PATH,
    metavar="FILE",
    help="Names of the classes, in order: a text file with one name per line, or a JSON list.",
)
_MULTI_LABEL = click.option(
    "--multi-label", is_flag=True, help="Predict each class independently: sigmoid, not softmax."
)
_LOGITS = click.option(
    "--logits",
    metavar="NAME",
    help="Part of the model's output that is the logits, by name or index, if it returns several tensors.",
)


#: Adds `--device`.
device_option = click.option(
    "--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, cuda:1, mps …"
)


#: Adds `--inside`, for commands with `--masks`.
inside_option = click.option(
    "--inside",
    metavar="VALUES",
    help="What is inside, in masks of several values: 15, 1-20, '#ff0000', several with commas, or gray.",
)


def structure_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that determine a model's structure; see `model_options`."""
    return _CHECKPOINT(_NUM_CLASSES(_as_choice(function)))


def class_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options about a model's classes, for a command that has other options for weights."""
    return _NUM_CLASSES(_CLASS_NAMES(_as_choice(function)))


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add all options about a model; the command receives them, and its argument `model`, as `choice`."""
    return _weights_and_names(_MULTI_LABEL(_as_choice(function)))


def single_label_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options about a model that gives each image one class; see `model_options`."""
    return _weights_and_names(_as_choice(function))


def _weights_and_names(command: Callable[..., Any]) -> Callable[..., Any]:
    return _CHECKPOINT(_PRETRAINED(_NUM_CLASSES(_CLASS_NAMES(_LOGITS(command)))))


def _as_choice(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def command(
        model: str | None,
        num_classes: int | None,
        checkpoint: Path | None = None,
        pretrained: bool = False,
        class_names: Path | None = None,
        multi_label: bool = False,
        logits: str | None = None,
        **others: Any,
    ) -> Any:
        which = int(logits) if logits and logits.lstrip("-").isdecimal() else logits
        choice = ModelChoice(model, checkpoint, pretrained, num_classes, class_names, multi_label, which)
        choice.check()
        return function(choice=choice, **others)

    return command


def batch_size_option(default: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make the option of the number of images in a batch."""
    return click.option(
        "--batch-size",
        type=click.IntRange(1),
        default=default,
        show_default=True,
        metavar="N",
        help="Images per batch.",
    )


_MEASURING = (
    click.option(
        "--source", default="grad_cam", show_default=True, metavar="NAME", help="Attribution source."
    ),
    click.option("--layer", default="auto", show_default=True, metavar="NAME", help="Layer to look at."),
    click.option(
        "--threshold",
        type=FiniteRange(0, 1, max_open=True),
        default=0.5,
        show_default=True,
        metavar="T",
        help="Threshold of the IoU; choose it on held-out data.",
    ),
    batch_size_option(32),
    device_option,
)


def measuring_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that determine how to measure where a model looks."""
    for option in reversed(_MEASURING):
        function = option(function)
    return function


def layers_of(text: str) -> str | list[str]:
    """Read `--layer`: one name, or several with commas between them."""
    return text.split(",") if "," in text else text


def read_class_names(path: Path) -> list[str]:
    """Read names of classes: a text file with one name per line, or a JSON list of strings.

    Raises:
        DataError: If the file is neither.
    """
    if path.suffix.lower() == ".json":
        names = read_json(path)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(
                f'{path} is not a JSON list of strings. Write the names in order: ["cat", "dog"].'
            )
        return names
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def pair_of_sizes(text: str) -> tuple[int, int]:
    """Read `224` or `192x256` as rows and columns.

    Raises:
        InputError: If it is neither, or not at least 1.
    """
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) > 2 or not all(
        re.fullmatch("[0-9]{1,5}", part) and 0 < int(part) <= 10_000 for part in parts
    ):
        raise InputError(
            f"--size {text:.40} is not a size. Write a number of pixels such as 224, or rows x columns: "
            "192x256."
        )
    return int(parts[0]), int(parts[-1])


def pick_device(name: str) -> torch.device:
    """Return a device by name; `"auto"` is the accelerator if there is one, else the CPU.

    Raises:
        InputError: If there is no such device, or it is not available.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        # Reading a value tells apart devices that hold none, such as meta.
        torch.zeros(1, device=device).item()
    # Which error it is depends on how PyTorch was built.
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"--device {name} cannot be used: {reason} Try auto or cpu.") from error
    return device
