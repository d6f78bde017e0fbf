"""What building a model of timm and one of torchvision have in common."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from attnguide.errors import InputError

#: Begins the name of a model of torchvision; names without it are timm's.
TORCHVISION = "torchvision/"
#: Begins the name of a model of transformers, or of its folder.
TRANSFORMERS = "hf:"
#: Begin the name of a model of timm that lies on the hub, or in a folder.
TIMM_PLACES = ("hf-hub:", "hf_hub:", "local-dir:")


def unknown_model(name: str, known: Sequence[str], remedy: str) -> InputError:
    """Make the error for an unknown name, with up to four similar names; there are about a thousand."""
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    return InputError(f"unknown model {name!r}. {hint}{remedy}")


def count_classes(weights: Mapping[str, Tensor], head: str) -> int | None:
    """Return the number of classes of a checkpoint, by the rows of its head; None if it has no such head.

    The name of the head may have a prefix, as in averaged models, if all that have one agree.
    """
    for ending in (f"{head}.weight", f"{head}.bias"):
        found = (
            [weights[ending]]
            if ending in weights
            else [value for name, value in weights.items() if name.endswith(f".{ending}")]
        )
        counts = {len(rows) for rows in found if rows.ndim}
        if len(counts) == 1:
            return counts.pop()
    return None


def class_names(count: int, subset: str | None) -> tuple[str, ...]:
    """Return the names of a subset of ImageNet, each the first of its synonyms; without a subset, numbers."""
    if subset is None:
        return tuple(f"class {index}" for index in range(count))
    from timm.data import ImageNetInfo  # type: ignore[attr-defined]

    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(index).partition(",")[0] for index in range(count))


@contextmanager
def reproducible() -> Iterator[None]:
    """Make random weights the same each time, so that a run can be repeated and resumed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
