"""`attnguide annotate`: the page on which one paints where a model should look."""

from __future__ import annotations

import secrets
import socket
import threading
import webbrowser
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnguide.cli.console import warn_of_random_weights
from attnguide.cli.options import ModelChoice, device_option, model_options, pick_device, read_class_names
from attnguide.errors import InputError

if TYPE_CHECKING:
    from attnguide.models.loading import LoadedModel
    from attnguide_gradcam_iou.painting.server import Studio
    from attnguide_gradcam_iou.painting.tuning import Answered

__all__ = ["annotate"]

_PORT = 8765
_LOCAL = ("127.0.0.1", "localhost", "::1")
#: All addresses of this machine.
_EVERY = ("0.0.0.0", "::")  # noqa: S104  (only if asked for)


@click.command(short_help="Paint where a model should look, in the browser.")
@click.argument("images", nargs=-1)
@click.option(
    "--template",
    metavar="average|FILE",
    help="Paint once for all images: on their mean, if they are aligned, or on one image.",
)
@click.option(
    "--classes",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Names of the classes to paint: one a line, or a JSON list.  [default: the model's]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FOLDER",
    help="Where the masks go; what is there already is gone on with.",
)
@click.option(
    "--model", metavar="NAME", help="Show what this model looks at: one of timm, or torchvision/NAME."
)
@model_options
@click.option("--source", default="grad_cam", show_default=True, metavar="NAME", help="Attribution source.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Fine-tune the model on these images, a subfolder for each class.",
)
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --data, for a model of attributes: CSV with a row file,attribute,… and 1, 0 or -1 below.",
)
@click.option("--parts", is_flag=True, help="Offer the parts of faces that a parser finds.")
@click.option(
    "--landmarks",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Offer the parts of faces between landmarks: a table of attnguide landmarks.",
)
@click.option(
    "--parser",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A parser's weights; the one that comes along knows drawn faces.",
)
@device_option
@click.option(
    "--port", type=click.IntRange(0, 65535), metavar="N", help=f"Port.  [default: {_PORT}, or a free one]"
)
@click.option(
    "--host",
    default=_LOCAL[0],
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen at. Any other lets the whole network in that has the token.",
)
@click.option("--no-browser", is_flag=True, help="Print the address, and open nothing.")
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

    IMAGES are files, folders or patterns. One walks through them, and paints a mask for each; or paints once
    for all with --template, on the mean of aligned images, or on one image. Every change is written at once
    into the folder --out, as PNG files that the prior `mask` reads. Ctrl-C ends the server.

    With --model or --checkpoint the page shows what the model looks at; with --data as well it can be
    fine-tuned towards the masks, and its new weights are FOLDER/finetuned.safetensors.

    The page needs no network. It is served on this machine only, to who has the address with its token.

    \b
    Examples:
      attnguide annotate faces/ --template average --classes attributes.txt --out masks/
      attnguide annotate photos/ --model resnet18 --checkpoint mine.safetensors --data train/ --out masks/
    """  # noqa: D301  (click's mark for "leave these lines as they are")
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
    with listener:
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
            click.echo(
                f"Warning: at {host} everyone in the network can reach the page who has the address below. "
                "It is not encrypted.",
                err=True,
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
            click.echo("Ctrl-C ends.", err=True)
            if not no_browser:
                threading.Timer(0.3, webbrowser.open, (address,)).start()
            uvicorn.Server(settings).run(sockets=[listener])
        except KeyboardInterrupt:
            click.echo("", err=True)
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
    from rich.console import Console
    from rich.progress import Progress

    from attnguide_gradcam_iou.painting.server import Studio
    from attnguide_gradcam_iou.painting.sheets import find_sheets
    from attnguide_gradcam_iou.painting.store import MaskStore, recorded_classes

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("averaging", total=None, visible=template == "average")
        sheets = find_sheets(
            images, template, out, lambda done, of: progress.update(task, completed=done, total=of)
        )
    if sheets.links:
        click.echo(f"{sheets.links} images are links to elsewhere, and left out.", err=True)
    with_model = choice.name is not None or choice.checkpoint is not None
    loaded, answered = _answered(choice.load(), *data, out) if with_model else (None, None)
    if loaded is not None:
        warn_of_random_weights(loaded)
    names: list[str] | None = None
    if classes is not None:
        names = read_class_names(classes)
        if not names:
            raise InputError(f"{classes} names no class. Write one a line.")
    elif loaded is not None:
        names = list(loaded.classes)
    else:
        names = recorded_classes(out)
    if not names:
        names = ["region"] if template is not None else []
    store = MaskStore(out, names, template=template is not None)
    studio = Studio(sheets, store, {}, [None] * max(1, len(names)))
    if loaded is not None:
        _with_model(studio, loaded, names, source, answered, choice.checkpoint, device)
    about: dict[str, Any] = {"template": None, "size": None}
    if sheets.template is not None:
        about = {"template": sheets.about, "size": list(sheets.template.size[::-1])}
    store.record(about)
    return studio


def _answered(
    loaded: LoadedModel, data: Path | None, labels: Path | None, out: Path
) -> tuple[LoadedModel, list[Answered] | None]:
    """Find the images to fine-tune on; their folders may name the model's classes."""
    if data is None:
        return loaded, None
    from attnguide.evaluation.evaluate import single_label_images
    from attnguide_gradcam_iou.painting.tuning import Answered, read_answers

    if loaded.multi_label and labels is None:
        raise InputError(f"{loaded.name} answers a question for each class: give the answers by --labels.")
    if labels is None:
        loaded, labelled = single_label_images(loaded, data)
        _check_apart([each.path for each in labelled], out)
        return loaded, [Answered(each.path, each.cls) for each in labelled]
    if not loaded.multi_label:
        raise InputError(
            f"--labels is for attributes, but {loaded.name} gives each image one class: --multi-label."
        )
    answered = read_answers(labels, data, loaded.classes)
    _check_apart([each.path for each in answered], out)
    return loaded, answered


