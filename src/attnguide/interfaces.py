"""The interfaces that everything else is made of.

An *attribution source* says where the model looks, a *target prior* where it should look, and an *alignment
loss* how far apart the two are. An *adapter* is for methods that train something of their own beside the
model. To add a part, subclass one of these and declare it in a plugin (see [`Part`][attnguide.Part]).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attnguide.errors import GuidanceError, InputError, nearest
from attnguide.pairs import Pairs
from attnguide.trace import Layer, Trace

__all__ = [
    "Adapter",
    "AlignmentLoss",
    "AttributionSource",
    "PriorMaps",
    "RegionSource",
    "TargetPrior",
    "check_annotations",
    "maps_of",
]


class AttributionSource(ABC):
    """Where the model looks.

    Attributes:
        needs_gradient: Whether the source asks the trace for gradients. If not, explaining needs no graph at
            all.
        reads_attention: Whether it reads what the attention of a transformer attends to; the layer then
            determines only where the patches are.
        only_gradients: Whether the maps are made of gradients alone: then nothing is left of the guidance if
            gradients are taken for constants.
        layer: What the layer `"auto"` means to this source.
        differentiable: Whether the maps stay attached to the graph, so that they can guide.
    """

    needs_gradient: ClassVar[bool] = True
    differentiable: bool = True
    reads_attention: ClassVar[bool] = False
    only_gradients: bool = False
    layer: str = "auto"

    @abstractmethod
    def __call__(self, trace: Trace, pairs: Pairs) -> Tensor:
        """Compute one map for each pair.

        Args:
            trace: The forward pass, with the layer that was asked for.
            pairs: N (sample, class) pairs, at least one.

        Returns:
            Maps `(N, h, w)` of the size that [`size`][attnguide.interfaces.AttributionSource.size] specifies,
            raw values, never detached.
        """

    def layers(self, asked: str | Layer | Sequence[str | Layer]) -> tuple[str | Layer, ...]:
        """What a user asked for, where `"auto"` is this source's own choice."""
        names = asked if isinstance(asked, (list, tuple)) else (asked,)
        return tuple(self.layer if name == "auto" else name for name in names)

    def size(self, trace: Trace) -> tuple[int, int]:
        """Size `(h, w)` of the maps; by default that of the layer."""
        return trace.feature.layout.grid

    def passes(self, trace: Trace) -> int:
        """Return how many times the source runs the model for each pair; 0 if it uses the trace alone.

        Of a source that runs it often, the time is estimated and reported before it begins.
        """
        return 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def maps_of(source: AttributionSource, trace: Trace, pairs: Pairs) -> Tensor:
    """Compute a source's maps `(N, h, w)`; a stranger's source may give anything.

    Raises:
        GuidanceError: If the maps are not of the size that the source specifies.
    """
    maps = source(trace, pairs)
    expected = (len(pairs.sample), *source.size(trace))
    if maps.shape != expected:
        raise GuidanceError(
            f"source {source!r} gave maps of shape {tuple(maps.shape)}, expected {expected}: one (h, w) map "
            "for each pair, of the size that its size() specifies."
        )
    return maps


class PriorMaps(NamedTuple):
    """What a prior gives.

    Attributes:
        maps: Where to look, `(N, h, w)` in [0, 1].
        weights: `(N,)`, at least 0; 0 means "no annotation here", and the pair drops out.
    """

    maps: Tensor
    weights: Tensor


