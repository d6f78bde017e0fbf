"""Reserves the output folder for one run, and clears what a killed run left in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attnguide.cli.console import warn
from attnguide.errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows
    _can_lock = False
else:
    _can_lock = True

__all__ = ["SCRATCH", "reserved"]

#: Folder of the lock and of temporary files, in the output folder. It is on the same file system, and a
#: hidden folder, which no search for images enters.
SCRATCH = ".attnguide-run"
#: A run that ends may remove the lock between two steps of the next run, which then tries again.
_TRIES = 100


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Keep an output folder for this run alone, and remove temporary files of a run that was killed.

    The operating system releases the lock of a process that ends in any way, so no lock is ever stale.

    Args:
        folder: The output folder, which exists.

    Raises:
        InputError: If another run writes to the folder, or it cannot be locked.
    """
    scratch = folder / SCRATCH
    handle = _lock(scratch)
    try:
        _clear(scratch)
        yield
    finally:
        # Files first, the lock last, and only then is it released.
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(handle)


def _lock(scratch: Path) -> int:
    """Lock a folder, and return the handle that holds the lock until it is closed."""
    path = scratch / "lock"
    for _ in range(_TRIES):
        try:
            scratch.mkdir(exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InputError(
                f"cannot lock the folder {scratch.parent}: {error.strerror}. Choose another with --out."
            ) from error
        try:
            _take(handle, scratch.parent)
            if _is_file_of(handle, path):
                os.truncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    raise InputError(f"cannot lock the folder {scratch.parent}. Check that it exists, and try again.")


def _take(handle: int, folder: Path) -> None:
    if not _can_lock:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        process = os.read(handle, 20).decode("ascii", "replace")
        raise InputError(
            f"another run writes to {folder} (process {process or '?'}). Wait for it to end, or choose "
            "another folder with --out."
        ) from error
    except OSError as error:
        warn(
            f"{folder} cannot be locked ({error.strerror}). Do not let two runs write to it at the same time."
        )


def _is_file_of(handle: int, path: Path) -> bool:
    """Whether the path still leads to the open file; a run that ended may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _clear(scratch: Path) -> None:
    for entry in scratch.iterdir():
        if entry.name != "lock":
            entry.unlink()
