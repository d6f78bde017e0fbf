"""Fine-tunes a pretrained classifier of several attributes towards painted regions.

```python
loaded = prepare("torchvision/alexnet", ["Wearing_Lipstick", "Heavy_Makeup"], pretrained=True)
data = CelebA(root, attributes=loaded.classes, transform=loaded.transform)
history = finetune(loaded.model, data, template="regions/", classes=loaded.classes)
```

The loss is that of arXiv 1905.00593: w_a · binary cross entropy + w_g · (−ln IoU).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, IterableDataset

from attnguide import functional, models
from attnguide.capture.calls import find_logits
from attnguide.capture.model_state import evaluating
from attnguide.data.procedural.faces import FaceSample
from attnguide.errors import DataError, GuidanceError, InputError
from attnguide.guiding.guide import Guide
from attnguide.masks.class_names import Size, as_size
from attnguide.masks.folders import MaskFolder, Template, load_template
from attnguide.pairs import IGNORE_INDEX
from attnguide.parts.recipe import Recipe, load_recipe
from attnguide.priors.mask import MaskPrior

__all__ = ["Epoch", "WithMasks", "finetune", "prepare", "with_head"]


@dataclass(frozen=True)
class Epoch:
    """What one epoch brought.

    Attributes:
        number: From 1; 0 for what there was before the training.
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
    """Fine-tune a classifier so that it predicts attributes from where they are.

    Data are batches, or single samples of a data set, of `(image, attributes)` or `(image, attributes,
    mask)`: images as the model expects them, attributes multi-hot with NaN or −100 for an unknown label, and
    masks as [`MaskPrior`][attnguide.priors.MaskPrior] takes them. Samples of `ProceduralFaces` are fine
    as they are. Where each image has one class, its index (a whole number, −100 if unknown) stands for the
    attributes, and the loss is the softmax's cross entropy.

    The model is trained in place, in training mode. When the function ends, however it ends, nothing is
    attached to the model, and its modules have the training flags that they had.

    Args:
        model: A classifier with one logit for each attribute; [`with_head`]
            [attnguide_gradcam_iou.finetune.with_head] makes one.
        train: Data set or loader. A data set is shuffled; give a loader for worker processes.
        template: Regions that hold for every image: `(K, H, W)` or `(H, W)` in [0, 1], NaN for a class that
            has none, or a path for [`load_template`][attnguide.masks.load_template]. If None, the
            data give masks.
        validation: Measured after each epoch.
        classes: Names of the attributes, to read a template; by default the data set's `classes`.
        recipe: A recipe's name or TOML file. Its `[guide]` says how to guide, its `[train]` gives `epochs`,
            `learning_rate` and `batch_size`, unless they are given here.
        epochs: How often to go through the data.
        learning_rate: Passed to the optimiser.
        batch_size: Images at once; not with loaders, which have their own.
        attribute_weight: w_a.
        guidance_weight: w_g; the recipe's weight if None. 0 measures without guiding.
        optimizer: Called as `optimizer(parameters, lr=learning_rate)` with the list of the parameters that
            require a gradient.
        device: Where to train; the model moves there and stays. By default where it is.
        amp: Compute in bfloat16 where that is safe.
        seed: Of the order of the images, and of whatever is random in the model and the data. The random
            state of the process stays as it is.
        progress: Show a progress bar on stderr.
        on_epoch: Called after each epoch.
        measure_before: Measure the validation data before the training, too; an entry of number 0.
        on_step: Called after each batch, of training and validation. What it raises ends the training.

    Returns:
        One entry for each epoch.

    Raises:
        InputError: If an argument or the data have a wrong form, or there are no regions.
        GuidanceError: If the guidance reaches no weight, which is tried before the first step, or a loss is
            not finite.
        DataError: If the template cannot be read.
        UnknownNameError: If the recipe or a class of the template is unknown.
    """
    settings = load_recipe(recipe)
    epochs = _whole("epochs", epochs, settings)
    rate = _setting("learning_rate", learning_rate, settings)
    if not (math.isfinite(attribute_weight) and attribute_weight >= 0):
        raise InputError(f"attribute_weight={attribute_weight} must be a finite number of at least 0.")
    if not any(weight.requires_grad for weight in model.parameters()):
        raise InputError("every parameter of the model is frozen. Set requires_grad on those to be trained.")
    loader = _loader(train, "train", batch_size, settings, seed)
    judge = None if validation is None else _loader(validation, "validation", batch_size, settings)
    arguments = _arguments(settings, template, classes, loader.dataset, guidance_weight)
    place = torch.device(device) if device is not None else next(iter(model.parameters())).device
    # Used for what it does at its end: it restores the training flag of every module.
    with ExitStack() as stack:
        stack.enter_context(_seeded(seed, place))
        stack.enter_context(evaluating(model))
        if _has_classes(loader, place):
            # Classes of a softmax exclude each other: the true one is looked for, and nothing else.
            arguments |= {"targets": "labels", "evidence": "logit"}
        guide = stack.enter_context(Guide(model.to(place), **arguments))
        trainer = _Trainer(model, guide, place, amp)
        trainer.check(loader)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimiser = optimizer(weights, lr=rate)
        history = []
        with _bar(progress, epochs, loader, judge, measure_before) as advance:

            def step(epoch: int) -> None:
                advance(epoch)
                if on_step is not None:
                    on_step()

            for number in range(0 if measure_before and judge is not None else 1, epochs + 1):
                losses = (math.nan, math.nan)
                if number:
                    losses = trainer.train(loader, optimiser, attribute_weight, number, step)
                scores = (None, None) if judge is None else trainer.validate(judge, number, step)
                history.append(Epoch(number, *losses, *scores))
                if on_epoch is not None:
                    on_epoch(history[-1])
        optimiser.zero_grad()
    return history


