"""The region by a segmentation or saliency network: of torchvision, transformers, your own, or ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnguide import functional
from attnguide.capture.model_state import weights_digest
from attnguide.data.files import check_file
from attnguide.errors import DataError, InputError, nearest
from attnguide.interfaces import PriorMaps
from attnguide.priors.finding import (
    IMAGENET,
    FindingPrior,
    Normalization,
    normalization_of,
    own_copy,
    renormalized,
)

__all__ = ["SegmenterPrior"]


class SegmenterPrior(FindingPrior):
    """What a segmentation network says is an object, or the labels that show a class.

    Args:
        model: A network of torchvision such as `"deeplabv3_mobilenet_v3_large"`, of transformers as
            `"transformers/NAME"` or `"transformers/FOLDER"`, an `.onnx` file (needs onnxruntime), or a
            module. It gives logits `(N, L, h, w)` of L labels, or of one, which is saliency; also as `out` or
            `logits` of its output. Named networks are loaded at the first batch, their weights downloaded
            once.
        classes: Labels that show each class of the guided model: a mapping from its index to names or numbers
            of labels. A class without an entry drops out. By default each label but number 0, the background,
            for every class.
        labels: Names of the L labels, for a module or an ONNX file.
        minimum: Share of the image from which on a region counts.
        normalization: Mean and standard deviation of the images that the guided model sees. By default as its
            own settings say, else ImageNet's.
        own_normalization: Mean and standard deviation that the network wants. By default ImageNet's.
        cache: Folder of regions; see [`FindingPrior`][attnguide.priors.FindingPrior].

    Raises:
        InputError: If a setting has a wrong value, or onnxruntime is not installed.
        DataError: If there is no such file.
    """

    def __init__(
        self,
        model: str | Path | nn.Module = "deeplabv3_mobilenet_v3_large",
        *,
        classes: Mapping[int, Sequence[str | int]] | None = None,
        labels: Sequence[str] = (),
        minimum: float = 0.005,
        normalization: Normalization | None = None,
        own_normalization: Normalization = IMAGENET,
        cache: str | Path | None = None,
    ) -> None:
        super().__init__(cache)
        self.by_class = classes is not None
        if not isinstance(minimum, (int, float)) or not 0 <= minimum < 1:
            raise InputError(f"minimum={minimum!r} must be a share of the image in [0, 1).")
        self.name = str(model) if isinstance(model, (str, Path)) else type(model).__name__
        self.classes = None if classes is None else {cls: tuple(shown) for cls, shown in classes.items()}
        self.labels, self.minimum = tuple(labels), minimum
        self.normalization, self.own_normalization = normalization, own_normalization
        self._network: Callable[[Tensor], Any] | None = None
        if isinstance(model, nn.Module):
            self._network = own_copy(model)
        elif self.name.endswith(".onnx"):
            self._network = _onnx(self.name)

    def prepare(self, model: nn.Module | None, classes: int) -> None:
        """Load the network, and find out how the guided model's images are normalised."""
        if self._network is None:
            self._network, found = _load(self.name)
            self.labels = self.labels or found
        if self.normalization is None:
            self.normalization = normalization_of(model) or IMAGENET
        for cls in self.classes or ():
            if type(cls) is not int or not 0 <= cls < classes:
                raise InputError(f"classes= names class {cls!r}; the guided model has {classes}.")

    def settings(self) -> str:
        """Return the network, its labels and the normalization."""
        weights = weights_digest(self._network) if isinstance(self._network, nn.Module) else self.name
        return f"segmenter {weights} {self.classes} {self.labels} {self.minimum} {self.normalization}"

    def find(self, images: Tensor, classes: Tensor) -> PriorMaps:
        """Segment each image once, and join the labels that show its class.

        Raises:
            InputError: If the network's output is not of a known form, or it has no such label.
        """
        network = self._network
        if network is None or self.normalization is None:
            self.prepare(None, int(classes.max()) + 1)
            network = self._network
        if isinstance(network, nn.Module):
            network.to(images.device)
        logits = _logits(None if network is None else network(self._renormalized(images)), len(images))
        shares = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)
        chosen = torch.zeros(len(images), logits.shape[1], device=shares.device)
        for row, cls in enumerate(classes.tolist()):
            chosen[row, self._shown(cls, logits.shape[1])] = 1
        maps = (shares * chosen[:, :, None, None]).sum(dim=1).clamp(0, 1)
        inside = (maps >= 0.5).to(maps)
        weights = (inside.mean(dim=(1, 2)) > self.minimum).to(maps)
        return PriorMaps(inside.to(images.device), weights.to(images.device))

    def _shown(self, cls: int, count: int) -> list[int]:
        """Numbers of the labels that show a class."""
        if self.classes is None:
            return [0] if count == 1 else list(range(1, count))
        numbers = []
        for label in self.classes.get(cls, ()):
            if isinstance(label, str) and label not in self.labels:
                raise InputError(f"{self.name} has no label {label!r}.{nearest(label, self.labels)}")
            number = self.labels.index(label) if isinstance(label, str) else label
            if not 0 <= number < count:
                raise InputError(f"{self.name} has {count} labels, and no number {number}.")
            numbers.append(number)
        return numbers

    def _renormalized(self, images: Tensor) -> Tensor:
        """Turn the guided model's images into those that the network wants."""
        return renormalized(images, self.normalization or IMAGENET, self.own_normalization)

    def __repr__(self) -> str:
        return f"SegmenterPrior({self.name!r}, classes={self.classes})"


def _logits(output: Any, count: int) -> Tensor:
    """Return the logits `(N, L, h, w)` of a network's output."""
    if isinstance(output, Mapping):
        output = output.get("out", output.get("logits"))
    output = getattr(output, "logits", output)
    if isinstance(output, (list, tuple)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim != 4 or len(output) != count:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"the segmentation network gives {shape}, expected logits (N, L, h, w).")
    return functional.full_precision(output)


def _load(name: str) -> tuple[nn.Module, tuple[str, ...]]:
    """Load a network of torchvision or transformers by its name, with the names of its labels."""
    prefix, _, rest = name.partition("/")
    if prefix == "transformers":
        try:
            from transformers import AutoModelForSemanticSegmentation
        except ImportError as error:
            raise InputError(f"{name} needs transformers: pip install 'attnguide[transformers]'.") from error
        try:
            model: Any = AutoModelForSemanticSegmentation.from_pretrained(rest, use_safetensors=True)
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise DataError(f"{rest} cannot be loaded by transformers: {reason}") from error
        return own_copy(model), tuple(str(label) for label in model.config.id2label.values())
    from torchvision.models import get_model, get_model_weights, list_models, segmentation

    known = list_models(module=segmentation)
    if name not in known:
        raise InputError(f"torchvision has no segmentation network {name!r}.{nearest(name, known)}")
    weights = get_model_weights(name).DEFAULT
    from attnguide.models._downloading import downloading

    with downloading(name, True):
        network = get_model(name, weights=weights)
    return own_copy(network), tuple(weights.meta["categories"])


def _onnx(name: str) -> Callable[[Tensor], Tensor]:
    """Return a function that runs an ONNX file on the CPU."""
    path = check_file(name)
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(f"{path} needs onnxruntime: pip install 'attnguide[onnx]'.") from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    # Its errors have no common class but that of Python.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{path} is not a model that onnxruntime can load: {reason}") from error
    wanted = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        try:
            result = session.run(None, {wanted: images.float().cpu().numpy()})[0]
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"{path} does not take images {tuple(images.shape)}: {reason}") from error
        return torch.from_numpy(result).to(images.device)

    return run
