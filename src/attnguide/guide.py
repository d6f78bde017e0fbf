"""The guide: one added term in a training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from attnguide import check as checking
from attnguide.errors import GuidanceError, InputError, nearest
from attnguide.hooks import Recorder, Shard, replace_logits, unwrap
from attnguide.interfaces import Adapter, AlignmentLoss, AttributionSource, PriorMaps, TargetPrior
from attnguide.layers import check_name, find_layer
from attnguide.pairs import Evidence, Pairs, Targets, check_choice, resolve
from attnguide.recipe import load_recipe
from attnguide.registry import registry
from attnguide.trace import Trace
from attnguide.tracing import maps_of, trace_of

__all__ = ["Guide", "Term", "TermMaps"]


@dataclass(eq=False)
class Term:
    """One guidance term: what is compared with what, where, for which pairs, and how much it counts.

    Attributes:
        source: An attribution source, by name or as an object.
        prior: A target prior, by name or as an object.
        loss: An alignment loss, by name or as an object.
        weight: λ, at least 0; the term's mean over the annotated pairs is multiplied by it. May be changed
            while training.
        layer: Name of a module, or `"auto"`: the deepest with rows and columns.
        targets: Which (sample, class) pairs; see [`pairs.resolve`][attnguide.pairs.resolve].
        evidence: `"logit"`, or `"decision"`: negated for a binary attribute that is predicted negative.
    """

    source: str | AttributionSource = "grad_cam"
    prior: str | TargetPrior = "mask"
    loss: str | AlignmentLoss = "iou"
    weight: float = 1.0
    layer: str = "auto"
    targets: Targets = "labels"
    evidence: Evidence = "logit"


@dataclass(frozen=True)
class TermMaps:
    """What one term saw in the last call of `guide.loss`, detached, for logging.

    Attributes:
        layer: The layer that it looked at.
        pairs: The N annotated pairs.
        maps: Attribution maps `(N, h, w)`, raw.
        prior: Prior maps `(N, h, w)` in [0, 1].
        losses: Alignment losses `(N,)`, not multiplied by λ.
    """

    layer: str
    pairs: Pairs
    maps: Tensor
    prior: Tensor
    losses: Tensor


class _Bound:
    """A term whose parts are made and whose layer is found, or will be at the first forward."""

    def __init__(self, term: Term, model: nn.Module) -> None:
        self.term = term
        self.source: AttributionSource = registry().create("source", term.source, AttributionSource)
        self.prior: TargetPrior = registry().create("prior", term.prior, TargetPrior)
        self.loss: AlignmentLoss = registry().create("loss", term.loss, AlignmentLoss)
        self.layer = None if term.layer == "auto" else check_name(model, term.layer)
        if not self.source.differentiable:
            raise GuidanceError(
                f"source {self.source!r} is not differentiable: it can explain, but not guide. Choose "
                "another source."
            )
        if not (isinstance(term.weight, (int, float)) and math.isfinite(term.weight) and term.weight >= 0):
            raise InputError(f"weight={term.weight!r} must be a finite number of at least 0.")
        check_choice(term.targets, term.evidence)


class Guide:
    """Guides a classifier to look where it should, through hooks alone.

    ```python
    guide = ag.Guide(model, source="grad_cam", prior="mask", loss="iou", weight=0.5)
    for images, labels, masks in loader:
        loss = criterion(model(images), labels) + guide.loss(labels, mask=masks)
        ...
    guide.remove()
    ```

    Works in training and evaluation mode, under `torch.autocast`, with gradient accumulation, frozen
    backbones, any memory format and models wrapped in `DataParallel` or `DistributedDataParallel` (wrap
    first, then guide).

    Args:
        model: Any classifier: an `nn.Module` whose output is logits, or a tuple, dict or object with
            `.logits`.
        source: See [`Term`][attnguide.guide.Term], as for all that follow.
        prior: Where to look.
        loss: The distance.
        weight: λ.
        layer: Layer to look at; `"auto"` is found at the first forward, from the images that come.
        targets: Which (sample, class) pairs.
        evidence: `"logit"` or `"decision"`.
        terms: Several terms at once, instead of the arguments from `source` to `evidence`.
        adapters: Parts that train something of their own beside the model; see `guide.parameters()`.

    Raises:
        UnknownNameError: If a part's name is unknown.
        LayerError: If the model has no such layer.
        GuidanceError: If a source cannot guide.
        InputError: If an argument has a wrong value.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        source: str | AttributionSource = "grad_cam",
        prior: str | TargetPrior = "mask",
        loss: str | AlignmentLoss = "iou",
        weight: float = 1.0,
        layer: str = "auto",
        targets: Targets = "labels",
        evidence: Evidence = "logit",
        terms: Sequence[Term] | None = None,
        adapters: Sequence[Adapter] = (),
    ) -> None:
        single = Term(source, prior, loss, weight, layer, targets, evidence)
        if terms is not None and vars(single) != vars(Term()):
            raise InputError(
                "give either terms=[…] or source=, prior=, loss=, weight=, layer=, targets=, evidence=."
            )
        self.model = model
        self.terms: list[Term] = [single] if terms is None else _listed(terms)
        if not self.terms and not adapters:
            raise InputError("terms is empty; a guide needs at least one term or adapter.")
        self._bound = [_Bound(term, model) for term in self.terms]
        self.adapters = nn.ModuleList(adapters)
        self._adapter_layers = [None if a.layer == "auto" else check_name(model, a.layer) for a in adapters]
        self._records: list[TermMaps] = []
        self._removed = False
        self._recorder = Recorder(
            model,
            second_order=any(bound.source.needs_gradient for bound in self._bound),
            before=self._find_layers,
            after=self._adapt if adapters else None,
        )
        try:
            self._recorder.attach(self._known_layers())
        except BaseException:
            self._recorder.remove()
            raise

    @classmethod
    def from_recipe(cls, model: nn.Module, recipe: str | Path, **overrides: Any) -> Guide:
        """Build a guide from a named method with its published settings, or from a recipe file.

        Args:
            model: Any classifier.
            recipe: A registered name such as `"gradcam-iou"`, or the path of a TOML file.
            **overrides: Arguments of [`Guide`][attnguide.guide.Guide] that take the place of the recipe's.

        Returns:
            The guide.

        Raises:
            UnknownNameError: If the recipe or a part in it is unknown.
            InputError: If the file cannot be read or names unknown settings.
        """
        return cls(model, **{**load_recipe(recipe).guide, **overrides})

    # ------------------------------------------------------------ the loss

    def loss(self, labels: Tensor, *, weight: Tensor | None = None, **annotations: Any) -> Tensor:
        """Return the guidance loss of the last forward pass of the model.

        Args:
            labels: Class indices `(B,)`, or multi-hot `(B, K)` floats or bools.
            weight: How much each annotation counts, `(B,)` or `(B, K)`, at least 0; 0 drops a pair.
            **annotations: What the priors read, for example `mask=`, `boxes=`.

        Returns:
            A scalar: Σ λ · mean over the annotated pairs. Where no pair is annotated it is an exact zero that
            can be differentiated.

        Raises:
            GuidanceError: If there was no forward, it ran without gradients, or the guide was removed.
            LayerError: If a layer did not run, or its output has no rows and columns.
            InputError: If labels or annotations are wrong, missing or unknown.
        """
        self._check_names(annotations)
        trace = self._trace()
        if not trace.logits.requires_grad:
            raise GuidanceError(
                "the last forward recorded no graph: it ran under torch.no_grad() or inference_mode(), or "
                "every parameter is frozen. Run it with gradients enabled; skip guide.loss in validation."
            )
        # An empty sum is an exact zero with a graph, whatever the logits are.
        total = trace.logits.flatten()[:0].sum().float()
        records = []
        with torch.autocast(trace.logits.device.type, enabled=False), self._recorder.differentiating():
            for bound in self._bound:
                record, mean = self._term_loss(bound, trace, labels, weight, annotations)
                records.append(record)
                if mean is not None:
                    total = total + bound.term.weight * mean
            for adapter, layer in zip(self._adapter_modules(), self._adapter_layers, strict=True):
                own = adapter.loss(
                    trace.at(str(layer)), labels, **self._annotations_for(adapter, annotations)
                )
                total = total if own is None else total + own
        self._records = records
        self._recorder.follow(total)
        return total

    def _term_loss(
        self,
        bound: _Bound,
        trace: Trace,
        labels: Tensor,
        weight: Tensor | None,
        annotations: Mapping[str, Any],
    ) -> tuple[TermMaps, Tensor | None]:
        layer = str(bound.layer)
        trace = trace.at(layer)
        pairs = resolve(bound.term.targets, trace.logits, labels, bound.term.evidence)
        size = bound.source.size(trace)
        counts = None if weight is None else _pair_weights(weight, trace, pairs)
        if counts is not None:
            # What is dropped is not looked at: its annotation need not be valid.
            counted = (counts > 0).nonzero()[:, 0]
            pairs, counts = pairs.select(counted), counts[counted]
        wanted = {name: value for name, value in annotations.items() if name in bound.prior.annotations}
        given = bound.prior(trace, pairs, size, **wanted)
        prior, weights = _checked_prior(bound.prior, given, pairs, size)
        if counts is not None:
            weights = weights * counts
        # Pairs without annotation leave before any gradient is computed.
        kept = (weights > 0).nonzero()[:, 0]
        pairs, prior, weights = pairs.select(kept), prior[kept], weights[kept]
        if not len(pairs):
            nothing = prior.detach()
            return TermMaps(layer, pairs, nothing, nothing, weights), None
        maps = maps_of(bound.source, trace, pairs)
        losses = bound.loss(maps, prior)
        if losses.shape != weights.shape:
            raise GuidanceError(
                f"loss {bound.loss!r} gave shape {tuple(losses.shape)}, expected one number for each of "
                f"{len(pairs)} pairs."
            )
        record = TermMaps(layer, pairs, maps.detach(), prior.detach(), losses.detach())
        return record, (weights * losses).sum() / weights.sum()

    def maps(self) -> list[TermMaps]:
        """Return what each term saw in the last call of `loss`, detached; empty before the first call."""
        return list(self._records)

    def check(self, images: Tensor, labels: Tensor, **annotations: Any) -> checking.CheckReport:
        """Prove that the guidance term reaches the weights, and tell which.

        Runs one forward pass in evaluation mode and one backward pass; the model, its gradients and buffers
        stay as they are. Call it once before training, with a batch that has annotations.

        Args:
            images: `(B, C, H, W)`.
            labels: As for [`loss`][attnguide.guide.Guide.loss].
            **annotations: As for [`loss`][attnguide.guide.Guide.loss].

        Returns:
            A report; print it for a table.

        Raises:
            GuidanceError: If the gradient arrives nowhere.
        """
        records = self._records
        try:
            return checking.check(
                self.model, images, lambda: self.loss(labels, **annotations), lambda: self.layers
            )
        finally:
            self._records = records

    # ------------------------------------------------------ coming and going

    @property
    def layers(self) -> list[str]:
        """Names of the layers looked at; `"auto"` for those to be found at the first forward."""
        return [bound.layer or "auto" for bound in self._bound]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the adapters, for the optimiser; none without adapters."""
        return self.adapters.parameters()

    def remove(self) -> None:
        """Take every hook off; the model is as it was. May be called twice."""
        self._recorder.remove()
        self._records = []
        self._removed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        terms = ", ".join(
            f"{b.source!r} ~ {b.prior!r} by {b.loss!r} × {b.term.weight:g} at {b.layer or 'auto'}"
            for b in self._bound
        )
        return f"Guide({type(unwrap(self.model)).__name__}: {terms})"

    # -------------------------------------------------------------- helpers

    def _known_layers(self) -> list[str]:
        named = [*(bound.layer for bound in self._bound), *self._adapter_layers]
        return list(dict.fromkeys(layer for layer in named if layer is not None))

    def _find_layers(self, images: Tensor) -> None:
        """Find the automatic layers, once, when the first images come."""
        if all(bound.layer for bound in self._bound) and all(self._adapter_layers):
            return
        found = find_layer(self.model, images)
        before = self._known_layers()
        for bound in self._bound:
            bound.layer = bound.layer or found
        self._adapter_layers = [layer or found for layer in self._adapter_layers]
        self._recorder.attach([layer for layer in self._known_layers() if layer not in before])

    def _trace(self) -> Trace:
        if self._removed:
            raise GuidanceError("this guide was removed from its model; build a new one.")
        shards = self._recorder.shards
        if not shards:
            raise GuidanceError("guide.loss was called before a forward; call model(images) first.")
        return trace_of(unwrap(self.model), shards, self._known_layers(), differentiable=True)

    def _adapter_modules(self) -> list[Adapter]:
        return [adapter for adapter in self.adapters if isinstance(adapter, Adapter)]

    def _adapt(self, shard: Shard, output: Any) -> Any:
        """Let the adapters answer in place of the model."""
        for adapter, layer in zip(self._adapter_modules(), self._adapter_layers, strict=True):
            trace = trace_of(unwrap(self.model), [shard], [str(layer)], differentiable=True)
            logits = adapter(trace)
            if logits is not None:
                shard.logits = logits
                output = replace_logits(output, logits)
        return output

    @staticmethod
    def _annotations_for(adapter: Adapter, annotations: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in annotations.items() if name in adapter.annotations}

    def _check_names(self, annotations: Mapping[str, Any]) -> None:
        """Refuse annotations that nobody reads, and name those that are missing."""
        readers: list[TargetPrior | Adapter] = [
            *(bound.prior for bound in self._bound),
            *self._adapter_modules(),
        ]
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


def _listed(terms: Sequence[Term]) -> list[Term]:
    listed = list(terms) if isinstance(terms, Sequence) else [terms]
    for term in listed:
        if not isinstance(term, Term):
            raise InputError(f"terms must be a list of attnguide.Term, got {term!r} in it.")
    return listed


def _checked_prior(
    prior: TargetPrior, given: PriorMaps | Tensor, pairs: Pairs, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Check what a prior gave; a stranger's prior may give anything."""
    maps, weights = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(maps, Tensor) or not isinstance(weights, (Tensor, type(None))):
        raise GuidanceError(f"prior {prior!r} gave {given!r}, expected maps or PriorMaps(maps, weights).")
    if maps.shape != (len(pairs), *size):
        raise GuidanceError(
            f"prior {prior!r} gave maps of shape {tuple(maps.shape)}, expected {(len(pairs), *size)}."
        )
    if weights is None:
        weights = maps.new_ones(len(pairs), dtype=torch.float32)
    if weights.shape != (len(pairs),):
        raise GuidanceError(
            f"prior {prior!r} gave weights of shape {tuple(weights.shape)}, expected {(len(pairs),)}."
        )
    # Written so that NaN fails too; the margin is for resampling in float32.
    if not bool(((maps >= -1e-4) & (maps <= 1 + 1e-4)).all()):
        raise GuidanceError(
            f"prior {prior!r} gave values outside [0, 1], or NaN; mark a missing map by weight 0."
        )
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise GuidanceError(f"prior {prior!r} gave a negative or infinite weight.")
    device = pairs.sample.device
    return maps.to(device), weights.to(device)


def _pair_weights(weight: Tensor, trace: Trace, pairs: Pairs) -> Tensor:
    weight = torch.as_tensor(weight, dtype=torch.float32, device=trace.logits.device)
    batch, classes = trace.logits.shape
    if weight.shape not in ((batch,), (batch, classes)):
        raise InputError(
            f"weight has shape {tuple(weight.shape)}; it must be ({batch},) or ({batch}, {classes})."
        )
    if not bool(((weight >= 0) & weight.isfinite()).all()):
        raise InputError("weight must be finite and at least 0; 0 drops a pair.")
    return weight[pairs.sample] if weight.ndim == 1 else weight[pairs.sample, pairs.cls]
