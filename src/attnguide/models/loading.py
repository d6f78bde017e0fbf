"""Loads classifiers by name, of timm, torchvision and transformers, and the small one of the library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from attnguide.capture.logits import find_logits
from attnguide.errors import InputError
from attnguide.models import _timm, _torchvision, _transformers
from attnguide.models._building import TORCHVISION, TRANSFORMERS
from attnguide.models.checkpoints import load_into, read_weights
from attnguide.models.described import described
from attnguide.models.embedded_model import embedded
from attnguide.models.loaded_model import LoadedModel

__all__ = ["load"]


def load(
    name: str | None = None,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    multi_label: bool = False,
    logits: str | int | None = None,
) -> LoadedModel:
    """Load a classifier by name.

    Without pretrained weights or a checkpoint the weights are random, the same each time.

    Args:
        name: A model of timm (`resnet50.a1_in1k`; `hf-hub:OWNER/NAME` on the hub, `local-dir:FOLDER`), of
            torchvision as `torchvision/NAME`, or of transformers as `hf:OWNER/NAME` on the hub or
            `hf:FOLDER`; None for the embedded classifier. A folder comes with its weights.
        checkpoint: File with weights; see [`read_weights`][attnguide.models.read_weights]. If no
            name is given, a file that says it, as those of `attnguide train`, or one in the format of
            [`write_embedded`][attnguide.models.write_embedded].
        pretrained: Download the published weights, or take them from the cache.
        num_classes: Number of classes; by default that of the checkpoint's classifier, else the model's own.
        class_names: Name of each class; by default ImageNet's for a model with that many classes, else "class
            0", "class 1" …
        multi_label: Whether an image can have several classes; a model of transformers may say so itself.
        logits: Which part of the model's output is the logits, as in [`explain`][attnguide.explain]; the
            loaded model returns it alone.

    Returns:
        The classifier in evaluation mode, on the CPU.

    Raises:
        MissingPackageError: If a model of transformers is named, which is not installed.
        InputError: If the name is unknown, arguments contradict each other, or weights or class names do not
            fit.
        DataError: If the checkpoint or the pretrained weights cannot be read.
    """
    if pretrained and checkpoint is not None:
        raise InputError(f"both the pretrained weights and {checkpoint} were requested. Choose one.")
    if num_classes is not None and num_classes < 1:
        raise InputError(f"num_classes={num_classes} must be at least 1.")
    if name is not None and not isinstance(name, str):
        raise InputError(f"name={name!r:.60} must be text: a model of timm, torchvision/NAME, or hf:NAME.")
    about = {} if checkpoint is None else described(checkpoint)
    if about and name in (None, about["model"]):
        name, multi_label = about["model"], multi_label or bool(about["multi_label"])
        class_names = about["classes"] if class_names is None else class_names
    if name is None:
        if pretrained or num_classes is not None:
            raise InputError("pretrained and num_classes describe a model that has a name. Name one.")
        loaded = embedded(checkpoint)
    else:
        weights = None if checkpoint is None else read_weights(checkpoint)
        library = (
            _torchvision if name.startswith(TORCHVISION) else
            _transformers if name.startswith(TRANSFORMERS) else
            _timm
        )  # fmt: skip
        loaded = library.build(name, weights, pretrained, num_classes)
        if weights is not None:
            load_into(loaded.model, weights, checkpoint or "")
        origin: Any = "checkpoint" if checkpoint else "pretrained" if pretrained else loaded.weights
        loaded = replace(loaded, weights=origin, multi_label=multi_label or loaded.multi_label)
    if logits is not None:
        # An attribute too: what is measured of this model does not hold for its like with other logits.
        loaded.model.attnguide_logits = str(logits)  # type: ignore[assignment]
        loaded.model.register_forward_hook(lambda module, args, output: find_logits(output, logits))
    loaded.model.eval()
    return loaded if class_names is None else loaded.renamed(class_names)
