"""Caches the layers that were found: for a model, for models of the same kind, and on disk for known ones.

On disk there is one small JSON file for each architecture and question, in `$ATTNGUIDE_CACHE`, else in
`attnguide` under the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`). Only what is certain is
kept there. The files may be deleted at any time; with `ATTNGUIDE_CACHE=off` none are read or written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from attnguide import __version__
from attnguide.capture.calls import Tap
from attnguide.capture.model_state import state_of
from attnguide.data.files import atomic_write
from attnguide.errors import InputError
from attnguide.trace import Layer

__all__ = [
    "Known",
    "Question",
    "fingerprint",
    "folder",
    "forget",
    "other_sizes",
    "recall",
    "remember",
]


class Question(NamedTuple):
    """The key of the cache: which layers were asked for, and how.

    Attributes:
        asked: The layers.
        measure: Whether to measure.
        signature: What the model was called with besides images; see `Call`.
    """

    asked: tuple[str, ...]
    measure: bool = True
    signature: tuple[str, ...] = ()


#: Larger files, in bytes, are neither written nor read; the order of a million patches takes half of it.
_LARGEST = 2**24
#: So many answers are kept for a model, and for all models that are gone.
_MOST = 256


@dataclass(frozen=True)
class Known:
    """An entry of the cache: the layers that were found.

    Attributes:
        layers: The layers found.
        size: `(H, W)` of the images that they were found with.
        probed: Whether they were found by a probe of this size, not carried over from another one.
    """

    layers: tuple[Layer, ...]
    size: tuple[int, int]
    probed: bool = True

    @property
    def certain(self) -> bool:
        """Whether a probe determines how these layers are arranged.

        Of a layer whose rows and columns are axes it is enough that they were seen at another layer, whose
        output has the same shape.
        """
        return all(
            layer.how == "measured" or (self.probed and layer.how == "inherited" and layer.layout.has_axes)
            for layer in self.layers
        )


#: Shape of one image, with the question.
_Key = tuple[tuple[int, ...], Question]
#: The modules that an answer speaks of, and what the model was like.
_State = tuple[tuple[ReferenceType[nn.Module], ...], int]
_of_models: WeakKeyDictionary[nn.Module, OrderedDict[_Key, tuple[Known, _State]]] = WeakKeyDictionary()
_of_kinds: OrderedDict[tuple[str, _Key], Known] = OrderedDict()
_lock = threading.Lock()


def recall(model: nn.Module, images: Tensor, question: Question) -> tuple[Layer, ...] | None:
    """Look up the layers for a model, or one of the same kind, and a size of images; None if unknown."""
    key: _Key = (tuple(images.shape[1:]), question)
    own = _of_models.get(model, OrderedDict()).get(key)
    if own is not None:
        answer, (references, snapshot) = own
        if snapshot == state_of(model).snapshot and [r() for r in references] == _modules(model, answer):
            return answer.layers
    print_ = fingerprint(model)
    if print_ is None:
        return None
    known = _of_kinds.get((print_, key)) or _read(_entry(model, print_, key), key)
    if known is None or None in _modules(model, known):
        return None
    _keep(model, print_, key, known)
    return known.layers


def other_sizes(model: nn.Module, images: Tensor, question: Question) -> list[Known]:
    """Return what was measured for this model and other sizes of images."""
    shape = tuple(images.shape[1:])
    return [
        known
        for (other, asked), (known, _) in _of_models.get(model, OrderedDict()).items()
        if asked == question and other[:-2] == shape[:-2] and known.certain
    ]


def remember(
    model: nn.Module, images: Tensor, question: Question, layers: Sequence[Layer], *, probed: bool
) -> None:
    """Store the layers that were found, by a probe or by what was found for another size."""
    key: _Key = (tuple(images.shape[1:]), question)
    print_ = fingerprint(model)
    known = Known(tuple(layers), (images.shape[-2], images.shape[-1]), probed)
    _keep(model, print_, key, known)
    if print_ is not None and known.certain:
        _write(_entry(model, print_, key), known)


def forget() -> None:
    """Empty the cache in memory; files stay."""
    with _lock:
        _of_models.clear()
        _of_kinds.clear()


def _keep(model: nn.Module, print_: str | None, key: _Key, known: Known) -> None:
    references = tuple(ref(module) for module in _modules(model, known) if module is not None)
    state = references, state_of(model).snapshot
    shape, question = key
    # The names are what a guide asks for from then on.
    named = shape, question._replace(asked=tuple(layer.name for layer in known.layers))
    with _lock:
        own = _of_models.setdefault(model, OrderedDict())
        for each in (key, named):
            own[each] = known, state
            if print_ is not None:
                _of_kinds[print_, each] = known
        while len(own) > _MOST:
            own.popitem(last=False)
        while len(_of_kinds) > _MOST:
            _of_kinds.popitem(last=False)


def _modules(model: nn.Module, known: Known) -> list[nn.Module | None]:
    """Return the modules of the layers of an entry; None for one that the model no longer has."""
    names = [
        name
        for layer in known.layers
        for name in (layer.name, *layer.watched, *layer.shortcuts.rowwise, *layer.shortcuts.queries)
    ]
    found = []
    for name in names:
        module: nn.Module | None = model
        for step in Tap.parse(name).module.split("."):
            module = None if module is None else module._modules.get(step)
        found.append(module)
    return found


def fingerprint(model: nn.Module) -> str | None:
    """Return a digest of a model's classes, settings and shapes of weights.

    Models of the same digest arrange their outputs in the same way, whatever their weights are.

    Returns:
        The digest; None if the model holds something that cannot be compared.
    """
    digest = hashlib.sha256()
    try:
        for name, module in model.named_modules():
            kind = type(module)
            settings = {
                key: _told(value)
                for key, value in vars(module).items()
                if key not in _NO_SETTINGS and not key.endswith("_cache")
            }
            shapes = {
                key: tuple(value.shape) for key, value in module._parameters.items() if value is not None
            }
            digest.update(repr((name, kind.__module__, kind.__qualname__, settings, shapes)).encode())
    except _Untold:
        return None
    return digest.hexdigest()


#: What every module has, and no setting: its parts, its hooks, its mode.
_NO_SETTINGS = {*vars(nn.Module()), "training"}
#: Settings are looked into so deeply.
_DEEPEST = 6


class _Untold(Exception):  # noqa: N818
    """Raised for a setting that has no description by value, such as an arbitrary object."""


def _told(value: Any, depth: int = 0) -> Any:
    """Describe a setting as text; two settings with the same effect have the same text."""
    if depth > _DEEPEST:
        raise _Untold
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        return value
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, nn.Module):
        return type(value).__qualname__  # where it is a part of the model it has its own line
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *(_told(each, depth + 1) for each in value)]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(_told(each, depth + 1)) for each in value)
    if isinstance(value, Mapping):
        return [(repr(_told(key, depth + 1)), _told(each, depth + 1)) for key, each in value.items()]
    if isinstance(value, partial):
        return ["partial", *(_told(each, depth + 1) for each in (value.func, value.args, value.keywords))]
    if getattr(value, "__closure__", None) is None and "<" not in getattr(value, "__qualname__", "<"):
        return f"{value.__module__}.{value.__qualname__}"  # a class, or a function that needs nothing else
    if hasattr(value, "__dict__") and not callable(value):
        return [type(value).__qualname__, _told(vars(value), depth + 1)]
    raise _Untold


# -------------------------------------------------------------------------- disk


def folder() -> Path | None:
    """Return the folder of the cache on disk; None if it is switched off."""
    chosen = os.environ.get("ATTNGUIDE_CACHE")
    if chosen is not None:
        return None if chosen.lower() in ("", "off") else Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnguide"


class _Entry(NamedTuple):
    """A place on disk.

    Attributes:
        file: The file.
        identity: Digest of the model's like, of the question, and of the versions that answer it.
    """

    file: Path
    identity: str

    def seal(self, layers: object) -> str:
        """Return a digest of layers as JSON values, and of what they answer.

        A file that was edited, damaged or copied from another name has another one, and is not believed:
        another layer or order than the measured one would give a wrong map.
        """
        return hashlib.sha256(f"{self.identity} {json.dumps(layers)}".encode()).hexdigest()


def _entry(model: nn.Module, print_: str, key: _Key) -> _Entry | None:
    root, name = folder(), _name_of(model)
    if root is None or name is None:
        return None
    made_by = getattr(sys.modules.get(type(model).__module__.partition(".")[0]), "__version__", "")
    identity = hashlib.sha256(repr((print_, key, __version__, made_by)).encode()).hexdigest()
    return _Entry(root / "layers" / f"{name}-{identity[:16]}.json", identity)


def _name_of(model: nn.Module) -> str | None:
    """Name of an architecture of a known library; None for a user's own class, whose code may change."""
    kind = type(model)
    if kind.__module__.partition(".")[0] not in ("timm", "torchvision", "transformers"):
        return None
    config = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, dict) else None
    return str(name or kind.__name__).replace("/", "_")


