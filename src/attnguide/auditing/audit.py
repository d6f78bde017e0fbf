"""Checks whether guidance changed what a model looks at, or only the map that was optimized."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor, nn

from attnguide import _tables, functional
from attnguide.auditing.swapping import Swaps, swap
from attnguide.capture.logits import LogitsSpec, find_logits, only_logits
from attnguide.capture.model_state import evaluating, unwrap
from attnguide.capture.recorder import aside
from attnguide.errors import InputError
from attnguide.explanation import explain
from attnguide.functional import as_tensor
from attnguide.interfaces import AttributionSource
from attnguide.layers import LayerSpec
from attnguide.masks.sizes import check_proportions
from attnguide.metrics.faithfulness import occlusion
from attnguide.metrics.localization import energy_in_mask
from attnguide.pairs import Evidence, Pairs, Targets, positives, resolve

__all__ = ["AuditReport", "AuditWarning", "MasksOf", "audit"]

#: A gain of the optimized map from which on witnesses count; a quarter of what was left to gain is enough.
_GAIN = 0.05
#: The share of that gain, or of what they had left to gain, that witnesses should have gained.
_FOLLOWING = 0.25
#: With a report of the model before guidance, this share of its reliance passes too.
_REMAINING = 0.25
#: Name of the measurement by which a model is judged.
_OUTSIDE = "predictions that depend on what is outside, less chance"
#: Number of predictions from which on a class is judged by itself.
_ENOUGH = 5


class AuditWarning(UserWarning):
    """Warns of a guided model that looks right only by the optimized map."""


@dataclass(frozen=True)
class Reliance:
    """How many predictions depend on what is outside the masks.

    Attributes:
        share: Share of the predictions that change when what is outside is swapped with an image of another
            prediction, less those that change with an image of the same prediction, which is the effect of
            noise and of the cut itself. Near 0 in a model that does not look there.
        error: Standard error of the share over the predictions.
        chance: What was subtracted.
        pairs: Number of predictions for which there was an image with another one.
    """

    share: float
    error: float
    chance: float
    pairs: int

    def exceeds(self, limit: float) -> bool:
        """Whether it is above a limit by more than chance: by two standard errors."""
        return self.share - 2 * self.error > limit


@dataclass(frozen=True)
class AuditReport:
    """What a model looks at, by the attribution that was optimized and by witnesses that were not.

    Attributes:
        source: The attribution that was, or will be, optimized.
        optimized: Its energy in the mask, the mean over the pairs, in [0, 1].
        blank: Share of the pairs whose optimized map shows nothing at all, and has an energy of 0.
        witnesses: The energy of attributions that were not optimized: `"input_gradient"`, `"occlusion"`.
        inside: Share of the predictions that change when what is inside the mask is swapped with an image of
            another prediction: high in a model that looks there.
        outside: How many predictions depend on what is outside the masks.
        by_class: The same for the predictions about each class; for a model that gives each image one class,
            for the images with that prediction.
        uniform: Energy in the mask of a map that is the same everywhere: the mask's area.
        pairs: Number of (sample, class) pairs.
        tolerance: Highest reliance that passes.
        before: The report of the same model without guidance, if it was given.
    """

    source: str
    optimized: float
    blank: float
    witnesses: dict[str, float]
    inside: float
    outside: Reliance
    by_class: dict[int, Reliance]
    uniform: float
    pairs: int
    tolerance: float
    before: AuditReport | None = None

    @property
    def reliance(self) -> float:
        """Share of the predictions that depend on what is outside the masks, less chance."""
        return self.outside.share

    @property
    def n_swaps(self) -> int:
        """Number of predictions for which there was an image to swap with."""
        return self.outside.pairs

    @property
    def looks_right(self) -> bool:
        """Whether the optimized map is better than before; without `before`, than one that is uniform.

        A map that shows nothing shows nothing outside the mask either.
        """
        shown = self.optimized + self.blank
        if self.before is None:
            return _gained(shown, self.uniform)
        was = self.before
        return _gained(self.optimized, was.optimized) or _gained(shown, was.optimized + was.blank)

    @property
    def limit(self) -> float:
        """The reliance that passes: the tolerance, or a quarter of what it was before."""
        return (
            self.tolerance if self.before is None else max(self.tolerance, self.before.reliance * _REMAINING)
        )

    @property
    def reasons(self) -> list[str]:
        """Why the other measurements contradict the optimized map; empty if they do not."""
        reasons, limit = [], self.limit
        above = {
            cls: reliance
            for cls, reliance in self.by_class.items()
            if reliance.pairs >= _ENOUGH and reliance.exceeds(limit)
        }
        depend = f"depend on what is outside the mask (limit {limit:.0%})"
        if self.outside.exceeds(limit):
            reasons.append(f"{self.reliance:.0%} of the predictions {depend}")
        elif above:
            worst = max(above, key=lambda cls: above[cls].share)
            more = f", and so do those about {len(above) - 1} more" if len(above) > 1 else ""
            reasons.append(f"{above[worst].share:.0%} of the predictions about class {worst} {depend}{more}")
        if self.before is not None and self.reliance > limit:
            gain, was = self.optimized - self.before.optimized, self.before.witnesses
            gains = {name: value - was[name] for name, value in self.witnesses.items()}
            if all(rise < _FOLLOWING * min(gain, 1 - was[name]) for name, rise in gains.items()):
                gained = ", ".join(f"{name} {rise:+.2f}" for name, rise in gains.items())
                reasons.append(f"the optimized map gained {gain:+.2f}, the witnesses gained {gained}")
        return reasons

    @property
    def gamed(self) -> bool:
        """Whether the optimized map looks right and the other measurements contradict it."""
        return self.looks_right and bool(self.reasons)

    def __str__(self) -> str:
        rows = self._rows()
        width = max(len(name) for name, _, _ in rows)
        lines = [self._title()]
        for name, value, earlier in rows:
            lines.append(
                f"  {name:{width}}  {value:6.1%}" + ("" if earlier is None else f"  was {earlier:6.1%}")
            )
        if self.reasons:
            lines.append(f"  {self._verdict()}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        header = ("measurement", "value") if self.before is None else ("measurement", "value", "before")
        rows = []
        for name, value, earlier in self._rows():
            poor = name == _OUTSIDE and bool(self.reasons)
            shown = _tables.bar(value, f"{value:.1%}", _tables.POOR if poor else _tables.GOOD)
            before = () if self.before is None else ("" if earlier is None else f"{earlier:.1%}",)
            rows.append((escape(name), shown, *before))
        verdict = escape(self._verdict()) if self.reasons else ""
        note = f'<span style="color:{_tables.POOR}">{verdict}</span>' if verdict else ""
        return _tables.table(self._title(), header, rows, note)

    def _title(self) -> str:
        return f"{self.pairs} pairs, {self.n_swaps} swaps"

    def _rows(self) -> list[tuple[str, float, float | None]]:
        """Name, value, and earlier value of each measurement."""
        was = self.before
        return [
            (
                f"energy of {self.source} in the mask (optimized)",
                self.optimized,
                None if was is None else was.optimized,
            ),
            *(
                (f"energy of {name} in the mask", value, None if was is None else was.witnesses[name])
                for name, value in self.witnesses.items()
            ),
            ("energy of a uniform map", self.uniform, None),
            (_OUTSIDE, self.reliance, None if was is None else was.reliance),
            ("predictions that depend on what is inside", self.inside, None if was is None else was.inside),
        ]

    def _verdict(self) -> str:
        verdict = "The map looks right, but" if self.gamed else "The map does not look right, and"
        return f"{verdict} {'; and '.join(self.reasons)}."


def _gained(now: float, base: float) -> bool:
    return now - base > min(_GAIN, (1 - base) / 4)


#: Returns masks and weights for pairs at a size, as a prior does; pairs of weight 0 are left out.
MasksOf = Callable[[Pairs, tuple[int, int]], tuple[Tensor, Tensor]]


def audit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: Tensor | MasksOf,
    *,
    source: str | AttributionSource = "grad_cam",
    layer: LayerSpec = "auto",
    targets: Targets = "labels",
    evidence: Evidence = "logit",
    before: AuditReport | None = None,
    tolerance: float = 0.1,
    window: int | None = None,
    batch_size: int = 128,
    logits: LogitsSpec = None,
) -> AuditReport:
    """Compare the optimized attribution with others, and swap the forbidden regions between images.

    An optimized map can be gamed: the network finds a way to use a shortcut that the map does not show. So
    the audit also measures the gradient of the images and occlusion, which no guidance at a layer optimizes;
    and it swaps what is outside the masks between images with different predictions. The predictions of an
    honest model do not depend on it: they change no more often than with an image of the same prediction.
    The model runs in evaluation mode and comes back as it was.

    Args:
        model: Any classifier.
        images: `(B, C, H, W)`, none of which was trained on; some dozens or hundreds.
        labels: Class indices `(B,)`, or multi-hot `(B, K)`.
        masks: Where to look, `(H, W)`, `(B, H, W)`, or `(B, K, H, W)` for each class, in [0, 1]; of any size,
            but of the images' proportions.
            Or a function that returns masks and weights for pairs.
        source: The attribution that was optimized.
        layer: Layer at which it was optimized.
        targets: Which (sample, class) pairs.
        evidence: As in [`Term`][attnguide.Term].
        before: The report of the model before guidance, or of its unguided twin, on the same images.
        tolerance: Share of the predictions, less chance, that may depend on what is outside the mask; with
            `before`, a quarter of what it was passes too.
        window: Side of the window of occlusion, in pixels; an eighth of the image's height if left out.
        batch_size: Number of images in one forward pass.
        logits: Which part of the model's output is the logits, as in [`explain`][attnguide.explain].

    Returns:
        The report; print it.

    Raises:
        InputError: If labels or masks do not fit, nothing is annotated, or no two images are of different
            classes.

    Warns:
        AuditWarning: If the optimized map is better than before (without `before`: than a uniform one) and
            the other measurements contradict it.
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise InputError(
            "images must be a tensor (B, C, H, W). Add a batch axis to a single image: images[None]."
        )
    if not isinstance(tolerance, (int, float)) or not 0 <= tolerance <= 1:
        raise InputError(f"tolerance={tolerance!r} must be a share, in [0, 1].")
    if window is not None and (not isinstance(window, int) or window < 1):
        raise InputError(f"window={window!r} must be a number of pixels, at least 1.")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size={batch_size!r} must be a number of images, at least 1.")
    if before is not None and not isinstance(before, AuditReport):
        raise InputError(f"before={before!r:.60} must be the report of another audit.")
    size = images.shape[-2], images.shape[-1]
    plain = unwrap(model)
    with torch.no_grad(), evaluating(model), aside(plain), only_logits(plain, logits):
        predicted = torch.cat([find_logits(model(part)) for part in torch.split(images, batch_size)])
        pairs = resolve(targets, predicted, labels, evidence).compact()
        inside, weights = masks(pairs, size) if callable(masks) else _masks_of(masks, pairs, images)
        kept = (weights > 0).nonzero()[:, 0]
        if not len(kept):
            raise InputError("there is nothing to audit: no sample has both a class to look at and a mask.")
        pairs, inside = pairs.select(kept), inside[kept]
        truth = positives(labels, predicted)
        if len(torch.unique(truth, dim=0)) == 1:
            raise InputError(
                "no two images are of different classes: give a batch with at least two classes."
            )
        swaps = swap(model, images, predicted, truth, pairs, inside, batch_size)
        side = window or max(2, size[0] // 8)
        falls = occlusion(
            model,
            images,
            torch.stack([pairs.sample, pairs.cls], dim=1),
            window=side,
            stride=max(1, side // 2),
            batch_size=batch_size,
        )
    maps = {
        "optimized": _explained(model, images, pairs, source, layer, evidence, batch_size, logits),
        "input_gradient": _explained(
            model, images, pairs, "input_gradient", "auto", evidence, batch_size, logits
        ),
    }
    energy = {name: energy_in_mask(values, inside) for name, values in maps.items()}
    energy["occlusion"] = energy_in_mask(falls * pairs.sign[:, None, None], inside)
    scores = {name: float(values.mean()) for name, values in energy.items()}
    report = AuditReport(
        source=source if isinstance(source, str) else repr(source),
        optimized=scores.pop("optimized"),
        blank=float((maps["optimized"].clamp(min=0).flatten(1).amax(dim=1) == 0).float().mean()),
        witnesses=scores,
        inside=float(swaps.inside.nanmean()),
        outside=_reliance(swaps),
        by_class={cls: _reliance(swaps, swaps.cls == cls) for cls in torch.unique(swaps.cls).tolist()},
        uniform=float(inside.mean()),
        pairs=len(pairs),
        tolerance=tolerance,
        before=before,
    )
    if report.gamed:
        warnings.warn(
            f"the map looks right, but {'; and '.join(report.reasons)}.", AuditWarning, stacklevel=2
        )
    return report


def _explained(
    model: nn.Module,
    images: Tensor,
    pairs: Pairs,
    source: str | AttributionSource,
    layer: LayerSpec,
    evidence: Evidence,
    batch_size: int,
    logits: LogitsSpec,
) -> Tensor:
    """Compute the maps of the pairs, `(N, H, W)`, batch by batch."""
    maps = []
    for first in range(0, len(images), batch_size):
        in_batch = (pairs.sample >= first) & (pairs.sample < first + batch_size)
        if bool(in_batch.any()):
            part = pairs.select(in_batch.nonzero()[:, 0])
            index = torch.stack([part.sample - first, part.cls], dim=1)
            chosen = images[first : first + batch_size]
            shown = explain(model, chosen, source, index, layer, evidence=evidence, logits=logits)
            maps.append(shown.maps[part.sample - first, part.slot])
    return torch.cat(maps)


def _masks_of(masks: Tensor, pairs: Pairs, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pick each pair's mask, at the size of the images, and its weight: 0 for one that holds NaN."""
    masks = as_tensor(masks, "masks").to(images.device).float()
    if masks.ndim >= 2:
        check_proportions(masks.shape, images.shape, "masks")
    batch = len(images)
    if masks.ndim == 2:
        chosen = masks.expand(len(pairs), -1, -1)
    elif masks.ndim == 3 and len(masks) == batch:
        chosen = masks[pairs.sample]
    elif masks.ndim == 4 and len(masks) == batch and masks.shape[1] > int(pairs.cls.max()):
        chosen = masks[pairs.sample, pairs.cls]
    else:
        raise InputError(
            f"masks of shape {tuple(masks.shape)} do not fit {batch} images: give (H, W), (B, H, W) or "
            "(B, K, H, W)."
        )
    missing = chosen.isnan().flatten(1).any(dim=1)
    chosen = chosen.nan_to_num()
    if not bool(((chosen >= 0) & (chosen <= 1)).all()):
        raise InputError("masks have values outside [0, 1].")
    return functional.resize(chosen, (images.shape[-2], images.shape[-1])), (~missing).float()


def _reliance(swaps: Swaps, chosen: Tensor | None = None) -> Reliance:
    """Summarize the chosen predictions, or all; those without a partner do not count."""
    counted = ~swaps.outside.isnan() & (True if chosen is None else chosen)
    count = int(counted.sum())
    if not count:
        return Reliance(float("nan"), float("nan"), float("nan"), 0)
    # A prediction that no other image shares is compared with the chance of all.
    chance = torch.where(swaps.chance.isnan(), swaps.chance.nanmean().nan_to_num(), swaps.chance)[counted]
    excess = swaps.outside[counted] - chance
    # A few that are all alike are less certain than their spread suggests, hence the addition.
    error = (float(excess.var(correction=0)) + 1 / (4 * count)) / count
    return Reliance(max(0.0, float(excess.mean())), error**0.5, float(chance.mean()), count)
