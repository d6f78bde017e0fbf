"""Downloads of published weights: one error for all clients, and no retries without a network."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from attnguide.errors import DataError

#: Seconds to wait for a hub, where its client would wait and try again for minutes.
_PATIENCE = 5.0


@contextmanager
def downloading(
    name: str,
    pretrained: bool,
    remedy: str = "download a .safetensors file elsewhere and give it as the checkpoint",
) -> Iterator[None]:
    """Turn any error of a download into one of the library, and keep the client from retrying offline.

    Args:
        name: Name of the model, for the error.
        pretrained: Whether there is a download; without one, nothing is changed.
        remedy: What to do, other than going online.

    Raises:
        DataError: If the weights can neither be downloaded nor found in the cache.
    """
    if not pretrained:
        yield
        return
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(3 * _PATIENCE)
    try:
        with _cache_only_if_offline():
            yield
    # Each client has its own errors, and their names change between versions.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise DataError(
            f"the pretrained weights of {name} can neither be downloaded nor found in the cache ({reason}). "
            f"Go online once, or {remedy}."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


@contextmanager
def _cache_only_if_offline() -> Iterator[None]:
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not before and not _is_reachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _is_reachable(url: str) -> bool:
    try:
        request = urllib.request.Request(url, method="HEAD")  # noqa: S310  (the hub's own address)
        with urllib.request.urlopen(request, timeout=_PATIENCE):  # noqa: S310
            return True
    except urllib.error.HTTPError:  # the hub responds, if only with an error
        return True
    except (OSError, ValueError):
        return False
