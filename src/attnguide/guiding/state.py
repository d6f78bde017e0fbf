"""The state of a guide in a checkpoint: plain numbers and tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from attnguide.errors import InputError
from attnguide.guiding.terms import Term

__all__ = ["restore", "state_of"]

_ADAPTERS = "adapters."


def state_of(step: int, terms: Sequence[Term], adapters: nn.Module) -> dict[str, Any]:
    """Return the state of a guide.

    Args:
        step: Number of steps that it has made.
        terms: Its terms.
        adapters: Its adapters.

    Returns:
        The number of steps, λ of each term, and the weights and buffers of the adapters.
    """
    weights = {_weight(index): float(term.weight) for index, term in enumerate(terms)}
    return {"step": step, **weights, **adapters.state_dict(prefix=_ADAPTERS)}


def restore(state: Mapping[str, Any], terms: Sequence[Term], adapters: nn.Module) -> int:
    """Give terms and adapters what a state holds, all or nothing.

    Returns:
        The number of steps.

    Raises:
        InputError: If names are missing or unknown, or a value does not fit.
    """
    if not isinstance(state, Mapping):
        raise InputError(f"the state of a guide is a dict, got {type(state).__name__}.")
    expected = state_of(0, terms, adapters)
    for what, names in (
        ("lacks", [name for name in expected if name not in state]),
        ("has an unknown", [name for name in state if name not in expected]),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise InputError(
                f"the state {what} {names[0]!r}{more}. This guide has {len(terms)} terms and "
                f"{len(list(adapters.children()))} adapters; build it as it was when the state was saved."
            )
    numbers = {name: _number(name, state[name]) for name, own in expected.items() if not _is_tensor(own)}
    if not numbers["step"].is_integer():
        raise InputError(f"step of the state is {numbers['step']:g}; it must be a whole number.")
    for name, own in expected.items():
        value = state[name]
        if _is_tensor(own) and (not isinstance(value, Tensor) or value.shape != own.shape):
            got = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
            raise InputError(f"{name} of the state is {got}; it must be of shape {tuple(own.shape)}.")
    for index, term in enumerate(terms):
        term.weight = numbers[_weight(index)]
    adapters.load_state_dict(
        {name.removeprefix(_ADAPTERS): state[name] for name, own in expected.items() if _is_tensor(own)}
    )
    return int(numbers["step"])


def _weight(index: int) -> str:
    return f"terms.{index}.weight"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _number(name: str, value: Any) -> float:
    """Return a number of a state; tools for checkpoints may make a tensor of it."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise InputError(f"{name} of the state is {value!r}; it must be a number of at least 0.")
    return float(value)