# ------------------------------------------------------------------ the model


def prepare(
    name: str, classes: Sequence[str], *, pretrained: bool = False, checkpoint: str | Path | None = None
) -> models.LoadedModel:
    """Load a model by name and give it an output for each attribute.

    Args:
        name: As for [`models.load`][attnguide.models.load]: `"resnet50"`, `"torchvision/alexnet"`.
        classes: Names of the attributes.
        pretrained: Begin with the published weights; the head is new.
        checkpoint: Begin with the weights in a file, whatever number of classes they are for; a new head is
            made only if that number differs.

    Returns:
        The model in evaluation mode, with the transform that its images need.

    Raises:
        InputError: If there are no classes, or the name is unknown.
        DataError: If the weights cannot be had.
    """
    if isinstance(classes, str) or not classes:
        raise InputError(f"classes must be a sequence of at least one name, got {classes!r}.")
    loaded = models.load(name, pretrained=pretrained, checkpoint=checkpoint)
    if len(loaded.classes) != len(classes) or checkpoint is None:
        with _seeded(0, torch.device("cpu")):  # as what `load` makes: the same each time
            with_head(loaded.model, len(classes))
    return replace(loaded, classes=tuple(classes), multi_label=True)


def with_head(model: nn.Module, classes: int) -> nn.Module:
    """Replace a classifier's head by a fresh one.

    A model of timm knows its head. Of any other model it is the last linear layer or convolution among its
    modules.

    Args:
        model: Any classifier; it is changed in place.
        classes: Number of outputs.

    Returns:
        The same model.

    Raises:
        InputError: If the number is not positive, or no head is found.
    """
    if classes < 1:
        raise InputError(f"classes={classes} must be at least 1.")
    reset = getattr(model, "reset_classifier", None)
    if callable(reset):
        reset(classes)
        return model
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _Heads)]
    if not layers or not layers[-1][0]:
        raise InputError(
            f"{type(model).__name__} contains no linear layer or convolution that could be its head. Replace "
            "the head yourself."
        )
    name, old = layers[-1]
    new: nn.Module
    bias = old.bias is not None
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, classes, bias)
    else:
        new = nn.Conv2d(old.in_channels, classes, 1, bias=bias)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new.to(old.weight).train(old.training))
    return model


_Heads = (nn.Linear, nn.Conv2d)


# ------------------------------------------------------------------- the data


