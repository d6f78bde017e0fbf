"""Turns settings into images, a model and a method of guidance."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from attnguide import models
from attnguide.errors import DataError, InputError, nearest
from attnguide.evaluation.evaluate import mask_reader
from attnguide.guiding.guide import Guide
from attnguide.guiding.intervention import Intervention, arguments_of
from attnguide.guiding.recipe import Recipe, as_recipe, load_recipe
from attnguide.guiding.terms import Term
from attnguide.interfaces import AlignmentLoss, TargetPrior
from attnguide.models import LoadedModel, with_head
from attnguide.parts.registry import registry
from attnguide.priors import BoxPrior, FindingPrior, TeacherPrior
from attnguide.training.images import Images
from attnguide.training.listing import Listing, Sample, list_images
from attnguide.training.settings import AugmentSettings, Settings

__all__ = ["Method", "Prepared", "method_of", "prepare"]

#: λ that are tried by default, as multiples of the recipe's; 0 is training without guidance.
_MULTIPLES = (0.0, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class Method:
    """How a training is guided.

    Attributes:
        kind: By maps, by exchanging surroundings, or not.
        options: Fields of a [`Term`][attnguide.Term] or arguments of an
            [`Intervention`][attnguide.Intervention], without λ.
        weight: λ; None to choose it.
        weights: λ to choose from.
        recipe: Name of the recipe.
    """

    kind: Literal["guide", "intervention", "none"]
    options: dict[str, Any] = field(default_factory=dict)
    weight: float | None = 0.0
    weights: tuple[float, ...] = ()
    recipe: str = "none"

    @property
    def prior(self) -> TargetPrior | None:
        """The prior of a guidance by maps; None if its loss reads none."""
        if self.kind != "guide":
            return None
        loss: AlignmentLoss = registry().create("loss", self.options.get("loss", "iou"), AlignmentLoss)
        if not loss.reads_prior:
            return None
        prior: TargetPrior = registry().create("prior", self.options.get("prior", "mask"), TargetPrior)
        return prior

    @property
    def annotations(self) -> tuple[str, ...]:
        """Names of what is read of each image."""
        if self.kind == "intervention":
            return ("mask",)
        prior = self.prior
        return () if prior is None else tuple(prior.annotations)

    def on(self, model: nn.Module, weight: float) -> Guide | Intervention | None:
        """Put the guidance with a λ on a model; without λ there is none."""
        if self.kind == "none" or not weight:
            return None
        if self.kind == "guide":
            return Guide(model, terms=[Term(**{**self.options, "weight": weight})])
        return Intervention(model, weight=weight, **arguments_of(self.options, empty="skip"))


def method_of(settings: Settings) -> Method:
    """Read the method of guidance.

    Raises:
        UnknownNameError: If the recipe or a part is unknown.
        InputError: If the tables contradict each other, or a setting is wrong.
    """
    guide, intervention = settings.guide, settings.intervention
    if guide is not None and intervention is not None:
        raise InputError("the tables [guide] and [intervention] are two methods. Keep one.")
    given = dict(guide if guide is not None else intervention or {})
    if settings.recipe == "none":
        if given:
            raise InputError('recipe = "none" means no guidance; leave out [guide] and [intervention].')
        return Method("none")
    base = Recipe("", "")
    if settings.recipe is not None:
        base = load_recipe(settings.recipe)
    elif guide is None and intervention is None:
        if settings.masks is None:
            return Method("none")
        base = load_recipe("right-for-real")
    by_exchange = intervention is not None or base.intervention is not None
    if guide is not None and base.intervention is not None:
        raise InputError(f"the recipe {base.name!r} is an intervention, so [guide] cannot change it.")
    if intervention is not None and base.guide:
        raise InputError(f"the recipe {base.name!r} is a guide, so [intervention] cannot change it.")
    automatic = given.get("weight") == "auto"
    if automatic:
        del given["weight"]
    table = "intervention" if by_exchange else "guide"
    own = as_recipe({table: given}, "the settings", f"the table [{table}]")
    options: dict[str, Any] = (
        {**(base.intervention or {}), **(own.intervention or {})}
        if by_exchange
        else {**base.guide, **own.guide}
    )
    weight = options.pop("weight", 1.0)
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 <= weight < math.inf:
        raise InputError(f'{table}.weight = {weight!r} must be a number of at least 0, or "auto".')
    weights = settings.train.weights or tuple(weight * each for each in _MULTIPLES)
    if any(not 0 <= each < math.inf for each in weights):
        raise InputError(f"train.weights = {list(weights)} must be numbers of at least 0.")
    name = settings.recipe or base.name or f"[{table}]"
    chosen = None if automatic else float(weight)
    return Method(
        "intervention" if by_exchange else "guide", options, chosen, tuple(sorted(set(weights))), name
    )


@dataclass(frozen=True)
class Prepared:
    """Everything that a training needs.

    Attributes:
        settings: The settings; what could not be had is replaced.
        listing: The images.
        loaded: The model before the first step.
        method: How it is guided.
        train: Images to train on.
        plain: The same as the model's own preprocessing gives them.
        validation: Images to validate on.
        frozen: Names of the modules that stay as they are.
    """

    settings: Settings
    listing: Listing
    loaded: LoadedModel
    method: Method
    train: Images
    plain: Images
    validation: Images
    frozen: tuple[str, ...] = ()

    def fresh(self) -> nn.Module:
        """Return a copy of the model."""
        return copy.deepcopy(self.loaded.model)


def prepare(settings: Settings) -> Prepared:
    """List the images, load the model and read the method.

    Raises:
        InputError: If settings do not fit each other or the data.
        DataError: If a file is missing or cannot be read.
        UnknownNameError: If a recipe or part is unknown.
        LayerError: If the model has no such layer.

    Warns:
        UserWarning: If the published weights cannot be had.
    """
    method = method_of(settings)
    complete = settings.masks is not None and settings.masks.complete
    if complete:
        method = _with_masks(method)
    wanted = [name for name in method.annotations if name != "mask"]
    listing = list_images(settings.data, [*wanted, "boxes"] if complete else wanted)
    if method.kind == "none" and settings.recipe is None and any(s.mask for s in listing.train):
        method = method_of(replace(settings, recipe="right-for-real"))
    _check_annotations(settings, method, listing)
    loaded, settings, new = _model(settings, listing)
    method = _with_prior(method, loaded, new)
    guidance = method.on(loaded.model, 1.0)  # a wrong name is an error here, before anything is written
    if isinstance(guidance, Guide):
        guidance.remove()
    frozen = freeze(loaded.model, settings.model.freeze)
    masks = None
    if settings.masks is not None and settings.masks.path is not None:
        every = [*listing.train, *listing.validation]
        masks = mask_reader(settings.masks.path, listing.classes, _pairs(every), inside=settings.masks.inside)
    inside = None if settings.masks is None else settings.masks.inside
    seed = settings.train.seed

    def images(samples: Sequence[Sample], *, varied: bool) -> Images:
        return Images(
            samples,
            loaded,
            mask_for=masks,
            inside=inside,
            augment=settings.augment if varied and settings.augment != AugmentSettings(1.0, 0.0) else None,
            annotations=wanted,
            reads_masks="mask" in method.annotations or method.kind == "none",
            seed=seed,
        )

    train, plain = images(listing.train, varied=True), images(listing.train, varied=False)
    validation = images(listing.validation, varied=False)
    return Prepared(settings, listing, loaded, method, train, plain, validation, frozen)


def _with_masks(method: Method) -> Method:
    """Return the method that reads completed masks.

    Raises:
        InputError: If it reads no masks.
    """
    if isinstance(method.prior, BoxPrior):  # the masks are what is inside of the boxes
        return replace(method, options={**method.options, "prior": "mask"})
    if method.kind != "none" and "mask" not in method.annotations:
        raise InputError(
            f"masks.complete predicts masks, and the prior {method.prior!r} reads none. Leave it out, or "
            'give prior = "mask".'
        )
    return method


def _with_prior(method: Method, loaded: LoadedModel, new: bool) -> Method:
    """Make the prior once, for all that asks for regions; one that finds them sees the model as it is now.

    Args:
        method: The method.
        loaded: The model.
        new: Whether its head, or all of it, has random weights.
    """
    prior = method.prior
    if prior is None:
        return method
    if isinstance(prior, TeacherPrior) and not prior.models and not prior.named and new:
        raise InputError(
            f"{method.recipe} has no teacher: by default it is the model before its training, whose weights "
            'are random, at least of its head. Name one: --set \'guide.prior={name="teacher", '
            'model="run/model.safetensors"}\'.'
        )
    if isinstance(prior, FindingPrior):
        prior.names = loaded.classes
        if prior.normalization is None and loaded.mean:
            prior.normalization = (loaded.mean, loaded.std)
        prior.prepare(loaded.model, len(loaded.classes))
    return replace(method, options={**method.options, "prior": prior})


def _pairs(samples: Sequence[Sample]) -> list[tuple[Any, int]]:
    return [
        (sample.path, cls)
        for sample in samples
        for cls in ([sample.label] if isinstance(sample.label, int) else range(len(sample.label)))
        if cls >= 0
    ]


def _check_annotations(settings: Settings, method: Method, listing: Listing) -> None:
    for name in method.annotations:
        if name == "mask":
            masks = settings.masks
            there = (masks is not None and masks.path is not None) or any(
                sample.mask or (masks is not None and masks.complete and "boxes" in sample.annotations)
                for sample in listing.train
            )
            needed = method.kind == "intervention" or bool(method.prior and method.prior.annotations[name])
            template = getattr(method.prior, "template", None) is not None
            if not there and not template and (needed or method.options.get("prior", "mask") == "mask"):
                raise InputError(
                    f'{method.recipe} needs masks of where to look: give masks = "FOLDER" (or --masks), a '
                    "column of masks, or another prior."
                )
        elif (
            method.prior is not None
            and method.prior.annotations[name]
            and not any(name in sample.annotations for sample in listing.train)
        ):
            raise InputError(
                f"the prior {method.prior!r} reads {name}: give data.path a table with a column {name}."
            )


def _model(settings: Settings, listing: Listing) -> tuple[LoadedModel, Settings, bool]:
    """Load the model; say also whether its head, or all of it, has random weights."""
    wanted, count = settings.model, len(listing.classes)
    if wanted.checkpoint is not None or wanted.name is None:
        loaded = models.load(wanted.name, checkpoint=wanted.checkpoint)
    elif wanted.pretrained:
        try:
            loaded = models.load(wanted.name, pretrained=True)
        except (DataError, InputError) as error:
            if wanted.pretrained is True:
                raise
            loaded = models.load(wanted.name, num_classes=count)  # an unknown model is an error here, too
            warnings.warn(f"{error} The training begins with random weights.", stacklevel=2)
            settings = replace(settings, model=replace(wanted, pretrained=False))
    else:
        loaded = models.load(wanted.name, num_classes=count)
    # The published head knows other classes, even if there are as many.
    other = len(loaded.classes) != count or loaded.weights == "pretrained"
    if other:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            with_head(loaded.model, count)
    new = other or loaded.weights == "random"
    return replace(loaded, classes=listing.classes, multi_label=listing.multi_label), settings, new


def freeze(model: nn.Module, names: tuple[str, ...] | Literal["backbone"]) -> tuple[str, ...]:
    """Take the gradients of modules away.

    Args:
        model: The model; changed in place.
        names: Names of modules; `"backbone"` for all but the last one that has weights.

    Returns:
        The names; in training these modules have to be in evaluation mode, so that statistics stay too.

    Raises:
        InputError: If there is no such module, or nothing is left to train.
    """
    known = dict(model.named_modules())
    if names == "backbone":
        names = tuple(name for name, module in known.items() if any(True for _ in module.parameters(False)))[
            :-1
        ]
    for name in names:
        if name not in known:
            close = nearest(name, [each for each in known if each])
            raise InputError(f"model.freeze has {name!r}, but the model has no such module.{close}")
        known[name].requires_grad_(False)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise InputError("model.freeze leaves no weight to train.")
    return tuple(names)
