"""Distinguishes the library's own hooks on a model from the hooks of others.

What the hooks of others see must be as it would be without the library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

from torch import nn
from torch.nn.modules import module as global_hooks
from torch.utils.hooks import RemovableHandle

__all__ = ["Handles", "in_this_thread", "is_observed"]

_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Ids of the hooks of this library, as PyTorch counts them.
_ours: set[int] = set()


@dataclass
class Handles:
    """The hooks of one owner.

    Attributes:
        handles: Their handles.
        ids: Their ids.
    """

    handles: list[RemovableHandle] = field(default_factory=list)
    ids: set[int] = field(default_factory=set)

    def keep(self, handle: RemovableHandle) -> None:
        """Remember the handle of a hook of this owner."""
        _ours.add(handle.id)
        self.ids.add(handle.id)
        self.handles.append(handle)

    def remove(self) -> None:
        """Remove all hooks. May be called twice."""
        for handle in self.handles:
            handle.remove()
        _ours.difference_update(self.ids)
        self.handles.clear()
        self.ids.clear()


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that does nothing when another thread runs the module."""
    thread = get_ident()

    def only_here(*args: Any) -> Any:
        return hook(*args) if get_ident() == thread else None

    return only_here


def is_observed(modules: Iterable[nn.Module], own: set[int] | None = None) -> bool:
    """Whether modules have hooks besides `own`, or besides the library's; hooks on all modules count."""
    if any(getattr(global_hooks, f"_global{kind}") for kind in _KINDS):
        return True
    allowed = _ours if own is None else own
    for module in modules:
        attributes = module.__dict__
        for kind in _KINDS:
            hooks = attributes.get(kind)
            if hooks and not allowed.issuperset(hooks):
                return True
    return False
