"""`attnguide annotate`: a page in the browser, to paint where a model should look."""

from __future__ import annotations

import secrets
import socket
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from html import escape
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from attnguide.cli.console import note, note_skipped, progress, warn, warn_of_random_weights
from attnguide.cli.options import (
    PATH,
    ModelChoice,
    device_option,
    model_options,
    pick_device,
    read_class_names,
)
from attnguide.errors import InputError

if TYPE_CHECKING:
    from attnguide.models import LoadedModel
    from attnguide_gradcam_iou.painting.server import Studio
    from attnguide_gradcam_iou.painting.tuning import LabeledImage

__all__ = ["annotate"]

_PORT = 8765
_LOCAL = ("127.0.0.1", "localhost", "::1")
#: These stand for all addresses of this machine.
_EVERY = ("0.0.0.0", "::")  # noqa: S104  (only if asked for)
_file_option = partial(click.option, type=PATH, metavar="FILE")


@click.command(short_help="Paint where a model should look, in the browser.")
@click.argument("images", nargs=-1)
@click.option(
    "--template",
    metavar="average|FILE",
    help="Paint once for all images: on their mean if they are aligned, or on one image.",
)
@_file_option(
    "--classes", help="Names of the classes to paint: one per line, or a JSON list.  [default: the model's]"
)
@click.option(
    "--out",
    type=PATH,
    required=True,
    metavar="FOLDER",
    help="Folder of the masks; existing masks are kept and can be edited.",
)
@click.option(
    "--model",
    metavar="NAME",
    help="Show where this model looks: a model of timm, torchvision/NAME, or hf:NAME_OR_FOLDER.",
)
@model_options
@click.option("--source", default="grad_cam", show_default=True, metavar="NAME", help="Attribution source.")
@click.option(
    "--data",
    type=PATH,
    metavar="FOLDER",
    help="Images to fine-tune the model on, a subfolder for each class.",
)
@_file_option(
    "--labels",
    help="With --data, for a model of attributes: CSV with a row file,attribute,… and 1, 0 or -1 below it.",
)
@click.option("--parts", is_flag=True, help="Offer parts of faces, found by a parser.")
@_file_option(
    "--landmarks", help="Offer parts of faces, drawn around landmarks: a table of attnguide landmarks."
)
@_file_option("--parser", help="Weights of the parser; the default parser knows drawn faces only.")
@device_option
@click.option(
    "--port", type=click.IntRange(0, 65535), metavar="N", help=f"Port.  [default: {_PORT}, or a free one]"
)
@click.option(
    "--host",
    default=_LOCAL[0],
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen at. With any other, the whole network can connect; the token is still required.",
)
@click.option("--no-browser", is_flag=True, help="Print the address, and open no browser.")
def annotate(
    choice: ModelChoice,
    images: tuple[str, ...],
    template: str | None,
    classes: Path | None,
    out: Path,
    source: str,
    data: Path | None,
    labels: Path | None,
    parts: bool,
    landmarks: Path | None,
    parser: Path | None,
    device: str,
    port: int | None,
    host: str,
    no_browser: bool,
) -> None:
    """Paint where a model should look, in the browser.

    IMAGES are files, folders or patterns; each gets its own mask. With --template one mask holds for all:
    it is painted on the mean of aligned images, or on one image. Every change is saved at once in the folder
    --out, as PNG files that the prior `mask` reads. Ctrl-C ends the server.

    With --model or --checkpoint the page shows where the model looks. With --data the model can also be
    fine-tuned towards the masks; its new weights are FOLDER/finetuned.safetensors.

    The page needs no network. The server listens on this machine only and requires the token in the address.

    \b
    Examples:
      attnguide annotate faces/ --template average --classes attributes.txt --out masks/
      attnguide annotate photos/ --model resnet18 --checkpoint mine.safetensors --data train/ --out masks/
    """  # noqa: D301  (click's mark for lines that are not wrapped)
    try:
        import uvicorn

        from attnguide_gradcam_iou.painting.server import application
    except ModuleNotFoundError as error:
        raise InputError(
            f"the page needs {error.name}, which is not installed: pip install 'attnguide[ui]'"
        ) from error
    if landmarks is not None and (parts or parser is not None):
        raise InputError("--landmarks and --parts exclude each other. Leave one of them out.")
    if data is not None and choice.name is None and choice.checkpoint is None:
        raise InputError("--data is for fine-tuning a model. Name it: --model, --checkpoint.")
    if labels is not None and data is None:
        raise InputError("--labels needs --data, the folder with the images.")
    listener = _listen(host, port)
    with ExitStack() as stack:
        stack.enter_context(listener)
        studio = _studio(choice, images, template, classes, out, source, (data, labels), device)
        if landmarks is not None:
            _with_regions(studio, "landmarks", landmarks=landmarks)
        elif parts or parser is not None:
            _with_regions(studio, "face_parser", parser=parser)
        token = secrets.token_urlsafe(24)
        port = listener.getsockname()[1]
        shown = _named(_outward(host) if host in _EVERY else host)
        address = f"http://{shown}:{port}/?token={token}"
        if host not in _LOCAL:
            warn(
                f"at {host} everyone in the network who knows the address below can open the page. The "
                "connection is not encrypted."
            )
        settings = uvicorn.Config(
            application(studio, token, partial(_serves, host, port)),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=2,
        )
        try:
            click.echo(f"Open {address}")
            note("Ctrl-C ends the server.")
            if not no_browser:
                threading.Timer(0.3, webbrowser.open, (stack.enter_context(_leading_to(address)),)).start()
            uvicorn.Server(settings).run(sockets=[listener])
        except KeyboardInterrupt:
            note("")
        finally:
            if studio.tuning is not None:
                studio.tuning.stop()


