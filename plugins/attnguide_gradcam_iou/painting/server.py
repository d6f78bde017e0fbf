"""The server of the page: it serves clients with the token, and nothing but the images and masks."""

from __future__ import annotations

import io
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import parse_qs

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.convertors import IntegerConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from attnguide import __version__
from attnguide.errors import AttnGuideError, InputError
from attnguide_gradcam_iou.painting import import_export
from attnguide_gradcam_iou.painting.sheets import LONGEST, Sheets
from attnguide_gradcam_iou.painting.store import MaskStore

if TYPE_CHECKING:
    from attnguide_gradcam_iou.painting.parts import SheetRegions
    from attnguide_gradcam_iou.painting.tuning import FineTuning
    from attnguide_gradcam_iou.painting.watching import Watcher

__all__ = ["LARGEST_FILE", "Studio", "application"]

#: Greatest number of bytes of an imported file.
LARGEST_FILE = 64 * 2**20
#: Greatest number of bytes of other requests: a mask has a bit for each pixel.
_LARGEST_BODY = LONGEST * LONGEST // 8 + 1
_PAGE = Path(__file__).parent / "page"
_log = logging.getLogger(__name__)


@dataclass
class Studio:
    """Everything that the page shows and changes.

    Attributes:
        sheets: Sheets that are painted on.
        store: Folder of the masks.
        watchers: Maps of the model before (`"before"`) and after fine-tuning (`"after"`), if there are any.
        numbers: Index of each painted class in the model; None if the model has no class of that name.
        parts: Regions that can be added to a mask.
        tuning: Fine-tuning, if there are labelled images.
    """

    sheets: Sheets
    store: MaskStore
    watchers: dict[str, Watcher]
    numbers: list[int | None]
    parts: SheetRegions | None = None
    tuning: FineTuning | None = None

    @cached_property
    def stems(self) -> list[str]:
        """Name of each sheet's masks."""
        return [self.sheets.stem(number) for number in range(len(self.sheets))]

    def state(self) -> dict[str, Any]:
        """Collect what the page needs to begin with."""
        first = self.store.next_to_paint(self.stems, len(self.sheets) - 1)
        return {
            "version": __version__,
            "classes": list(self.store.classes),
            "template": self.sheets.template is not None,
            "sheets": len(self.sheets),
            "done": self.store.count(self.stems),
            "first": first or 0,
            "folder": str(self.store.root),
            "seen": [number is not None and bool(self.watchers) for number in self.numbers],
            "parts": [] if self.parts is None else list(self.parts.names),
            "tuning": self.tuning is not None,
        }


def application(studio: Studio, token: str, serves: Callable[[str], bool]) -> _ASGI:
    """Make the application.

    Args:
        studio: Sheets, masks and model to serve.
        token: Token that every request must carry, in the address or as `X-Token`.
        serves: Whether a host and port, such as `127.0.0.1:8765`, may be in the address of a request.

    Returns:
        An ASGI application. Requests for another host, from another origin, without the token, or with too
        long a body are refused before anything is read.
    """
    api, page_key = _Api(studio), secrets.token_urlsafe(24)
    register_url_convertor("number", _Number())
    routes = [
        Route("/", api.page),
        Route("/api/state", api.state),
        Route("/api/sheet/{sheet:number}", api.sheet),
        Route("/api/image/{sheet:number}", api.image),
        Route("/api/next/{sheet:number}", api.next),
        Route("/api/mask/{sheet:number}/{cls:number}", api.mask),
        Route("/api/mask/{sheet:number}/{cls:number}", api.keep, methods=["PUT"]),
        Route("/api/map/{sheet:number}/{cls:number}/{which}", api.map),
        Route("/api/part/{sheet:number}/{part:number}", api.part),
        Route("/api/labelme/{sheet:number}", api.labelme),
        Route("/api/coco", api.coco),
        Route("/api/import/{sheet:number}", api.take, methods=["POST"]),
        Route("/api/tuning", api.tuning),
        Route("/api/tuning", api.tune, methods=["POST"]),
        Route("/api/tuning", api.stop, methods=["DELETE"]),
    ]
    handlers: Mapping[Any, Any] = {AttnGuideError: _refused, HTTPException: _http_error, Exception: _failed}
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), token, page_key, serves)


# ----------------------------------------------------------------------------- requests


class _Number(IntegerConvertor):
    """A number in an address. Longer ones are not found, rather than an error of `int`."""

    regex = "[0-9]{1,9}"


