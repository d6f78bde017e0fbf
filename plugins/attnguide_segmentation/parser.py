"""Finds the regions of faces: with the embedded network, your own, or any segmentation network."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attnguide.capture.model_state import muting
from attnguide.data.files import atomic_write, check_file
from attnguide.errors import DataError, InputError, UnknownNameError
from attnguide.functional import may_read
from attnguide.models.checkpoints import load_into
from attnguide_segmentation.parsing import ParsingNetwork
from attnguide_segmentation.regions import REGIONS

__all__ = ["EMBEDDED", "Parser", "load_parser", "save_parser", "standardized"]

#: The embedded parser, trained on drawn faces; see `tools/train_parser.py`.
EMBEDDED = Path(__file__).parent / "assets" / "parser.safetensors"
#: Name of `standardized` in files of parsers.
_STANDARDIZED = "standardised"
#: The embedded parser is surer than this of drawn faces, and less sure of photographs: the share of the most
#: probable region, averaged over the pixels of an image.
_SURE = 0.945


def standardized(images: Tensor) -> Tensor:
    """Scale each channel of each image to mean 0 and deviation 1.

    So the normalisation of the images and the color of the light do not matter.
    """
    centred = images.float() - images.float().mean(dim=(-2, -1), keepdim=True)
    return centred / centred.square().mean(dim=(-2, -1), keepdim=True).sqrt().clamp(min=1e-4)


class Parser(nn.Module):
    """Computes region masks of images; frozen, without a graph, always in evaluation mode.

    Any segmentation network can be used, with the region of each of its labels:

    ```python
    network = torchvision.models.segmentation.lraspp_mobilenet_v3_large(num_classes=19)
    parser = Parser(network, labels=SCHEMES["celebamask"], size=256, prepare=None)
    ```

    Args:
        network: Network that returns logits `(B, L, h, w)`, alone, as the last of a tuple, or as `"out"` in a
            dictionary.
        labels: Region of each of its L labels.
        size: Side in pixels of the square that images are resized to; None for no resizing.
        prepare: Function that is then applied to the images; None for no preparation.

    Attributes:
        only_drawn: Whether it was trained on drawn faces only: it then warns, once, if its answer for at
            least half of a batch is unlikely for such faces. True for the embedded parser.

    Raises:
        UnknownNameError: If a region is unknown.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        labels: Sequence[str] = REGIONS,
        size: int | None = None,
        prepare: Callable[[Tensor], Tensor] | None = standardized,
    ) -> None:
        super().__init__()
        self.network, self.labels, self.size, self.prepare = network, tuple(labels), size, prepare
        for name in self.labels:
            if name not in REGIONS:
                raise UnknownNameError("region", name, REGIONS)
        table = torch.tensor([[float(name == region) for name in self.labels] for region in REGIONS])
        self.register_buffer("table", table, persistent=False)
        self.only_drawn = False
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever the mode of the model around it."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Find the regions.

        Args:
            images: Images `(B, 3, H, W)`, normalised in any way by channel if `prepare` is `standardized`.

        Returns:
            Shares of the seven regions in each pixel `(B, 7, h, w)`, in [0, 1], which sum to 1.

        Raises:
            InputError: If the network does not return logits of its labels.
        """
        if self.size is not None and tuple(images.shape[-2:]) != (self.size, self.size):
            images = F.interpolate(
                images.float(),
                size=(self.size, self.size),
                mode="bilinear",
                antialias=True,
                align_corners=False,
            )
        logits = _logits(self.network(images if self.prepare is None else self.prepare(images)))
        if logits.ndim != 4 or logits.shape[1] != len(self.labels):
            raise InputError(
                f"the segmentation network gives {tuple(logits.shape)}, but {len(self.labels)} labels were "
                "named: expected (B, labels, h, w)."
            )
        shares = logits.float().softmax(dim=1)
        if self.labels != REGIONS:
            table: Any = self.table
            shares = torch.einsum("blhw,rl->brhw", shares, table)
        self._warn_of_others(shares)
        return shares

    def _warn_of_others(self, shares: Tensor) -> None:
        """Warn of images that do not seem to be drawn faces; the library's own probes do not count."""
        if not self.only_drawn or not len(shares) or muting.depth or not may_read(shares):
            return
        unsure = shares.amax(dim=1).mean(dim=(1, 2)) < _SURE
        eyes_and_mouth = shares[:, [REGIONS.index("eyes"), REGIONS.index("mouth")]]
        unlikely = unsure | (eyes_and_mouth.amax(dim=(2, 3)) < 0.5).any(dim=1)
        count = int(unlikely.sum())
        if 2 * count >= len(shares):
            warnings.warn(
                f"the embedded face parser knows drawn faces only, and its regions in {count} of "
                f"{len(shares)} images are probably wrong, as in photographs: it is unsure of them, or finds "
                'no eyes or no mouth. Draw the regions around landmarks ("landmarks" in place of the '
                "parser), give your own masks, or load a parser that was trained on such images.",
                stacklevel=2,
            )
            self.only_drawn = False  # said once


def _logits(output: Any) -> Tensor:
    if isinstance(output, Mapping):
        output = output.get("out", next(iter(output.values()), None))
    if isinstance(output, (tuple, list)) and output:
        output = output[-1]
    if not isinstance(output, Tensor):
        raise InputError(
            f"the segmentation network gives {type(output).__name__}, not logits (B, labels, h, w)."
        )
    return output


def load_parser(path: str | Path | None = None) -> Parser:
    """Load a parser.

    Args:
        path: A file that [`save_parser`][attnguide_segmentation.parser.save_parser] wrote; by default the
            embedded parser, which knows drawn faces only, and warns once if its answer is unlikely.

    Returns:
        The parser, on the CPU.

    Raises:
        DataError: If the file is missing, or not of that format.
    """
    embedded = path is None
    path = check_file(EMBEDDED if path is None else path)
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["parser"])
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        network = ParsingNetwork(int(about["width"]), len(about["labels"]))
        prepare = standardized if about["prepare"] == _STANDARDIZED else None
        size = None if about["size"] is None else int(about["size"])
        parser = Parser(network, labels=[str(name) for name in about["labels"]], size=size, prepare=prepare)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} is not a parser that attnguide saved ({type(error).__name__}: {error}). Wrap a "
            "network of another kind in Parser."
        ) from error
    load_into(network, weights, path)
    parser.only_drawn = embedded
    parser.train(False)
    return parser


def save_parser(path: str | Path, parser: Parser) -> None:
    """Save a parser whose network is a [`ParsingNetwork`][attnguide_segmentation.parsing.ParsingNetwork].

    Weights are saved in half precision.

    Args:
        path: The `.safetensors` file, written atomically.
        parser: The parser.

    Raises:
        InputError: If it holds another network, or the file cannot be written.
    """
    if not isinstance(parser.network, ParsingNetwork):
        raise InputError(
            f"the parser holds {type(parser.network).__name__}; only a ParsingNetwork is saved. Save the "
            "weights of another network yourself, and wrap it in Parser again."
        )
    if parser.prepare not in (None, standardized):
        raise InputError(
            "the parser prepares images by another function, which cannot be saved; use `standardized`."
        )
    about = {
        "width": parser.network.width,
        "size": parser.size,
        "labels": parser.labels,
        "prepare": None if parser.prepare is None else _STANDARDIZED,
    }
    weights = {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in parser.network.state_dict().items()
    }
    with atomic_write(path) as temporary:
        save_file(weights, temporary, metadata={"parser": json.dumps(about)})
