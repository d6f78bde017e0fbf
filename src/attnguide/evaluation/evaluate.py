"""Measures a classifier on a folder of images: accuracy, and where maps lie on masks, class by class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from attnguide import metrics as measures
from attnguide.capture.logits import find_logits
from attnguide.capture.model_state import evaluating
from attnguide.data.images import IMAGE_SUFFIXES, OTHER_SUFFIXES, find_images, image_size, read_image
from attnguide.errors import DataError, InputError, nearest
from attnguide.explanation import explain
from attnguide.masks.class_names import ClassNames
from attnguide.masks.folders import MaskFolder, images_in, load_template, read_mask
from attnguide.masks.inside import Inside
from attnguide.masks.legends import legend_of
from attnguide.masks.sizes import check_fit
from attnguide.metrics.faithfulness import area
from attnguide.models import LoadedModel

__all__ = [
    "COLUMNS",
    "METRICS",
    "ClassResult",
    "Evaluation",
    "ImageResult",
    "LabeledImage",
    "MaskFor",
    "Sample",
    "evaluate_folder",
    "labeled_images",
    "mask_reader",
    "measure_images",
    "preprocess_mask",
    "read_batches",
    "single_label_images",
]

#: Headings of tables for the values of a `summary`.
COLUMNS = {
    "images": "images",
    "accuracy": "accuracy",
    "masks": "masks",
    "energy": "energy in mask",
    "iou": "IoU",
    "pointing": "pointing game",
    "witness": "input gradient in mask",
    "area": "mask's area",
    "deletion": "deletion",
    "insertion": "insertion",
    "road": "ROAD",
    "confidence_change": "confidence change",
    "sensitivity": "sensitivity",
}

METRICS = ("deletion", "insertion", "road", "confidence_change", "sensitivity")
"""Measures of maps that need no mask, by name: functions of `attnguide.metrics`. They run the model often."""

#: Returns the mask of an image file and class, `(H, W)`, or None.
MaskFor = Callable[[Path, int], Tensor | None]


@dataclass(frozen=True)
class LabeledImage:
    """An image file and the class of its folder."""

    path: Path
    cls: int


@dataclass(frozen=True)
class ImageResult:
    """The results of one image.

    Attributes:
        image: The file and its class.
        predicted: The class of the highest probability.
        confidence: That probability.
        probability: The probability of the image's own class.
        scores: Its scores, see [`evaluate_folder`][attnguide.evaluation.evaluate_folder]; none
            without a mask.
    """

    image: LabeledImage
    predicted: int
    confidence: float
    probability: float
    scores: Mapping[str, float]

    @property
    def right(self) -> bool:
        """Whether the prediction is right."""
        return self.predicted == self.image.cls


@dataclass
class ClassResult:
    """The results of the images of one class, or of any other group.

    Attributes:
        images: Number of images.
        right: Number of images that were classified right.
        scores: Scores by measure: of the images that have a mask, and of all images for those that need none.
    """

    images: int = 0
    right: int = 0
    scores: dict[str, list[float]] = field(default_factory=dict)

    def add(self, record: ImageResult) -> None:
        """Add the result of an image."""
        self.images += 1
        self.right += record.right
        for name, value in record.scores.items():
            self.scores.setdefault(name, []).append(value)

    @property
    def masked(self) -> int:
        """Number of images that have a mask."""
        return len(self.scores.get("area", []))

    def summary(self) -> dict[str, float | int | None]:
        """Return counts, accuracy and mean scores; None for the mean of no images."""
        return {
            "images": self.images,
            "accuracy": self.right / self.images if self.images else None,
            "masks": self.masked,
            **{name: _mean(values) for name, values in self.scores.items()},
        }


@dataclass
class Evaluation:
    """The results of a model.

    Attributes:
        classes: Results by name of the class, in the order of the logits.
        failures: Files that could not be read, with the reason.
        empty: Files whose mask has no pixel inside, or none after the crop; they count as without a mask.
    """

    classes: dict[str, ClassResult]
    failures: dict[Path, str] = field(default_factory=dict)
    empty: list[Path] = field(default_factory=list)

    @property
    def whole(self) -> ClassResult:
        """All images together."""
        together = ClassResult()
        for result in self.classes.values():
            together.images += result.images
            together.right += result.right
            for name, values in result.scores.items():
                together.scores.setdefault(name, []).extend(values)
        return together

    @property
    def balanced(self) -> dict[str, float | None]:
        """Means over the classes: each counts the same, however many images it has."""
        rows = [result.summary() for result in self.classes.values() if result.images]
        names = dict.fromkeys(name for row in rows for name in row if name not in ("images", "masks"))
        return {name: _mean([row[name] for row in rows if row.get(name) is not None]) for name in names}

    @property
    def worst(self) -> tuple[str, float]:
        """The class of the lowest accuracy, and that accuracy."""
        accuracy = {
            name: result.right / result.images for name, result in self.classes.items() if result.images
        }
        name = min(accuracy, key=lambda key: accuracy[key])
        return name, accuracy[name]


def _mean(values: Sequence[Any]) -> float | None:
    return sum(values) / len(values) if values else None


def single_label_images(loaded: LoadedModel, root: Path) -> tuple[LoadedModel, list[LabeledImage]]:
    """List the images of a folder that has a subfolder for each class of a model.

    Args:
        loaded: A model that gives each image one class.
        root: The folder.

    Returns:
        The model, with the names of the subfolders for its classes if they had none, and the images.

    Raises:
        InputError: If the model is multi-label, or the folder does not fit it; see
            [`labeled_images`][attnguide.evaluation.labeled_images].
        DataError: If there is no image.
    """
    if loaded.multi_label:
        raise InputError(
            f"{loaded.name} is multi-label; a folder for each class needs a model that gives each image one "
            "class. Name it: --model NAME."
        )
    named = not all(name == f"class {index}" for index, name in enumerate(loaded.classes))
    images = labeled_images(root, loaded.classes, named=named)
    if not named:
        folders = {image.cls: image.path.relative_to(root).parts[0] for image in images}
        loaded = loaded.renamed([folders.get(index, name) for index, name in enumerate(loaded.classes)])
    return loaded, images


def labeled_images(root: Path, classes: Sequence[str], *, named: bool) -> list[LabeledImage]:
    """List the images of a folder that has a subfolder for each class.

    Args:
        root: The folder.
        classes: Names of the model's classes.
        named: Whether the names are known. If so, subfolders are found by name, in any case, and with `_` or
            spaces; else they are the classes in the order of torchvision's `ImageFolder`.

    Raises:
        InputError: If there is no such folder, its subfolders are not the classes, or two classes have one
            name.
        DataError: If there is no image.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder. Give the one that holds a subfolder for each class.")
    folders = sorted(
        (path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")),
        key=lambda path: path.name,  # as torchvision's ImageFolder, which numbered them for the training
    )
    if not folders:
        raise InputError(
            f"{root} has no subfolder. It must hold one for each class, with the class's images."
        )
    if named:
        names = ClassNames(classes)
        chosen = [names.get(folder.name, folder) for folder in folders]
        for name in chosen:
            if classes.count(name) > 1:
                raise InputError(
                    f"two classes of the model are called {name!r}. Give them names: --class-names."
                )
        indices = [classes.index(name) for name in chosen]
    elif len(folders) == len(classes):
        indices = list(range(len(classes)))
    else:
        raise InputError(
            f"{root} has {len(folders)} subfolders, but the model has {len(classes)} classes, whose names "
            "are not known. Give them: --class-names FILE."
        )
    images = [
        LabeledImage(path, cls)
        for folder, cls in zip(folders, indices, strict=True)
        # A class of which no image can be read, by its format, is an error of `find_images`, not left out.
        if any(path.suffix.lower() in IMAGE_SUFFIXES | OTHER_SUFFIXES for path in folder.rglob("*"))
        for path in find_images([folder])
    ]
    if not images:
        raise DataError(f"{root}: its subfolders hold no image.")
    return images


def mask_reader(
    masks: Path | None,
    classes: Sequence[str],
    images: Iterable[tuple[Path, int]] = (),
    *,
    inside: Inside | None = None,
) -> MaskFor:
    """Return a function that finds the mask of an image.

    Args:
        masks: An image, the mask of all images, or of several classes if it has a legend; a folder with an
            image for each class, named like it, a template; or a folder with masks for single images, see
            [`MaskFolder`][attnguide.masks.MaskFolder]. None without masks.
        classes: Names of the model's classes.
        images: Files and classes of all images, to find masks that would serve several of them.
        inside: Values that are inside; see [`read_mask`][attnguide.masks.read_mask].

    Returns:
        The function. It raises `DataError` for a mask that cannot be read or has other proportions than its
        image.

    Raises:
        DataError: If a mask for all images cannot be read, one mask belongs to several images, or the masks
            are the images themselves.
        InputError: If there is no such file, or there are values inside but no masks.
    """
    if masks is None:
        if inside is not None:
            raise InputError("--inside says what masks mean, but there are none. Give --masks.")
        return lambda _path, _cls: None
    if not masks.exists():
        raise InputError(f"{masks} does not exist. Give a mask, or a folder of masks.")
    files = images_in(masks) if masks.is_dir() else []
    names = ClassNames(classes)
    if files and all(names.find(file.stem) is not None for file in files):
        return _of_template(masks, load_template(masks, classes, inside=inside).masks)
    if files or masks.is_dir():
        return _of_folder(MaskFolder(masks, classes, inside=inside), classes, images)
    if inside is None and legend_of(masks) is not None:
        return _of_template(masks, load_template(masks, classes).masks)
    mask = read_mask(masks, inside=inside)
    if not mask.any():
        raise DataError(f"{masks} has no pixel inside. Paint the region white, or say what it is: --inside.")
    return _of_template(masks, mask.expand(len(classes), -1, -1))


def _of_template(file: Path, masks: Tensor) -> MaskFor:
    def mask_for(path: Path, cls: int) -> Tensor | None:
        mask = masks[cls]
        if bool(mask.isnan().all()):
            return None
        check_fit(mask.shape, image_size(path), file, path)
        return mask

    return mask_for


def _of_folder(folder: MaskFolder, classes: Sequence[str], images: Iterable[tuple[Path, int]]) -> MaskFor:
    for image, cls in images:
        folder.claim(image, classes[cls])

    def mask_for(path: Path, cls: int) -> Tensor | None:
        mask, file = folder.get_class(path, classes[cls]), folder.file(path, classes[cls])
        if mask is not None:
            check_fit(mask.shape, image_size(path), file, path)
        return mask

    return mask_for


def evaluate_folder(
    loaded: LoadedModel,
    images: Sequence[LabeledImage],
    mask_for: MaskFor,
    *,
    source: str = "grad_cam",
    layer: str | list[str] = "auto",
    threshold: float = 0.5,
    batch_size: int = 32,
    device: torch.device | None = None,
    advance: Callable[[int], None] = lambda count: None,
    metrics: Sequence[str] = (),
) -> Evaluation:
    """Classify images, and compare the maps with masks.

    Masks go through the model's own preprocessing, so that they are cropped and resized as the images are.

    Args:
        loaded: The model.
        images: The files.
        mask_for: Returns the mask of an image.
        source: Attribution source.
        layer: Layer to explain.
        threshold: Threshold of the IoU.
        batch_size: Number of images at once.
        device: Device of the model; by default the one it is on.
        advance: Called with the number of images that are done.
        metrics: Names of further measures, of [`METRICS`][attnguide.evaluation.METRICS].

    Returns:
        Counts and scores of each class. Scores are of the true class's map: `energy`, `iou`, `pointing`, and
        `witness`, the energy of the gradient of the images, which guidance at a layer does not optimise.

    Raises:
        InputError: If a further measure is unknown, or its library is not installed.
    """
    for name in metrics:
        if name not in METRICS:
            raise InputError(f"metric {name!r} is unknown.{nearest(name, METRICS)}")
    result = Evaluation({name: ClassResult() for name in loaded.classes})
    records = measure_images(
        [loaded],
        images,
        mask_for,
        result.failures,
        result.empty,
        source=source,
        layer=layer,
        threshold=threshold,
        batch_size=batch_size,
        device=device,
        advance=advance,
        metrics=metrics,
    )
    for (record,) in records:
        result.classes[loaded.classes[record.image.cls]].add(record)
    return result


def measure_images(
    models: Sequence[LoadedModel],
    images: Sequence[LabeledImage],
    mask_for: MaskFor,
    failures: dict[Path, str],
    empty: list[Path],
    *,
    source: str = "grad_cam",
    layer: str | list[str] = "auto",
    threshold: float = 0.5,
    batch_size: int = 32,
    device: torch.device | None = None,
    advance: Callable[[int], None] = lambda count: None,
    metrics: Sequence[str] = (),
) -> Iterator[tuple[ImageResult, ...]]:
    """Measure models on the same images, each of which is read once.

    Args:
        models: Models with the same classes and preprocessing.
        images: The files.
        mask_for: Returns the mask of an image.
        failures: Dictionary to which files that cannot be read are added, with the reason.
        empty: List to which files are added whose mask has no pixel inside; they then have none.
        source: Attribution source.
        layer: Layer to explain.
        threshold: Threshold of the IoU.
        batch_size: Number of images at once.
        device: Device of the models; by default that of the first.
        advance: Called with the number of images that are done.
        metrics: Names of further measures.

    Yields:
        The result of each model, for each image that could be read, in order.
    """
    device = device or next(models[0].model.parameters()).device
    for loaded in models:
        loaded.model.to(device)
    for batch in read_batches(
        models[0], images, mask_for, failures, empty, batch_size=batch_size, advance=advance
    ):
        pixels = torch.stack([sample.pixels for sample in batch]).to(device)
        results = [_measured(loaded, batch, pixels, source, layer, threshold, metrics) for loaded in models]
        yield from zip(*results, strict=True)


@dataclass(frozen=True)
class Sample:
    """An image that was read.

    Attributes:
        image: The file and its class.
        pixels: Pixels after the model's preprocessing, `(3, H, W)`.
        mask: Mask, cropped and resized as the image, `(H, W)`; None where there is none.
    """

    image: LabeledImage
    pixels: Tensor
    mask: Tensor | None


def read_batches(
    loaded: LoadedModel,
    images: Sequence[LabeledImage],
    mask_for: MaskFor,
    failures: dict[Path, str],
    empty: list[Path],
    *,
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[list[Sample]]:
    """Read and preprocess images and their masks, batch by batch.

    Args:
        loaded: The model.
        images: The files.
        mask_for: Returns the mask of an image.
        failures: Dictionary to which files that cannot be read are added, with the reason.
        empty: List to which files are added whose mask has no pixel inside; they then have none.
        batch_size: Number of images at once.
        advance: Called with the number of images that are done.
    """
    batch: list[Sample] = []
    for image in images:
        try:
            picture, mask = read_image(image.path), mask_for(image.path, image.cls)
            pixels = loaded.prepared(picture, image.path)
            cropped = None if mask is None else preprocess_mask(loaded, mask, picture.size)
            if cropped is not None and not bool(cropped.any()):
                empty.append(image.path)
                cropped = None
            batch.append(Sample(image, pixels, cropped))
        except DataError as error:
            failures[image.path] = str(error)
        if len(batch) == batch_size:
            yield batch
            batch = []
        advance(1)
    if batch:
        yield batch


def preprocess_mask(loaded: LoadedModel, mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Apply a model's preprocessing to a mask.

    Args:
        loaded: The model.
        mask: `(H, W)` in [0, 1], of the image's proportions.
        size: Width and height of the image.

    Returns:
        `(H, W)` in [0, 1], cropped and resized as the image is.

    Raises:
        DataError: If the mask has other proportions than the image.
    """
    check_fit(mask.shape, size[::-1], "the mask", "its image")
    picture = Image.fromarray((mask.clamp(0, 1) * 255).round().byte().numpy())
    picture = picture.resize(size, Image.Resampling.BILINEAR).convert("RGB")
    return loaded.displayed(loaded.transform(picture)[None])[0, 0]


def _measured(
    loaded: LoadedModel,
    batch: Sequence[Sample],
    pixels: Tensor,
    source: str,
    layer: str | list[str],
    threshold: float,
    further: Sequence[str] = (),
) -> list[ImageResult]:
    classes = [sample.image.cls for sample in batch]
    logits = pixels.new_empty(len(batch), len(loaded.classes))
    scores: list[dict[str, float]] = [{} for _ in batch]
    with_mask = [number for number, sample in enumerate(batch) if sample.mask is not None]
    without = [number for number, sample in enumerate(batch) if sample.mask is None]
    if without:
        with torch.no_grad(), evaluating(loaded.model):
            logits[without] = find_logits(loaded.model(pixels[without])).to(logits)
    if with_mask:
        masks = torch.stack([sample.mask for sample in batch if sample.mask is not None]).to(pixels.device)
        own = [(row, classes[number]) for row, number in enumerate(with_mask)]
        shown = explain(loaded.model, pixels[with_mask], source, own, layer)
        logits[with_mask], maps = shown.logits.to(logits), shown.maps[:, 0]
        witness = explain(loaded.model, pixels[with_mask], "input_gradient", own).maps[:, 0]
        found = {
            "energy": measures.energy_in_mask(maps, masks),
            "iou": measures.iou(maps, masks, threshold=threshold),
            "pointing": measures.pointing_game(maps, masks),
            "witness": measures.energy_in_mask(witness, masks),
            "area": masks.mean(dim=(1, 2)),
        }
        for name, values in found.items():
            for number, value in zip(with_mask, values.tolist(), strict=True):
                scores[number][name] = value
    for name, values in _without_masks(loaded, pixels, classes, source, layer, further).items():
        for score, value in zip(scores, values.tolist(), strict=True):
            score[name] = value
    probabilities, predicted = loaded.probabilities(logits), logits.argmax(dim=1)
    chosen = torch.stack([predicted, torch.tensor(classes, device=pixels.device)], dim=1)
    pairs = probabilities.gather(1, chosen).tolist()
    return [
        ImageResult(sample.image, cls, confidence, probability, score)
        for sample, cls, (confidence, probability), score in zip(
            batch, predicted.tolist(), pairs, scores, strict=True
        )
    ]


def _without_masks(
    loaded: LoadedModel,
    pixels: Tensor,
    classes: Sequence[int],
    source: str,
    layer: str | list[str],
    names: Sequence[str],
) -> dict[str, Tensor]:
    """Measure the maps of the true classes by measures that need no mask; each `(B,)`."""
    if not names:
        return {}
    cls = torch.tensor(classes, device=pixels.device)
    model, results = loaded.model, {}
    maps = explain(model, pixels, source, list(enumerate(classes)), layer).maps[:, 0]
    for name in names:
        if name == "sensitivity":
            results[name] = measures.sensitivity(model, pixels, cls, source, layer)
        elif name in ("deletion", "insertion"):
            curves = getattr(measures, name)(model, pixels, maps, cls)
            results[name] = area(curves)
        else:
            results[name] = getattr(measures, name)(model, pixels, maps, cls)
    return results
