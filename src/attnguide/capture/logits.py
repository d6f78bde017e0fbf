"""Which tensor of a model's output is the logits."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from attnguide.capture.own_hooks import in_this_thread
from attnguide.errors import GuidanceError, InputError

__all__ = ["LogitsSpec", "check_spec", "describe", "find_logits", "only_logits", "replace_logits"]

#: Which part of a model's output is the logits: a key or attribute (`"scores"`, `"heads.species"`), an index,
#: or a function of the output. None: the output itself, its `logits`, or the only candidate in it.
LogitsSpec = str | int | Callable[[Any], Tensor] | None

#: Names of outputs that are features, of models without a head.
_FEATURES = frozenset(
    {
        *("embed", "embedding", "embeddings", "image_embedding", "image_embeds", "last_hidden_state", "z"),
        *("feat", "feats", "feature", "features", "image_features", "hidden", "hidden_states", "latent"),
        *("global_pool", "penultimate", "pooled", "pooler_output", "pre_logits", "prelogits"),
        *("representation", "representations", "x_norm_clstoken"),
    }
)

#: A number for each function that reads logits, since two functions may have the same name.
_numbers: WeakKeyDictionary[Callable[[Any], Tensor], int] = WeakKeyDictionary()
_count = itertools.count()


def check_spec(which: LogitsSpec) -> None:
    """Refuse what cannot name a part of an output.

    Raises:
        InputError: If it is neither a name, nor an index, nor a function, nor None.
    """
    if not (which is None or isinstance(which, (str, int)) or callable(which)) or isinstance(which, bool):
        raise InputError(f"logits={which!r} must be a name, an index, or a function of the model's output.")


def describe(which: LogitsSpec) -> str:
    """Return a text that is the same for the same choice, in this process."""
    if which is None or isinstance(which, (str, int)):
        return repr(which)
    try:
        return f"<function {_numbers.setdefault(which, next(_count))}>"
    except TypeError:  # no weak references to it
        return f"<function {id(which)}>"


def find_logits(output: Any, which: LogitsSpec = None) -> Tensor:
    """Return the logits `(B, K)` in a model's output: a tensor, a tuple, a dict, or an object with `.logits`.

    One logit for each sample, `(B,)`, is one class, `(B, 1)`.

    Args:
        output: What the model returned.
        which: Which part of it is the logits. By default the output itself, if it is a tensor; else
            `output.logits` or `output["logits"]`; else the only floating-point tensor with one or two axes.

    Raises:
        GuidanceError: If there are none, or several tensors could be the logits.
    """
    if isinstance(output, Tensor) and which is None:
        logits: Any = output
    elif callable(which):
        logits = which(output)
    else:
        logits = _at(output, _path(output, which))
    if not isinstance(logits, Tensor):
        raise GuidanceError(f"logits={which!r} gave {type(logits).__name__}, not a tensor.")
    found: Tensor = logits if logits.ndim != 1 else logits[:, None]
    if found.ndim != 2:
        raise GuidanceError(
            f"the model's output has shape {tuple(found.shape)}; a classifier gives logits (B, K). Models "
            "without a head, or with a map of scores, cannot be explained by class."
        )
    return found


@contextmanager
def only_logits(model: nn.Module, which: LogitsSpec) -> Iterator[None]:
    """Let a model return its logits alone.

    Args:
        model: The model, without a wrapper.
        which: Which part of its output is the logits; None leaves the output as it is.
    """
    if which is None:
        yield
        return
    handle = model.register_forward_hook(
        in_this_thread(lambda module, args, output: find_logits(output, which))
    )
    try:
        yield
    finally:
        handle.remove()


def replace_logits(output: Any, logits: Tensor, which: LogitsSpec = None) -> Any:
    """Return the output with other logits where `find_logits` finds them.

    Raises:
        GuidanceError: If a function computes the logits, so that the output does not contain them.
    """
    if isinstance(output, Tensor) and which is None:
        return _like(output, logits)
    if callable(which):
        found = which(output)
        path = next((path for path, tensor in _tensors(output) if tensor is found), None)
        if path is None:
            raise GuidanceError(
                "logits= is a function that computes the logits, and an adapter has to put others in their "
                "place. Give a name or an index, or a function that returns a part of the output."
            )
    else:
        path = _path(output, which)
    return _replaced(output, path, _like(_at(output, path), logits))


#: Where something is inside an output: keys, indices and attributes, from the outside inwards.
_Path = tuple[str | int, ...]


def _path(output: Any, which: str | int | None) -> _Path:
    if which is not None:
        steps: list[str | int] = [which] if isinstance(which, int) else [*which.split(".")]
        if isinstance(which, str) and isinstance(output, Mapping) and which in output:
            steps = [which]
        try:
            _at(output, (*steps,))
        except (LookupError, AttributeError, TypeError, ValueError, StopIteration):
            raise GuidanceError(
                f"the model's output has no part logits={which!r}. {_listed(output)}"
            ) from None
        return (*steps,)
    if isinstance(getattr(output, "logits", None), Tensor) or (
        isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor)
    ):
        return ("logits",)
    candidates = [
        (path, tensor)
        for path, tensor in _tensors(output)
        if tensor.ndim in (1, 2) and tensor.is_floating_point()
    ]
    if len(candidates) == 1:
        (path, _), *_ = candidates
        if str(path[-1]).lower() not in _FEATURES:
            return path
        raise GuidanceError(
            f"the model gives features and no logits: {_listed(output)} It is a backbone without a "
            "classifier. Put it into a model with a head, or, if this is the logits, say so: "
            f"logits={_spelled(path)!r}."
        )
    if candidates:
        raise GuidanceError(
            f"{len(candidates)} tensors of the model's output could be the logits. {_listed(output)} Choose "
            f"one, such as logits={_spelled(candidates[-1][0])!r}: a name, an index, or a function of the "
            "output. Where logits= cannot be given, wrap the model in a module that returns the logits alone."
        )
    maps = [value for _, value in _tensors(output)]
    if len(maps) > 1 and all(value.ndim >= 3 for value in maps):
        raise GuidanceError(
            f"the model gives {len(maps)} feature maps and no logits: a backbone without a classifier, as "
            "timm builds with features_only=True. Build it without, or put it into a model with a head."
        )
    raise GuidanceError(
        f"no logits in the model's output of type {type(output).__name__}: expected a tensor (B, K), or a "
        "tuple, a dict or an object with .logits that holds one."
    )


def _parts(output: Any) -> list[tuple[str | int, Any]]:
    """List the parts of an output, one level deep."""
    if isinstance(output, Mapping):
        return [*output.items()]
    if isinstance(output, (tuple, list)):
        names = getattr(output, "_fields", range(len(output)))  # of a named tuple
        return [*zip(names, output, strict=True)]
    return [] if isinstance(output, Tensor) else [*getattr(output, "__dict__", {}).items()]


def _tensors(output: Any) -> list[tuple[_Path, Tensor]]:
    """List all tensors of an output with their paths."""
    if isinstance(output, Tensor):
        return [((), output)]
    return [((key, *path), tensor) for key, part in _parts(output) for path, tensor in _tensors(part)]


def _listed(output: Any) -> str:
    """Say which tensors an output has."""
    found = [
        f"{'.'.join(map(str, path)) or 'output'} {tuple(tensor.shape)}" for path, tensor in _tensors(output)
    ]
    return f"It has {', '.join(found[:12])}{', …' if len(found) > 12 else ''}." if found else ""


def _spelled(path: _Path) -> str | int:
    """Write a path as a user would."""
    return path[0] if len(path) == 1 else ".".join(map(str, path))


def _at(output: Any, path: _Path) -> Any:
    for step in path:
        if isinstance(output, Mapping):
            output = output[step if step in output else next(key for key in output if str(key) == str(step))]
        elif isinstance(output, (tuple, list)) and step not in getattr(output, "_fields", ()):
            output = output[int(step)]
        else:
            output = getattr(output, str(step))
    return output


def _replaced(output: Any, path: _Path, tensor: Tensor) -> Any:
    if not path:
        return tensor
    step, rest = path[0], path[1:]
    new = _replaced(_at(output, (step,)), rest, tensor)
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        changed[next(key for key in output if str(key) == str(step))] = new
        return changed
    if hasattr(output, "_replace"):  # a named tuple
        name = step if isinstance(step, str) and step in output._fields else output._fields[int(step)]
        return output._replace(**{name: new})
    if isinstance(output, (tuple, list)):
        place = int(step) % len(output)
        return type(output)(new if index == place else part for index, part in enumerate(output))
    setattr(output, str(step), new)
    return output


def _like(old: Tensor, logits: Tensor) -> Tensor:
    """Drop the class axis where the model has none."""
    return logits[:, 0] if old.ndim == 1 and logits.ndim == 2 else logits