class _Api:
    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def page(self, request: Request) -> Response:
        """The page in one document, so that it requests no other file."""
        nonce = secrets.token_urlsafe(16)
        parts = {name: (_PAGE / name).read_text(encoding="utf-8") for name in _FILES}
        text = parts["index.html"].replace("{nonce}", nonce).replace("{style}", parts["style.css"])
        script = "\n".join(parts[name] for name in _FILES if name.endswith(".js"))
        text = text.replace("{script}", script)
        rules = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        return HTMLResponse(text, headers={"Content-Security-Policy": rules})

    def state(self, request: Request) -> Response:
        return JSONResponse(self.studio.state())

    def sheet(self, request: Request) -> Response:
        number = self._sheet(request)
        width, height = self.studio.sheets.picture(number).size
        painted = self.studio.store.painted(self.studio.sheets.stem(number))
        name = self.studio.sheets.name(number)
        return JSONResponse({"name": name, "width": width, "height": height, "painted": painted})

    def image(self, request: Request) -> Response:
        file = io.BytesIO()
        self.studio.sheets.picture(self._sheet(request)).save(file, "JPEG", quality=92)
        return Response(file.getvalue(), media_type="image/jpeg")

    def next(self, request: Request) -> Response:
        """The next image without a mask; null if there is none."""
        stems = self.studio.stems
        return JSONResponse({"sheet": self.studio.store.next_to_paint(stems, self._sheet(request))})

    def mask(self, request: Request) -> Response:
        number, cls = self._sheet(request), self._class(request)
        width, height = self.studio.sheets.picture(number).size
        mask = self.studio.store.read(self.studio.sheets.stem(number), cls, (height, width))
        if mask is None:
            return Response(status_code=204)
        return Response(np.packbits(mask).tobytes(), media_type="application/octet-stream")

    async def keep(self, request: Request) -> Response:
        body = await _body(request, _LARGEST_BODY)
        return await run_in_threadpool(self._kept, self._sheet(request), self._class(request), body)

    def _kept(self, number: int, cls: int, body: bytes) -> Response:
        sheets, store = self.studio.sheets, self.studio.store
        width, height = sheets.picture(number).size
        if len(body) != -(-width * height // 8):
            raise InputError(
                f"a mask of {width}×{height} pixels has {-(-width * height // 8)} bytes, not {len(body)}."
            )
        bits = np.unpackbits(np.frombuffer(body, dtype=np.uint8), count=width * height)
        store.write(sheets.stem(number), cls, bits.reshape(height, width).astype(bool))
        return JSONResponse(self._progress(number))

    def _progress(self, number: int) -> dict[str, Any]:
        store, stems = self.studio.store, self.studio.stems
        return {"painted": store.painted(stems[number]), "done": store.count(stems)}

    def map(self, request: Request) -> Response:
        number, which = self._sheet(request), request.path_params["which"]
        cls, watcher = self.studio.numbers[self._class(request)], self.studio.watchers.get(which)
        if cls is None or watcher is None:
            raise HTTPException(404, "there is no such map: the model has no class of this name.")
        return JSONResponse(asdict(watcher.map(number, cls)))

    def part(self, request: Request) -> Response:
        number, part = self._sheet(request), request.path_params["part"]
        if self.studio.parts is None or part >= len(self.studio.parts.names):
            raise HTTPException(404, "there is no such part.")
        mask = self.studio.parts.mask(number, part)
        if not mask.any():
            raise InputError(f"no {self.studio.parts.names[part]} was found in this image.")
        return Response(np.packbits(mask).tobytes(), media_type="application/octet-stream")

    def labelme(self, request: Request) -> Response:
        number = self._sheet(request)
        document = import_export.as_labelme(self.studio.sheets, self.studio.store, number)
        return _download(document, f"{self.studio.sheets.stem(number) or 'template'}.json")

    def coco(self, request: Request) -> Response:
        return _download(import_export.as_coco(self.studio.sheets, self.studio.store), "masks-coco.json")

    async def take(self, request: Request) -> Response:
        content = await _body(request, LARGEST_FILE)
        number = self._sheet(request)

        def taken() -> dict[str, Any]:
            imported = import_export.read_into(self.studio.sheets, self.studio.store, content, number)
            return {**imported._asdict(), **self._progress(number)}

        return JSONResponse(await run_in_threadpool(taken))

    def tuning(self, request: Request) -> Response:
        return JSONResponse({**self._tuning().progress.as_dict(), "maps": sorted(self.studio.watchers)})

    async def tune(self, request: Request) -> Response:
        settings = _settings(await _body(request, 2**16))
        await run_in_threadpool(self._tuning().start, **settings)
        return JSONResponse(self._tuning().progress.as_dict())

    def stop(self, request: Request) -> Response:
        self._tuning().stop()
        return JSONResponse(self._tuning().progress.as_dict())

    def _tuning(self) -> FineTuning:
        if self.studio.tuning is None:
            raise HTTPException(404, "fine-tuning needs --model or --checkpoint, and --data.")
        return self.studio.tuning

    def _sheet(self, request: Request) -> int:
        number: int = request.path_params["sheet"]
        if number >= len(self.studio.sheets):
            raise HTTPException(404, f"there is no image {number}.")
        return number

    def _class(self, request: Request) -> int:
        cls: int = request.path_params["cls"]
        if cls >= max(1, len(self.studio.store.classes)):
            raise HTTPException(404, f"there is no class {cls}.")
        return cls


_FILES = ("index.html", "style.css", "raster.js", "view.js", "app.js")


def _download(document: Mapping[str, Any], name: str) -> Response:
    return JSONResponse(document, headers={"X-Filename": json.dumps(name)})


async def _body(request: Request, longest: int) -> bytes:
    """Read the body of a request, up to the allowed length."""
    content = bytearray()
    try:
        async for chunk in request.stream():
            content += chunk
            if len(content) > longest:
                raise HTTPException(413, f"more than {longest} bytes were sent.", {"Connection": "close"})
    except ClientDisconnect as error:
        raise HTTPException(400, "the connection ended before the whole body was sent.") from error
    return bytes(content)


def _settings(body: bytes) -> dict[str, Any]:
    """Read the settings of a fine-tuning."""
    kinds: dict[str, tuple[type, ...]] = {"epochs": (int,)}
    kinds |= {"weight": (int, float), "learning_rate": (int, float)}
    try:
        settings = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON: {error}.") from error
    if not isinstance(settings, dict) or set(settings) != set(kinds):
        raise InputError(f"give {', '.join(kinds)}, and nothing else.")
    for name, kind in kinds.items():
        if type(settings[name]) not in kind:
            raise InputError(f"{name}={settings[name]!r} must be a number.")
    return settings


def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)


