"""The teacher's regions are its maps, as `explain` gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.models import batch, cnn
from tests.helpers.recipes import network
from torch import Tensor, nn

import attnguide as ag
from attnguide.errors import DataError, InputError
from attnguide.functional import resize
from attnguide.interfaces import AttributionSource
from attnguide.models import load
from attnguide.priors import TeacherPrior

IMAGES, LABELS, _ = batch()


def unit(maps: Tensor) -> Tensor:
    return maps / maps.amax(dim=(-2, -1), keepdim=True)


def record(model: nn.Module, prior: Any, layer: str = "block4") -> Any:
    with ag.Guide(model, prior=prior, layer=layer) as guide:
        model(IMAGES)
        guide.loss(LABELS)
        return guide.records()[0]


def test_maps_are_those_of_explain_scaled_to_their_maximum() -> None:
    student, teacher = cnn().eval(), cnn().eval()
    expected = ag.explain(teacher, IMAGES, "cam", "labels", labels=LABELS, size=None).maps[:, 0]
    found = record(student, TeacherPrior(teacher, source="cam"))
    torch.testing.assert_close(found.prior, unit(expected))
    halved = record(student, TeacherPrior(teacher, source="cam", threshold=0.5)).prior
    torch.testing.assert_close(halved, (unit(expected) >= 0.5).float())


def test_an_ensemble_is_the_mean_of_scaled_maps() -> None:
    student, teachers = cnn().eval(), [cnn().eval(), cnn().eval()]
    maps = [
        unit(ag.explain(t, IMAGES, "cam", "labels", labels=LABELS, size=None).maps[:, 0]) for t in teachers
    ]
    found = record(student, TeacherPrior(teachers, source="cam"))
    torch.testing.assert_close(found.prior, (maps[0] + maps[1]) / 2)


def test_by_name_the_teacher_is_the_model_before_it_was_trained() -> None:
    model = cnn().eval()
    before = ag.explain(model, IMAGES, targets="labels", labels=LABELS, size=None).maps[:, 0]
    shown = before.amax(dim=(1, 2)) > 0
    guide = ag.Guide(model, source="cam", prior="teacher")
    for _ in range(2):
        model(IMAGES)
        guide.loss(LABELS)
        (found,) = guide.records()
        torch.testing.assert_close(found.prior, unit(before)[found.pairs.sample])
        assert found.pairs.sample.tolist() == shown.nonzero()[:, 0].tolist()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.01 * torch.randn_like(weight))


def test_other_classes() -> None:
    student, teacher = cnn(classes=4).eval(), cnn(classes=2).eval()
    for count in (2, 7):  # class 0 of seven is not class 0 of four
        with pytest.raises(InputError, match=f"has {count} classes, the guided model has 4"):
            record(student, TeacherPrior(cnn(classes=count).eval(), source="cam"))
    with pytest.raises(InputError, match=r"classes= has 2; the teacher .* has 2 classes"):
        record(student, TeacherPrior(teacher, source="cam", classes=[2, None, None, None]))
    with pytest.raises(InputError, match="classes= has -1"):
        TeacherPrior(teacher, classes=[-1])
    prior = TeacherPrior(teacher, source="cam", classes=[1, None, 0, None])
    known = [row for row, cls in enumerate(LABELS.tolist()) if cls in (0, 2)]
    with pytest.warns(UserWarning, match="finds no region"):
        found = record(student, prior)
    assert found.pairs.sample.tolist() == known
    pairs = [(row, {0: 1, 2: 0}[int(LABELS[row])]) for row in known]
    maps = ag.explain(
        teacher, IMAGES[known], "cam", [(n, c) for n, (_, c) in enumerate(pairs)], size=None
    ).maps
    torch.testing.assert_close(found.prior, unit(maps[:, 0]))
    with pytest.raises(InputError, match="classes= has 1 entries"):
        record(student, TeacherPrior(teacher, classes=[0]))
    with pytest.raises(InputError, match="threshold=2"):
        TeacherPrior(teacher, threshold=2)


def test_a_map_that_shows_nothing_drops_out_and_is_counted() -> None:
    class Sometimes(AttributionSource):
        """Evidence for even samples, and against the class for odd ones."""

        needs_gradient = False

        def __call__(self, trace: ag.Trace, pairs: ag.Pairs) -> Tensor:
            sign = 1.0 - 2 * (pairs.sample % 2)
            return sign[:, None, None] * torch.ones(len(pairs), *self.size(trace))

    prior = TeacherPrior(cnn().eval(), source=Sometimes())
    with pytest.warns(UserWarning, match="finds no region for 2 of 4"):
        found = record(cnn().eval(), prior)
    assert found.pairs.sample.tolist() == [0, 2]
    assert (prior.found, prior.missing) == (2, 2)


def test_a_teacher_by_its_file_gets_images_as_it_wants_them(tmp_path: Path) -> None:
    file = network(tmp_path, classes=4)  # a mean of 0.5 and a standard deviation of 0.25
    own = (IMAGES * 0.4 + 0.3 - 0.5) / 0.25
    loaded = load(checkpoint=file)
    maps = ag.explain(loaded.model, own, "cam", "labels", labels=LABELS, size=None).maps[:, 0]
    told: Any = {"normalization": ([0.3] * 3, [0.4] * 3), "source": "cam"}
    for teacher in (str(file), file, loaded):
        found = record(cnn().eval(), TeacherPrior(teacher, **told), layer="block3")
        torch.testing.assert_close(found.prior, resize(unit(maps), (found.prior.shape[-1],) * 2))
    # Nobody says how the images of the guided model are normalised: they are taken as they are.
    maps = ag.explain(loaded.model, IMAGES, "cam", "labels", labels=LABELS, size=None).maps[:, 0]
    found = record(cnn().eval(), TeacherPrior(file, source="cam"), layer="block3")
    torch.testing.assert_close(found.prior, resize(unit(maps), (found.prior.shape[-1],) * 2))
    with pytest.raises(DataError, match=r"no\.safetensors"):
        record(cnn().eval(), TeacherPrior(tmp_path / "no.safetensors"))
    with pytest.raises(InputError, match="resnet1"):
        record(cnn().eval(), TeacherPrior("resnet1"))
