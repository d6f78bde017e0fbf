"""Distinguishes guidance that changed the model from guidance that only changed the map."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnguide import functional
from attnguide.auditing.swapping import Exchanges, exchange
from attnguide.capture.calls import find_logits
from attnguide.capture.model_state import evaluating, unwrap
from attnguide.capture.recorder import aside
from attnguide.errors import InputError
from attnguide.explanation import explain
from attnguide.interfaces import AttributionSource
from attnguide.layers import LayerSpec
from attnguide.metrics.faithfulness import occlusion
from attnguide.metrics.localisation import energy_in_mask
from attnguide.pairs import Evidence, Pairs, Targets, positives, resolve

__all__ = ["AuditReport", "AuditWarning", "MasksOf", "audit"]

#: A gain of the optimised map that is worth a question; a quarter of what was left to gain is enough.
_GAIN = 0.05
#: The witnesses should have gained this share of it, or of what they had left to gain.
_FOLLOWING = 0.25
#: With a report of the model before guidance, this share of its reliance passes too.
_REMAINING = 0.25
#: Of so many answers a class is judged by itself.
_ENOUGH = 5


class AuditWarning(UserWarning):
    """A guided model looks right on the optimised map alone."""


@dataclass(frozen=True)
class Reliance:
    """How many answers follow what is outside the masks.

    Attributes:
        share: Share of the answers that change when what is outside is exchanged for that of an image with
            another answer, less those that do with an image of the same answer, which noise and the cut
            itself change. Near 0 in a model that does not look there.
        error: Its standard error over the answers.
        chance: What was subtracted.
        pairs: Number of answers for which there was an image with another one.
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
    """What a model looks at, by the attribution that was optimised and by witnesses that were not.

    Attributes:
        source: The attribution that was, or will be, optimised.
        optimised: Its energy in the mask, the mean over the pairs, in [0, 1].
        blank: Share of the pairs whose optimised map shows nothing at all, and has an energy of 0.
        witnesses: The energy of attributions that were not optimised: `"input_gradient"`, `"occlusion"`.
        exchanged: How many answers follow what is outside the masks.
        by_class: The same of the answers about each class: where a model gives each image one class, of the
            images that it gives that one.
        attention: Share of the answers that change when what is inside the mask is exchanged for that of an
            image with another answer: high in a model that looks there.
        uniform: Energy in the mask of a map that is the same everywhere: the mask's area.
        pairs: Number of (sample, class) pairs.
        tolerance: Highest reliance that passes.
        before: The report of the same model without guidance, if it was given.
    """

    source: str
    optimised: float
    blank: float
    witnesses: dict[str, float]
    exchanged: Reliance
    by_class: dict[int, Reliance]
    attention: float
    uniform: float
    pairs: int
    tolerance: float
    before: AuditReport | None = None

    @property
    def reliance(self) -> float:
        """Share of the answers that follow what is outside the masks, less chance."""
        return self.exchanged.share

    @property
    def swaps(self) -> int:
        """Number of answers for which there was an image to exchange with."""
        return self.exchanged.pairs

    @property
    def looks_right(self) -> bool:
        """Whether the optimised map is better than before; without `before`, than one that is uniform.

        A map that shows nothing shows nothing outside the mask either.
        """
        shown = self.optimised + self.blank
        if self.before is None:
            return _gained(shown, self.uniform)
        was = self.before
        return _gained(self.optimised, was.optimised) or _gained(shown, was.optimised + was.blank)

    @property
    def limit(self) -> float:
        """The reliance that passes: the tolerance, or a quarter of what it was before."""
        return (
            self.tolerance if self.before is None else max(self.tolerance, self.before.reliance * _REMAINING)
        )

    @property
    def reasons(self) -> list[str]:
        """What the other measurements hold against the optimised map; empty if nothing."""
        found, limit = [], self.limit
        above = {
            cls: one for cls, one in self.by_class.items() if one.pairs >= _ENOUGH and one.exceeds(limit)
        }
        verdict = f"depend on what is outside the mask (limit {limit:.0%})"
        if self.exchanged.exceeds(limit):
            found.append(f"{self.reliance:.0%} of predictions {verdict}")
        elif above:
            worst = max(above, key=lambda cls: above[cls].share)
            more = f", so do those about {len(above) - 1} more" if len(above) > 1 else ""
            found.append(f"{above[worst].share:.0%} of predictions about class {worst} {verdict}{more}")
        if self.before is not None and self.reliance > limit:
            gain, was = self.optimised - self.before.optimised, self.before.witnesses
            gains = {name: value - was[name] for name, value in self.witnesses.items()}
            if all(each < _FOLLOWING * min(gain, 1 - was[name]) for name, each in gains.items()):
                gained = ", ".join(f"{name} {value:+.2f}" for name, value in gains.items())
                found.append(f"the optimised map gained {gain:+.2f}, those that were not optimised {gained}")
        return found

    @property
    def gamed(self) -> bool:
        """Whether the optimised map looks right and the others say otherwise."""
        return self.looks_right and bool(self.reasons)

    def __str__(self) -> str:
        was = self.before
        rows = [
            (f"energy of {self.source} in the mask (optimised)", self.optimised, was and was.optimised),
            *(
                (f"energy of {name} in the mask", value, was and was.witnesses[name])
                for name, value in self.witnesses.items()
            ),
            ("energy of a uniform map", self.uniform, None),
            ("answers that change with what is outside, less chance", self.reliance, was and was.reliance),
            ("answers that change with what is inside", self.attention, was and was.attention),
        ]
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{self.pairs} pairs, {self.swaps} exchanges"]
        for name, value, earlier in rows:
            lines.append(
                f"  {name:{width}}  {value:6.1%}" + ("" if earlier is None else f"  was {earlier:6.1%}")
            )
        if self.reasons:
            verdict = "The map looks right, but" if self.gamed else "The map does not look right, and"
            lines.append(f"  {verdict} {'; and '.join(self.reasons)}.")
        return "\n".join(lines)


