"""Sources that follow attention through all blocks of a transformer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from attnguide.functional import full_precision
from attnguide.interfaces import AttributionSource
from attnguide.pairs import Pairs
from attnguide.trace import Trace

__all__ = ["AttentionRollout", "TransformerRelevance"]


class AttentionRollout(AttributionSource):
    """Attention rollout: the attention of all blocks, multiplied, at the tokens that give the logits.

    Each block's attention, averaged over its heads, and the identity for the residual connection, half each
    (Abnar and Zuidema, ACL 2020, eq. 1). Needs no gradient, and is the same for every class of a sample.
    Where the logits are read from all patches, the mean of their maps.
    """

    needs_gradient = False
    reads_attention = True

    def __call__(self, trace: Trace, pairs: Pairs) -> Tensor:
        """Compute the maps `(N, h, w)`, at least 0."""
        blocks = [full_precision(attention).mean(dim=1) for attention in trace.attended]
        # Rows of attention sum to 1, and so do those of both halves: nothing is left to normalise.
        shares = _followed(trace, ((0.5, 0.5 * block) for block in reversed(blocks)))
        return pairs.pick(_on_grid(trace, shares))


class TransformerRelevance(AttributionSource):
    """Attention times its gradient, through all blocks: which patches speak for the class.

    The self-attention rules of Chefer et al. (ICCV 2021, eqs. 5 and 6): R ← R + E[(∇A ⊙ A)⁺]·R, the mean over
    the heads, from the first block to the last; the map is the row of the token from which the logits are
    read. Where they are read from all patches, the mean of their rows.
    """

    reads_attention = True

    def __call__(self, trace: Trace, pairs: Pairs) -> Tensor:
        """Compute the maps `(N, h, w)`, at least 0."""
        attention = [full_precision(block) for block in trace.attended]
        maps = []
        for slot in range(pairs.slots):
            gradients = trace.attention_gradients(pairs.select((pairs.slot == slot).nonzero()[:, 0]))
            steps = (
                (1.0, (full_precision(gradient) * block).relu().mean(dim=1))
                for gradient, block in zip(reversed(gradients), reversed(attention), strict=True)
            )
            maps.append(_on_grid(trace, _followed(trace, steps)))
        return torch.stack(maps)[pairs.slot, pairs.sample]


def _followed(trace: Trace, steps: Iterable[tuple[float, Tensor]]) -> Tensor:
    """Multiply the attention of all blocks, from the tokens that give the logits back to the first block.

    A row times the product of all blocks, from the last to the first: two blocks are never multiplied.

    Args:
        trace: The forward pass.
        steps: The share of a token that stays and the attention to the others, `(B, N, N)`, for each block
            from the last to the first.

    Returns:
        The share of each token, `(B, N)`.
    """
    tokens = trace.attention[-1][0].shape[-1]
    shares = full_precision(trace.logits).new_zeros(len(trace.logits), tokens)
    shares[:, list(trace.readers)] = 1 / len(trace.readers)
    for kept, attention in steps:
        shares = kept * shares + torch.bmm(shares[:, None], attention)[:, 0]
    return shares


def _on_grid(trace: Trace, tokens: Tensor) -> Tensor:
    """Arrange the patches among tokens `(B, N)` as maps `(B, h, w)`."""
    layout = trace.feature.layout
    return layout.spatial(tokens[:, :, None])[:, 0]
