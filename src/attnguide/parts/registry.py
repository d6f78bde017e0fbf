"""Finds parts by name, from any plugin.

Plugins are loaded one by one, so that a broken one is reported by name and takes nothing else down. Listing
names imports no part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module, metadata
from importlib.resources import files
from inspect import signature
from typing import Any

import pluggy

from attnguide.errors import AttnGuideError, InputError, PluginError, UnknownNameError
from attnguide.parts import hookspecs
from attnguide.parts.hookspecs import KINDS, PROJECT, Kind, Part

__all__ = ["Broken", "Owned", "Registry", "registry"]


@dataclass(frozen=True)
class Owned:
    """A part and the plugin that it comes from, as `plugin (distribution version)`."""

    part: Part
    owner: str


@dataclass(frozen=True)
class Broken:
    """A plugin that could not be loaded, and why."""

    owner: str
    reason: str


@dataclass
class Registry:
    """The parts of all plugins.

    Attributes:
        parts: The parts of each kind and name: one, or several where plugins collide.
        broken: The plugins that could not be loaded.
    """

    parts: dict[tuple[Kind, str], list[Owned]] = field(default_factory=lambda: defaultdict(list))
    broken: list[Broken] = field(default_factory=list)

    def load(self) -> None:
        """Load every plugin of the entry-point group `attnguide`."""
        for entry in sorted(metadata.entry_points(group=PROJECT), key=lambda entry: entry.name):
            owner = f"{entry.name} ({entry.dist.name} {entry.dist.version})" if entry.dist else entry.name
            try:
                self._add(entry.load(), owner)
            # Any plugin may raise anything at import; the library must still work.
            except (Exception, SystemExit) as error:  # noqa: BLE001
                self.broken.append(Broken(owner, f"{type(error).__name__}: {error}"))

    def _add(self, plugin: object, owner: str) -> None:
        # One manager for each plugin, so that an error of one never affects another.
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(hookspecs)
        manager.register(plugin)
        manager.check_pending()
        declared = [_part(item) for items in manager.hook.attnguide_parts() for item in items]
        if not declared:
            raise PluginError("it declares no part; implement attnguide_parts with @attnguide.hookimpl.")
        for part in declared:
            self.parts[part.kind, part.name].append(Owned(part, owner))

    def names(self, kind: Kind) -> list[str]:
        """Names of one kind, sorted."""
        return sorted(name for owned_kind, name in self.parts if owned_kind == kind)

    def find(self, kind: Kind, name: str) -> Owned:
        """Return the part of that kind and name.

        Raises:
            UnknownNameError: If there is none.
            PluginError: If several plugins claim the name; both are named.
        """
        claims = self.parts.get((kind, name), [])
        if not claims:
            raise UnknownNameError(kind, name, self.names(kind))
        if len(claims) > 1:
            owners = " and ".join(claim.owner for claim in claims)
            raise PluginError(
                f"{kind} {name!r} is claimed by {owners}. Uninstall one, or pass the object itself."
            )
        return claims[0]

    def load_part(self, kind: Kind, name: str) -> Any:
        """Import the object that a part's path names.

        Returns:
            The class, function, command, or for a recipe the file (a `Traversable`).

        Raises:
            UnknownNameError: If there is no such part.
            PluginError: If it cannot be imported.
        """
        owned = self.find(kind, name)
        module, _, attribute = owned.part.path.partition(":")
        try:
            if kind == "recipe":
                return files(module).joinpath(attribute)
            target: Any = import_module(module)
            for step in attribute.split("."):
                target = getattr(target, step)
        # As above: a plugin's module may raise anything.
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{kind} {name!r} of plugin {owned.owner} cannot be loaded from {owned.part.path!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return target

    def create(self, kind: Kind, what: Any, interface: type, **options: Any) -> Any:
        """Return a part given by name, class or instance as an instance.

        Args:
            kind: Kind of the part.
            what: A registered name, or the object itself.
            interface: The class of which it must be an instance.
            **options: Arguments of the constructor; only with a name.

        Returns:
            An instance of the interface.

        Raises:
            UnknownNameError: If there is no such name.
            PluginError: If the part cannot be imported or built, or is of another kind.
            InputError: If a switch is given something other than true or false.
        """
        part = what
        if isinstance(what, str):
            factory = self.load_part(kind, what)
            if options and callable(factory):
                _check_switches(f"{kind} {what!r}", factory, options)
            try:
                part = factory(**options)
            except AttnGuideError:
                raise
            except Exception as error:
                raise PluginError(
                    f"{kind} {what!r} of plugin {self.find(kind, what).owner} cannot be made with "
                    f"{options}: {type(error).__name__}: {error}"
                ) from error
            if not isinstance(part, interface):
                raise PluginError(
                    f"{kind} {what!r} of plugin {self.find(kind, what).owner} gives {part!r}, which is not "
                    f"an attnguide.{interface.__name__}."
                )
        if not isinstance(part, interface):
            remedy = (
                " Make an instance: add ()." if isinstance(part, type) and issubclass(part, interface) else ""
            )
            raise PluginError(
                f"{kind} must be a name or an instance of attnguide.{interface.__name__}, got "
                f"{part!r}.{remedy}"
            )
        return part


def _check_switches(where: str, factory: Any, options: Mapping[str, Any]) -> None:
    """Refuse a switch that is not true or false: in Python any text, even "no", would turn it on."""
    try:
        parameters = signature(factory).parameters
    except (TypeError, ValueError):  # some factories have none that can be read
        return
    for name, value in options.items():
        default = parameters[name].default if name in parameters else None
        if isinstance(default, bool) and not isinstance(value, bool):
            raise InputError(f"{where}: {name} = {value!r:.60} must be true or false.")


def _part(item: Part | tuple[Any, ...]) -> Part:
    part = item if isinstance(item, Part) else Part(*item)
    if not (isinstance(part.name, str) and part.name and isinstance(part.path, str)):
        raise PluginError(f"{part!r}: name and path must be text.")
    if part.kind not in KINDS:
        raise PluginError(f"part {part.name!r} has kind {part.kind!r}; kinds are {', '.join(KINDS)}.")
    if ":" not in part.path:
        raise PluginError(
            f"part {part.name!r} has path {part.path!r}; write it as 'package.module:attribute'."
        )
    return part


@cache
def registry() -> Registry:
    """Return the registry of the installed plugins, loaded at first use."""
    loaded = Registry()
    loaded.load()
    return loaded