def _gained(now: float, base: float) -> bool:
    return now - base > min(_GAIN, (1 - base) / 4)


#: Gives masks and weights for pairs at a size, as a prior does; pairs of weight 0 are left out.
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
) -> AuditReport:
    """Look at a model by the attribution that was optimised, by others, and by exchanging what is forbidden.

    An optimised map can be gamed: the network finds a way to use a shortcut that the map does not show. So
    the masks are held against the gradient of the images and against occlusion, which no guidance at a layer
    optimises; and what is outside the masks is exchanged between images that the model answers differently.
    An honest model's answers do not follow it: no more change than between images that it answers alike. The
    model runs in evaluation mode and comes back as it was.

    Args:
        model: Any classifier.
        images: `(B, C, H, W)`, none of which was trained on; some dozens or hundreds.
        labels: Class indices `(B,)`, or multi-hot `(B, K)`.
        masks: Where to look, `(H, W)`, `(B, H, W)`, or `(B, K, H, W)` for each class, in [0, 1]; of any size.
            Or a function that gives masks and weights for pairs.
        source: The attribution that was optimised.
        layer: Where it looks.
        targets: Which (sample, class) pairs.
        evidence: As in [`Term`][attnguide.Term].
        before: The report of the model before guidance, or of its unguided twin, on the same images.
        tolerance: Share of the answers, less chance, that may change with what is outside the mask; with
            `before`, a quarter of what it was passes too.
        window: Side of the window of occlusion, in pixels; an eighth of the image's height if left out.
        batch_size: Number of images that the model sees at once.

    Returns:
        The report; print it.

    Raises:
        InputError: If labels or masks do not fit, nothing is annotated, or no two images are of different
            classes.

    Warns:
        AuditWarning: If the optimised map is better than before (without `before`: than a uniform one) and
            the others do not bear it out.
    """
    size = images.shape[-2], images.shape[-1]
    with torch.no_grad(), aside(unwrap(model)), evaluating(model):
        logits = torch.cat([find_logits(model(part)) for part in torch.split(images, batch_size)])
        pairs = resolve(targets, logits, labels, evidence).compact()
        inside, weights = masks(pairs, size) if callable(masks) else _masks_of(masks, pairs, images)
        kept = (weights > 0).nonzero()[:, 0]
        if not len(kept):
            raise InputError("there is nothing to audit: no sample has both a class to look at and a mask.")
        pairs, inside = pairs.select(kept), inside[kept]
        truth = positives(labels, logits)
        if len(torch.unique(truth, dim=0)) == 1:
            raise InputError(
                "no two images are of different classes: give a batch with at least two classes."
            )
        changes = exchange(model, images, logits, truth, pairs, inside, batch_size)
        side = window or max(2, size[0] // 8)
        falls = occlusion(
            model,
            images,
            torch.stack([pairs.sample, pairs.cls], dim=1),
            window=side,
            stride=max(1, side // 2),
            batch_size=batch_size,
        )
    by_name = {"optimised": (source, layer), "input_gradient": ("input_gradient", "auto")}
    maps = {
        name: _explained(model, images, pairs, which, where, evidence, batch_size)
        for name, (which, where) in by_name.items()
    }
    energy = {name: energy_in_mask(each, inside) for name, each in maps.items()}
    energy["occlusion"] = energy_in_mask(falls * pairs.sign[:, None, None], inside)
    scores = {name: float(values.mean()) for name, values in energy.items()}
    report = AuditReport(
        source=source if isinstance(source, str) else repr(source),
        optimised=scores.pop("optimised"),
        blank=float((maps["optimised"].clamp(min=0).flatten(1).amax(dim=1) == 0).float().mean()),
        witnesses=scores,
        exchanged=_reliance(changes),
        by_class={cls: _reliance(changes, changes.cls == cls) for cls in torch.unique(changes.cls).tolist()},
        attention=float(changes.inside.nanmean()),
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
) -> Tensor:
    """Maps of the pairs, `(N, H, W)`, from so many images at once."""
    maps = []
    for first in range(0, len(images), batch_size):
        some = (pairs.sample >= first) & (pairs.sample < first + batch_size)
        if bool(some.any()):
            part = pairs.select(some.nonzero()[:, 0])
            index = torch.stack([part.sample - first, part.cls], dim=1)
            shown = explain(
                model, images[first : first + batch_size], source, index, layer, evidence=evidence
            )
            maps.append(shown.maps[part.sample - first, part.slot])
    return torch.cat(maps)


def _masks_of(masks: Tensor, pairs: Pairs, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pick each pair's mask, at the size of the images; one that holds NaN is none."""
    masks = torch.as_tensor(masks).to(images.device).float()
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


def _reliance(changes: Exchanges, some: Tensor | None = None) -> Reliance:
    """Of some answers, or of all; those without a partner do not count."""
    counted = ~changes.outside.isnan() & (True if some is None else some)
    count = int(counted.sum())
    if not count:
        return Reliance(float("nan"), float("nan"), float("nan"), 0)
    # An answer that no other image shares is held against the chance of all.
    chance = torch.where(changes.chance.isnan(), changes.chance.nanmean().nan_to_num(), changes.chance)[
        counted
    ]
    less = changes.outside[counted] - chance
    # Few that are all alike say less than their spread says, hence the addition.
    error = (float(less.var(correction=0)) + 1 / (4 * count)) / count
    return Reliance(max(0.0, float(less.mean())), error**0.5, float(chance.mean()), count)