def _studio(
    choice: ModelChoice,
    images: tuple[str, ...],
    template: str | None,
    classes: Path | None,
    out: Path,
    source: str,
    data: tuple[Path | None, Path | None],
    device: str,
) -> Studio:
    from attnguide_gradcam_iou.painting.server import Studio
    from attnguide_gradcam_iou.painting.sheets import find_sheets
    from attnguide_gradcam_iou.painting.store import MaskStore, recorded_classes

    with progress("Averaging", unit="images", show=template == "average") as advance:
        sheets = find_sheets(images, template, out, lambda done, of: advance(total=of))
    if sheets.links:
        note_skipped([f"{sheets.links} images that are links out of their folder."])
    with_model = choice.name is not None or choice.checkpoint is not None
    loaded, labeled = _labeled(choice.load(), *data, out) if with_model else (None, None)
    if loaded is not None:
        warn_of_random_weights(loaded)
    names: list[str] | None = None
    if classes is not None:
        names = read_class_names(classes)
        if not names:
            raise InputError(f"{classes} names no class. Write one per line.")
    elif loaded is not None:
        names = list(loaded.classes)
    else:
        names = recorded_classes(out)
    if not names:
        names = ["region"] if template is not None else []
    store = MaskStore(out, names, template=template is not None)
    studio = Studio(sheets, store, {}, [None] * max(1, len(names)))
    if loaded is not None:
        _with_model(studio, loaded, names, source, labeled, choice.checkpoint, device)
    about: dict[str, Any] = {"template": None, "size": None}
    if sheets.template is not None:
        about = {"template": sheets.about, "size": list(sheets.template.size[::-1])}
    store.record(about)
    return studio


def _labeled(
    loaded: LoadedModel, data: Path | None, labels: Path | None, out: Path
) -> tuple[LoadedModel, list[LabeledImage] | None]:
    """List the images to fine-tune on; their folders may name the model's classes."""
    if data is None:
        return loaded, None
    from attnguide.evaluation import single_label_images
    from attnguide_gradcam_iou.painting.tuning import LabeledImage, read_attributes

    if loaded.multi_label and labels is None:
        raise InputError(f"{loaded.name} predicts attributes: give the attributes of the images by --labels.")
    if labels is not None and not loaded.multi_label:
        raise InputError(
            f"--labels is for attributes, but {loaded.name} gives each image one class: --multi-label."
        )
    if labels is not None:
        images = read_attributes(labels, data, loaded.classes)
    else:
        loaded, in_folders = single_label_images(loaded, data)
        images = [LabeledImage(image.path, image.cls) for image in in_folders]
    root = out.resolve()
    inside = next((image.path for image in images if image.path.resolve().is_relative_to(root)), None)
    if inside is not None:
        raise InputError(f"{inside} of --data lies in {out}, where the masks go. Choose another --out.")
    return loaded, images


