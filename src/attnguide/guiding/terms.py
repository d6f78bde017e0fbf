"""Guidance terms: attribution, prior and the loss between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from attnguide import functional, visual
from attnguide.capture.calls import Call
from attnguide.errors import GuidanceError, InputError
from attnguide.functional import as_tensor, may_read
from attnguide.interfaces import AlignmentLoss, AttributionSource, TargetPrior, maps_of
from attnguide.layers import LayerSpec, check_layer, find_layers, out_of_reach
from attnguide.pairs import Evidence, Pairs, Targets, check_choice, resolve
from attnguide.parts.registry import registry
from attnguide.trace import Layer, Trace

__all__ = ["BoundTerm", "Records", "Term", "TermRecord", "Weighed", "generator_of", "mean"]

#: Number of pairs that `max_classes="auto"` draws where each class costs a pass through what follows the
#: layer.
_DRAWN = 4


@dataclass(eq=False)
class Term:
    """One guidance term: its source, prior and loss, where and for which pairs, and its weight.

    A setting of a term is a field of this class and nothing else: `Guide`, recipes and their documentation
    read the fields.

    Attributes:
        source: An attribution source, by name or as an object.
        prior: A target prior, by name or as an object; not used with a loss that reads none, such as `erase`.
        loss: An alignment loss, by name or as an object.
        weight: λ, at least 0; the term's mean over the annotated pairs is multiplied by it. May be changed
            while training.
        layer: The layers whose attribution is guided; see [`find_layers`][attnguide.layers.find_layers]. With
            several layers their losses are averaged.
        targets: Which (sample, class) pairs; see [`pairs.resolve`][attnguide.pairs.resolve].
        evidence: `"logit"`, or `"decision"`: negated for a binary attribute that is predicted negative,
            whatever its label is.
        combine: `"mean"`, `"max"` or `"product"`: combine the maps of several layers into one, and compare
            that with the prior. None compares each layer's map.
        max_classes: Largest number of pairs of each sample that are compared in a step, drawn at random; the
            expected loss stays the same. None for all of them. `"auto"`: all, where the layer is followed by
            pooling or a sample has at most 4; else 4, since each costs a pass through the layers that follow.
        seed: Seed of these draws, at least 0. They depend on it, the step and the process alone, and take
            nothing from PyTorch's own random numbers.
        warmup: Number of steps in which λ grows from nothing to `weight`, since the features of a fresh
            network mean nothing yet. 0: λ is `weight` from the first step.
        measure: Measure the layout of the layers' outputs, once for a model and a size of images; otherwise
            it is assumed from shapes and metadata.
    """

    source: str | AttributionSource = "grad_cam"
    prior: str | TargetPrior = "mask"
    loss: str | AlignmentLoss = "iou"
    weight: float = 1.0
    layer: LayerSpec = "auto"
    targets: Targets = "labels"
    evidence: Evidence = "logit"
    combine: str | None = None
    max_classes: int | Literal["auto"] | None = "auto"
    seed: int = 0
    warmup: int = 0
    measure: bool = True

    def weight_at(self, step: int) -> float:
        """λ in a step, counted from 0."""
        return self.weight * min(1.0, (step + 1) / self.warmup) if self.warmup else self.weight


@dataclass(frozen=True)
class TermRecord:
    """The maps, priors and losses of one term at one layer in the last call of `guide.loss`, detached.

    Attributes:
        layer: Name of the layer; several names with a + between them if their maps were combined.
        pairs: The N annotated pairs (those that were drawn).
        maps: Attribution maps `(N, h, w)`, raw.
        prior: Prior maps `(N, h, w)` in [0, 1].
        losses: Alignment losses `(N,)`, not multiplied by λ.
        images: The images of the batch, `(B, C, H, W)`, as the model saw them.

    In a notebook a record shows itself: the image of each pair, its map, and its prior.
    """

    layer: str
    pairs: Pairs
    maps: Tensor
    prior: Tensor
    losses: Tensor
    images: Tensor

    def picture(self, *, pairs: int = 8, cell: int = 192) -> Image.Image:
        """Draw the first pairs: image, map and prior, with the class and the loss.

        Args:
            pairs: Largest number of pairs.
            cell: Side of an image in pixels.

        Raises:
            InputError: If no pair is annotated.
        """
        count = min(pairs, len(self.pairs))
        if count < 1:
            raise InputError("this record has no annotated pair, so there is nothing to draw.")
        images = visual.displayable(self.images[self.pairs.sample[:count]])
        size = (images.shape[-2], images.shape[-1])
        signed = visual.has_signs(self.maps)
        maps = visual.overlay(
            images, visual.scaled(self.maps[:count, None], size=size, signed=signed), signed=signed
        )
        priors = visual.overlay(images, self.prior[:count, None], signed=False)
        pictures: list[Image.Image | None] = []
        captions: list[str] = []
        for row in range(count):
            drawn = (images[row], maps[row, 0], priors[row, 0])
            pictures += [visual.to_pil(picture) for picture in drawn]
            cls, loss = int(self.pairs.cls[row]), float(self.losses[row])
            captions += [f"image {int(self.pairs.sample[row])}", f"class {cls}", f"prior, loss {loss:.3g}"]
        columns = 1 if count < 3 else 2
        page = visual.contact_sheet(pictures, captions, columns=columns, cell=cell, group=3)
        left_out = len(self.pairs) - count
        text = f"maps at {self.layer}" + (f"; {left_out} more pairs" if left_out else "")
        return visual.with_legend(page, text, signed=signed)

    def show(self) -> None:
        """Show the picture: below the cell of a notebook, elsewhere in the system's viewer."""
        visual.show(self.picture())

    def __repr__(self) -> str:
        loss = f", mean loss {float(self.losses.mean()):.3g}" if len(self.pairs) else ""
        return f"TermRecord({self.layer}: {len(self.pairs)} pairs{loss})"

    def _repr_png_(self) -> bytes | None:
        return visual.to_png(self.picture()) if len(self.pairs) else None