class TargetPrior(ABC):
    """Where the model should look.

    The keyword-only parameters of `__call__` name the annotations that the prior reads from
    `guide.loss(labels, **annotations)`; one without a default is required.
    """

    @abstractmethod
    def __call__(
        self, trace: Trace, pairs: Pairs, size: tuple[int, int], *args: Any, **annotations: Any
    ) -> PriorMaps | Tensor:
        """Compute one map for each pair.

        A subclass writes the annotations that it reads as keyword-only parameters:
        `def __call__(self, trace, pairs, size, *, mask)`.

        Args:
            trace: The forward pass; its images and their size are what most priors need.
            pairs: N (sample, class) pairs.
            size: Size `(h, w)` of the maps.
            *args: Nothing is passed here; it lets type checkers accept a subclass that names its annotations.
            **annotations: What the subclass names as keyword-only parameters.

        Returns:
            Maps `(N, h, w)` in [0, 1] with a weight for each pair, or the maps alone, all of weight 1.
        """

    @cached_property
    def annotations(self) -> dict[str, bool]:
        """Names of the annotations read, and whether each is required."""
        return _keyword_only(self.__call__)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class AlignmentLoss(ABC):
    """How far attribution and prior are apart.

    Attributes:
        reads_prior: Whether attributions are compared with a prior. If not, the term has none: each pair
            counts.
    """

    reads_prior: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, attribution: Tensor, prior: Tensor) -> Tensor:
        """Compare each map with its prior.

        Args:
            attribution: Maps `(N, h, w)`, raw.
            prior: Maps `(N, h, w)` in [0, 1].

        Returns:
            Losses `(N,)`, finite, independent of the attribution's scale and of the number of pairs.
        """

    def compare(self, attribution: Tensor, prior: Tensor, trace: Trace, pairs: Pairs) -> Tensor:
        """Compare the maps of a pass with their priors; what a guide calls.

        By default only the maps count. A loss that needs more of the pass, such as its images or the model,
        overrides this.

        Args:
            attribution: Maps `(N, h, w)`, raw, with a graph.
            prior: Maps `(N, h, w)` in [0, 1].
            trace: The forward pass.
            pairs: The N pairs.

        Returns:
            As for a call.
        """
        return self(attribution, prior)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Adapter(nn.Module):
    """A method that trains something of its own beside the model.

    Its parameters belong to the guide (`guide.parameters()`), never to the model. It may answer in place of
    the model (`forward`), add a loss (`loss`), and change what happens inside the model (`attach`).

    Attributes:
        layer: The layer whose feature `forward` and `loss` read: a name, or `"auto"`. With None they are not
            called.
        name: The name that the class is registered by, and `settings` what its constructor is given: with
            both, [`AdapterSet`][attnguide.adapters.AdapterSet] can save it and make it again.
        settings: See `name`; plain values that JSON knows.
    """

    layer: str | None = "auto"
    name: ClassVar[str] = ""
    settings: dict[str, Any]

    def attach(self, model: nn.Module) -> Iterable[RemovableHandle]:
        """Put hooks on the model, which the guide takes off again.

        They do nothing while the library mutes hooks: then it looks at the model itself.

        Args:
            model: The model, without a wrapper for parallel training.

        Returns:
            The handles of the hooks.
        """
        return ()

    def forward(self, trace: Trace) -> Tensor | None:
        """Compute new logits; the guide calls it at the end of every forward pass.

        Args:
            trace: The forward pass with the feature of the adapter's layer.

        Returns:
            Logits `(B, K)` that the model returns in place of its own, or None to leave them.
        """
        return None

    def loss(self, trace: Trace, labels: Tensor, **annotations: Any) -> Tensor | None:
        """Return a loss of the adapter's own, a scalar, or None; `guide.loss` adds it.

        As with a prior, keyword-only parameters name the annotations that it reads.
        """
        return None

    @cached_property
    def annotations(self) -> dict[str, bool]:
        """Names of the annotations that the loss reads, and whether each is required."""
        return _keyword_only(self.loss)


class RegionSource(ABC):
    """Finds named regions of images, such as the parts of a face.

    Attributes:
        names: Names of the R regions.
    """

    names: tuple[str, ...]

    @abstractmethod
    def __call__(self, images: Tensor, files: Sequence[Sequence[Path]]) -> Tensor:
        """Find the regions.

        Args:
            images: Images `(B, 3, H, W)` in [0, 1].
            files: Files that each image comes from: one, or several aligned files if the image is
                their mean.

        Returns:
            Masks `(B, R, h, w)` in [0, 1], of any resolution; all zero for a region that is not in an image.

        Raises:
            DataError: If nothing is known about an image.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def check_annotations(readers: Sequence[TargetPrior | Adapter], annotations: Mapping[str, Any]) -> None:
    """Refuse annotations that no prior or adapter reads, and name those that are missing.

    Raises:
        InputError: If an annotation is unknown or missing.
    """
    known = sorted({name for reader in readers for name in reader.annotations})
    for name in annotations:
        if name not in known:
            raise InputError(f"no prior of this guide reads {name}=.{nearest(name, known)}")
    for reader in readers:
        for name, required in reader.annotations.items():
            if required and name not in annotations:
                raise InputError(
                    f"{reader!r} needs {name}=: pass guide.loss(labels, {name}=…), None for a batch "
                    "without any."
                )


def _keyword_only(function: Callable[..., Any]) -> dict[str, bool]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}