class WithMasks(Dataset[tuple[Any, Any, Tensor]]):
    """Adds a painted mask to each sample of a data set: `(image, attributes, mask)`.

    The images' transform may resize whole images, but not crop or turn them: the mask does not follow.

    Args:
        data: Gives `(image, attributes)`.
        folder: Masks, as for [`MaskFolder`][attnguide.masks.MaskFolder].
        size: Size of the masks, best that of the images.
        classes: Names of the attributes, for masks of single classes; None for masks of whole images.
        names: File name of each image; by default the data set's `filename`, which CelebA has.

    Raises:
        InputError: If there is not one name for each sample.
        DataError: If no image has a mask.
    """

    def __init__(
        self,
        data: Any,
        folder: str | Path,
        size: Size,
        classes: Sequence[str] | None = None,
        names: Sequence[str | Path] | None = None,
    ) -> None:
        self.data, self.masks = data, MaskFolder(folder, classes, size)
        self.classes = None if classes is None else tuple(classes)
        self.names = list(getattr(data, "filename", ()) if names is None else names)
        if len(self.names) != len(data):
            raise InputError(
                f"there are {len(self.names)} names for {len(data)} samples. Give names=, the file name of "
                "each image."
            )
        if not any(name in self.masks for name in self.names):
            raise DataError(
                f"{folder} holds masks, but for none of the images, such as {self.names[0]}. Name each mask "
                "like its image."
            )
        shape = as_size(size) if classes is None else (len(classes), *as_size(size))
        self._missing = torch.full(shape, torch.nan)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, Any, Tensor]:
        """Return a sample with its mask; all NaN if it has none."""
        image, attributes = self.data[index]
        mask = self.masks.get(self.names[index])
        return image, attributes, self._missing if mask is None else mask


class _Batch(NamedTuple):
    """Images `(B, C, H, W)`; attributes; masks as `MaskPrior` takes them.

    Attributes are floats `(B, K)`, NaN where unknown, or classes `(B,)`, −100 where unknown.
    """

    images: Tensor
    attributes: Tensor
    masks: Any = None

    @property
    def annotations(self) -> dict[str, Any]:
        return {} if self.masks is None else {"mask": self.masks}

    @property
    def painted(self) -> bool:
        """Whether any sample has a mask of its own. NaN and −1 mean "none"."""
        if isinstance(self.masks, Tensor):
            return bool((self.masks >= 0).any())
        return self.masks is not None and any(mask is not None for mask in self.masks)


def _batches(loader: DataLoader[Any], device: torch.device) -> Iterator[_Batch]:
    for batch in loader:
        parts = batch[:2] if isinstance(batch, FaceSample) else batch
        if not isinstance(parts, (tuple, list)) or len(parts) not in (2, 3):
            got = f"{len(parts)} parts" if isinstance(parts, (tuple, list)) else type(parts).__name__
            raise InputError(
                f"the data give {got}, expected (image, attributes) or (image, attributes, mask)."
            )
        images, attributes = parts[0], parts[1]
        if not isinstance(images, Tensor) or images.ndim != 4 or not isinstance(attributes, Tensor):
            raise InputError(
                f"the data give {_kind(images)} and {_kind(attributes)}, expected images (B, C, H, W) and "
                "attributes (B, K) as tensors. Does the data set lack a transform?"
            )
        attributes = attributes.as_subclass(Tensor)
        if attributes.ndim != 1 or attributes.is_floating_point() or attributes.dtype == torch.bool:
            attributes = attributes.float()
            attributes = attributes[:, None] if attributes.ndim == 1 else attributes
            attributes = attributes.masked_fill(attributes == IGNORE_INDEX, torch.nan)
        moved = images.as_subclass(Tensor).to(device, non_blocking=True)
        yield _Batch(moved, attributes.to(device, non_blocking=True), *parts[2:])


def _has_classes(loader: DataLoader[Any], device: torch.device) -> bool:
    """Whether the data give a class for each image, and not attributes."""
    first = next(_batches(loader, device), None)
    return first is not None and first.attributes.ndim == 1