class Records(list[TermRecord]):
    """The records of all terms, which show themselves in a notebook, one below the other."""

    def _repr_html_(self) -> str:
        shown = [
            f'<p>{escape(record.layer)}</p><img alt="maps and priors" style="max-width:100%" '
            f'src="{visual.data_uri(record.picture(), "jpeg")}">'
            if len(record.pairs)
            else f"<p>{escape(record.layer)}: no annotated pair</p>"
            for record in self
        ]
        return "".join(shown) or "<p>no records: call guide.loss first</p>"


class Weighed(NamedTuple):
    """The losses of one term at one layer, or at layers whose maps are combined.

    Attributes:
        losses: The weighted sum of the losses, a scalar with a graph; None if no pair is annotated.
        weights: The sum of the weights of the annotated pairs, a scalar.
    """

    losses: Tensor | None
    weights: Tensor


def mean(parts: Sequence[Weighed], weights: Tensor) -> Tensor | None:
    """Divide the losses of a term at each layer by a sum of weights, and average over the layers.

    Args:
        parts: L parts, of this batch.
        weights: `(L,)`, what each is divided by: the weights of this batch, or of a larger one that it is
            part of.

    Returns:
        A scalar; None if no pair of this batch is annotated.
    """
    counted = weights > 0
    # Pairs that only fill a place are there on accelerators; their sum of weights may be zero.
    shares = torch.where(counted, weights, 1.0).reciprocal() / counted.sum().clamp(min=1)
    pairs = zip(parts, shares, strict=True)
    scaled = [part.losses * share for part, share in pairs if part.losses is not None]
    return torch.stack(scaled).sum() if scaled else None


class _Everywhere(TargetPrior):
    """Stands where a loss reads no prior: each pair counts, and no annotation is read."""

    def __call__(self, trace: Trace, pairs: Pairs, size: tuple[int, int]) -> Tensor:
        return trace.logits.new_ones(len(pairs), *size, dtype=torch.float32).detach()


