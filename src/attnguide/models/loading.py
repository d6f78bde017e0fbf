"""Classifiers by name: timm's, torchvision's, and the small one that comes with the library.

A classifier comes with all that it takes to use it on a file: preprocessing, class names, and how to undo the
normalisation so that a map can be drawn on the image as the model saw it.
"""

from __future__ import annotations

import difflib
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attnguide.data.files import atomic_write, check_file
from attnguide.data.images import read_image
from attnguide.errors import DataError, InputError
from attnguide.models import networks
from attnguide.models.checkpoints import load_into, read_weights

__all__ = ["EMBEDDED", "LoadedModel", "embedded", "load", "write_embedded"]

#: The classifier that comes with the library.
EMBEDDED = Path(__file__).parent / "faces.safetensors"
TORCHVISION = "torchvision/"

#: Seconds to wait for a hub, where its client would wait and try again for minutes.
_PATIENCE = 5.0
#: Resizing the short side of a longer image would make the long one enormous.
_MAX_ASPECT = 50


@dataclass(frozen=True)
class LoadedModel:
    """A classifier with all that it takes to use it on files.

    Attributes:
        model: The classifier, in evaluation mode, on the CPU at first.
        classes: Name of each class.
        transform: Turns an RGB image into what the model expects, `(3, H, W)`.
        mean: What the transform subtracts from each channel of an image in [0, 1].
        std: What it divides by afterwards.
        multi_label: Whether each class is a question of its own (sigmoid), or they exclude each other
            (softmax).
        name: What it is called, as in `load`.
        size: Rows and columns `(H, W)` of what the transform gives.
        weights: Where the weights come from.
    """

    model: nn.Module
    classes: tuple[str, ...]
    transform: Callable[[Image.Image], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    multi_label: bool
    name: str
    size: tuple[int, int]
    weights: Literal["random", "pretrained", "checkpoint", "embedded"]

    def read(self, path: str | Path) -> Tensor:
        """Read an image file as the model expects it, `(3, H, W)`.

        Raises:
            DataError: If it cannot be read, or is too elongated to be resized.
        """
        return self.prepared(read_image(path), path)

    def prepared(self, image: Image.Image, path: str | Path) -> Tensor:
        """Turn an image that was read into what the model expects, `(3, H, W)`.

        Args:
            image: Upright RGB, as [`read_image`][attnguide.data.read_image] gives it.
            path: Where it came from, for the error.

        Raises:
            DataError: If it is too elongated to be resized.
        """
        if max(image.size) > _MAX_ASPECT * min(image.size):
            raise DataError(
                f"{path} is {image.width}×{image.height} pixels, more than {_MAX_ASPECT} times as long as "
                "wide. Crop it."
            )
        return self.transform(image)

    def renamed(self, classes: Sequence[str]) -> LoadedModel:
        """The same with other names of classes.

        Raises:
            InputError: If their number is another.
        """
        return replace(self, classes=_checked(classes, self))

    def displayed(self, images: Tensor) -> Tensor:
        """Undo the normalisation: the images `(B, 3, H, W)` as the model saw them, in [0, 1]."""
        mean, std = (images.new_tensor(value)[:, None, None] for value in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn logits `(B, K)` into probabilities: softmax, or sigmoid for multi-label or one logit."""
        logits = logits.float()
        return logits.sigmoid() if self.multi_label or logits.shape[1] == 1 else logits.softmax(dim=1)


def load(
    name: str | None = None,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    multi_label: bool = False,
) -> LoadedModel:
    """Load a classifier by name.

    Without weights of either kind the model is random, the same each time.

    Args:
        name: A model of timm (`resnet50.a1_in1k`), or of torchvision as `torchvision/NAME`; None for the
            embedded classifier.
        checkpoint: File with weights; see [`read_weights`][attnguide.models.read_weights]. Without a
            name, a file in the format of [`write_embedded`][attnguide.models.write_embedded].
        pretrained: Download the published weights, or take them from the cache.
        num_classes: Number of classes; by default that of the checkpoint's classifier, else the model's own.
        class_names: Name of each class; by default ImageNet's for a model with that many classes, else "class
            0", "class 1" …
        multi_label: Whether classes don't exclude each other.

    Returns:
        The classifier in evaluation mode, on the CPU.

    Raises:
        InputError: If the name is unknown, arguments contradict each other, or weights or class names do not
            fit.
        DataError: If the checkpoint cannot be read, or pretrained weights cannot be had.
    """
    if pretrained and checkpoint is not None:
        raise InputError(f"both the pretrained weights and {checkpoint} were asked for. Choose one.")
    if num_classes is not None and num_classes < 1:
        raise InputError(f"num_classes={num_classes} must be at least 1.")
    if name is None:
        if pretrained or num_classes is not None:
            raise InputError("pretrained and num_classes describe a model that has a name. Name one.")
        loaded = embedded(checkpoint)
    else:
        weights = None if checkpoint is None else read_weights(checkpoint)
        build = _torchvision if name.startswith(TORCHVISION) else _timm
        loaded = build(name, weights, pretrained, num_classes)
        if weights is not None:
            load_into(loaded.model, weights, checkpoint or "")
        source: Any = "checkpoint" if checkpoint else "pretrained" if pretrained else "random"
        loaded = replace(loaded, weights=source, multi_label=multi_label)
    loaded.model.eval()
    return loaded if class_names is None else loaded.renamed(class_names)


def _checked(class_names: Sequence[str], loaded: LoadedModel) -> tuple[str, ...]:
    if len(class_names) != len(loaded.classes):
        raise InputError(
            f"there are {len(class_names)} class names, but {loaded.name} has {len(loaded.classes)} classes. "
            "Give one for each, in order."
        )
    return tuple(class_names)


# ----------------------------------------------------------- the embedded one


def embedded(path: str | Path | None = None) -> LoadedModel:
    """Load the small classifier of faces that comes with the library, or another file of its format.

    Args:
        path: A file that [`write_embedded`][attnguide.models.write_embedded] wrote; by default the one in the
            package.

    Returns:
        The classifier in evaluation mode.

    Raises:
        DataError: If the file is missing or not of that format.
    """
    if path is None and not EMBEDDED.is_file():
        raise DataError(
            f"{EMBEDDED} does not exist: this installation lacks the embedded classifier. Reinstall "
            "attnguide, or name a model."
        )
    path = check_file(EMBEDDED if path is None else path)
    try:
        with safe_open(path, "pt") as file:
            about = {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key in _KEYS}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        classes, side = tuple(str(name) for name in about["classes"]), int(about["size"])
        mean, std = (tuple(float(value) for value in about[key]) for key in ("mean", "std"))
        model = networks.small_cnn(len(classes), width=int(about["width"]), reduction=int(about["reduction"]))
        multi_label = bool(about["multi_label"])
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} is not a classifier that attnguide saved ({type(error).__name__}: {error}). For weights "
            "of another kind, name "
            "the model that they belong to."
        ) from error
    load_into(model, weights, path)
    return LoadedModel(
        model.eval(),
        classes,
        _transform(side, mean, std),
        mean,
        std,
        multi_label,
        f"attnguide/{path.stem}",
        (side, side),
        "embedded",
    )


_KEYS = ("classes", "size", "width", "reduction", "mean", "std", "multi_label")


def write_embedded(
    path: str | Path,
    model: nn.Module,
    *,
    classes: Sequence[str],
    size: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    reduction: int = 4,
    multi_label: bool = True,
) -> None:
    """Save a [`small_cnn`][attnguide.models.small_cnn] with all that it takes to use it.

    Args:
        path: The `.safetensors` file, written atomically.
        model: The network.
        classes: Name of each class.
        size: Side of the square images in pixels.
        width: The network's `width`.
        reduction: The network's `reduction`.
        mean: What was subtracted from each channel of an image in [0, 1].
        std: What it was divided by.
        multi_label: Whether classes don't exclude each other.

    Raises:
        InputError: If the file cannot be written.
    """
    values = (list(classes), size, width, reduction, list(mean), list(std), multi_label)
    about = {key: json.dumps(value) for key, value in zip(_KEYS, values, strict=True)}
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_write(path) as temporary:
        save_file(weights, temporary, metadata=about)


def _transform(side: int, mean: Sequence[float], std: Sequence[float]) -> Callable[[Image.Image], Tensor]:
    from torchvision import transforms

    steps = [
        transforms.Resize(side),
        transforms.CenterCrop(side),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ]
    transform: Callable[[Image.Image], Tensor] = transforms.Compose(steps)
    return transform


# -------------------------------------------------------- timm and torchvision


def _timm(
    name: str, weights: Mapping[str, Tensor] | None, pretrained: bool, num_classes: int | None
) -> LoadedModel:
    import timm
    from timm.data import create_transform, infer_imagenet_subset, resolve_model_data_config  # type: ignore[attr-defined]

    if not timm.is_model(name):
        raise _unknown(name, timm.list_models(), f"Or one of torchvision as {TORCHVISION}NAME.")
    architecture, _, tag = name.partition(".")
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and name not in tagged:
        raise _unknown(name, tagged, f"Weights that exist: {', '.join(tagged) or 'none'}.")
    if pretrained and not tagged:
        raise InputError(f"timm has no pretrained weights for {name!r}. Give a checkpoint, or another model.")
    config = timm.models.get_pretrained_cfg(name)
    if num_classes is None and weights is not None and config is not None:
        head = config.classifier if isinstance(config.classifier, str) else (config.classifier or ("",))[0]
        num_classes = _rows(weights, head)
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    with _seeded(), _downloading(name, pretrained):
        model: Any = timm.create_model(name, pretrained=pretrained, **options)
    data: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    subset = infer_imagenet_subset(model)
    return LoadedModel(
        model,
        _names(model.num_classes, subset),
        create_transform(**data, is_training=False),
        tuple(data["mean"]),
        tuple(data["std"]),
        False,
        name,
        tuple(data["input_size"][-2:]),
        "random",
    )


def _torchvision(
    name: str, weights: Mapping[str, Tensor] | None, pretrained: bool, num_classes: int | None
) -> LoadedModel:
    from torchvision import models

    short = name.removeprefix(TORCHVISION)
    known = models.list_models(module=models)
    if short not in known:
        raise _unknown(short, known, "Without the prefix, names are those of timm.")
    published = models.get_model_weights(short).DEFAULT
    if pretrained and num_classes not in (None, 1000):
        raise InputError(
            f"the pretrained weights of {name} are for 1000 classes, not {num_classes}. Leave one of the two "
            "out."
        )
    # These two would otherwise warn that they initialise themselves, which takes them a minute.
    options: dict[str, Any] = (
        {"init_weights": False} if short in ("googlenet", "inception_v3") and not pretrained else {}
    )
    if num_classes is None and weights is not None:
        with torch.device("meta"):
            skeleton = models.get_model(short, weights=None, **options)
        # Whatever the last layer is called: it is the last one that has a row for each class.
        heads = [key for key, value in skeleton.named_parameters() if value.ndim > 1 and len(value) == 1000]
        num_classes = _rows(weights, heads[-1].removesuffix(".weight"))
    if num_classes is not None and not pretrained:
        options["num_classes"] = num_classes
    with _seeded(), _downloading(name, pretrained):
        model = models.get_model(short, weights=published if pretrained else None, **options)
    transform = published.transforms()
    side = transform.crop_size[0]
    count = 1000 if num_classes is None else num_classes
    return LoadedModel(
        model,
        _names(count, "imagenet-1k" if count == 1000 else None),
        transform,
        tuple(transform.mean),
        tuple(transform.std),
        False,
        name,
        (side, side),
        "random",
    )


def _unknown(name: str, known: Sequence[str], remedy: str) -> InputError:
    # All names would be a thousand; the likely ones are a help.
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    return InputError(f"unknown model {name!r}. {hint}{remedy}")


def _rows(weights: Mapping[str, Tensor], head: str) -> int | None:
    """Number of classes by a classifier's weights, or None if they are not there."""
    found = next((weights[key] for key in (f"{head}.weight", f"{head}.bias") if key in weights), None)
    return None if found is None else len(found)


def _names(count: int, subset: str | None) -> tuple[str, ...]:
    """ImageNet's names, each the first of its synonyms, or numbers."""
    if subset is None:
        return tuple(f"class {index}" for index in range(count))
    from timm.data import ImageNetInfo  # type: ignore[attr-defined]

    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(index).partition(",")[0] for index in range(count))


@contextmanager
def _seeded() -> Iterator[None]:
    """Make random weights the same each time, so that a run can be repeated and resumed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextmanager
def _downloading(name: str, wanted: bool) -> Iterator[None]:
    """Turn whatever a hub's client raises into one error, and keep it from retrying without a network."""
    if not wanted:
        yield
        return
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(3 * _PATIENCE)
    try:
        with _cache_only_if_offline():
            yield
    # Each client has errors of its own, and their names change between versions.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise DataError(
            f"the pretrained weights of {name} can neither be downloaded nor found in the cache ({reason}). "
            "Go online once, or "
            "download a .safetensors file elsewhere and give it as the checkpoint."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


@contextmanager
def _cache_only_if_offline() -> Iterator[None]:
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not before and not _answers(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(url: str) -> bool:
    try:
        request = urllib.request.Request(url, method="HEAD")  # noqa: S310  (the hub's own address)
        with urllib.request.urlopen(request, timeout=_PATIENCE):  # noqa: S310
            return True
    except urllib.error.HTTPError:  # an answer, if not a kind one
        return True
    except (OSError, ValueError):
        return False
