"""What changed between two models, image by image."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from attnguide.errors import InputError
from attnguide.evaluation.compare import Change, Comparison, check_comparable
from attnguide.evaluation.evaluate import Evaluation, ImageResult, LabeledImage


def change(name: str, before: tuple[int, float, float], after: tuple[int, float, float]) -> Change:
    """A change of the predicted class, of the probability of class 1, and of the energy in the mask."""
    image = LabeledImage(Path(name), 1)
    return Change(
        *(
            ImageResult(image=image, predicted=cls, confidence=p, probability=p, scores={"energy": energy})
            for cls, p, energy in (before, after)
        )
    )


CHANGES = [
    change("a", (0, 0.2, 0.1), (1, 0.9, 0.5)),
    change("b", (0, 0.4, 0.3), (1, 0.6, 0.2)),
    change("c", (1, 0.9, 0.5), (0, 0.1, 0.1)),
    change("d", (1, 0.8, 0.2), (1, 0.8, 0.8)),
]


def test_the_largest_changes_come_first() -> None:
    nothing: Any = Evaluation.__new__(Evaluation)
    comparison = Comparison(("x", "y"), nothing, nothing, changes=list(CHANGES))

    def names(kind: Any) -> list[str]:
        return [change.image.path.name for change in comparison.largest(kind)]

    assert names("rose") == ["d", "a"]
    assert names("fell") == ["c", "b"]
    assert names("righted") == ["a", "b"]
    assert names("wronged") == ["c"]


def test_differences_of_one_image() -> None:
    assert CHANGES[0].probability == pytest.approx(0.7)
    assert CHANGES[0].energy == pytest.approx(0.4)
    record = ImageResult(
        image=LabeledImage(Path("a"), 0), predicted=0, confidence=1.0, probability=1.0, scores={}
    )
    assert Change(record, record).energy is None


@pytest.mark.parametrize(
    ("field", "other", "what"),
    [("classes", ("a", "c"), "classes"), ("size", (64, 64), "sizes"), ("std", (0.2,), "standard deviations")],
)
def test_models_that_cannot_be_compared(field: str, other: Any, what: str) -> None:
    common = {"classes": ("a", "b"), "size": (32, 32), "mean": (0.5,), "std": (0.5,)}
    one: Any = SimpleNamespace(**common)
    changed: Any = SimpleNamespace(**{**common, field: other})
    files = [Path("before.pt"), Path("after.pt")]
    check_comparable(one, one, files)
    with pytest.raises(InputError, match=rf"before\.pt and after\.pt have different {what}"):
        check_comparable(one, changed, files)