class BoundTerm:
    """A term with its parts created; its layers are found with the first images.

    Args:
        term: The term.
        model: The model, wrapped or not.

    Raises:
        UnknownNameError: If a part's name is unknown.
        LayerError: If the model has no such layer.
        GuidanceError: If the source cannot guide.
        InputError: If a setting has a wrong value.
    """

    def __init__(self, term: Term, model: nn.Module) -> None:
        self.term = term
        self.source: AttributionSource = registry().create("source", term.source, AttributionSource)
        self.loss: AlignmentLoss = registry().create("loss", term.loss, AlignmentLoss)
        if not self.loss.reads_prior and term.prior != Term.prior:
            raise InputError(f"loss {self.loss!r} reads no prior; leave prior={term.prior!r:.60} out.")
        self.prior: TargetPrior = (
            registry().create("prior", term.prior, TargetPrior) if self.loss.reads_prior else _Everywhere()
        )
        self.requested = check_layer(model, self.source.layers(term.layer))
        self.layers: list[Layer] = []
        if not self.source.differentiable:
            raise GuidanceError(
                f"source {self.source!r} is not differentiable: it can explain, but not guide. Choose "
                "another source."
            )
        if not (isinstance(term.weight, (int, float)) and math.isfinite(term.weight) and term.weight >= 0):
            raise InputError(f"weight={term.weight!r} must be a finite number of at least 0.")
        if term.combine not in (None, *functional.COMBINATIONS):
            raise InputError(
                f"combine={term.combine!r} is unknown: {', '.join(functional.COMBINATIONS)}, or None."
            )
        if term.max_classes not in (None, "auto") and not (
            type(term.max_classes) is int and term.max_classes >= 1
        ):
            raise InputError(
                f"max_classes={term.max_classes!r} must be 'auto', None, or a number of at least 1."
            )
        if type(term.seed) is not int or term.seed < 0:
            raise InputError(f"seed={term.seed!r} must be a number of at least 0.")
        if type(term.measure) is not bool:
            raise InputError(f"measure={term.measure!r} must be True or False.")
        if type(term.warmup) is not int or term.warmup < 0:
            raise InputError(f"warmup={term.warmup!r} must be a number of steps, at least 0.")
        check_choice(term.targets, term.evidence)

    def find(self, model: nn.Module, call: Call) -> None:
        """Find the layers for images of this size; the names stay those of the first images."""
        self.layers = find_layers(model, call.images, self.names, measure=self.term.measure, call=call)
        if self.source.needs_gradient:
            for layer in self.layers:
                if layer.spread == 0:
                    raise out_of_reach(layer)

    @property
    def names(self) -> list[str]:
        """Names of the layers; the requested ones before these are found."""
        return [layer.name for layer in self.layers] or list(self.requested)

    def __call__(
        self,
        trace: Trace,
        labels: Tensor,
        sample_weight: Tensor | None,
        annotations: Mapping[str, Any],
        moment: tuple[int, int] = (0, 0),
    ) -> tuple[list[TermRecord], list[Weighed]]:
        """Compare attribution and prior in the last forward pass.

        Args:
            trace: The pass, with this term's layers among others.
            labels: As for [`Guide.loss`][attnguide.Guide.loss], like the rest.
            sample_weight: Weight of each annotation.
            annotations: What the priors read.
            moment: Step and number of the process, for each of which the draws of `max_classes` differ.

        Returns:
            Records and losses, at each layer or at all of them combined.
        """
        pairs, weights = self._pairs(trace, labels, sample_weight)
        groups = [self.layers] if self.term.combine else [[layer] for layer in self.layers]
        compared = [self._compare(layers, trace, pairs, weights, annotations, moment) for layers in groups]
        return [record for record, _ in compared], [losses for _, losses in compared]

    def count(
        self,
        trace: Trace,
        labels: Tensor,
        sample_weight: Tensor | None,
        annotations: Mapping[str, Any],
    ) -> float:
        """Sum up the weights of the annotated pairs of a batch of which only images and labels are known.

        Args:
            trace: A pass of the model, with the images of the batch, and logits that mean nothing.
            labels: As for [`Guide.loss`][attnguide.Guide.loss], like the rest.
            sample_weight: Weight of each annotation.
            annotations: What the priors read.

        Raises:
            InputError: If the pairs depend on the prediction.
        """
        if self.term.targets == "predicted":
            raise InputError(
                "targets='predicted' gives pairs that are known after the forward pass alone: they cannot be "
                "counted before. Choose other targets, or accumulate no gradients."
            )
        pairs, weights = self._pairs(trace, labels, sample_weight)
        layer = trace.at(self.layers[0].name)
        _, annotated = self.prior_at(layer, pairs, self.source.size(layer), annotations)
        return float((annotated if weights is None else annotated * weights).sum())

    def _pairs(
        self, trace: Trace, labels: Tensor, sample_weight: Tensor | None
    ) -> tuple[Pairs, Tensor | None]:
        """Return the pairs that count, and the weight of each; None for all 1."""
        pairs = resolve(self.term.targets, trace.logits, labels, self.term.evidence)
        weights = None if pairs.present is None else pairs.present.float()
        if sample_weight is not None:
            trust = _pair_weights(sample_weight, trace, pairs)
            weights = trust if weights is None else trust * weights
        # A pair without weight is not compared, and its annotation need not be valid.
        kept = None if weights is None else _positive(weights)
        if kept is not None and weights is not None:
            pairs, weights = pairs.select(kept), weights[kept]
        return pairs, weights

    def prior_at(
        self, trace: Trace, pairs: Pairs, size: tuple[int, int], annotations: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Compute the prior's maps `(N, h, w)` and weights `(N,)`, and check them."""
        prior = self.prior
        wanted = {name: value for name, value in annotations.items() if name in prior.annotations}
        given = prior(trace, pairs, size, **wanted)
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
        if may_read(maps) and maps.numel():
            low, high = maps.aminmax()
            # Written so that NaN fails too; the margin is for resampling in float32.
            if not (bool(low >= -1e-4) and bool(high <= 1 + 1e-4)):
                raise GuidanceError(
                    f"prior {prior!r} gave values outside [0, 1], or NaN; mark a missing map by weight 0."
                )
        if may_read(weights) and not bool(((weights >= 0) & weights.isfinite()).all()):
            raise GuidanceError(f"prior {prior!r} gave a negative or infinite weight.")
        device = pairs.sample.device
        return maps.to(device), weights.to(device)

    def _compare(
        self,
        layers: Sequence[Layer],
        trace: Trace,
        pairs: Pairs,
        pair_weights: Tensor | None,
        annotations: Mapping[str, Any],
        moment: tuple[int, int],
    ) -> tuple[TermRecord, Weighed]:
        single = len(layers) == len(trace.features) == 1
        traces = [trace] if single else [trace.at(layer.name) for layer in layers]
        sizes = [self.source.size(part) for part in traces]
        size = (max(height for height, _ in sizes), max(width for _, width in sizes))
        prior, weights = self.prior_at(traces[0], pairs, size, annotations)
        if pair_weights is not None:
            weights = weights * pair_weights
        # Pairs without annotation leave before any gradient is computed.
        total = weights.sum()
        count = self.term.max_classes
        if count == "auto":
            cheap = not self.source.needs_gradient or all(layer.shortcuts.pooled for layer in layers)
            count = None if cheap else _DRAWN
        if count is None or pairs.slots <= count:
            count, stands_for, kept = None, None, _positive(weights)
        else:
            generator = generator_of(weights.device, self.term.seed, *moment)
            kept, stands_for = pairs.draw(count, weights > 0, len(trace.logits), generator)
        if kept is not None:
            pairs, prior, weights = pairs.select(kept, count), prior[kept], weights[kept]
        if stands_for is not None:
            weights = weights * stands_for
        name = " + ".join(layer.name for layer in layers)
        images = traces[0].images.detach()
        if not len(pairs):
            nothing = prior.detach()
            return TermRecord(name, pairs, nothing, nothing, weights, images), Weighed(None, total)
        maps = [maps_of(self.source, part, pairs) for part in traces]
        combined = maps[0] if self.term.combine is None else functional.combine(maps, self.term.combine)
        losses = self.loss.compare(combined, prior, traces[0], pairs)
        if losses.shape != weights.shape:
            raise GuidanceError(
                f"loss {self.loss!r} gave shape {tuple(losses.shape)}, expected one number for each of "
                f"{len(pairs)} pairs."
            )
        record = TermRecord(name, pairs, combined.detach(), prior.detach(), losses.detach(), images)
        return record, Weighed((weights * losses).sum(), total)

    def __repr__(self) -> str:
        where = ", ".join(self.names)
        return f"{self.source!r} ~ {self.prior!r} by {self.loss!r} × {self.term.weight:g} at {where}"


def generator_of(device: torch.device, *entropy: int) -> torch.Generator:
    """Make a generator from numbers that say when and where it is used, so that it has no state to keep."""
    mixed = np.random.SeedSequence(entropy).generate_state(1)[0]
    device = torch.device("cpu") if device.type == "meta" else device  # where nothing can be drawn
    return torch.Generator(device).manual_seed(int(mixed))


def _positive(weights: Tensor) -> Tensor | None:
    """Positions of the pairs that count; None for all, as on an accelerator, which nobody waits for."""
    if weights.device.type != "cpu":
        return None
    counted = weights > 0
    return None if bool(counted.all()) else counted.nonzero()[:, 0]


def _pair_weights(sample_weight: Tensor, trace: Trace, pairs: Pairs) -> Tensor:
    """Pick the weight of each pair, `(N,)`."""
    weight = as_tensor(sample_weight, "sample_weight").to(trace.logits.device, torch.float32)
    batch, classes = trace.logits.shape
    if weight.shape not in ((batch,), (batch, classes)):
        raise InputError(
            f"sample_weight has shape {tuple(weight.shape)}; it must be ({batch},) or ({batch}, {classes})."
        )
    if may_read(weight) and not bool(((weight >= 0) & weight.isfinite()).all()):
        raise InputError("sample_weight must be finite and at least 0; 0 drops a pair.")
    return pairs.pick(weight) if weight.ndim == 1 else weight[pairs.sample, pairs.cls]