def _read(entry: _Entry | None, key: _Key) -> Known | None:
    if entry is None:
        return None
    try:
        if not entry.file.is_file():
            return None
        layers = tuple(map(Layer.from_dict, _unsealed(entry)))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        logging.getLogger(__name__).info("%s is not used: %s", entry.file, error)
        return None
    shape = key[0]
    return Known(layers, (shape[-2], shape[-1]))


def _unsealed(entry: _Entry) -> list[dict[str, Any]]:
    """Read layers as JSON values; raises `ValueError` and others if the file is not as it was written."""
    if entry.file.stat().st_size > _LARGEST:
        raise ValueError("it is larger than any that attnguide writes")
    written = json.loads(entry.file.read_text(encoding="utf-8"))
    layers: list[dict[str, Any]] = written["layers"]
    if written["seal"] != entry.seal(layers):
        raise ValueError("it is not as attnguide wrote it")
    return layers


def _write(entry: _Entry | None, known: Known) -> None:
    if entry is None:
        return
    layers = [layer.to_dict() for layer in known.layers]
    text = json.dumps({"seal": entry.seal(layers), "layers": layers})
    if len(text) > _LARGEST:
        return
    try:
        entry.file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(entry.file) as part:
            part.write_text(text, encoding="utf-8")
    except (OSError, InputError) as error:  # work goes on without a cache
        logging.getLogger(__name__).info("%s was not written: %s", entry.file, error)
