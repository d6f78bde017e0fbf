"""What is public is listed once, and every other module says that it is internal."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

import attnguide

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src"

#: Internal names that plugins of this repository may use, since they are released with the core. A shorter
#: list is better; before it grows, ask whether the name should be public.
USED_BY_PLUGINS = {
    "attnguide.__version__",
    "attnguide.capture.calls.Call",
    "attnguide.capture.calls.Tap",
    "attnguide.capture.logits.find_logits",
    "attnguide.capture.model_state.evaluating",
    "attnguide.capture.model_state.muting",
    "attnguide.capture.model_state.muted",
    "attnguide.capture.model_state.unwrap",
    "attnguide.capture.recorder.aside",
    "attnguide.data.files.atomic_write",
    "attnguide.data.files.check_file",
    "attnguide.data.files.natural_key",
    "attnguide.data.files.read_json",
    "attnguide.data.files.read_text",
    "attnguide.data.images.IMAGE_SUFFIXES",
    "attnguide.data.images.load_image",
    "attnguide.pairs.IGNORE_INDEX",
}


def module_name(file: Path, src: Path) -> str:
    """Return the dotted name of a module's file."""
    steps = file.relative_to(src).with_suffix("").parts
    return ".".join(steps[:-1] if steps[-1] == "__init__" else steps)


def exporting(package: Path, src: Path) -> set[str]:
    """Return the modules that a package takes the names from which it exports."""
    stub = package / "__init__.pyi"
    file = stub if stub.exists() else package / "__init__.py"
    name = module_name(package / "__init__.py", src)
    modules = set()
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.ImportFrom):
            home = ".".join([name] * bool(statement.level) + [statement.module] * bool(statement.module))
            # `from . import losses` exports the module itself.
            modules |= {home} if statement.module else {f"{home}.{alias.name}" for alias in statement.names}
    return modules


def is_internal(file: Path, src: Path) -> bool:
    """Whether an underscore, or the docstring of a package, says that a module is internal."""
    steps = file.relative_to(src).parts
    folders = [src.joinpath(*steps[:end]) for end in range(1, len(steps))]
    return any(step.startswith("_") and step != "__init__.py" for step in steps) or any(
        (ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or "").startswith(
            "Internal:"
        )
        for folder in folders
    )


def problems(src: Path, public: Collection[str], entry_points: Collection[str] = ()) -> Iterator[str]:
    """Yield what is wrong with the line between public and internal modules.

    Args:
        src: The folder with the package.
        public: Names of the public modules.
        entry_points: Modules that `pyproject.toml` names; these are internal.
    """
    files = {module_name(file, src): file for file in sorted(src.rglob("*.py"))}
    package = min(files, key=len)
    listing = files[package].relative_to(src.parent)
    for name in sorted({*public} - {*files}):
        yield f"{name} is in PUBLIC_MODULES, but there is no such module. Remove it from the list."
    packages = {name for name, file in files.items() if file.name == "__init__.py"}
    # The package itself is public, and so are those on the way to a public module.
    open_packages = {name for name in packages if name in public or name == package}
    homes = {home for name in open_packages for home in exporting(files[name].parent, src)}
    homes = {home for home in homes if home.startswith(f"{package}.")}
    for name in sorted(homes - {*files}):
        yield f"a name is exported from {name}, but there is no such module."
    for name, file in files.items():
        path = file.relative_to(src.parent)
        if is_internal(file, src):
            if name in public:
                yield f"{path} is internal by its name or its package, but in PUBLIC_MODULES. Decide for one."
            continue
        holds_public = name in packages and any(other.startswith(f"{name}.") for other in {*public, *homes})
        if name == package or name in public or name in homes or name in entry_points or holds_public:
            continue
        if name in packages:
            yield (
                f"{path.parent} is neither public nor internal. Begin its docstring with 'Internal:', rename "
                f"it to _{path.parent.name}, or add {name!r} to PUBLIC_MODULES in {listing}."
            )
            continue
        parent = name.rpartition(".")[0]
        stub = (
            f"{path.with_name('__init__.pyi')}{'' if parent in open_packages else ' and list that package'}"
        )
        yield (
            f"{path} is neither public nor internal. Rename it to _{path.name}, export a name of it from "
            f"{stub}, or add {name!r} to PUBLIC_MODULES in {listing}."
        )