def _http_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def _failed(request: Request, error: Exception) -> Response:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)


# ------------------------------------------------------------------------------- access

_Scope: TypeAlias = Any
_ASGI: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]


class _Guard:
    """Refuses requests that do not come from the page, before their bodies are read.

    The page takes the token out of the address bar, so a reload comes without it. It brings a cookie instead,
    which opens the page and nothing else: browsers send cookies to all servers of a machine.
    """

    def __init__(self, app: _ASGI, token: str, page_key: str, serves: Callable[[str], bool]) -> None:
        self.app, self.token, self.page_key, self.serves = app, token, page_key, serves

    async def __call__(self, scope: _Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no web sockets here
            return
        # Kept as lists: a header that occurs twice is not trusted.
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        is_page = scope["path"] == "/" and scope["method"] in ("GET", "HEAD")
        problem = self._problem(headers, scope["query_string"], is_page)
        cookie = f"{_cookie(headers)}={self.page_key}; Path=/; HttpOnly; SameSite=Lax".encode("latin-1")

        async def secured(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(b"set-cookie", cookie)] if is_page and problem is None else []
                message["headers"] = [*message["headers"], *_HEADERS, *own]
            await send(message)

        if problem is not None:
            status, text = problem
            refusal = JSONResponse({"error": text}, status, {"Connection": "close"})
            await refusal(scope, receive, secured)
            return
        await self.app(scope, receive, secured)

    def _problem(
        self, headers: Mapping[str, list[str]], query: bytes, is_page: bool
    ) -> tuple[int, str] | None:
        # Another site's name may lead to this machine; the Host header shows it.
        hosts = [host.lower() for host in headers.get("host", [])]
        if len(hosts) != 1 or not self.serves(hosts[0]):
            return 403, "this host is not served here."
        if any(origin.lower() != f"http://{hosts[0]}" for origin in headers.get("origin", [])):
            return 403, "requests of other sites are not served."
        tokens = parse_qs(query.decode("latin-1")).get("token", [])
        token = [*headers.get("x-token", []), *tokens]
        known = len(token) == 1 and secrets.compare_digest(token[0].encode(), self.token.encode())
        if not known and not (is_page and not token and self._is_reload(headers)):
            return 403, "the token is missing or wrong. Open the address that attnguide annotate printed."
        length = headers.get("content-length", ["0"])[0]
        if not (length.isascii() and length.isdigit() and len(length) < 20) or int(length) > LARGEST_FILE:
            return 413, f"at most {LARGEST_FILE} bytes may be sent."
        return None

    def _is_reload(self, headers: Mapping[str, list[str]]) -> bool:
        pairs = [pair.strip().partition("=") for pair in "; ".join(headers.get("cookie", [])).split(";")]
        keys = [value for name, _, value in pairs if name == _cookie(headers)]
        return len(keys) == 1 and secrets.compare_digest(keys[0].encode(), self.page_key.encode())


def _cookie(headers: Mapping[str, list[str]]) -> str:
    """Name of the cookie: with the port, since a browser keeps one of each name for all ports."""
    return f"attnguide-{''.join(headers.get('host', [])).rpartition(':')[2]}"


_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)
