"""Prepares a pretrained classifier, and fine-tunes it towards painted regions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from attnguide import Guide, Term, load_recipe, models
from attnguide.capture.model_state import evaluating
from attnguide.errors import InputError
from attnguide.masks import Template
from attnguide.models import with_head
from attnguide.training import Measured, Trainer, accelerator_on, unseeded
from attnguide_gradcam_iou.finetune._data import as_loader, batches, check_data, has_class_indices
from attnguide_gradcam_iou.finetune._settings import guide_arguments, positive_number, whole_number

__all__ = ["Epoch", "finetune", "prepare"]


@dataclass(frozen=True)
class Epoch:
    """Losses and scores of one epoch.

    Attributes:
        number: Number of the epoch, from 1; 0 for the scores before the training.
        attribute_loss: Mean cross entropy of the training batches; NaN before the training.
        guidance_loss: Mean guidance loss of the training pairs, not multiplied by its weight; NaN before the
            training.
        accuracy: Share of the validation labels that are predicted right, or None without validation.
        iou: Mean soft IoU of attribution and region in validation, or None without validation or regions.
    """

    number: int
    attribute_loss: float
    guidance_loss: float
    accuracy: float | None = None
    iou: float | None = None

    def __str__(self) -> str:
        text = f"epoch {self.number}"
        if self.number:
            text += f": attribute loss {self.attribute_loss:.3f}, guidance loss {self.guidance_loss:.3f}"
        text += "" if self.accuracy is None else f", accuracy {self.accuracy:.1%}"
        return text if self.iou is None else f"{text}, IoU {self.iou:.3f}"


def finetune(
    model: nn.Module,
    train: Dataset[Any] | DataLoader[Any],
    *,
    template: Tensor | Template | str | Path | None = None,
    validation: Dataset[Any] | DataLoader[Any] | None = None,
    classes: Sequence[str] | None = None,
    recipe: str | Path = "gradcam-iou",
    epochs: int | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    attribute_weight: float = 1.0,
    guidance_weight: float | None = None,
    optimizer: Callable[..., Optimizer] = torch.optim.Adam,
    device: str | torch.device | None = None,
    amp: bool = False,
    seed: int = 0,
    progress: bool = False,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_step: Callable[[], None] | None = None,
    measure_before: bool = False,
) -> list[Epoch]:
    """Fine-tune a classifier so that it predicts attributes from the regions that show them.

    The steps are those of `attnguide train`, which needs `pip install 'attnguide[train]'`.

    Data are batches, or single samples of a data set, of `(image, attributes)` or `(image, attributes,
    mask)`: images as the model expects them, attributes multi-hot with NaN or −100 for an unknown label, and
    masks as [`MaskPrior`][attnguide.priors.MaskPrior] takes them. Samples of `ProceduralFaces` are fine
    as they are. Where each image has one class, its index (a whole number, −100 if unknown) stands for the
    attributes, and the loss is the softmax's cross entropy.

    The model is trained in place, in training mode. When the function ends, however it ends, nothing is
    attached to the model, and its modules have the training flags that they had.

    Args:
        model: A classifier with one logit for each attribute; [`with_head`]
            [attnguide.models.with_head] makes one.
        train: Data set or loader. A data set is shuffled; give a loader for worker processes.
        template: Regions that hold for every image: `(K, H, W)` or `(H, W)` in [0, 1], NaN for a class that
            has none, or a path for [`load_template`][attnguide.masks.load_template]. If None, the
            data give masks.
        validation: Data set or loader that is measured after each epoch.
        classes: Names of the attributes, to read a template; by default the data set's `classes`.
        recipe: A recipe's name or TOML file. Its `[guide]` holds arguments of the guide, its `[train]`
            `epochs`, `learning_rate` and `batch_size`, unless they are given here.
        epochs: Number of passes through the data.
        learning_rate: Learning rate of the optimiser.
        batch_size: Number of images in a batch; not with loaders, which have their own.
        attribute_weight: Weight w_a of the cross entropy.
        guidance_weight: Weight w_g of the guidance; the recipe's weight if None. 0 measures without guiding.
        optimizer: Function that makes the optimiser; called as `optimizer(parameters, lr=learning_rate)` with
            the list of the parameters that require a gradient.
        device: Device to train on; the model moves there and stays. By default where it is.
        amp: Whether to compute in bfloat16 where that is safe.
        seed: Seed of the order of the images, and of everything random in the model and the data. The random
            state of the process stays as it is.
        progress: Whether to show a progress bar on stderr.
        on_epoch: Function that is called after each epoch.
        on_step: Function that is called after each batch, of training and validation. An error that it raises
            ends the training.
        measure_before: Whether to measure the validation data before the training, too; an entry of number 0.

    Returns:
        One entry for each epoch.

    Raises:
        InputError: If an argument or the data have a wrong form, or there are no regions.
        GuidanceError: If the guidance reaches no weight, which is checked before the first step, or a loss
            is not finite.
        DataError: If the template cannot be read.
        UnknownNameError: If the recipe or a class of the template is unknown.
    """
    from attnguide.cli.console import progress as progress_bar

    settings = load_recipe(recipe)
    epochs = whole_number("epochs", epochs, settings)
    rate = positive_number("learning_rate", learning_rate, settings)
    if not (math.isfinite(attribute_weight) and attribute_weight >= 0):
        raise InputError(f"attribute_weight={attribute_weight} must be a finite number of at least 0.")
    if not any(weight.requires_grad for weight in model.parameters()):
        raise InputError("every parameter of the model is frozen. Set requires_grad on those to be trained.")
    loader = as_loader(train, "train", batch_size, settings, seed)
    judge = None if validation is None else as_loader(validation, "validation", batch_size, settings)
    arguments = guide_arguments(settings, template, classes, loader.dataset, guidance_weight)
    place = torch.device(device) if device is not None else next(iter(model.parameters())).device
    accelerator = accelerator_on(place, "bf16" if amp else "no")
    with ExitStack() as stack:
        stack.enter_context(unseeded())
        torch.manual_seed(seed)
        # At its end it restores the training flag of every module.
        stack.enter_context(evaluating(model))
        if has_class_indices(loader):
            # Classes of a softmax exclude each other: only the map of the true class is guided.
            arguments |= {"targets": "labels", "evidence": "logit"}
        guide = stack.enter_context(Guide(model.to(place), terms=[Term(**arguments)]))
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        trainer = Trainer(
            model, optimizer(weights, lr=rate), accelerator, guide, task_weight=attribute_weight, seed=seed
        )
        check_data(guide, loader, place)
        history = []
        steps = _steps(epochs, loader, judge, measure_before)
        with progress_bar("", steps, show=progress, keep=True) as advance:

            def step() -> None:
                advance(description=f"epoch {number}/{epochs}")
                if on_step is not None:
                    on_step()

            for number in range(0 if measure_before and judge is not None else 1, epochs + 1):
                model.train()
                for batch in batches(loader) if number else ():
                    trainer.step([batch])
                    step()
                losses = trainer.finish_epoch() if number else Measured()
                model.eval()
                scores = Measured() if judge is None else trainer.measure(batches(judge), on_batch=step)
                history.append(
                    Epoch(number, _or_nan(losses.loss), _or_nan(losses.guidance), scores.accuracy, scores.iou)
                )
                if on_epoch is not None:
                    on_epoch(history[-1])
        trainer.optimizer.zero_grad()
    return history


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _steps(epochs: int, train: DataLoader[Any], judge: DataLoader[Any] | None, before: bool) -> int | None:
    """Number of batches in all; None for data of unknown length."""
    try:
        judged = 0 if judge is None else len(judge)
        return epochs * (len(train) + judged) + (judged if before else 0)
    except TypeError:
        return None


def prepare(
    name: str, classes: Sequence[str], *, pretrained: bool = False, checkpoint: str | Path | None = None
) -> models.LoadedModel:
    """Load a model by name and give it an output for each attribute.

    Args:
        name: Name of the model, as for [`models.load`][attnguide.models.load]: `"resnet50"`,
            `"torchvision/alexnet"`.
        classes: Names of the attributes.
        pretrained: Whether to begin with the published weights; the head is new.
        checkpoint: File of weights to begin with, for any number of classes; a new head is made only if that
            number differs.

    Returns:
        The model in evaluation mode, with the transform that its images need.

    Raises:
        InputError: If there are no classes, or the name is unknown.
        DataError: If the weights cannot be loaded.
    """
    if isinstance(classes, str) or not classes:
        raise InputError(f"classes must be a sequence of at least one name, got {classes!r}.")
    loaded = models.load(name, pretrained=pretrained, checkpoint=checkpoint)
    if len(loaded.classes) != len(classes) or checkpoint is None:
        with unseeded():
            torch.manual_seed(0)  # as what `load` makes: the same each time
            with_head(loaded.model, len(classes))
    return replace(loaded, classes=tuple(classes), multi_label=True)