def _check_apart(paths: list[Path], out: Path) -> None:
    """Refuse images where masks would take their place."""
    inside = next((path for path in paths if path.resolve().is_relative_to(out.resolve())), None)
    if inside is not None:
        raise InputError(f"{inside} of --data lies in {out}, where the masks go. Choose another --out.")


def _with_model(
    studio: Studio,
    loaded: LoadedModel,
    names: list[str],
    source: str,
    answered: list[Answered] | None,
    checkpoint: Path | None,
    device: str,
) -> None:
    """Show what a model looks at, and let it be fine-tuned."""
    from attnguide.masks.class_names import ClassNames
    from attnguide.parts.registry import registry
    from attnguide_gradcam_iou.painting.tuning import FineTuning
    from attnguide_gradcam_iou.painting.watching import Watcher

    registry().find("source", source)
    place = pick_device(device)
    known = ClassNames(loaded.classes)
    found = [known.find(name) for name in names]
    studio.numbers = [None if name is None else loaded.classes.index(name) for name in found] or [0]
    if not any(number is not None for number in studio.numbers):
        raise InputError(
            f"none of the classes {', '.join(names[:5])} is one of the model's, such as "
            f"{', '.join(loaded.classes[:5])}. Name the model's by --class-names."
        )
    studio.watchers["before"] = Watcher(loaded, studio.sheets, place, source)
    if answered is None:
        return

    def on_model(tuned: LoadedModel) -> None:
        studio.watchers["after"] = Watcher(tuned, studio.sheets, place, source)

    studio.tuning = FineTuning(loaded, answered, studio.store.root, place, on_model, checkpoint)


def _with_regions(studio: Studio, name: str, **options: Any) -> None:
    """Offer the regions of a source that a plugin provides."""
    from attnguide.interfaces import RegionSource
    from attnguide.parts.registry import registry
    from attnguide_gradcam_iou.painting.parts import SheetRegions

    source = registry().create("regions", name, RegionSource, **options)
    studio.parts = SheetRegions(studio.sheets, source)


def _listen(host: str, port: int | None) -> socket.socket:
    """Take a port before anything slow begins."""
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


def _named(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _serves(host: str, port: int, asked: str) -> bool:
    """Whether the page may be called by a name and port."""
    name, _, number = asked.rpartition(":")
    if number != str(port):
        return False
    if host in _EVERY:
        # By any address of this machine; a name could be another site's.
        try:
            return bool(ip_address(name.strip("[]")))
        except ValueError:
            return name == "localhost"
    return name in {_named(host).lower(), *map(_named, _LOCAL)}


def _outward(host: str) -> str:
    """The address by which others reach this machine."""
    family, beyond = (socket.AF_INET6, "2001:db8::1") if ":" in host else (socket.AF_INET, "192.0.2.1")
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((beyond, 9))  # nothing is sent
            return str(probe.getsockname()[0])
        except OSError:
            return "::1" if ":" in host else "127.0.0.1"
