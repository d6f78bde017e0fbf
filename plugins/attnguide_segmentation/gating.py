"""Adapters that change the features inside a model: SSG, and masks as further input channels."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attnguide.capture.calls import Call
from attnguide.capture.model_state import muting
from attnguide.errors import GuidanceError, InputError, LayerError
from attnguide.interfaces import Adapter
from attnguide_segmentation.finder import RegionFinder
from attnguide_segmentation.regions import REGIONS, normalized, resized

__all__ = ["SSG", "MaskChannels"]

Start = Literal["identity", "paper"]


class _Passing(threading.local):
    """Images and features of the running forward passes of each thread, innermost pass last."""

    def __init__(self) -> None:
        self.images: list[Tensor | None] = []
        self.features: Tensor | None = None


class _Inside(Adapter):
    """An adapter that needs the images while the model runs."""

    layer = None

    def __init__(self, regions: RegionFinder | None, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.finder = regions or RegionFinder(count=len(self.names))
        self._passing = _Passing()
        self.inert = True  # until it is attached; copies, such as those in a copy of the model, are inert

    def _put_on(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Watch the passes through a model."""
        self.inert = False
        yield model.register_forward_pre_hook(self._begin, with_kwargs=True)
        yield model.register_forward_hook(self._end, always_call=True)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Probes of the library run inside other passes.
        hidden = self.inert or muting.depth
        if not muting.depth:
            self._passing.images.clear()  # left by an interrupted pass
            self._passing.features = None
            self.finder.forget()
        self._passing.images.append(None if hidden else Call.of(args, kwargs).images)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._passing.images:
            self._passing.images.pop()

    def _masks(self, size: tuple[int, int]) -> Tensor | None:
        """Masks of the images of the running pass; None without one."""
        images = self._images()
        return None if images is None else resized(self.finder(images), size, self.names)

    def _images(self) -> Tensor | None:
        """Images of the running pass; None without one, and in passes of the library.

        Raises:
            GuidanceError: If a backward pass runs the model again, part by part.
        """
        if self._passing.images:
            return self._passing.images[-1]
        if not self.inert and not muting.depth and torch._C._current_graph_task_id() != -1:
            raise GuidanceError(
                f"{type(self).__name__} does not work with activation checkpointing, which runs a part of "
                "the model again without the images. Switch it off, or use SSP."
            )
        return None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the state of a thread."""
        return {**self.__dict__, "_passing": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_passing": _Passing(), "inert": True})  # type: ignore[no-untyped-call]


class SSG(_Inside):
    """Semantic-segmentation-based gating: pools the features of each region separately.

    The output of a layer is multiplied by each region's mask, whose values have a mean of 1, which gives a
    copy for each region. The copies are normalised, pass the model's own activations and pooling, if any
    follow (see `through`), and a 1×1 convolution reduces them to the number of channels that the model
    expects. So the pooling cannot mix features of different regions.

    As published, values of a mask sum to 1; here they are multiplied by the number of positions, which
    changes nothing but the part of the normalisation's epsilon.

    Args:
        channels: Number of channels C of the layer's features.
        after: Name of the layer whose output is gated; best a convolution, before its batch normalisation.
        through: Names of the activations and the pooling that follow. The adapter's result replaces, or is
            added to, the output of the last of them, or of `instead_of`.
        instead_of: Name of the module whose output is replaced; the last of `through`, or `after`, by
            default.
        start: Initial state. `"paper"`: the result replaces the model's features, and is random at first.
            `"identity"`: the result is added, and is zero at first, so that a trained model is unchanged.
        regions: Source of the masks.
        names: Names of the regions.

    Raises:
        InputError: If `start` is neither.

    Source: Kalayeh, Gong and Shah, CVPR 2017, section 3.1.3; the start from identity is ours.
    """

    name = "ssg"

    def __init__(
        self,
        channels: int,
        *,
        after: str,
        through: Sequence[str] = (),
        instead_of: str | None = None,
        start: Start = "identity",
        regions: RegionFinder | None = None,
        names: Sequence[str] = REGIONS,
    ) -> None:
        super().__init__(regions, names)
        if start not in ("identity", "paper"):
            raise InputError(f"start={start!r} must be 'identity' or 'paper'.")
        self.after, self.through, self.start = after, tuple(through), start
        self.instead_of = instead_of or (self.through[-1] if self.through else after)
        self.settings = {
            "channels": channels,
            "after": after,
            "through": list(through),
            "instead_of": self.instead_of,
            "start": start,
            "names": list(names),
        }
        self.channels = channels
        self.norm = nn.BatchNorm2d(channels * len(self.names))
        self.restore = nn.Conv2d(channels * len(self.names), channels, 1)
        if start == "identity":
            nn.init.zeros_(self.restore.weight)
            nn.init.zeros_(self.restore.bias)  # type: ignore[arg-type]
        # Not as submodules: they belong to the model.
        self._passed: list[nn.Module] = []

    def attach(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Put the gate on the model."""
        modules = dict(model.named_modules())
        for name in (self.after, *self.through, self.instead_of):
            if name not in modules:
                raise LayerError(f"the model has no module {name!r}.")
        object.__setattr__(self, "_passed", [modules[name] for name in self.through])
        yield from self._put_on(model)
        yield modules[self.after].register_forward_hook(self._gate)
        if self.instead_of != self.after:
            yield modules[self.instead_of].register_forward_hook(self._replace)

    def _gate(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._images() is None:
            return None
        if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[1] != self.channels:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise LayerError(
                f"layer {self.after!r} gives {shape}; SSG gates (B, {self.channels}, h, w). Choose a layer "
                "with rows and columns behind the channels, or use SSP."
            )
        if self.instead_of == self.after:
            return self._joined(output, self.gated(output))
        # The next activation may work in place.
        self._passing.features = output.clone()
        return None

    def _replace(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        features, self._passing.features = self._passing.features, None
        return None if features is None else self._joined(output, self.gated(features))

    def _joined(self, own: Tensor, gated: Tensor) -> Tensor:
        return own + gated if self.start == "identity" else gated

    def gated(self, features: Tensor) -> Tensor:
        """Gate features, normalise them, apply the model's modules, and restore the number of channels.

        Args:
            features: Features `(B, C, h, w)` of the images of the running pass.

        Returns:
            `(B, C, h', w')`, of the size that the pooling gives.
        """
        masks = self._masks((features.shape[-2], features.shape[-1]))
        assert masks is not None  # noqa: S101  (only called during a pass)
        # Sums of 1 as published, times the number of places: the normalisation that follows removes a factor,
        # but not from values that are small compared with its epsilon.
        shares = (normalized(masks) * masks[0, 0].numel()).to(features.dtype)
        copies = (features[:, None] * shares[:, :, None]).flatten(1, 2)
        copies = self.norm(copies)
        batch, regions = len(features), len(self.names)
        # The model's own modules know C channels, so that regions pass them as further samples.
        for module in self._passed:
            # Not as a call: hooks on the module expect the model's own features.
            passed = module.forward(copies.view(batch * regions, self.channels, *copies.shape[-2:]))
            copies = passed.view(batch, regions * self.channels, *passed.shape[-2:])
        restored: Tensor = self.restore(copies)
        return restored


class MaskChannels(_Inside):
    """Adds region masks as further channels of the image, a simple baseline.

    A convolution of these channels is added to the output of the first convolution, which is the same as one
    convolution of all channels. The masks are normalised over the batch.

    Args:
        channels: Number of output channels of the model's first convolution.
        kernel: Kernel size of that convolution, in pixels, down and across.
        stride: Stride of that convolution.
        padding: Padding of that convolution, or `"same"`.
        dilation: Dilation of that convolution.
        after: Name of that convolution.
        regions: Source of the masks.
        names: Names of the regions.
    """

    name = "mask_channels"

    def __init__(
        self,
        channels: int,
        kernel: Sequence[int],
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] | str = (0, 0),
        dilation: Sequence[int] = (1, 1),
        *,
        after: str,
        regions: RegionFinder | None = None,
        names: Sequence[str] = REGIONS,
    ) -> None:
        super().__init__(regions, names)
        self.after = after
        self.settings = {
            "channels": channels,
            "after": after,
            "kernel": list(kernel),
            "stride": list(stride),
            "padding": padding if isinstance(padding, str) else list(padding),
            "dilation": list(dilation),
            "names": list(names),
        }
        self.norm = nn.BatchNorm2d(len(self.names))
        self.conv = nn.Conv2d(
            len(self.names),
            channels,
            _two(kernel),
            stride=_two(stride),
            padding=padding if isinstance(padding, str) else _two(padding),
            dilation=_two(dilation),
            bias=False,
        )

    def attach(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Put the adapter on the model."""
        try:
            first = model.get_submodule(self.after)
        except AttributeError:
            raise LayerError(f"the model has no module {self.after!r}.") from None
        yield from self._put_on(model)
        yield first.register_forward_hook(self._add)

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        images = self._images()
        masks = None if images is None else self._masks((images.shape[-2], images.shape[-1]))
        if masks is None:
            return None
        own: Tensor = self.conv(self.norm(masks.to(self.conv.weight.dtype))).to(output.dtype)
        if own.shape != output.shape:
            raise LayerError(
                f"layer {self.after!r} gives {tuple(output.shape)}, the masks {tuple(own.shape)}; "
                "it is not the first convolution, or has another stride."
            )
        return output + own


def _two(values: Sequence[int]) -> tuple[int, int]:
    down, across = values
    return int(down), int(across)
