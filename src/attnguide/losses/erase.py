"""Attention mining: an image without what the map covers must lose the class."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.func import functional_call

from attnguide import functional
from attnguide.capture.logits import find_logits
from attnguide.capture.model_state import muted
from attnguide.capture.parallel import refuse_sharded
from attnguide.errors import GuidanceError, InputError, nearest
from attnguide.interfaces import AlignmentLoss
from attnguide.pairs import Pairs
from attnguide.trace import Trace

__all__ = ["Erase", "Probability"]

#: How the probability of a class follows from the logits: over all classes, or of each class by itself.
Probability = Literal["softmax", "sigmoid"]


class Erase(AlignmentLoss):
    """What is left of the class if what the map covers is erased (GAIN, Li et al., CVPR 2018, eq. 5).

    The images are multiplied by 1 − sigmoid(ω·(A − σ)), A the map scaled to a maximum of 1, and pass through
    the model a second time; the loss is the probability of the pair's class. A map that covers all that
    speaks for the class has the least. There is no prior: each pair of the term counts, and
    `guide.loss(labels)` reads no annotation for it.

    The second pass is in the mode that the model is in; statistics of normalization and random numbers stay
    as they are. Erased pixels are 0, the mean color where images are normalised.

    Args:
        threshold: σ, the share of the maximum at which half of a pixel is erased.
        steepness: ω, how sharp the border is.
        probability: `"softmax"` if classes exclude each other, `"sigmoid"` for attributes.

    Raises:
        InputError: If a setting has a wrong value.
    """

    reads_prior = False

    def __init__(
        self, *, threshold: float = 0.5, steepness: float = 10.0, probability: Probability = "softmax"
    ) -> None:
        if not (isinstance(threshold, (int, float)) and 0 <= threshold <= 1):
            raise InputError(f"threshold={threshold!r} must be in [0, 1], a share of the map's maximum.")
        if not (isinstance(steepness, (int, float)) and 0 < steepness < math.inf):
            raise InputError(f"steepness={steepness!r} must be a positive number.")
        if probability not in get_args(Probability):
            raise InputError(
                f"probability={probability!r} is unknown.{nearest(str(probability), get_args(Probability))}"
            )
        self.threshold, self.steepness, self.probability = threshold, steepness, probability

    def __call__(self, attribution: Tensor, prior: Tensor) -> Tensor:
        """Refuse: maps alone do not say what is left.

        Raises:
            GuidanceError: Always.
        """
        raise GuidanceError("the loss 'erase' runs the model again: use it in a Guide, not on maps alone.")

    def compare(self, attribution: Tensor, prior: Tensor, trace: Trace, pairs: Pairs) -> Tensor:
        """Erase what each map covers, and return the probability of its class, `(N,)`.

        Raises:
            GuidanceError: If adapters are on the model, or its weights are in pieces.
            InputError: If it has one logit, and `probability` is `"softmax"`.
        """
        model = trace.model
        if model is None or trace.adapters:
            raise GuidanceError(
                "the loss 'erase' runs the model again, without adapters: guide a model that has none."
            )
        refuse_sharded(model, "use the loss 'erase'")
        if self.probability == "softmax" and trace.logits.shape[1] < 2:
            raise InputError("the model has one logit, whose softmax is 1: use Erase(probability='sigmoid').")
        erased = functional.erase(
            pairs.pick(trace.images.detach()), attribution, self.threshold, self.steepness
        )
        devices = [erased.device] if erased.device.type == "cuda" else []
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with muted(), torch.random.fork_rng(devices):
            output = functional_call(model, buffers, (erased.to(trace.images.dtype),))
        logits = functional.full_precision(find_logits(output, trace.output))
        if self.probability == "softmax":
            found = logits.softmax(dim=1).gather(1, pairs.cls[:, None])[:, 0]
            # For a class that is predicted absent the evidence is the negated logit, that of all others.
            return torch.where(pairs.sign > 0, found, 1 - found)
        return (logits.gather(1, pairs.cls[:, None])[:, 0] * pairs.sign).sigmoid()

    def __repr__(self) -> str:
        return f"Erase(threshold={self.threshold}, steepness={self.steepness}, {self.probability!r})"
