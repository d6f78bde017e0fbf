"""What goes in and out of a forward call: images, and tensors inside tuples and dicts."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from attnguide.capture.logits import LogitsSpec, describe
from attnguide.capture.suitable import no_images
from attnguide.errors import LayerError

__all__ = [
    "INPUT",
    "Call",
    "Tap",
    "images_name",
    "replace",
    "select",
    "tensors_in",
]

#: Name of the images themselves, where a layer is asked for; a module may be called "input", but not so.
INPUT = ":input"

#: Where a tensor is inside an output: keys and indices, from the outside inwards.
Path = tuple[str | int, ...]

_TAP = re.compile(r"(?P<module>[^#:\[\]]+)(?P<given>:input)?(?:#(?P<call>\d+))?(?P<path>(?:\[[^\[\]]+\])*)")


@dataclass(frozen=True)
class Tap:
    """A tensor that a module gives, or is given: the address behind a layer's name.

    Written `module`, `module#call`, `module[path]` or `module:input`: `norm#0` is what `norm` gives when it
    runs first, `blocks.2[1]` the second tensor of its output, `fc:input` what `fc` is given.

    Attributes:
        module: Name of the module, as in `model.named_modules()`.
        call: Which of its calls in a forward pass, from 0; None for the last.
        path: Where the tensor is in the output; empty for the output itself, or the first tensor in it.
        given: Whether it is the module's (first) input rather than its output.
    """

    module: str
    call: int | None = None
    path: Path = ()
    given: bool = False

    @classmethod
    def parse(cls, text: str) -> Tap:
        """Read a tap as `str()` writes it.

        Raises:
            LayerError: If the text has another form.
        """
        match = _TAP.fullmatch(text)
        if match is None:
            raise LayerError(
                f"layer {text!r} is not understood: expected a module's name, with #0, #1 … for one of "
                "several calls and [0], [1] … for one of several tensors."
            )
        keys = re.findall(r"\[([^\[\]]+)\]", match["path"])
        path = tuple(int(key) if key.isdecimal() else key for key in keys)
        call = None if match["call"] is None else int(match["call"])
        return cls(match["module"], call, path, match["given"] is not None)

    def __str__(self) -> str:
        call = "" if self.call is None else f"#{self.call}"
        return self.module + ":input" * self.given + call + "".join(f"[{key}]" for key in self.path)


def images_name(model: nn.Module) -> str:
    """What the images are called among the layers of a model: `"input"`, if no module is called so."""
    return INPUT if "input" in model._modules else "input"


def tensors_in(output: Any) -> Iterator[tuple[Path, Tensor]]:
    """List the tensors in an output with their paths, in order."""
    if isinstance(output, Tensor):
        yield (), output
        return
    if isinstance(output, Mapping):
        pairs: Any = output.items()
    else:
        pairs = enumerate(output) if isinstance(output, (tuple, list)) else ()
    for key, value in pairs:
        yield from (((key, *path), tensor) for path, tensor in tensors_in(value))


def select(output: Any, path: Path) -> Tensor | None:
    """Return the tensor at a path of an output, the first one for an empty path; None if there is none."""
    if path:
        wanted = [*map(str, path)]  # a written path does not say whether a key is 0 or "0"
        return next((tensor for found, tensor in tensors_in(output) if [*map(str, found)] == wanted), None)
    return next((tensor for _, tensor in tensors_in(output)), None)


def replace(output: Any, path: Path, tensor: Tensor) -> Any:
    """Return the output with another tensor where `select` finds one."""
    if isinstance(output, Tensor):
        return tensor
    if not path:
        path = next(found for found, _ in tensors_in(output))
    key, rest = path[0], path[1:]
    if isinstance(output, Mapping):
        key = next(found for found in output if str(found) == str(key))
    new = replace(output[key], rest, tensor) if rest else tensor
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        changed[key] = new
        return changed
    parts = [new if index == int(key) else part for index, part in enumerate(output)]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)


@dataclass(frozen=True)
class Call:
    """How a model was called, so that it can be called in the same way with other images.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        images: The images among them.
        logits: Which part of the output is the logits; see `find_logits`.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    images: Tensor
    logits: LogitsSpec = None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], logits: LogitsSpec = None) -> Call:
        """Find the images among the arguments: the first tensor with four axes.

        Raises:
            InputError: If there are none.
        """
        given = (*args, *kwargs.values())
        for value in given:
            if isinstance(value, Tensor) and value.ndim == 4:
                return cls(args, kwargs, value, logits)
        raise no_images(given)

    @property
    def signature(self) -> tuple[str, ...]:
        """What else the model was called with, as far as it may change what it does, and what is read."""
        others = [
            f"{index}={_text(value)}" for index, value in enumerate(self.args) if value is not self.images
        ]
        others += [f"{key}={_text(value)}" for key, value in self.kwargs.items() if value is not self.images]
        others += [f"logits={describe(self.logits)}"] * (self.logits is not None)
        return tuple(sorted(others))

    def arguments(self, images: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with other images, `(N, C, H, W)`, in place of those of the call.

        Other tensors with one entry for each image repeat their first.
        """
        batch = len(self.images)

        def adapted(value: Any) -> Any:
            if value is self.images:
                return images
            if isinstance(value, Tensor) and value.ndim and len(value) == batch and len(images) != batch:
                return value[:1].expand(len(images), *value.shape[1:])
            return value

        return tuple(map(adapted, self.args)), {key: adapted(value) for key, value in self.kwargs.items()}


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__