def _kind(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _loader(
    data: Any, name: str, batch_size: int | None, recipe: Recipe, seed: int | None = None
) -> DataLoader[Any]:
    """Make a loader of a data set, shuffled if there is a seed."""
    if isinstance(data, DataLoader):
        if batch_size is not None:
            raise InputError(f"{name} is a loader and has a batch size of its own. Leave out batch_size=.")
        return data
    size = _whole("batch_size", batch_size, recipe)
    if isinstance(data, IterableDataset):
        return DataLoader(data, size)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or not len(data):
        raise InputError(f"{name} must be a data set of at least one sample or a DataLoader, got {data!r}.")
    if seed is None:
        return DataLoader(data, size)
    # Batch normalisation cannot train on a single image.
    single = len(data) > size and len(data) % size == 1
    return DataLoader(
        data, size, shuffle=True, drop_last=single, generator=torch.Generator().manual_seed(seed)
    )


# --------------------------------------------------------------- the settings


def _setting(name: str, given: float | None, recipe: Recipe) -> Any:
    """Return an argument, or else the recipe's: a number above 0."""
    value = recipe.train.get(name) if given is None else given
    where = f"{name}={value!r}" + (f" of recipe {recipe.name!r}" if given is None else "")
    if value is None:
        raise InputError(f"recipe {recipe.name!r} has no {name} in [train]. Give {name}=.")
    if not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise InputError(f"{where} must be a number above 0.")
    return value


def _whole(name: str, given: int | None, recipe: Recipe) -> int:
    value = _setting(name, given, recipe)
    if not isinstance(value, int):
        raise InputError(f"{name}={value!r} must be a whole number.")
    return value


def _arguments(
    recipe: Recipe,
    template: Tensor | Template | str | Path | None,
    classes: Sequence[str] | None,
    data: object,
    weight: float | None,
) -> dict[str, Any]:
    """Arguments of the guide: the recipe's, with the template as prior."""
    arguments = {"prior": "mask", **recipe.guide}
    if weight is not None:
        arguments["weight"] = weight
    if template is None:
        return arguments
    if isinstance(template, (str, Path)):
        classes = getattr(data, "classes", None) if classes is None else classes
        if classes is None:
            raise InputError(f"{template} can only be read with the names of the attributes. Give classes=.")
        template = load_template(template, classes)
    masks = template.masks if isinstance(template, Template) else template
    arguments["prior"] = MaskPrior(masks)
    if arguments.get("targets") == "all" and masks.ndim == 3 and bool(masks.isnan().all()):
        raise InputError("the template has no region: every class is NaN. Paint at least one.")
    return arguments


# --------------------------------------------------------------- the training


@dataclass(frozen=True)
class _Trainer:
    model: nn.Module
    guide: Guide
    device: torch.device
    amp: bool

    @property
    def has_template(self) -> bool:
        prior = self.guide.terms[0].prior
        return isinstance(prior, MaskPrior) and prior.template is not None

    @property
    def needs_masks(self) -> bool:
        prior = self.guide.terms[0].prior
        return prior == "mask" or (isinstance(prior, MaskPrior) and prior.template is None)

    def check(self, loader: DataLoader[Any]) -> None:
        """Refuse data that do not fit the model, and a guidance that arrives at no weight."""
        for batch in _batches(loader, self.device):
            if batch.masks is not None and self.has_template:
                raise InputError("the data give masks, and there is a template too. Give one of them.")
            if batch.masks is None and self.needs_masks:
                raise InputError(
                    "there are no regions to look at. Give template=, or data of (image, attributes, mask)."
                )
            if self.needs_masks and not batch.painted:
                continue  # masks may be rare
            with torch.no_grad(), evaluating(self.model):
                count = find_logits(self.model(batch.images)).shape[1]
            if batch.attributes.ndim == 1 and int(batch.attributes.max()) >= count:
                raise InputError(
                    f"the data give class {int(batch.attributes.max())}, but the model has {count} outputs. "
                    f"Give it a head: with_head(model, {int(batch.attributes.max()) + 1})."
                )
            if batch.attributes.ndim == 2 and batch.attributes.shape[1] != count:
                raise InputError(
                    f"attributes have shape {tuple(batch.attributes.shape)}, but the model has {count} "
                    f"outputs. Give it a head: with_head(model, {batch.attributes.shape[-1]})."
                )
            if any(term.weight > 0 for term in self.guide.terms):
                self.guide.check(batch.images, batch.attributes, **batch.annotations)
            return
        raise InputError("no sample of the training data has a mask, or there is no sample.")

    def train(
        self,
        loader: DataLoader[Any],
        optimiser: Optimizer,
        attribute_weight: float,
        epoch: int,
        step: Callable[[int], None],
    ) -> tuple[float, float]:
        """Go through the data once; mean attribute loss, and mean guidance loss of the pairs."""
        self.model.train()
        attribute, guidance = _Mean(), _Mean()
        for number, batch in enumerate(_batches(loader, self.device), 1):
            logits = self._forward(batch)
            cross_entropy = _cross_entropy(logits, batch.attributes)
            guided = self.guide.loss(batch.attributes, **batch.annotations)
            self._check_finite(cross_entropy, guided, epoch, number)
            optimiser.zero_grad()
            (attribute_weight * cross_entropy + guided).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            attribute.add(cross_entropy.detach()[None])
            guidance.add(self.guide.records()[0].losses)
            step(epoch)
        return attribute.value, guidance.value

    def validate(
        self, loader: DataLoader[Any], epoch: int, step: Callable[[int], None]
    ) -> tuple[float, float | None]:
        """Share of labels predicted right, and mean soft IoU."""
        self.model.eval()
        right, overlap = _Mean(), _Mean()
        measured = False
        for batch in _batches(loader, self.device):
            masked = batch.masks is not None or not self.needs_masks
            # Grad-CAM needs a graph.
            with torch.set_grad_enabled(masked):
                logits = self._forward(batch)
                right.add(_right(logits, batch.attributes))
                if masked:
                    self.guide.loss(batch.attributes, **batch.annotations)
                    seen = self.guide.records()[0]
                    overlap.add((-functional.iou_loss(seen.maps, seen.prior)).exp())
                    measured = True
            step(epoch)
        return right.value, overlap.value if measured else None

    def _forward(self, batch: _Batch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return find_logits(self.model(batch.images)).float()

    def _check_finite(self, attribute: Tensor, guided: Tensor, epoch: int, step: int) -> None:
        if bool(torch.isfinite(attribute + guided)):
            return
        raise GuidanceError(
            f"the loss is not finite in epoch {epoch}, step {step}: attribute loss {attribute.item():g}, "
            f"guidance loss {guided.item():g}. Lower learning_rate= or the weights, look for NaN or infinity "
            "in the images and the model, or leave out amp=."
        )


def _cross_entropy(logits: Tensor, attributes: Tensor) -> Tensor:
    """Mean over what is known."""
    if attributes.ndim == 1:
        known = attributes != IGNORE_INDEX
        total = F.cross_entropy(logits, attributes, ignore_index=IGNORE_INDEX, reduction="sum")
    else:
        known = ~attributes.isnan()
        total = F.binary_cross_entropy_with_logits(
            logits, attributes.nan_to_num(), weight=known.float(), reduction="sum"
        )
    return total / known.sum().clamp(min=1)


def _right(logits: Tensor, attributes: Tensor) -> Tensor:
    """For each label that is known, whether it was predicted."""
    if attributes.ndim == 1:
        return (logits.argmax(dim=1) == attributes)[attributes != IGNORE_INDEX]
    return ((logits > 0) == (attributes > 0.5))[~attributes.isnan()]


class _Mean:
    """A running mean that asks nothing of the device before its end."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0

    def add(self, values: Tensor) -> None:
        self._sum = self._sum + values.float().sum()
        self._count += values.numel()

    @property
    def value(self) -> float:
        return float(self._sum) / self._count if self._count else math.nan


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Make what is random the same each time, and restore the state of the random numbers."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _bar(
    shown: bool, epochs: int, train: DataLoader[Any], judge: DataLoader[Any] | None, before: bool
) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr, or nothing; gives what is to be called, with the epoch, at each step."""
    if not shown:
        yield lambda epoch: None
        return
    from rich.console import Console
    from rich.progress import Progress

    try:
        judged = 0 if judge is None else len(judge)
        total = epochs * (len(train) + judged) + (judged if before else 0)
    except TypeError:  # data of unknown length
        total = None
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda epoch: progress.update(task, advance=1, description=f"epoch {epoch}/{epochs}")
