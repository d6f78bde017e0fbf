"""Leaves patches without a graph where the answer does not depend on them.

Behind the last attention of a transformer with a class token, each token is treated by itself, and only the
class token reaches the answer. The patches' gradients there are zero; computing and differentiating
zeros is most of the cost of that block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnguide.modes import is_muted

__all__ = ["FewRows"]


class FewRows(threading.local):
    """Runs a module with a graph for the first tokens, and without one for the others.

    Args:
        prefix: Number of the first tokens.
        is_off: Whether to leave the module alone.
    """

    def __init__(self, prefix: int, is_off: Callable[[], bool]) -> None:
        self.prefix, self.is_off = prefix, is_off
        self.others: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Hook before the forward: hand on the first tokens alone."""
        self.others = None
        if (
            self.is_off()
            or is_muted()
            or not torch.is_grad_enabled()
            or len(args) != 1
            or args[0].ndim != 3
            or any(_is_hooked(inner) for inner in module.modules() if inner is not module)
        ):
            return None
        self.others = args[0][:, self.prefix :].detach()
        return (args[0][:, : self.prefix],)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook after the forward: append what the others become."""
        if self.others is None:
            return None
        others, self.others = self.others, None
        with torch.no_grad():
            rest = module.forward(others)
        return torch.cat([output, rest], dim=1)

    def __reduce__(self) -> tuple[type[FewRows], tuple[int, Callable[[], bool]]]:
        """A copy of a guided model is not guided."""
        return FewRows, (self.prefix, _always)


def _always() -> bool:
    return True


def _is_hooked(module: nn.Module) -> bool:
    """Whether somebody looks inside, who would see the first tokens only."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
