"""Sources that use the gradient of the score with respect to the images, or a layer."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from attnguide import functional
from attnguide.capture.calls import INPUT
from attnguide.errors import InputError, nearest
from attnguide.interfaces import AttributionSource
from attnguide.pairs import Pairs
from attnguide.trace import Trace

__all__ = ["Gradient", "GradientTimesInput", "Score"]

#: The score to differentiate: the logit of the pair's class, its log-probability, which is the cross entropy
#: negated, or the log-probabilities of all classes, summed.
Score = Literal["logit", "cross_entropy", "log_probabilities"]


class _Gradients(AttributionSource):
    """A map made of gradients with respect to the images; at a layer, if one is named.

    Args:
        score: The score to differentiate. `"logit"`: that of the pair. `"cross_entropy"`: the cross entropy
            of the pair's class, negated: ln p. `"log_probabilities"`: Σ ln p over all classes of a softmax,
            the same for every class of a sample (Ross et al., IJCAI 2017, eq. 3):
            the evidence against other classes is penalised too.

    Raises:
        InputError: If the score is unknown.
    """

    layer = INPUT
    only_gradients = True

    def __init__(self, *, score: Score = "logit") -> None:
        if score not in get_args(Score):
            raise InputError(f"score={score!r} is unknown.{nearest(score, get_args(Score))}")
        self.score = score

    def gradients(self, trace: Trace, pairs: Pairs) -> Tensor:
        """Return the gradient of each pair's score, `(N, C, h, w)`."""
        if self.score == "logit":
            return trace.gradients(pairs)
        if self.score == "cross_entropy":
            return trace.log_gradients(pairs)
        return pairs.pick(trace.gradients_of_all())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(score={self.score!r})"


class Gradient(_Gradients):
    """How strongly the score reacts to each position: the norm of its gradient over the channels.

    See [`functional.gradient_norm`][attnguide.functional.gradient_norm].

    Args:
        score: `"logit"`; `"cross_entropy"`, as in GALS; or `"log_probabilities"` as in "Right for the right
            reasons".
    """

    def __call__(self, trace: Trace, pairs: Pairs) -> Tensor:
        """Compute the maps `(N, h, w)`, at least 0."""
        return functional.gradient_norm(self.gradients(trace, pairs))


class GradientTimesInput(_Gradients):
    """Gradient times image, summed over the channels: what each position adds to the score; signed.

    See [`functional.hires_cam`][attnguide.functional.hires_cam], which is the same for any layer.

    Args:
        score: `"logit"`, `"cross_entropy"` or `"log_probabilities"`.
    """

    def __call__(self, trace: Trace, pairs: Pairs) -> Tensor:
        """Compute the maps `(N, h, w)`, signed."""
        gradients = self.gradients(trace, pairs)
        return functional.hires_cam(pairs.pick(trace.feature.spatial), gradients, relu=False)
