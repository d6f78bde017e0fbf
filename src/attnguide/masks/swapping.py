"""Exchanges what is outside of the masks between the images of a batch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnguide import functional
from attnguide.errors import InputError
from attnguide.functional import as_tensor, full_precision, may_read
from attnguide.masks.sizes import check_proportions

__all__ = ["Exchange", "SwapOutside", "Swapped"]


class Swapped(NamedTuple):
    """A batch of images whose outside comes from other images.

    Attributes:
        images: `(B, C, H, W)`, of the type of those given.
        masks: The masks of these images, `(B, H, W)` in [0, 1], which are those given: what is inside stays
            where it was. NaN where an image has none.
        partner: The image that the outside comes from, `(B,)`; its own index where an image stays as it is.
        exchanged: Whether the outside was exchanged, `(B,)` bool.
    """

    images: Tensor
    masks: Tensor
    partner: Tensor
    exchanged: Tensor


@dataclass(frozen=True, eq=False)
class Exchange:
    """Which image of a batch gets the outside of which other.

    [`SwapOutside.draw`][attnguide.masks.SwapOutside] makes it.

    Attributes:
        regions: The masks, `(B, H, W)` in [0, 1]; zeros where an image has none.
        given: Which images have a mask, `(B,)` bool.
        partner: As in [`Swapped`][attnguide.masks.Swapped].
        exchanged: As in [`Swapped`][attnguide.masks.Swapped].
    """

    regions: Tensor
    given: Tensor
    partner: Tensor
    exchanged: Tensor

    @property
    def masks(self) -> Tensor:
        """The masks `(B, H, W)`, NaN where an image has none."""
        return torch.where(self.given[:, None, None], self.regions, torch.nan)

    def __call__(self, images: Tensor) -> Tensor:
        """Give images, or feature maps, `(B, C, h, w)`, the outside of their partners; differentiable.

        In a feature map a position is inside as far as the mask covers it.
        """
        inside = functional.resize(self.regions, (images.shape[-2], images.shape[-1]))[:, None]
        outside = functional.inpaint(images, inside)[self.partner]
        mixed = torch.lerp(outside, full_precision(images), inside.to(outside)).to(images.dtype)
        return torch.where(self.exchanged[:, None, None, None], mixed, images)


@dataclass(frozen=True)
class SwapOutside:
    """Gives each image the outside of another image of the batch, along the masks.

    What a label owes to its surroundings is then gone, and what is inside the mask remains. The other image's
    own object does not come along: before, its mask is filled from around it. Soft edges of masks blend.

    ```python
    swapped = SwapOutside()(images, labels, masks)
    loss = criterion(model(swapped.images), labels)
    ```

    Where a mask allows an image to be looked at everywhere, there is no outside, and the image is partner to
    none. An image without a mask stays as it is, and is partner to none, since its object would come along;
    so does one that finds no partner. `swapped.exchanged` shows which were exchanged.

    Attributes:
        partners: `"any"`: any other image, so that surroundings say nothing about the label; `"other"`: one
            with another label, if there is one. Surroundings that go with a label then come with the wrong
            one, which makes a contrast to the image as it is; a network trained on such images alone learns
            the reverse.
        probability: Share of the images that are exchanged, in [0, 1].
        empty: What to do with a mask that is zero everywhere, so that nothing of the image would be left:
            `"error"`, or `"skip"`, for pipelines whose crops may lose the object; the image then stays as it
            is.

    Raises:
        InputError: If a setting has a wrong value.
    """

    partners: Literal["any", "other"] = "any"
    probability: float = 1.0
    empty: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if self.partners not in ("any", "other"):
            raise InputError(f"partners={self.partners!r} must be 'any' or 'other'.")
        if self.empty not in ("error", "skip"):
            raise InputError(f"empty={self.empty!r} must be 'error' or 'skip'.")
        # Written so that NaN fails too.
        if not isinstance(self.probability, (int, float)) or not 0 <= self.probability <= 1:
            raise InputError(f"probability={self.probability!r} must be in [0, 1].")

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        masks: Tensor | np.ndarray[Any, Any] | Sequence[Any] | None,
        *,
        generator: torch.Generator | None = None,
    ) -> Swapped:
        """Exchange what is outside of the masks.

        Args:
            images: `(B, C, H, W)`, floats, normalized or not.
            labels: Class indices `(B,)`, or `(B, K)` for several at once.
            masks: `(H, W)` for all images, `(B, H, W)` or `(B, 1, H, W)` in [0, 1], of the images'
                proportions, NaN or −1 everywhere for a missing one; or a list of `(H, W)` and None; or None.
            generator: Source of the random numbers, on the device of the images; PyTorch's own if left out.

        Returns:
            The new batch, without a graph.

        Raises:
            InputError: If something does not fit the images, or a mask has values outside [0, 1] or is empty.

        Warns:
            UserWarning: If there are masks, and yet no image could be exchanged.
        """
        exchange = self.draw(images, labels, masks, generator=generator)
        return Swapped(exchange(images), exchange.masks, exchange.partner, exchange.exchanged)

    @torch.no_grad()
    def draw(
        self,
        images: Tensor,
        labels: Tensor,
        masks: Tensor | np.ndarray[Any, Any] | Sequence[Any] | None,
        *,
        generator: torch.Generator | None = None,
    ) -> Exchange:
        """Draw the partners without exchanging anything yet; arguments and errors as for a call.

        Returns:
            The exchange, which can be done to images and to feature maps.
        """
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            raise InputError(
                "images to swap must be floats (B, C, H, W), got "
                + (
                    f"{tuple(images.shape)} of {images.dtype}."
                    if isinstance(images, Tensor)
                    else f"{images!r:.60}."
                )
            )
        labels = as_tensor(labels, "labels").to(images.device)
        if labels.ndim not in (1, 2) or len(labels) != len(images):
            raise InputError(
                f"labels have shape {tuple(labels.shape)}; for {len(images)} images they must be "
                f"({len(images)},) or ({len(images)}, K)."
            )
        regions, given = regions_of(masks, images)
        full = (regions > 0).flatten(1).any(dim=1)
        if self.empty == "error" and may_read(full) and bool((given & ~full).any()):
            raise InputError(
                f"mask {int((given & ~full).nonzero()[0])} is empty: nothing of its image would be left; "
                "give None (or NaN) for 'no mask', or build SwapOutside(empty='skip')."
            )
        given = given & full
        gives = given & (regions < 0.5).flatten(1).any(dim=1)
        partner, found = self._draw(labels, gives, generator)
        lucky = torch.rand(len(images), generator=generator, device=images.device) < self.probability
        exchanged = given & found & lucky
        if may_read(given) and bool(given.any()) and self.probability == 1 and not bool(exchanged.any()):
            warnings.warn(
                f"none of the {int(given.sum())} images with a mask could be given another outside: a batch "
                "needs two images whose masks leave something outside.",
                stacklevel=3,
            )
        partner = torch.where(exchanged, partner, torch.arange(len(images), device=images.device))
        return Exchange(regions, given, partner, exchanged)

    def _draw(
        self, labels: Tensor, gives: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Draw the partner of each image among those that give their outside, and say where there is one."""
        allowed = gives.expand(len(gives), -1).clone().fill_diagonal_(False)
        if self.partners == "other":
            rows = labels.flatten(1) if labels.ndim > 1 else labels[:, None]
            best = allowed & (rows[:, None] != rows).any(dim=2)
            allowed = torch.where(best.any(dim=1, keepdim=True), best, allowed)
        found = allowed.any(dim=1)
        chances = torch.where(found[:, None], allowed, True).float()
        return torch.multinomial(chances, 1, generator=generator)[:, 0], found


