"""Ends a command on a signal as Ctrl-C does, so that it removes what is temporary."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

__all__ = ["Ended", "ending_like_ctrl_c"]

#: By name, since Windows has no SIGHUP.
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Ended(KeyboardInterrupt):
    """A signal that asks the process to end; whoever handles Ctrl-C handles it in the same way.

    Args:
        signal: Number of the signal.
    """

    def __init__(self, signal: int) -> None:
        super().__init__()
        self.signal = signal


@contextmanager
def ending_like_ctrl_c() -> Iterator[None]:
    """Raise `Ended` in the block at a signal that would end the process at once.

    Signals that the caller handles or ignores, as nohup does, are left alone.
    """
    # Only the main thread may handle signals.
    main = threading.current_thread() is threading.main_thread()
    taken = [number for number in _SIGNALS if main and signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: FrameType | None) -> NoReturn:
        # A second signal must not interrupt the removal of what is temporary.
        for each in taken:
            signal.signal(each, signal.SIG_IGN)
        raise Ended(number)

    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
