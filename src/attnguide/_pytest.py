"""The pytest plugin: `pytest --attnguide NAME` tests the parts of a plugin by the contract of all parts.

It is loaded wherever pytest runs beside attnguide, so it imports nothing heavy.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from attnguide.parts.hookspecs import Kind

__all__ = ["ContractHooks"]

_CHOSEN = pytest.StashKey[list[tuple[str, str]]]()


class ContractHooks:
    """What the `conftest.py` of a plugin may specify about its parts, for the contract."""

    @staticmethod
    @pytest.hookspec(firstresult=True)
    def pytest_attnguide_annotations(name: str) -> Any:
        """Return an annotation of the four images of `attnguide.testing.batch()`.

        Known are `mask` and `boxes`. Without any that a prior reads, the prior cannot be tried.

        Args:
            name: Name of the annotation, such as `"points"` in `guide.loss(labels, points=…)`.
        """

    @staticmethod
    @pytest.hookspec(firstresult=True)
    def pytest_attnguide_settings(kind: Kind, name: str) -> dict[str, Any] | None:
        """Return arguments of the constructor of a part that has no defaults, for a model of four classes.

        Args:
            kind: Kind of the part.
            name: Its name.
        """

    @staticmethod
    @pytest.hookspec(firstresult=True)
    def pytest_attnguide_beside(
        source: str, model: nn.Module, images: Tensor
    ) -> AbstractContextManager[Any] | None:
        """Return a context that puts on a model what a source shows, such as an adapter.

        Args:
            source: Name of the source.
            model: The model, of four classes.
            images: Four images, `(4, 3, 32, 32)`.
        """


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("attnguide").addoption(
        "--attnguide",
        action="append",
        default=[],
        metavar="NAME",
        help="test a part, or all parts of a plugin, by the contract of attnguide (may be repeated)",
    )


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Declare the hooks of a plugin's `conftest.py`."""
    pluginmanager.add_hookspecs(ContractHooks)


def pytest_configure(config: pytest.Config) -> None:
    """Find the parts that are asked for, and add the contract to the tests.

    Raises:
        pytest.UsageError: If there is no such part or plugin.
    """
    config.stash[_CHOSEN] = [part for name in config.getoption("--attnguide") for part in _parts(name)]
    if config.stash[_CHOSEN]:
        config.args.append(str(Path(__file__).with_name("_contract.py")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of kinds that were not asked for, which have no case."""
    items[:] = [item for item in items if item.path.name != "_contract.py" or "NOTSET" not in item.name]


def chosen(config: pytest.Config) -> list[tuple[str, str]]:
    """Kinds and names of the parts that are asked for."""
    return config.stash[_CHOSEN]


def _parts(name: str) -> list[tuple[str, str]]:
    """Kinds and names of the parts of that name, or of the plugin or distribution of that name."""
    from attnguide.errors import nearest
    from attnguide.parts.registry import registry

    parts = registry()
    for broken in parts.broken:
        if broken.owner.partition(" ")[0] == name:
            raise pytest.UsageError(f"plugin {broken.owner} could not be loaded: {broken.reason}")
    known: dict[str, list[tuple[str, str]]] = {}
    for (kind, part), claims in parts.parts.items():
        for claim in claims:
            plugin, _, distribution = claim.owner.partition(" (")
            for each in {part, plugin, distribution.partition(" ")[0]} - {""}:
                known.setdefault(each, []).append((kind, part))
    if name not in known:
        raise pytest.UsageError(
            f"--attnguide {name}: no part and no plugin is called so.{nearest(name, sorted(known))}"
            " Install the package that declares it: pip install -e ."
        )
    return known[name]
