"""The hook by which plugins declare parts: the standard parts, the published methods, and yours.

A plugin is an importable module or object, named in the entry-point group `attnguide` of a package:

```toml
[project.entry-points.attnguide]
my-priors = "my_package.plugin"
```

It implements one function, which declares names and dotted paths. The object of a path is imported when it is
first used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import pluggy

__all__ = ["KINDS", "Kind", "Part", "attnguide_parts", "hookimpl"]

PROJECT = "attnguide"

hookspec = pluggy.HookspecMarker(PROJECT)
#: Marks a function as an implementation of a hook.
hookimpl = pluggy.HookimplMarker(PROJECT)

#: Kinds of parts.
Kind = Literal["source", "prior", "loss", "adapter", "regions", "recipe", "command"]
#: Kinds of parts, in the order of listings.
KINDS: tuple[Kind, ...] = ("source", "prior", "loss", "adapter", "regions", "recipe", "command")


@dataclass(frozen=True)
class Part:
    """One named thing that a plugin provides.

    Attributes:
        kind: `"source"`, `"prior"`, `"loss"`, `"adapter"`, `"regions"`: a class, or a function that returns
            an instance (of [`RegionSource`][attnguide.interfaces.RegionSource] for `"regions"`);
            `"recipe"`: a TOML file in a package; `"command"`: a click command that joins the command line.
        name: The name that users write.
        path: `"package.module:attribute"`, or for a recipe `"package:folder/file.toml"`.
        summary: One line for listings.
    """

    kind: Kind
    name: str
    path: str
    summary: str = ""


@hookspec
def attnguide_parts() -> Iterable[Part | tuple[Any, ...]]:
    """Declare the parts that a plugin provides.

    Returns:
        [`Part`][attnguide.Part]s, or tuples `(kind, name, path)` or `(kind, name, path, summary)`.
    """
    raise NotImplementedError  # a specification; pluggy never calls it
