"""Folders and files by address: local paths, and whatever fsspec reads (`s3://`, `gs://`, `hf://` …)."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from attnguide.data.files import atomic_write, check_file
from attnguide.errors import DataError, InputError

__all__ = ["Place", "is_remote", "open_address", "read_content"]

#: Stores in which a file appears when its upload has ended, whole. Elsewhere a file is written under another
#: name, and renamed.
_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "r2"}
#: What a file that is being written is called, with the name that it will have.
_TEMPORARY = ".attnguide-"


def is_remote(address: str | Path) -> bool:
    """Whether an address names a store rather than a path; `file://` does not."""
    text = str(address)
    return "://" in text and not text.startswith(("file://", "local://"))


def _plain(address: str | Path) -> Path:
    """Return the path of a local address."""
    return Path(str(address).removeprefix("file://").removeprefix("local://"))


def file_system(address: str) -> tuple[Any, str]:
    """Return fsspec's file system for an address, and the path in it.

    Raises:
        InputError: If the protocol is unknown, or its library is missing.
    """
    import fsspec

    try:
        system, path = fsspec.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{address} cannot be reached: {error}. Install the library that fsspec names, such as s3fs for "
            "s3:// or gcsfs for gs://, and check the spelling."
        ) from error
    return system, str(path)


@contextmanager
def open_address(address: str | Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, local or remote.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        if is_remote(address):
            system, path = file_system(str(address))
            with system.open(path, "rb") as file:
                yield file
        else:
            with check_file(_plain(address)).open("rb") as file:
                yield file
    except OSError as error:
        raise DataError(
            f"{address} cannot be read: {error.strerror or error}. Check the address and its permissions."
        ) from error


def read_content(address: str) -> bytes | Path:
    """Return the path of a local file, or the content of a remote one.

    Raises:
        DataError: If it cannot be read.
    """
    if not is_remote(address):
        return check_file(_plain(address))
    with open_address(address) as file:
        return file.read()


class Place:
    """A folder that files are written to, each of them completely or not at all.

    On a local disk a file is written under a temporary name, flushed, and renamed. To an object store it is
    uploaded in one piece, which the store shows when it is whole; elsewhere it is uploaded under a temporary
    name and moved.

    Args:
        address: A path, or an address such as `s3://bucket/maps`.

    Raises:
        InputError: If there can be no such folder.
    """

    def __init__(self, address: str | Path) -> None:
        if not str(address):
            raise InputError("the address of the output is empty. Give a folder; '.' is the current one.")
        self.address = str(address).rstrip("/") or "/"
        self.remote = is_remote(address)
        self.folder = _plain(address)
        if self.remote:
            self.system, self.root = file_system(self.address)

    def __str__(self) -> str:
        return self.address

    def make(self) -> None:
        """Make the folder if it is missing.

        Raises:
            InputError: If that fails.
        """
        try:
            if self.remote:
                self.system.makedirs(self.root, exist_ok=True)
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot make the folder {self}: {error.strerror or error}. Choose another."
            ) from error

    def names(self) -> list[str]:
        """Return the names of the files in the folder, hidden ones too; none if there is no folder."""
        try:
            if self.remote:
                self.system.invalidate_cache()
                return [str(path).rpartition("/")[2] for path in self.system.ls(self.root, detail=False)]
            return os.listdir(self.folder)  # noqa: PTH208  (names alone are wanted)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DataError(
                f"{self} cannot be listed: {error.strerror or error}. Check its permissions."
            ) from error

    def path(self, name: str) -> str:
        """Return the address of a file."""
        return f"{self.address}/{name}" if self.remote else str(self.folder / name)

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None if there is none.

        Raises:
            DataError: If it cannot be read.
        """
        try:
            return (
                self.system.cat_file(f"{self.root}/{name}")
                if self.remote
                else (self.folder / name).read_bytes()
            )
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(
                f"{self.path(name)} cannot be read: {error.strerror or error}. Check its permissions."
            ) from error

    @contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """Open a file for reading at any place in it."""
        if self.remote:
            with self.system.open(f"{self.root}/{name}", "rb") as file:
                yield file
        else:
            with (self.folder / name).open("rb") as file:
                yield file

    def leftovers(self, name: str, names: list[str]) -> list[str]:
        """Return those of the names that are temporary files of a file."""
        return [each for each in names if each.startswith(f"{_TEMPORARY}{name}-")]

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        try:
            if self.remote:
                self.system.rm_file(f"{self.root}/{name}")
            else:
                (self.folder / name).unlink()
        except FileNotFoundError:
            return

    @contextmanager
    def writing(self, name: str, *, exclusive: bool = False) -> Iterator[Path]:
        """Write a file completely or not at all; yields a local path to write to.

        Args:
            name: The file.
            exclusive: Keep a file that is there already. On a local disk this is certain; in a store another
                process may write in between.

        Raises:
            InputError: If it cannot be written, for example because the disk is full.
        """
        try:
            if self.remote:
                with tempfile.TemporaryDirectory(prefix="attnguide-") as folder:
                    path = Path(folder, name)
                    yield path
                    if not (exclusive and self.system.exists(f"{self.root}/{name}")):
                        self._upload(path, name)
            elif exclusive:
                with self._exclusive(name) as path:
                    yield path
            else:
                with atomic_write(self.folder / name, label=f"{name}-") as path:
                    yield path
        except OSError as error:
            raise InputError(
                f"cannot write {self.path(name)}: {error.strerror or error}. Make room, check that nothing "
                "else writes there, and run the same command again."
            ) from error

    @contextmanager
    def _exclusive(self, name: str) -> Iterator[Path]:
        path = self.folder / f"{_TEMPORARY}{name}-{secrets.token_hex(8)}"
        try:
            yield path
            try:
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
                # Unlike a renaming, this fails where the name is taken.
                os.link(path, self.folder / name)
            except OSError:
                # Another process was faster and has cleared up, or the file system knows no links.
                if not (self.folder / name).exists():
                    path.replace(self.folder / name)
        finally:
            path.unlink(missing_ok=True)

    def _upload(self, path: Path, name: str) -> None:
        protocols = self.system.protocol
        whole = not _WHOLE.isdisjoint([protocols] if isinstance(protocols, str) else protocols)
        target = f"{self.root}/{name}"
        if whole:
            self.system.put_file(str(path), target)
            return
        temporary = f"{self.root}/{_TEMPORARY}{name}-{secrets.token_hex(8)}"
        try:
            self.system.put_file(str(path), temporary)
            self.system.mv(temporary, target)
        except BaseException:
            if self.system.exists(temporary):
                self.system.rm_file(temporary)
            raise
