"""An extension of griffe, with which the site is built: what cannot be read off a module otherwise.

Packages import their names at first use, so their `__init__.py` has no `__all__` that griffe could read
without running it: a package exports what its `__init__.pyi` imports. And a `#:` comment above a constant is
the docstring of the constant.
"""

from __future__ import annotations

from typing import Any

import griffe


class Exports(griffe.Extension):
    """Sets the exports of packages that have a stub, and docstrings of constants."""

    def on_attribute(self, *, attr: griffe.Attribute, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Make the `#:` comment above an attribute its docstring."""
        if attr.docstring is not None or attr.lineno is None or attr.filepath not in loader.lines_collection:
            return
        above = loader.lines_collection[attr.filepath][: attr.lineno - 1]
        comment: list[str] = []
        while above and above[-1].strip().startswith("#:"):
            comment.insert(0, above.pop().strip().removeprefix("#:").strip())
        if comment:
            attr.docstring = griffe.Docstring(
                "\n".join(comment),
                parent=attr,
                parser=loader.docstring_parser,
                parser_options=loader.docstring_options,
            )

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Set the exports of a package and of the packages in it."""
        _set_exports(pkg, f"{pkg.name}.")


def _set_exports(module: griffe.Module, root: str) -> None:
    if module.is_init_module and module.exports is None:
        aliases = [member for member in module.members.values() if isinstance(member, griffe.Alias)]
        module.exports = [alias.name for alias in aliases if alias.target_path.startswith(root)]
    for member in module.members.values():
        if isinstance(member, griffe.Module):
            _set_exports(member, root)
