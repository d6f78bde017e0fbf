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
    """Attention of all blocks, multiplied: which patches the answer is gathered from.

    Each block's attention, averaged over its heads, and the identity for the residual connection, half each
    (Abnar and Zuidema, ACL 2020, eq. 1). Needs no gradient, and is the same for every class of a sample.
    Where the answer is read from all patches, the mean of their maps.
    """

    needs_gradient = False
    reads_attention = True

    def __call__(self, trace: Trace, pairs: Pairs) -> Tensor:
        """Compute the maps `(N, h, w)`, at least 0."""
        blocks = [full_precision(seen).mean(dim=1) for seen in trace.attended]
        # Rows of attention sum to 1, and so do those of both halves: nothing is left to normalise.
        seen = _followed(trace, ((0.5, 0.5 * block) for block in reversed(blocks)))
        return pairs.pick(_on_grid(trace, seen))


class TransformerRelevance(AttributionSource):
    """Attention times its gradient, through all blocks: which patches speak for the class.

    The self-attention rules of Chefer et al. (ICCV 2021, eqs. 5 and 6): R ← R + E[(∇A ⊙ A)⁺]·R, the mean over
    the heads, from the first block to the last; the map is the row of the token that the answer is read from.
    Where the answer is read from all patches, the mean of their rows.
    """

    reads_attention = True

    def __call__(self, trace: Trace, pairs: Pairs) -> Tensor:
        """Compute the maps `(N, h, w)`, at least 0."""
        attention = [full_precision(seen) for seen in trace.attended]
        maps = []
        for slot in range(pairs.slots):
            gradients = trace.attention_gradients(pairs.select((pairs.slot == slot).nonzero()[:, 0]))
            steps = (
                (1.0, (full_precision(gradient) * seen).relu().mean(dim=1))
                for gradient, seen in zip(reversed(gradients), reversed(attention), strict=True)
            )
            maps.append(_on_grid(trace, _followed(trace, steps)))
        return torch.stack(maps)[pairs.slot, pairs.sample]


def _followed(trace: Trace, steps: Iterable[tuple[float, Tensor]]) -> Tensor:
    """Follow the tokens that the answer is read from back to the first block.

    A row times the product of all blocks, from the last to the first: no product of two blocks is ever made.

    Args:
        trace: The forward pass.
        steps: Share of a token that stays in each block, the last block first, and what it takes from the
            others, `(B, N, N)`.

    Returns:
        How much of each token arrives, `(B, N)`.
    """
    tokens = trace.attention[-1][0].shape[-1]
    seen = full_precision(trace.logits).new_zeros(len(trace.logits), tokens)
    seen[:, list(trace.readers)] = 1 / len(trace.readers)
    for kept, taken in steps:
        seen = kept * seen + torch.bmm(seen[:, None], taken)[:, 0]
    return seen


def _on_grid(trace: Trace, tokens: Tensor) -> Tensor:
    """Put the patches of `(B, N)` where they are, `(B, h, w)`."""
    layout = trace.feature.layout
    return layout.spatial(tokens[:, :, None])[:, 0]
