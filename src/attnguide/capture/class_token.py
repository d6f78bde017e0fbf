"""Computes patches without a graph of autograd where the logits do not depend on them.

After the last attention of a transformer with a class token, each token is transformed separately, and only
the class token affects the logits. In that attention only the query of the class token matters, though it
attends to all patches. The queries of the patches have a gradient of zero; computing and differentiating
zeros is most of the cost of that block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnguide.capture.calls import tensors_in
from attnguide.capture.model_state import muting
from attnguide.capture.own_hooks import Handles

__all__ = ["ClassToken", "FewRows", "FirstQueries"]


class FirstQueries(TorchFunctionMode):
    """Computes attention with a graph of autograd for the queries of the first tokens only.

    Args:
        prefix: Number of the first tokens.
        blank: Give zeros for the other tokens, to see whether they matter.

    Attributes:
        calls: Number of calls of attention.
    """

    def __init__(self, prefix: int, blank: bool = False) -> None:
        super().__init__()
        self.prefix, self.blank = prefix, blank
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the function of attention; call every other function unchanged."""
        kwargs = kwargs or {}
        # Masks and causal attention treat the rows differently: they are left as they are.
        if (
            func is not F.scaled_dot_product_attention
            or len(args) != 3
            or kwargs.get("attn_mask") is not None
            or kwargs.get("is_causal")
        ):
            return func(*args, **kwargs)
        self.calls += 1
        query, key, value = args
        first = func(query[..., : self.prefix, :], key, value, **kwargs)
        with torch.no_grad():
            others = func(query[..., self.prefix :, :], key, value, **kwargs)
            others = torch.zeros_like(others) if self.blank else others
        return torch.cat([first, others], dim=-2)


class ClassToken:
    """Rider of a recorder: leaves patches without a graph in modules after the last attention.

    Args:
        model: The model, without a wrapper.
        is_off: Whether a module, by its name, has to keep the whole graph in the pass that is running.
    """

    def __init__(self, model: nn.Module, is_off: Callable[[str], bool]) -> None:
        self._model, self._is_off = model, is_off
        self._handles = Handles()
        self._hooked: set[str] = set()
        #: Names of the modules of which only the first tokens matter now.
        self.modules: frozenset[str] = frozenset()

    def leave_out(self, modules: Mapping[str, tuple[int, bool]]) -> None:
        """Keep no graph from now on for tokens that the logits do not depend on.

        Modules do as usual while others have hooks on the model, who may see these tokens, and while
        checkpointing runs them again in a backward pass.

        Args:
            modules: Names of modules; for each the number of tokens, from the first, that the logits do
                depend on, and whether it is attention.
        """
        self.modules = frozenset(modules)
        for name, (prefix, attends) in modules.items():
            if name not in self._hooked:
                module = self._model.get_submodule(name)
                rows = FewRows(prefix, attends, partial(self._is_off, name))
                self._handles.keep(module.register_forward_pre_hook(rows.before, with_kwargs=True))
                # Before others that look at its output.
                self._handles.keep(module.register_forward_hook(rows.after, prepend=True, with_kwargs=True))
                self._hooked.add(name)

    @property
    def hook_ids(self) -> set[int]:
        """Ids of its hooks."""
        return self._handles.ids

    def remove(self) -> None:
        """Remove all hooks."""
        self._handles.remove()


class FewRows(threading.local):
    """Runs a module with a graph for the first tokens, and without one for the others.

    Args:
        prefix: Number of the first tokens.
        attends: The module is attention: the first tokens need all others, but not what those become.
        is_off: Whether to leave the module alone.
    """

    def __init__(self, prefix: int, attends: bool, is_off: Callable[[], bool]) -> None:
        self.prefix, self.attends, self.is_off = prefix, attends, is_off
        self.whole: Tensor | None = None

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]] | None:
        """Hook before the forward: hand on the first tokens alone."""
        self.whole = None
        if (
            self.is_off()
            or muting.depth
            or kwargs is None  # another thread removes the hook at this moment
            or not torch.is_grad_enabled()
            or len(args) != 1
            or not isinstance(args[0], Tensor)
            or args[0].ndim != 3
            or (kwargs and any(True for _ in tensors_in(kwargs)))
        ):
            return None
        self.whole = args[0]
        return (args[0][:, : self.prefix],), kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> Any:
        """Hook after the forward: compute the other tokens without a graph, and join both."""
        if self.whole is None:
            return None
        whole, self.whole = self.whole, None
        if self.attends:
            # The first tokens by themselves were of no use but to keep the forward short: a mode can be
            # entered and left safely only here.
            with FirstQueries(self.prefix):
                return module.forward(whole, **kwargs)
        with torch.no_grad():
            rest = module.forward(whole[:, self.prefix :], **kwargs)
        return torch.cat([output, rest], dim=1)

    def __reduce__(self) -> tuple[type[FewRows], tuple[int, bool, Callable[[], bool]]]:
        """A copy of a guided model is not guided."""
        return FewRows, (self.prefix, self.attends, _always)


def _always() -> bool:
    return True
