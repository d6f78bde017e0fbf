"""Every error that attnguide raises on purpose.

Each message names the culprit, the value that it had, and the remedy. All of them derive from
[`AttnGuideError`][attnguide.AttnGuideError], so that one `except` catches all of them, and
most also derive from the built-in error that a caller would expect.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AttnGuideError",
    "DataError",
    "GuidanceError",
    "InputError",
    "LayerError",
    "MissingPackageError",
    "PluginError",
    "UnknownNameError",
    "nearest",
]


class AttnGuideError(Exception):
    """Base class of every error raised by attnguide."""


class InputError(AttnGuideError, ValueError):
    """An argument has the wrong shape, type, range or value."""


class DataError(AttnGuideError, ValueError):
    """A file cannot be read, or does not hold what its format promises."""


class UnknownNameError(AttnGuideError, LookupError):
    """A name is not known; the message lists the ones that exist and offers the nearest."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        """Compose the message from the requested name and the known ones.

        Args:
            kind: Kind of the named thing, for example `"prior"`.
            name: The requested name.
            known: The names that exist.
        """
        self.kind, self.name, self.known = kind, name, sorted(known)
        super().__init__(f"unknown {kind} {name!r}.{nearest(name, self.known)}")


class LayerError(AttnGuideError, LookupError):
    """No layer of the model is suitable, or the named one is not."""


class GuidanceError(AttnGuideError, RuntimeError):
    """The guidance loss cannot be computed, or sends no gradient to the weights."""


class MissingPackageError(AttnGuideError, ImportError):
    """An optional package is not installed; the message says how it is."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        """Compose the message.

        Args:
            what: What needs the package.
            package: The package that cannot be imported.
            extra: The extra of attnguide that installs it.
        """
        super().__init__(f"{what} needs {package}, which is not installed: pip install 'attnguide[{extra}]'.")


class PluginError(AttnGuideError, RuntimeError):
    """A plugin is broken, or two plugins claim one name."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on any device."""
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in texts)


def nearest(name: str, known: Iterable[str], *, limit: int = 40) -> str:
    """Return a sentence that offers the nearest known name and lists the known ones.

    Args:
        name: The name that was not found.
        known: The names that exist.
        limit: Largest number of names to list.

    Returns:
        Text that starts with a space, ready to follow an error's first sentence.
    """
    # Those of other libraries, "captum:…", come last: there are many.
    names = sorted(known, key=lambda known: ":" in known)
    if not names:
        return " There are none."
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    more = f", … ({len(names) - limit} more)" if len(names) > limit else ""
    return f"{hint} Known: {', '.join(names[:limit])}{more}."
