"""Words for each class: the region of an image that a CLIP-like model finds for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnguide.capture.model_state import evaluating
from attnguide.errors import DataError, InputError, MissingPackageError, nearest
from attnguide.interfaces import AttributionSource, PriorMaps
from attnguide.models._building import TRANSFORMERS
from attnguide.models._transformers import folder_of, normalization, quiet, reading
from attnguide.models.preprocessing import preprocessing_of
from attnguide.priors.finding import (
    IMAGENET,
    FindingPrior,
    Normalization,
    normalization_of,
    own_copy,
    renormalized,
)
from attnguide.priors.teacher import TeacherPrior

__all__ = ["TextPrior", "Words"]

#: What shows a class: a text, or several of one meaning.
Words = str | Sequence[str]

#: The model by default (Radford et al., ICML 2021), and the normalization of its images.
CLIP = "hf:openai/clip-vit-base-patch16"
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class TextPrior(FindingPrior):
    """What a CLIP-like model finds in an image for the words of its class (GALS, Petryk et al., CVPR 2022).

    The cosine between image and words is a score like a logit, and the region is where the model looks for
    it: the words are a teacher whose classes are texts. Several texts of a class are averaged as vectors. A
    class without words drops out, and so does one whose words the tokenizer does not know, and an image
    in which nothing speaks for the words. Words of something that an image does not show still have a map:
    `minimum=` drops such images.

    Args:
        words: One text for every class; a list with an entry for each class; or a mapping of classes, by
            number or name, to texts. An entry may be several texts, or None for a class without words. By
            default "a photo of a NAME" with the names of the classes.
        classes: Names of the guided model's classes. By default as the training or the model itself says.
        model: The CLIP-like model of transformers, `"hf:OWNER/NAME"` on the hub or `"hf:FOLDER"`, loaded at
            the first batch, its weights downloaded once; or a module with `get_image_features` and
            `get_text_features`, with a tokenizer.
        tokenizer: Turns texts into the model's input, as those of transformers do; that of a folder or name
            by default.
        source: Attribution source.
        layer: Layer of the source.
        threshold: Share of the maximum from which on a position is inside; None for the map itself.
        minimum: Cosine between image and words from which on the image shows them; None for any.
        normalization: Mean and standard deviation of the images that the guided model sees. By default as its
            own settings say, else ImageNet's.
        own_normalization: Mean and standard deviation that the CLIP-like model wants. By default as its
            folder or name says, else CLIP's.
        cache: Folder of regions; see [`FindingPrior`][attnguide.priors.FindingPrior].

    Attributes:
        side: Rows and columns of the images that the CLIP-like model takes; known once it is prepared.

    Raises:
        InputError: If a setting has a wrong value.
    """

    def __init__(
        self,
        words: Words | Sequence[Words | None] | Mapping[int | str, Words | None] | None = None,
        *,
        classes: Sequence[str] = (),
        model: str | nn.Module = CLIP,
        tokenizer: Any = None,
        source: str | AttributionSource = "transformer_relevance",
        layer: str | list[str] = "auto",
        threshold: float | None = None,
        minimum: float | None = None,
        normalization: Normalization | None = None,
        own_normalization: Normalization | None = None,
        cache: str | Path | None = None,
    ) -> None:
        super().__init__(cache)
        if words is not None and not isinstance(words, (str, Mapping, Sequence)):
            raise InputError(f"words={words!r:.60} must be a text, a list of texts, or a mapping of them.")
        entries = words.values() if isinstance(words, Mapping) else () if isinstance(words, str) else words
        for entry in entries or ():
            _texts(entry)
        if minimum is not None and not (isinstance(minimum, (int, float)) and -1 <= minimum <= 1):
            raise InputError(f"minimum={minimum!r} must be a cosine in [−1, 1].")
        if isinstance(model, str) and not model.startswith(TRANSFORMERS):
            raise InputError(f"model={model!r} must be a model of transformers, hf:OWNER/NAME or hf:FOLDER.")
        if not isinstance(model, str) and (tokenizer is None or not hasattr(model, "get_text_features")):
            raise InputError("model= as a module needs get_text_features, get_image_features and tokenizer=.")
        # A copy of the settings, without a model, whose mistakes are found here.
        TeacherPrior(source=source, layer=layer, threshold=threshold)
        self.words, self.classes, self.model, self.tokenizer = words, tuple(classes), model, tokenizer
        self.source, self.layer, self.threshold, self.minimum = source, layer, threshold, minimum
        self.normalization, self.own_normalization = normalization, own_normalization
        self.by_class = not isinstance(words, str)
        self.side = 0
        self._teacher: TeacherPrior | None = None

    def prepare(self, model: nn.Module | None, classes: int) -> None:
        """Load the CLIP-like model, turn the words into vectors, and find out how images are normalised.

        Raises:
            InputError: If words are given for other classes than the guided model has, a text is too long, or
                the module is not of a known form.
            DataError: If the model cannot be loaded.
            MissingPackageError: If transformers is not installed.
        """
        if self._teacher is not None:
            return
        if self.normalization is None:
            self.normalization = normalization_of(model) or IMAGENET
        texts = self._texts_of(classes, self.classes or tuple(self.names) or _names_of(model))
        clip, tokenizer = self.model, self.tokenizer
        if isinstance(clip, str):
            clip, found, own = _load(clip)
            tokenizer = tokenizer or found
            self.own_normalization = self.own_normalization or own
        else:
            clip = own_copy(clip).cpu()
            self.own_normalization = self.own_normalization or _CLIP
        self.side = _side(clip)
        vectors = [_vector(clip, tokenizer, each) for each in texts]
        clip.register_module("text_model", None)  # its work is done
        known = [vector for vector in vectors if vector is not None]
        numbers = iter(range(len(known)))
        rows = [None if vector is None else next(numbers) for vector in vectors]
        matcher = [_Matcher(clip, torch.stack(known))] if known else []
        self._teacher = TeacherPrior(
            matcher, source=self.source, layer=self.layer, classes=rows, threshold=self.threshold
        )

    def settings(self) -> str:
        """Return the vectors of the words, the weights of the model, and what the maps depend on."""
        teacher = "" if self._teacher is None else self._teacher.settings()
        return f"text {teacher} {self.minimum} {self.normalization} {self.own_normalization}"

    def find(self, images: Tensor, classes: Tensor) -> PriorMaps:
        """Look for the words of each image's class.

        Raises:
            InputError: If the model takes no images of this kind.
        """
        if self._teacher is None:
            self.prepare(None, int(classes.max()) + 1)
        teacher = self._teacher
        if teacher is None or not teacher.models:
            return PriorMaps(images.new_zeros(len(images), 1, 1), images.new_zeros(len(images)))
        matcher, size = teacher.models[0].to(images.device), (self.side, self.side)
        now, wanted = self.normalization or IMAGENET, self.own_normalization or _CLIP
        prepared = renormalized(images.float(), now, wanted)
        if prepared.shape[-2:] != size:
            prepared = F.interpolate(prepared, size, mode="bilinear", antialias=True)
        maps, weights = teacher.find(prepared, classes)
        if self.minimum is not None:
            rows = [row or 0 for row in teacher.classes or ()]
            with torch.no_grad(), evaluating(matcher):
                cosines = matcher(prepared)
            own = cosines.gather(1, torch.tensor(rows, device=classes.device)[classes][:, None])[:, 0]
            weights = weights * (own >= self.minimum)
        return PriorMaps(maps, weights)

    def _texts_of(self, count: int, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Texts of each of the guided model's classes, none for a class without words."""
        words = self.words
        if self.classes and len(self.classes) != count:
            raise InputError(f"classes= has {len(self.classes)} names, the guided model has {count} classes.")
        if words is None:
            if len(names) != count:
                raise InputError(
                    "prior 'text' needs words, as nobody says what the classes are called: TextPrior({…}), "
                    "or classes=[…]."
                )
            return [(f"a photo of a {name}",) for name in names]
        if isinstance(words, str):
            return [_texts(words)] * count
        if not isinstance(words, Mapping):
            if len(words) != count:
                raise InputError(
                    f"words= has {len(words)} entries, the guided model has {count} classes. Give one for "
                    "each, None for a class without words."
                )
            return [_texts(entry) for entry in words]
        found: list[tuple[str, ...]] = [()] * count
        for cls, entry in words.items():
            if isinstance(cls, str) and not cls.isdecimal() and len(names) != count:
                raise InputError(f"words= names class {cls!r}, and classes= does not say which that is.")
            if isinstance(cls, str) and cls in names and len(names) == count:
                number = names.index(cls)
            else:
                number = int(cls) if isinstance(cls, int) or cls.isdecimal() else -1
            if isinstance(cls, bool) or not 0 <= number < count:
                close = nearest(str(cls), names)
                raise InputError(f"words= names class {cls!r}; the guided model has {count}.{close}")
            found[number] = _texts(entry)
        return found

    def __repr__(self) -> str:
        name = self.model if isinstance(self.model, str) else type(self.model).__name__
        return f"TextPrior({self.words!r:.60}, model={name!r})"