def regions_of(masks: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return a mask `(B, H, W)` of the images' size for each image, zeros for none, and which there are."""
    batch, _, height, width = images.shape
    kind = full_precision(images[:0]).dtype
    if masks is None:
        return images.new_zeros(batch, height, width, dtype=kind), images.new_zeros(batch, dtype=torch.bool)
    if isinstance(masks, (list, tuple)):
        if len(masks) != batch:
            raise InputError(f"there are {len(masks)} masks for {batch} images; give None for a missing one.")
        parts = [_of_one(mask, images[:1], number) for number, mask in enumerate(masks)]
        return torch.cat([region for region, _ in parts]), torch.cat([each for _, each in parts])
    mask = as_tensor(masks, "masks").detach().as_subclass(Tensor).to(images.device, kind)
    if mask.ndim == 2:
        mask = mask.expand(batch, -1, -1)
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim != 3 or len(mask) != batch:
        advice = " Join the masks of the classes: masks.amax(dim=1)." if mask.ndim == 4 else ""
        raise InputError(
            f"masks have shape {tuple(mask.shape)}; for {batch} images they must be (H, W), ({batch}, H, W) "
            f"or ({batch}, 1, H, W), one for each image.{advice}"
        )
    check_proportions(mask.shape, images.shape, "masks")
    absent = mask.isnan() | (mask == -1)
    given = ~absent.flatten(1).all(dim=1)
    mask = torch.where(given[:, None, None], mask, 0.0)
    wrong = ~((mask >= 0) & (mask <= 1)).flatten(1).all(dim=1)
    if may_read(wrong) and bool(wrong.any()):
        values = mask[int(wrong.nonzero()[0])]
        raise InputError(
            f"mask {int(wrong.nonzero()[0])} has values outside [0, 1], or is missing in places (minimum "
            f"{values.min().item():g}, maximum {values.max().item():g}); divide an 8-bit mask by 255."
        )
    return functional.resize(mask, (height, width)), given


def _of_one(mask: Any, image: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The mask of one image and whether it has one, each with a batch axis of one."""
    if mask is None:
        return regions_of(None, image)
    mask = as_tensor(mask, f"mask {number}")
    if mask.shape[:-2] not in ((), (1,)):
        raise InputError(f"mask {number} has shape {tuple(mask.shape)}; it must be (H, W).")
    return regions_of(mask.reshape(1, *mask.shape[-2:]), image)
