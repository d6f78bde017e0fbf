"""Which hooks on a model are the library's own, and which are somebody else's.

What somebody else may look at must be as it would be without the library.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules import module as global_hooks
from torch.utils.hooks import RemovableHandle

__all__ = ["Handles", "is_observed"]

_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Hooks of this library, by the number that PyTorch gives them.
_ours: set[int] = set()


class Handles:
    """Hooks of one owner."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def keep(self, handle: RemovableHandle) -> None:
        """Take a hook over."""
        _ours.add(handle.id)
        self._handles.append(handle)

    def remove(self) -> None:
        """Take all of them off. May be called twice."""
        for handle in self._handles:
            handle.remove()
            _ours.discard(handle.id)
        self._handles.clear()

    @property
    def ids(self) -> set[int]:
        """Their numbers."""
        return {handle.id for handle in self._handles}


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