def _with_model(
    studio: Studio,
    loaded: LoadedModel,
    names: list[str],
    source: str,
    labeled: list[LabeledImage] | None,
    checkpoint: Path | None,
    device: str,
) -> None:
    """Show the maps of a model, and offer to fine-tune it."""
    from attnguide.masks import ClassNames
    from attnguide.parts.registry import registry
    from attnguide_gradcam_iou.painting.tuning import FineTuning
    from attnguide_gradcam_iou.painting.watching import Watcher

    registry().find("source", source)
    place = pick_device(device)
    known = ClassNames(loaded.classes)
    matches = [known.find(name) for name in names]
    studio.numbers = [None if match is None else loaded.classes.index(match) for match in matches] or [0]
    if not any(number is not None for number in studio.numbers):
        raise InputError(
            f"none of the classes {', '.join(names[:5])} is one of the model's, such as "
            f"{', '.join(loaded.classes[:5])}. Name the model's classes by --class-names."
        )
    studio.watchers["before"] = Watcher(loaded, studio.sheets, place, source)
    if labeled is None:
        return

    def on_model(tuned: LoadedModel) -> None:
        studio.watchers["after"] = Watcher(tuned, studio.sheets, place, source)

    studio.tuning = FineTuning(loaded, labeled, studio.store.root, place, on_model, checkpoint)


def _with_regions(studio: Studio, name: str, **options: Any) -> None:
    """Offer the regions of a source that a plugin provides."""
    from attnguide.interfaces import RegionSource
    from attnguide.parts.registry import registry
    from attnguide_gradcam_iou.painting.parts import SheetRegions

    source = registry().create("regions", name, RegionSource, **options)
    studio.parts = SheetRegions(studio.sheets, source)


def _listen(host: str, port: int | None) -> socket.socket:
    """Take a port, before the images and the model are loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in (_PORT, 0) if port is None else (port,):
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, number))
            listener.listen(128)
        except OSError as error:
            listener.close()
            problem = error
        else:
            return listener
    raise InputError(
        f"cannot listen at {host}, port {port or _PORT}: {problem.strerror}. Choose another --port."
    )


@contextmanager
def _leading_to(address: str) -> Iterator[str]:
    """Yield the address of a local page that leads to another one.

    What a browser is started with can be read by every user of the machine; this file only by its owner.
    """
    with TemporaryDirectory(prefix="attnguide-") as folder:  # for its owner alone
        page = Path(folder, "open.html")
        target = escape(address)
        page.write_text(
            f'<!doctype html><meta charset="utf-8"><meta name="referrer" content="no-referrer">'
            f'<meta http-equiv="refresh" content="0; url={target}"><a href="{target}">Open the page</a>\n',
            encoding="utf-8",
        )
        yield page.as_uri()


def _named(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _serves(host: str, port: int, requested: str) -> bool:
    """Whether the server may be addressed by this host and port."""
    name, _, number = requested.rpartition(":")
    if number != str(port):
        return False
    if host in _EVERY:
        # Any address of this machine; a name could be another site's.
        try:
            return bool(ip_address(name.strip("[]")))
        except ValueError:
            return name == "localhost"
    return name in {_named(host).lower(), *map(_named, _LOCAL)}


def _outward(host: str) -> str:
    """Find the address by which others reach this machine."""
    family, beyond = (socket.AF_INET6, "2001:db8::1") if ":" in host else (socket.AF_INET, "192.0.2.1")
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((beyond, 9))  # nothing is sent
            return str(probe.getsockname()[0])
        except OSError:
            return "::1" if ":" in host else "127.0.0.1"
