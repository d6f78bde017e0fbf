"""Reads the attention probabilities of transformers, whichever implementation they use.

Fused attention never holds its probabilities. A module that is to be read runs once more, step by step: its
output is that of the second run, so that the output comes from the probabilities that were read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnguide.capture.own_hooks import Handles
from attnguide.errors import LayerError

__all__ = ["AttentionReader", "Note", "Reading", "read"]

#: Sees the probabilities `(B, heads, N, N)` of one attention, and returns what is to be used in their place.
Note = Callable[[Tensor], Tensor]


class Reading(TorchFunctionMode):
    """Runs attention step by step, and shows its probabilities.

    Args:
        note: Called with the probabilities of each attention.
    """

    def __init__(self, note: Note) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the functions of attention; call every other function unchanged."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attend(self.note, *args, **kwargs)[0]
        if func is F.multi_head_attention_forward:
            return _multi_head(self.note, *args, **kwargs)
        result = func(*args, **kwargs)
        # What models write out themselves.
        if func in (Tensor.softmax, torch.softmax, F.softmax) and _is_square(result):
            return self.note(result)
        return result


def _is_square(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.ndim == 4 and tensor.shape[-1] == tensor.shape[-2] > 1


def _attend(
    note: Note,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Do what `torch.nn.functional.scaled_dot_product_attention` does; with the probabilities."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (each.repeat_interleave(repeats, dim=-3) for each in (key, value))
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)  # scaled before, or half precision overflows
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = (
            scores.masked_fill(~attn_mask, -torch.inf)
            if attn_mask.dtype == torch.bool
            else scores + attn_mask
        )
    probabilities = scores.softmax(dim=-1)
    if _is_square(probabilities):
        probabilities = note(probabilities)
    return F.dropout(probabilities, dropout_p) @ value, probabilities


def _multi_head(
    note: Note,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _width: int,
    heads: int,
    weight: Tensor | None,
    bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero: bool,
    dropout: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    **_separate: Any,
) -> tuple[Tensor, Tensor | None]:
    """Do what `torch.nn.functional.multi_head_attention_forward` does for the attention of image models."""
    masks = (bias_k, bias_v, key_padding_mask, attn_mask)
    if weight is None or add_zero or is_causal or any(mask is not None for mask in masks):
        raise LayerError(
            "this torch.nn.MultiheadAttention has masks, extra tokens or separate projections, which "
            "attention sources cannot read. Choose a source of another kind, such as grad_cam."
        )
    biases = (None, None, None) if bias is None else bias.chunk(3)
    split = [
        # (N, B, D) to (B, heads, N, D / heads)
        F.linear(each, part, shift).view(*each.shape[:2], heads, -1).permute(1, 2, 0, 3)
        for each, part, shift in zip((query, key, value), weight.chunk(3), biases, strict=True)
    ]
    found, weights = _attend(note, split[0], split[1], split[2], dropout_p=dropout if training else 0.0)
    answer = F.linear(found.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias)
    if not need_weights:
        return answer, None
    return answer, weights.mean(dim=1) if average_attn_weights else weights


def read(
    note: Callable[[], Note | None],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Any,
    output: Any = None,
) -> Any:
    """Run an attention module again, after its forward, and read its attention probabilities.

    Of several such hooks on a module the first runs it, for all of them.

    Args:
        note: Gives what looks, or None if nobody does now.
        module: The module.
        args: What it was given.
        kwargs: The same.
        output: What it gave.

    Returns:
        What it gives when it is read.
    """
    notes = [
        hook.args[0]
        for hook in module._forward_hooks.values()
        if isinstance(hook, partial) and hook.func is read
    ]
    looks = [look for each in notes if (look := each()) is not None]
    if not looks or notes[0] is not note:
        return None

    def look_all(probabilities: Tensor) -> Tensor:
        for look in looks:
            probabilities = look(probabilities)
        return probabilities

    with Reading(look_all):
        return module.forward(*args, **kwargs)


class AttentionReader:
    """Rider of a recorder: records the probabilities of attention modules.

    Args:
        model: The model, without a wrapper.
        note_of: Returns what records the probabilities of a module, by its name; None while nothing does.
    """

    def __init__(self, model: nn.Module, note_of: Callable[[str], Note | None]) -> None:
        self._model, self._note_of = model, note_of
        self._handles = Handles()
        self._hooked: set[str] = set()

    def attach(self, modules: Sequence[str]) -> None:
        """Record the attention of the named modules too."""
        for name in modules:
            if name not in self._hooked:
                hook = partial(read, partial(self._note_of, name))
                module = self._model.get_submodule(name)
                # Before others that look at its output, which is another tensor then.
                self._handles.keep(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
                self._hooked.add(name)

    @property
    def hook_ids(self) -> set[int]:
        """Ids of its hooks."""
        return self._handles.ids

    def remove(self) -> None:
        """Remove all hooks."""
        self._handles.remove()
