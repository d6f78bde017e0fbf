"""`attnguide masks`: writes the regions that a prior finds, as masks that can be looked at and corrected."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnguide.cli.console import (
    exit_if,
    note,
    note_default_model,
    note_skipped,
    progress,
    warn_of_random_weights,
)
from attnguide.cli.options import (
    PATH,
    FiniteRange,
    ModelChoice,
    batch_size_option,
    device_option,
    layers_of,
    model_options,
    pick_device,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from attnguide.interfaces import PriorMaps
    from attnguide.masks import MaskCompletion
    from attnguide.models import LoadedModel
    from attnguide.priors import FindingPrior

__all__ = ["masks"]

#: Number of images on the sheet.
_ON_SHEET = 60
#: Largest number of images from which narrowing learns.
_LEARNED_FROM = 500


@click.command(short_help="Write the regions that a prior finds, as masks.")
@click.argument("data", type=PATH, metavar="FOLDER")
@click.option(
    "--prior",
    type=click.Choice(["token_cut", "teacher", "segmenter", "text"]),
    default="token_cut",
    show_default=True,
    help="token_cut: the object, from the model's features; teacher: where the model looks; segmenter: what "
    "a segmentation network calls an object; text: what --words name.",
)
@click.option(
    "--segmenter",
    metavar="NAME",
    help="Segmentation network: of torchvision (deeplabv3_resnet50), transformers/NAME, or an ONNX file. Its "
    "weights are downloaded once.",
)
@click.option(
    "--words",
    multiple=True,
    metavar="TEXT",
    help="What to look for, such as 'a bird'. Repeated: several texts of one meaning.",
)
@click.option(
    "--clip",
    metavar="NAME",
    help="Model like CLIP that finds the words, of transformers: hf:OWNER/NAME, whose weights are downloaded "
    "once, or hf:FOLDER.  [default: hf:openai/clip-vit-base-patch16]",
)
@click.option(
    "--model",
    metavar="NAME",
    help="Model of timm, or torchvision/NAME, that finds the regions.  [default: the small embedded one]",
)
@model_options
@click.option(
    "--source",
    default="grad_cam",
    show_default=True,
    metavar="NAME",
    help="Attribution source of a teacher.",
)
@click.option(
    "--layer",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Layer of the features, or of the source.",
)
@click.option(
    "--threshold",
    type=FiniteRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    metavar="T",
    help="Share of a map's maximum from which on a pixel is inside, of a teacher or words.",
)
@click.option(
    "--narrow",
    is_flag=True,
    help="Take out of each region what looks like the outside of the others, so that masks are nearer to the "
    "objects. For token_cut and teacher.",
)
@click.option(
    "--out",
    type=PATH,
    default=Path("masks"),
    show_default=True,
    metavar="DIR",
    help="Folder for the masks.",
)
@click.option("--sheet", is_flag=True, help="Draw images and masks on one page, masks.png beside the folder.")
@click.option("--overwrite", is_flag=True, help="Replace masks that exist.  [default: keep them]")
@device_option
@batch_size_option(16)
def masks(
    choice: ModelChoice,
    data: Path,
    prior: str,
    segmenter: str | None,
    words: tuple[str, ...],
    clip: str | None,
    source: str,
    layer: str,
    threshold: float,
    narrow: bool,
    out: Path,
    sheet: bool,
    overwrite: bool,
    device: str,
    batch_size: int,
) -> None:
    """Write the regions that a prior finds, as masks.

    FOLDER holds images, with its subfolders. The masks have the images' names and sizes: guide with them by
    WithMasks, measure with `attnguide evaluate --masks`, correct them with `attnguide annotate`. Existing
    masks are kept, so that corrected ones stay, and a run that was ended goes on.

    The whole image is resized to the model's input, and the mask back to the image. A teacher's mask is that
    of the class that it predicts. A segmenter and words need no --model. An image in which no region is found
    gets no mask, and is counted.

    The exit status is 1 if an image could not be read or no region was found at all.

    \b
    Examples:
      attnguide masks photos/ --model vit_small_patch16_224.dino --pretrained --out masks/ --sheet
      attnguide masks photos/ --model resnet50.a1_in1k --pretrained --narrow --sheet
      attnguide masks photos/ --prior teacher --model resnet50.a1_in1k --pretrained
      attnguide masks photos/ --prior text --words "a bird" --sheet
    """  # noqa: D301  (click's mark for "leave these lines as they are")
    from attnguide.data.files import check_writable
    from attnguide.data.images import find_images
    from attnguide.parts.registry import registry

    registry().find("source", source)
    images = find_images([data])
    files = _names(images, data, out)
    check_writable(out)
    left = {image: file for image, file in files.items() if overwrite or not file.exists()}
    for option, of, value in (
        ("--segmenter", "segmenter", segmenter),
        ("--words", "text", words),
        ("--clip", "text", clip),
    ):
        if value and prior != of:
            raise click.UsageError(f"{option} is for --prior {of}.")
    if narrow and prior in ("segmenter", "text"):
        raise click.UsageError("--narrow is for --prior token_cut and teacher, whose model it looks with.")
    if prior == "segmenter":
        finder = _segmenter(segmenter)
    elif prior == "text":
        finder = _text(words, clip, threshold)
    else:
        loaded = choice.load()
        warn_of_random_weights(loaded)
        note_default_model(choice, loaded)
        found = _prior(prior, loaded, source, layers_of(layer), threshold)
        finder = _Finder(found, loaded.size, loaded.mean, loaded.std, loaded.model)
    place = pick_device(device)
    if finder.model is not None:
        finder.model.to(place)
        if narrow and left:
            finder = _narrowing(finder, finder.model, list(files), place, batch_size)
    written, skipped, missing = _write(finder, left, place, batch_size)
    note_skipped(skipped)
    kept = len(files) - len(left)
    if missing:
        note(f"No region was found in {len(missing)} images, such as {missing[0]}; they have no mask.")
    if sheet:
        page = _sheet([(image, file) for image, file in files.items() if file.exists()], out)
        if page is not None:
            note(f"Sheet: {page}")
    click.echo(
        f"{written} masks in {out}"
        + (f" ({kept} existed and were kept)" if kept else "")
        + f", {len(missing)} images without a region, {len(skipped)} skipped"
    )
    exit_if(skipped or (left and not written))


@dataclass(frozen=True)
class _Finder:
    """A prior, the images that it wants, the model that chooses their class, and what narrows the regions."""

    prior: FindingPrior
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    model: nn.Module | None = None
    completion: MaskCompletion | None = None

    def __call__(self, pixels: Tensor) -> PriorMaps:
        """Find the regions of images `(B, 3, H, W)`: maps `(B, h, w)`, and weight 0 where there is none."""
        import torch

        from attnguide.capture.logits import find_logits
        from attnguide.interfaces import PriorMaps

        with torch.no_grad():
            classes = torch.zeros(len(pixels), dtype=torch.long, device=pixels.device)
            if self.model is not None:
                classes = find_logits(self.model(pixels)).argmax(dim=1)
            maps, weights = self.prior.find(pixels, classes)
        if self.completion is None:
            return PriorMaps(maps, weights)
        regions = torch.stack([_cut(plane, self.size) for plane in maps])
        narrowed = self.completion(pixels, within=regions.to(pixels)).nan_to_num(0.0)
        return PriorMaps(narrowed, weights)


def _segmenter(name: str | None) -> _Finder:
    """Make the finder of a segmentation network, whose images are larger than most classifiers'."""
    from attnguide.priors import SegmenterPrior

    prior = SegmenterPrior() if name is None else SegmenterPrior(name)
    prior.prepare(None, 1)
    return _Finder(prior, (320, 320), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _text(words: tuple[str, ...], clip: str | None, threshold: float) -> _Finder:
    """Make the finder of words, whose images are those of a model like CLIP."""
    from attnguide.errors import InputError
    from attnguide.priors.finding import IMAGENET
    from attnguide.priors.text import CLIP, TextPrior

    if not any(text.strip() for text in words):
        raise InputError("--prior text needs words: --words 'a bird'.")
    prior = TextPrior([words], threshold=threshold, model=clip or CLIP)
    prior.prepare(None, 1)
    mean, std = prior.normalization = prior.own_normalization or IMAGENET
    return _Finder(prior, (prior.side, prior.side), tuple(mean), tuple(std))


def _names(images: Sequence[Path], data: Path, out: Path) -> dict[Path, Path]:
    """Return the file of each image's mask.

    Raises:
        InputError: If two images would share one, or masks would replace the images.
    """
    from attnguide.errors import InputError

    root = data if data.is_dir() else data.parent
    if out.resolve() == root.resolve():
        raise InputError(f"--out {out} is the folder of the images. Name another one for the masks.")
    files: dict[Path, Path] = {}
    for image in images:
        inside = image.relative_to(root) if image.is_relative_to(root) else Path(image.name)
        file = out / inside.with_suffix(".png")
        if file in files.values():
            other = next(first for first, target in files.items() if target == file)
            raise InputError(f"{other} and {image} would have one mask, {file}. Rename one of them.")
        files[image] = file
    return files


def _prior(
    name: str, loaded: LoadedModel, source: str, layer: str | list[str], threshold: float
) -> FindingPrior:
    from attnguide.errors import InputError
    from attnguide.priors import TeacherPrior, TokenCutPrior

    if name == "teacher":
        return TeacherPrior(loaded, source=source, layer=layer, threshold=threshold)
    if not isinstance(layer, str):
        raise InputError(f"--prior token_cut reads one layer, not {','.join(layer)}.")
    return TokenCutPrior(loaded, layer=layer)


def _narrowing(
    finder: _Finder, model: nn.Module, images: Sequence[Path], device: Any, batch_size: int
) -> _Finder:
    """Learn from the regions of some images what is inside of them, spread evenly over all."""
    import torch

    from attnguide.errors import DataError
    from attnguide.masks import MaskCompletion

    count = min(_LEARNED_FROM, len(images))
    chosen = [images[number * len(images) // count] for number in range(count)]
    learned = []
    with progress("Learning what objects look like", count, unit="images") as advance:
        for start in range(0, count, batch_size):
            batch = []
            for image in chosen[start : start + batch_size]:
                with suppress(DataError):  # it is skipped, and mentioned, when its mask is written
                    batch.append(_read(finder, image)[0])
            if batch:
                pixels = torch.stack(batch).to(device)
                maps, weights = finder(pixels)
                regions = torch.stack([_cut(plane, finder.size) for plane in maps])
                found = weights > 0
                learned.append((pixels[found], regions.to(pixels)[found]))
            advance(len(chosen[start : start + batch_size]))
    return replace(finder, completion=MaskCompletion(model).fit(learned, coarse=True))


def _write(
    finder: _Finder, files: dict[Path, Path], device: Any, batch_size: int
) -> tuple[int, list[str], list[Path]]:
    """Find and write masks; return their number, reasons of skipped images, and images without a region."""
    import torch

    from attnguide.errors import DataError

    written, skipped, missing = 0, [], []
    items = list(files.items())
    with progress("Finding regions", len(items), unit="images") as advance:
        for start in range(0, len(items), batch_size):
            batch = []
            for image, file in items[start : start + batch_size]:
                try:
                    batch.append((image, file, *_read(finder, image)))
                except DataError as error:
                    skipped.append(str(error))
            if batch:
                maps, weights = finder(torch.stack([pixels for _, _, pixels, _ in batch]).to(device))
                for (image, file, _, size), plane, weight in zip(batch, maps, weights.tolist(), strict=True):
                    if weight:
                        _save(plane, size, file)
                        written += 1
                    else:
                        missing.append(image)
            advance(len(items[start : start + batch_size]))
    return written, skipped, missing


def _read(finder: _Finder, path: Path) -> tuple[Tensor, tuple[int, int]]:
    """Read a whole image as the model's input, `(3, H, W)`, and return its own width and height."""
    import torch
    from torchvision.transforms.functional import pil_to_tensor

    from attnguide.data.images import read_image

    image = read_image(path)
    height, width = finder.size
    pixels = pil_to_tensor(image.resize((width, height))).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (finder.mean, finder.std))
    return (pixels - mean) / std, image.size


def _save(plane: Tensor, size: tuple[int, int], file: Path) -> None:
    """Write a region as black and white, of an image's size."""
    from PIL import Image

    from attnguide.data.files import atomic_write

    inside = _cut(plane, (size[1], size[0])).byte() * 255
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        Image.fromarray(inside.numpy()).save(temporary, "PNG")


def _cut(plane: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map to `(h, w)`, and cut it at half of its strongest value: a smooth border between cells."""
    from attnguide import functional

    sized = functional.resize(plane[None].float().cpu(), size)[0]
    return (sized >= 0.5 * sized.max()).to(sized)


def _sheet(files: Sequence[tuple[Path, Path]], out: Path) -> Path | None:
    """Draw images with their masks on one page beside the folder, spread evenly over all."""
    import torch
    from torchvision.transforms.functional import pil_to_tensor

    from attnguide import visual
    from attnguide.data.files import atomic_write
    from attnguide.data.images import load_image, read_image, save_picture

    if not files:
        return None
    count = min(_ON_SHEET, len(files))
    shown = [files[number * len(files) // count] for number in range(count)]
    pictures: list[Any] = []
    captions: list[str] = []
    for image, mask in shown:
        picture = read_image(image)
        picture.thumbnail((320, 320))
        inside = pil_to_tensor(load_image(mask).convert("L").resize(picture.size)).float() / 255
        pixels = (pil_to_tensor(picture).float() / 255)[None]
        pictures += [picture, visual.to_pil(visual.overlay(pixels, inside[None], signed=False)[0, 0])]
        captions += [image.name, f"{float(torch.mean(inside)):.0%} inside"]
    page = out.with_name(f"{out.name}.png")
    with atomic_write(page) as temporary:
        save_picture(visual.contact_sheet(pictures, captions, group=2), temporary)
    return page
