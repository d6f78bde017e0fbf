"""(sample, class) pairs: the unit in which everything is attributed, compared and weighted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from attnguide.errors import InputError, nearest
from attnguide.functional import as_tensor, may_read

__all__ = ["Evidence", "Pairs", "Targets", "check_choice", "positives", "recordable", "resolve"]

#: Which pairs to look at: a name, class indices for every sample, or explicit (sample, class) pairs.
Targets = str | Sequence[int] | Sequence[tuple[int, int]] | Tensor
#: What counts as evidence: the class's logit, or the logit in the direction of the binary decision.
Evidence = Literal["logit", "decision"]
EVIDENCE: tuple[Evidence, ...] = get_args(Evidence)

#: Class indices with this value carry no label, as in `torch.nn.CrossEntropyLoss`.
IGNORE_INDEX = -100

_NAMED = ("labels", "predicted", "all")


@dataclass(frozen=True)
class Pairs:
    """N pairs of a sample of the batch and a class of the model.

    Attributes:
        sample: Index into the batch, `(N,)`, int64.
        cls: Class index, `(N,)`, int64.
        sign: +1, or −1 where the evidence is the negated logit, `(N,)`.
        slot: Rank of the pair among those of its sample, `(N,)`, int64, from 0.
        slots: The largest number of pairs that one sample has. Gradients of all samples are computed
            together, slot by slot.
        present: False for a pair that only fills a place, `(N,)`; None if there are none of these. On an
            accelerator pairs are not left out, since the number that is left would have to be waited for.
        each: Whether the pairs are one of each sample of the batch, in their order, so that nothing need be
            picked.
    """

    sample: Tensor
    cls: Tensor
    sign: Tensor
    slot: Tensor
    slots: int
    present: Tensor | None = None
    each: bool = False

    def __len__(self) -> int:
        return len(self.sample)

    @classmethod
    def one_each(cls, classes: Tensor) -> Pairs:
        """Pair every sample with one class, `classes` of shape `(B,)`."""
        sample = torch.arange(len(classes), device=classes.device)
        return cls(sample, classes, torch.ones_like(classes), torch.zeros_like(classes), 1, each=True)

    @classmethod
    def of(cls, sample: Tensor, classes: Tensor, slots: int | None = None) -> Pairs:
        """Pair `sample[i]` with `classes[i]`; any order, any number for a sample.

        Args:
            sample: Index into the batch, `(N,)`.
            classes: Class index, `(N,)`.
            slots: The largest number of pairs that one sample has, where it is known: it need not be
                waited for then.
        """
        order = torch.argsort(sample, stable=True)
        sample, classes = sample[order], classes[order]
        slot = torch.arange(len(sample), device=sample.device) - torch.searchsorted(sample, sample)
        if slots is None:
            slots = 1 + int(slot.max()) if len(slot) else 0
        return cls(sample, classes, torch.ones_like(classes), slot, slots)

    def pick(self, values: Tensor) -> Tensor:
        """Return what belongs to each pair's sample: of `(B, …)` gives `(N, …)`."""
        return values if self.each else values[self.sample]

    def select(self, index: Tensor, slots: int | None = None) -> Pairs:
        """Return the pairs at the given positions, `index` of shape `(M,)`, ascending.

        Args:
            index: Positions.
            slots: How many of these one sample has at most, where it is known.
        """
        sample, classes, sign = self.sample[index], self.cls[index], self.sign[index]
        present = None if self.present is None else self.present[index]
        if self.slots <= 1:
            return Pairs(sample, classes, sign, self.slot[index], self.slots, present)
        # Ranked anew: each slot costs a pass through the tail, and what is left may need only one.
        return replace(Pairs.of(sample, classes, slots), sign=sign, present=present)

    def compact(self) -> Pairs:
        """Leave out the pairs that only fill a place."""
        return (
            self if self.present is None else replace(self.select(self.present.nonzero()[:, 0]), present=None)
        )

    def draw(
        self, count: int, counted: Tensor, batch: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw at most `count` pairs of each sample at random.

        Args:
            count: How many.
            counted: True for the pairs to draw from, `(N,)`.
            batch: Number of samples.
            generator: Source of the random numbers, on the device of the pairs; PyTorch's own by default.

        Returns:
            Positions of the pairs drawn, ascending, and how many of its sample's pairs each stands for (0 for
            one that only fills a place, where a sample has fewer).
        """
        # Dense, so that no shape depends on a value.
        place = torch.zeros(batch, self.slots, dtype=torch.long, device=self.sample.device)
        place[self.sample, self.slot] = torch.arange(len(self), device=place.device)
        eligible = torch.zeros_like(place, dtype=torch.bool)
        eligible[self.sample, self.slot] = counted
        random = torch.rand(place.shape, generator=generator, device=place.device)
        luck = torch.where(eligible, random, -1.0)
        drawn = luck.topk(min(count, self.slots), dim=1).indices
        number = eligible.sum(dim=1, keepdim=True)
        stands_for = eligible.gather(1, drawn) * number / number.clamp(min=1, max=count)
        index, stands_for = place.gather(1, drawn).flatten(), stands_for.flatten()
        if index.device.type == "cpu":
            kept = stands_for > 0
            index, stands_for = index[kept], stands_for[kept]
        order = index.argsort()
        return index[order], stands_for[order]


def positives(labels: Tensor, logits: Tensor) -> Tensor:
    """Check labels against the logits and return them as a boolean matrix of positives, or as class indices.

    Args:
        labels: Class indices `(B,)`, or multi-hot `(B, K)` floats or bools. With one logit, `(B,)` is
            multi-hot.
        logits: `(B, K)`.

    Returns:
        Class indices `(B,)` int64 (−100 = no label), or positives `(B, K)` bool. A multi-hot label of 1 is
        positive; NaN and −100 are none.

    Raises:
        InputError: If the shape does not fit the logits, a class index is out of range, or a multi-hot label
            is neither 0 nor 1.
    """
    if not isinstance(labels, Tensor):
        labels = as_tensor(labels, "labels")
    batch, classes = logits.shape
    if labels.ndim == 0 or len(labels) != batch:
        size = "no batch axis" if labels.ndim == 0 else f"{len(labels)} samples"
        raise InputError(
            f"labels have {size}, but the last forward of the model had {batch}. Call guide.loss with the "
            "labels of the batch that went through the model last."
        )
    if classes == 1 and labels.ndim == 1:
        labels = labels[:, None]
    labels = labels.to(logits.device)
    if labels.is_inference():  # a graph may not hold it
        labels = labels.clone()
    if labels.ndim == 2 and labels.shape[1] == classes:
        _check_multi_hot(labels)
        return labels == 1
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype} do not fit {classes} logits: "
            f"give class indices ({batch},) as integers, or multi-hot ({batch}, {classes}) as floats or "
            "bools."
        )
    labels = labels.long()
    wrong = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= classes))
    if may_read(wrong) and bool(wrong.any()):
        raise InputError(
            f"labels out of range: sample {int(wrong.nonzero()[0])} has class {int(labels[wrong][0])}, the "
            f"model has classes 0 to {classes - 1}. Use {IGNORE_INDEX} for 'no label'."
        )
    return labels


def recordable(tensor: Tensor) -> Tensor:
    """Return a tensor that a graph may hold, whichever mode it was made in."""
    return tensor.clone() if tensor.is_inference() else tensor


def _check_multi_hot(labels: Tensor) -> None:
    """Refuse labels besides 0 and 1: −1/1 coding, or soft labels, which may mean several things."""
    if labels.dtype == torch.bool:
        return
    wrong = (labels != 0) & (labels != 1) & (labels != IGNORE_INDEX) & ~labels.isnan()
    if not may_read(wrong) or not bool(wrong.any()):
        return
    value = labels[wrong][0].item()
    where = f"sample {int(wrong.nonzero()[0, 0])}, class {int(wrong.nonzero()[0, 1])}"
    if not 0 < value < 1:
        raise InputError(
            f"labels out of range [0, 1]: multi-hot labels are 0 or 1, that of {where} is {value:g}. Map "
            f"−1/1 labels with (labels + 1) / 2; NaN or {IGNORE_INDEX} means 'no label'."
        )
    raise InputError(
        f"the label of {where} is {value:g}, neither 0 nor 1. Say what soft labels mean: after label "
        "smoothing give labels > 0.5; for mixup and CutMix use attnguide.data.mix, since each of the two "
        "classes of an image has a mask of its own; to weight pairs by their labels give labels > 0 and "
        "sample_weight=labels."
    )


def resolve(
    targets: Targets, logits: Tensor, labels: Tensor | None = None, evidence: Evidence = "logit"
) -> Pairs:
    """Turn a choice of targets into pairs.

    Args:
        targets: `"labels"` (the positives), `"predicted"` (the arg-max; with multi-hot labels, every class
            whose logit is positive), `"all"`, a sequence or 1-D tensor of class indices that holds for every
            sample, or a sequence of (sample, class) tuples (or a tensor `(N, 2)`).
        logits: `(B, K)`.
        labels: As in [`positives`][attnguide.pairs.positives]; needed for `"labels"`.
        evidence: `"logit"`, or `"decision"`: for a class with a negative logit the evidence is the negated
            logit (the model says "no", and the map shows why), which fits binary attributes.

    Returns:
        The pairs, on the device of the logits.

    Raises:
        InputError: If the targets are not of a known form or out of range, or labels are missing.
    """
    if not isinstance(targets, str) or targets not in _NAMED or evidence not in EVIDENCE:
        check_choice(targets, evidence)
    truth = None if labels is None else positives(labels, logits)
    if not isinstance(targets, str):
        pairs = _listed(targets, logits)
    elif targets == "all":
        pairs = _every(logits)
    elif targets == "labels":
        pairs = _labelled(truth, logits)
    elif logits.shape[1] > 1 and truth is not None and truth.ndim == 2:
        pairs = _where(logits.detach() > 0, logits)
    else:
        pairs = Pairs.one_each(logits.detach().argmax(dim=1))
    if evidence == "logit":
        return pairs
    return replace(pairs, sign=torch.where(logits.detach()[pairs.sample, pairs.cls] < 0, -1, 1))


def check_choice(targets: Targets, evidence: Evidence) -> None:
    """Refuse what can be known to be wrong before there is any batch.

    Raises:
        InputError: If the targets are not of a known form, or the evidence is unknown.
    """
    if not isinstance(targets, str):
        _as_index(targets)
    elif targets not in _NAMED:
        raise InputError(
            f"targets={targets!r} is unknown.{nearest(targets, _NAMED)} Class indices and (sample, class) "
            "pairs are possible too."
        )
    if evidence not in EVIDENCE:
        raise InputError(f"evidence={evidence!r} is unknown.{nearest(str(evidence), EVIDENCE)}")


def _listed(targets: Sequence[int] | Sequence[tuple[int, int]] | Tensor, logits: Tensor) -> Pairs:
    batch, classes = logits.shape
    index = _as_index(targets).to(logits.device)
    limits = torch.tensor([batch, classes], device=logits.device)[-1 if index.ndim == 1 else slice(None)]
    outside = (index < 0) | (index >= limits)
    if may_read(outside) and bool(outside.any()):
        raise InputError(
            f"targets={targets!r} are out of range: the batch has samples 0 to {batch - 1}, the model has "
            f"classes 0 to {classes - 1}."
        )
    if index.ndim == 2:
        return Pairs.of(index[:, 0], index[:, 1])
    sample = torch.arange(batch, device=logits.device).repeat_interleave(len(index))
    cls = index.repeat(batch)
    slot = torch.arange(len(index), device=logits.device).repeat(batch)
    return Pairs(sample, cls, torch.ones_like(cls), slot, len(index))


def _labelled(truth: Tensor | None, logits: Tensor) -> Pairs:
    if truth is None:
        raise InputError(
            "targets='labels' needs labels. Pass labels=…, or choose targets='predicted', 'all' or class "
            "indices."
        )
    if truth.ndim == 2:
        return _where(truth, logits)
    pairs = Pairs.one_each(truth.clamp_min(0))
    labelled = truth != IGNORE_INDEX
    if logits.device.type != "cpu":
        return replace(pairs, present=labelled)
    return pairs if bool(labelled.all()) else pairs.select(labelled.nonzero()[:, 0])


def _every(logits: Tensor) -> Pairs:
    batch, classes = logits.shape
    sample = torch.arange(batch, device=logits.device).repeat_interleave(classes)
    cls = torch.arange(classes, device=logits.device).repeat(batch)
    return Pairs(sample, cls, torch.ones_like(cls), cls, classes)


def _where(chosen: Tensor, logits: Tensor) -> Pairs:
    """Pairs where a matrix `(B, K)` is true."""
    if logits.device.type != "cpu":
        return replace(_every(logits), present=chosen.flatten())
    sample, classes = chosen.nonzero(as_tuple=True)
    return Pairs.of(sample, classes)


def _as_index(targets: Sequence[int] | Sequence[tuple[int, int]] | Tensor) -> Tensor:
    try:
        index = targets if isinstance(targets, Tensor) else torch.tensor(list(targets))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"targets={targets!r} are neither class indices nor (sample, class) pairs: {error}."
        ) from error
    if index.dtype == torch.bool or index.is_floating_point() or index.numel() == 0:
        raise InputError(
            f"targets={targets!r} must be integers, at least one: class indices or (sample, class) pairs."
        )
    if index.ndim == 1 or (index.ndim == 2 and index.shape[1] == 2):
        return recordable(index.long())
    raise InputError(
        f"targets of shape {tuple(index.shape)} are neither class indices (T,) nor (sample, class) pairs "
        "(N, 2)."
    )