def entry_points() -> set[str]:
    """Return the modules that `pyproject.toml` names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [*project["scripts"].values(), *project["entry-points"]["attnguide"].values()]
    return {name.partition(":")[0] for name in named}


def imported(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the modules and names that a file imports from the core."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "attnguide":
            yield from ((node.module or "", alias.name) for alias in node.names)


def is_public(module: str, name: str) -> bool:
    """Whether a name is public: a public module, or exported from where it is defined or from above."""
    steps = module.split(".")
    packages = [".".join(steps[:end]) for end in range(1, len(steps) + 1)]
    return f"{module}.{name}" in attnguide.PUBLIC_MODULES or any(
        name in importlib.import_module(package).__all__
        for package in packages
        if package == "attnguide" or package in attnguide.PUBLIC_MODULES
    )


@pytest.mark.parametrize("plugin", sorted(path.parent.name for path in ROOT.glob("plugins/*/__init__.py")))
def test_plugins_use_public_names(plugin: str) -> None:
    used = {
        f"{module}.{name}"
        for file in (ROOT / "plugins" / plugin).rglob("*.py")
        for module, name in imported(file)
        if not is_public(module, name)
    }
    assert sorted(used - USED_BY_PLUGINS) == [], f"{plugin} uses internal names of the core"


@pytest.mark.parametrize("folder", ["src", "plugins", "docs"])
def test_references_name_public_paths(folder: str) -> None:
    """`[Guide][attnguide.Guide]`: what a reference names is public, and written as one imports it."""
    public = {f"attnguide.{name}" for name in attnguide.__all__} | {*attnguide.PUBLIC_MODULES}
    public |= {
        f"{module}.{name}"
        for module in attnguide.PUBLIC_MODULES
        for name in importlib.import_module(module).__all__
    }
    wrong = []
    for file in sorted([*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.md")]):
        for path in re.findall(r"\]\s*\[(attnguide(?:\.\w+)+)\]", file.read_text(encoding="utf-8")):
            owner = path.rpartition(".")[0]  # of a method or an attribute
            if path not in public and not (owner in public and owner not in attnguide.PUBLIC_MODULES):
                wrong.append(f"{file.relative_to(ROOT)}: {path}")
    assert wrong == []


def test_every_module_is_public_or_internal() -> None:
    assert list(problems(SRC, attnguide.PUBLIC_MODULES, entry_points())) == []


def test_public_modules_are_sorted_and_listed_once() -> None:
    assert list(attnguide.PUBLIC_MODULES) == sorted(set(attnguide.PUBLIC_MODULES))


@pytest.mark.parametrize("name", attnguide.PUBLIC_MODULES)
def test_public_modules_say_what_they_export(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__, f"{name} is public and has no __all__"
    for export in module.__all__:
        assert not export.startswith("_"), f"{name} exports {export}, which is internal by its name"
        assert getattr(module, export) is not None


@pytest.mark.parametrize("name", attnguide.__all__)
def test_public_names_exist(name: str) -> None:
    assert getattr(attnguide, name) is not None


class TestProblems:
    """The checker on a small package: `house` with a public module, a public and an internal package."""

    PUBLIC = ("house.doors", "house.rooms")

    @pytest.fixture
    def src(self, tmp_path: Path) -> Path:
        files = {
            "house/__init__.py": "",
            "house/__init__.pyi": "from .stairs import Stairs",
            "house/stairs.py": "",
            "house/doors.py": "",
            "house/_nails.py": "",
            "house/main.py": "",
            "house/rooms/__init__.py": "",
            "house/rooms/__init__.pyi": "from .kitchen import Stove\nfrom .cellar.wine import Wine",
            "house/rooms/kitchen.py": "",
            "house/rooms/_wiring.py": "",
            "house/rooms/cellar/__init__.py": "",
            "house/rooms/cellar/wine.py": "",
            "house/pipes/__init__.py": '"""Internal: the pipes."""',
            "house/pipes/water.py": "",
            "house/pipes/deep/__init__.py": '"""Deep pipes."""',
            "house/pipes/deep/drain.py": "",
        }
        for name, text in files.items():
            self.write(tmp_path / name, text)
        return tmp_path

    @staticmethod
    def write(file: Path, text: str = "") -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def found(self, src: Path, public: Collection[str] = PUBLIC) -> list[str]:
        return list(problems(src, public, ["house.main"]))

    def test_nothing_is_wrong(self, src: Path) -> None:
        assert self.found(src) == []

    def test_a_new_module(self, src: Path) -> None:
        self.write(src / "house/foo.py")
        (problem,) = self.found(src)
        assert "house/foo.py is neither public nor internal. Rename it to _foo.py, export a name" in problem
        assert "house/__init__.pyi, or add 'house.foo' to PUBLIC_MODULES in " in problem
        assert problem.endswith("house/__init__.py.")

    def test_a_new_module_in_a_public_package(self, src: Path) -> None:
        self.write(src / "house/rooms/foo.py")
        (problem,) = self.found(src)
        assert "house/rooms/foo.py is neither public nor internal. Rename it to _foo.py" in problem
        assert "house/rooms/__init__.pyi, or add" in problem

    def test_a_new_package(self, src: Path) -> None:
        self.write(src / "house/garden/__init__.py", '"""The garden."""')
        self.write(src / "house/garden/roses.py")
        package, module = self.found(src)
        assert "house/garden is neither public nor internal. Begin its docstring with 'Internal:'" in package
        assert "house/garden/__init__.pyi and list that package" in module

    def test_a_new_module_in_an_internal_package(self, src: Path) -> None:
        self.write(src / "house/pipes/gas.py")
        assert self.found(src) == []

    def test_a_package_without_a_stub(self, src: Path) -> None:
        (src / "house/rooms/__init__.pyi").unlink()
        eager = "from torch import nn\nfrom house.rooms.kitchen import Stove"
        self.write(src / "house/rooms/__init__.py", eager)
        assert [problem.split(" is ")[0].split("house/", 1)[1] for problem in self.found(src)] == [
            "rooms/cellar",
            "rooms/cellar/wine.py",
        ]

    def test_a_listed_module_that_is_internal(self, src: Path) -> None:
        (problem,) = self.found(src, [*self.PUBLIC, "house.pipes.water"])
        assert "house/pipes/water.py is internal by its name or its package, but in PUBLIC_MODULES" in problem

    def test_a_listed_module_that_is_not_there(self, src: Path) -> None:
        (problem,) = self.found(src, [*self.PUBLIC, "house.attic"])
        assert problem.startswith("house.attic is in PUBLIC_MODULES, but there is no such module.")

    def test_an_export_from_nowhere(self, src: Path) -> None:
        self.write(src / "house/__init__.pyi", "from .stairs import Stairs\nfrom .attic import Trunk")
        assert self.found(src) == ["a name is exported from house.attic, but there is no such module."]