class _Matcher(nn.Module):
    """A CLIP-like model as a classifier whose classes are texts.

    Args:
        model: The model.
        vectors: A unit vector for each text, `(T, D)`.
    """

    def __init__(self, model: nn.Module, vectors: Tensor) -> None:
        super().__init__()
        self.model: Any = model
        self.vectors: Tensor
        self.register_buffer("vectors", vectors)

    def forward(self, images: Tensor) -> Tensor:
        """Return the cosine between each image and each text, `(N, T)`."""
        found = _features(self.model.get_image_features(pixel_values=images))
        return F.normalize(found, dim=1) @ self.vectors.T


def _features(output: Any) -> Tensor:
    """The features of images or texts, which transformers returned alone before its version 5."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


def _side(model: nn.Module) -> int:
    """Rows and columns of the images that a CLIP-like model takes.

    Raises:
        InputError: If it does not say so.
    """
    config = getattr(model, "config", None)
    side = getattr(getattr(config, "vision_config", None), "image_size", None)
    if not isinstance(side, int) or not hasattr(config, "text_config"):
        raise InputError(
            f"{type(model).__name__} does not say the size of its images, config.vision_config.image_size, "
            "or the length of its texts, config.text_config.max_position_embeddings, as CLIP's does."
        )
    return side


def _texts(entry: Words | None) -> tuple[str, ...]:
    """Texts of one class.

    Raises:
        InputError: If they are something else.
    """
    texts = () if entry is None else (entry,) if isinstance(entry, str) else entry
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"words of a class, {entry!r:.60}, must be a text, several, or None.")
    return tuple(text for text in texts if text.strip())


def _vector(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor | None:
    """Unit vector of texts of one meaning; None if there is none that the tokenizer knows.

    Raises:
        InputError: If a text is too long.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    longest = model.config.text_config.max_position_embeddings  # type: ignore[union-attr]
    vectors = []
    for text in texts:
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not plain or all(number == unknown for number in plain):
            continue
        # Some were trained with all texts of one length.
        tokens = tokenizer(text, return_tensors="pt", padding="max_length", max_length=longest)
        count = tokens["input_ids"].shape[1]
        if count > longest:
            raise InputError(f"the words {text!r:.60} are {count} tokens, the model takes {longest}.")
        with torch.no_grad():
            features = _features(model.get_text_features(**tokens))  # type: ignore[operator]
        vectors.append(F.normalize(features.float(), dim=1)[0])
    return F.normalize(torch.stack(vectors).mean(dim=0), dim=0) if vectors else None


def _names_of(model: nn.Module | None) -> tuple[str, ...]:
    """Names of a model's classes; none if it does not say them."""
    try:
        return () if model is None else preprocessing_of(model).class_names
    except InputError:
        return ()


def _load(name: str) -> tuple[nn.Module, Any, Normalization]:
    """Load a CLIP-like model of transformers, its tokenizer, and how it wants images normalised."""
    try:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
    except ImportError as error:
        raise MissingPackageError(name, "transformers", "transformers") from error
    where = name.removeprefix(TRANSFORMERS)
    with reading(where, folder_of(where, name), "a model for images and texts"), quiet():
        model: Any
        model, info = AutoModel.from_pretrained(where, use_safetensors=True, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(where)
        processor = AutoImageProcessor.from_pretrained(where)
    if not hasattr(model, "get_text_features"):
        raise InputError(f"{name} is a {type(model).__name__}, which does not compare images with texts.")
    if info["missing_keys"]:
        raise DataError(f"{name} has no weights for {min(info['missing_keys'])!r}: it is not a whole model.")
    return own_copy(model.float()), tokenizer, normalization(processor)
