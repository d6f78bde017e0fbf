"""What goes in and out of a forward call: images, logits, and tensors inside tuples, dicts and objects."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from attnguide.capture.suitable import no_images
from attnguide.errors import GuidanceError, LayerError

__all__ = [
    "INPUT",
    "Call",
    "Tap",
    "find_logits",
    "images_name",
    "replace",
    "replace_logits",
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
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    images: Tensor

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Find the images among the arguments: the first tensor with four axes.

        Raises:
            InputError: If there are none.
        """
        given = (*args, *kwargs.values())
        for value in given:
            if isinstance(value, Tensor) and value.ndim == 4:
                return cls(args, kwargs, value)
        raise no_images(given)

    @property
    def signature(self) -> tuple[str, ...]:
        """What else the model was called with, as far as it may change what it does."""
        others = [
            f"{index}={_text(value)}" for index, value in enumerate(self.args) if value is not self.images
        ]
        others += [f"{key}={_text(value)}" for key, value in self.kwargs.items() if value is not self.images]
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


def _logits_key(output: Any) -> Any:
    """Return where in an output the logits are: None for the output itself, `.name`, or a key."""
    if isinstance(output, Tensor):
        return None
    if isinstance(output, Mapping) and not isinstance(getattr(output, "logits", None), Tensor):
        if isinstance(output.get("logits"), Tensor):
            return "logits"
        pairs: Any = output.items()
    elif isinstance(getattr(output, "logits", None), Tensor):
        return ".logits"
    else:
        pairs = enumerate(output) if isinstance(output, (tuple, list)) else ()
    for key, value in pairs:
        if isinstance(value, Tensor) and value.ndim in (1, 2):
            return key
    maps = [value for _, value in tensors_in(output)]
    if len(maps) > 1 and all(value.ndim >= 3 for value in maps):
        raise GuidanceError(
            f"the model gives {len(maps)} feature maps and no logits: a backbone without a classifier, as "
            "timm builds with features_only=True. Build it without, or put it into a model with a head."
        )
    raise GuidanceError(
        f"no logits in the model's output of type {type(output).__name__}: expected a tensor (B, K), or a "
        "tuple, a dict or an object with .logits that holds one."
    )


def find_logits(output: Any) -> Tensor:
    """Return the logits `(B, K)` in a model's output: a tensor, a tuple, a dict, or an object with `.logits`.

    One logit for each sample, `(B,)`, is one class, `(B, 1)`.

    Raises:
        GuidanceError: If there are none.
    """
    key = _logits_key(output)
    logits: Tensor = output if key is None else output.logits if key == ".logits" else output[key]
    if logits.ndim == 1:
        logits = logits[:, None]
    if logits.ndim != 2:
        raise GuidanceError(
            f"the model's output has shape {tuple(logits.shape)}; a classifier gives logits (B, K). Models "
            "without a head, or with a map of scores, cannot be explained by class."
        )
    return logits


def replace_logits(output: Any, logits: Tensor) -> Any:
    """Return the output with other logits where `find_logits` finds them."""
    key = _logits_key(output)
    if key is None:
        return _like(output, logits)
    if key == ".logits":
        logits = _like(output.logits, logits)
        if hasattr(output, "_replace"):  # a named tuple
            return output._replace(logits=logits)
        output.logits = logits
        return output
    logits = _like(output[key], logits)
    if isinstance(output, Mapping):
        return type(output)({**output, key: logits})  # type: ignore[call-arg]
    parts = [logits if index == key else part for index, part in enumerate(output)]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)


def _like(old: Tensor, logits: Tensor) -> Tensor:
    """Drop the class axis where the model has none."""
    return logits[:, 0] if old.ndim == 1 and logits.ndim == 2 else logits
