"""Tells an honest guidance from one that only made the map look right."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnguide import functional
from attnguide.errors import InputError
from attnguide.explanation import explain
from attnguide.hooks import aside, unwrap
from attnguide.interfaces import AttributionSource
from attnguide.layers import LayerSpec
from attnguide.metrics.faithfulness import occlusion
from attnguide.metrics.localisation import energy_in_mask
from attnguide.modes import evaluating
from attnguide.outputs import find_logits
from attnguide.pairs import Evidence, Pairs, Targets, positives, resolve

__all__ = ["AuditReport", "AuditWarning", "MasksOf", "audit"]

#: A gain of the optimised map that is worth a question.
_GAIN = 0.05
#: The witnesses should have gained this share of it.
_FOLLOWING = 0.25


class AuditWarning(UserWarning):
    """A guided model looks right on the optimised map alone."""


@dataclass(frozen=True)
class AuditReport:
    """What a model looks at, by the attribution that was optimised and by witnesses that were not.

    Attributes:
        source: The attribution that was, or will be, optimised.
        optimised: Its energy in the mask, the mean over the pairs, in [0, 1].
        witnesses: The same of attributions that were not optimised: `"input_gradient"`, `"occlusion"`.
        reliance: Share of the answers that change when what is outside the mask is exchanged for that of an
            image of another class, in [0, 1]. Near 0 in a model that does not look there.
        attention: The same when what is inside the mask is exchanged: high in a model that looks there.
        uniform: Energy in the mask of a map that is the same everywhere: the mask's area.
        pairs: Number of (sample, class) pairs.
        swaps: Number of pairs for which there was an image of another class.
        tolerance: Highest `reliance` that passes.
        before: The report of the same model without guidance, if it was given.
    """

    source: str
    optimised: float
    witnesses: dict[str, float]
    reliance: float
    attention: float
    uniform: float
    pairs: int
    swaps: int
    tolerance: float
    before: AuditReport | None = None

    @property
    def looks_right(self) -> bool:
        """Whether the optimised map is better than before; without `before`, than one that is uniform."""
        return self.optimised - (self.uniform if self.before is None else self.before.optimised) > _GAIN

    @property
    def reasons(self) -> list[str]:
        """What the other measurements hold against the optimised map; empty if nothing."""
        found = []
        limit = self.tolerance if self.before is None else max(self.tolerance, self.before.reliance / 2)
        if self.reliance > limit:
            found.append(
                f"{self.reliance:.0%} of the answers change with what is outside the mask; at most "
                f"{limit:.0%} pass"
            )
        if self.before is not None:
            gain = self.optimised - self.before.optimised
            gains = {name: value - self.before.witnesses[name] for name, value in self.witnesses.items()}
            if all(value < _FOLLOWING * gain for value in gains.values()):
                told = ", ".join(f"{name} {value:+.2f}" for name, value in gains.items())
                found.append(f"the optimised map gained {gain:+.2f}, those that were not optimised {told}")
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
            ("answers that change with what is outside", self.reliance, was and was.reliance),
            ("answers that change with what is inside", self.attention, was and was.attention),
        ]
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{self.pairs} pairs, {self.swaps} exchanges"]
        for name, value, earlier in rows:
            lines.append(
                f"  {name:{width}}  {value:6.1%}" + ("" if earlier is None else f"  was {earlier:6.1%}")
            )
        if self.gamed:
            lines.append(f"  The map looks right, but {'; and '.join(self.reasons)}.")
        return "\n".join(lines)


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
    optimises; and what is outside the mask is exchanged between images of different classes, which an honest
    model hardly notices. The model runs in evaluation mode and comes back as it was.

    Args:
        model: Any classifier.
        images: `(B, C, H, W)`, none of which was trained on; some dozens or hundreds.
        labels: Class indices `(B,)`, or multi-hot `(B, K)`.
        masks: Where to look, `(H, W)`, `(B, H, W)`, or `(B, K, H, W)` for each class, in [0, 1]; of any size.
            Or a function that gives masks and weights for pairs.
        source: The attribution that was optimised.
        layer: Where it looks.
        targets: Which (sample, class) pairs.
        evidence: As in [`Term`][attnguide.terms.Term].
        before: The report of the model before guidance, or of its unguided twin, on the same images.
        tolerance: Share of the answers that may change with what is outside the mask.
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
        partner, multi_label = _partners(truth, pairs), truth.ndim == 2
        outcome = [
            _exchanged(model, images, logits, pairs, stays, partner, multi_label, batch_size)
            for stays in (inside, 1 - inside)
        ]
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
    energy = {
        name: energy_in_mask(_explained(model, images, pairs, which, where, evidence, batch_size), inside)
        for name, (which, where) in by_name.items()
    }
    energy["occlusion"] = energy_in_mask(falls * pairs.sign[:, None, None], inside)
    scores = {name: float(values.mean()) for name, values in energy.items()}
    report = AuditReport(
        source=source if isinstance(source, str) else repr(source),
        optimised=scores.pop("optimised"),
        witnesses=scores,
        reliance=outcome[0],
        attention=outcome[1],
        uniform=float(inside.mean()),
        pairs=len(pairs),
        swaps=int((partner >= 0).sum()),
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


def _partners(truth: Tensor, pairs: Pairs) -> Tensor:
    """For each pair an image whose label of that class is another, drawn at random, `(N,)`; −1: none is.

    Raises:
        InputError: If there is none for any.
    """
    if truth.ndim == 2:
        own, others = truth[pairs.sample, pairs.cls][:, None], truth.T[pairs.cls]
    else:
        own, others = truth[pairs.sample][:, None], truth[None]
    other = (own != others).float()
    some = other.any(dim=1)
    if not bool(some.any()):
        raise InputError("no two images are of different classes: give a batch with at least two classes.")
    generator = torch.Generator(truth.device).manual_seed(0)
    drawn = torch.multinomial(torch.where(some[:, None], other, 1.0), 1, generator=generator)[:, 0]
    return torch.where(some, drawn, -1)


def _exchanged(
    model: nn.Module,
    images: Tensor,
    logits: Tensor,
    pairs: Pairs,
    stays: Tensor,
    partner: Tensor,
    multi_label: bool,
    batch_size: int,
) -> float:
    """Share of the answers that change where all but what stays is taken from an image of another class."""
    kept = (partner >= 0).nonzero()[:, 0]
    changed: list[Tensor] = []
    for some in torch.split(kept, batch_size):
        sample, share = pairs.sample[some], stays[some][:, None].to(images)
        mixed = find_logits(model(images[sample] * share + images[partner[some]] * (1 - share)))
        if multi_label or logits.shape[1] == 1:
            cls = pairs.cls[some]
            changed.append((logits[sample, cls] > 0) != (mixed.gather(1, cls[:, None])[:, 0] > 0))
        else:
            changed.append(logits[sample].argmax(dim=1) != mixed.argmax(dim=1))
    return float(torch.cat(changed).float().mean()) if changed else float("nan")
