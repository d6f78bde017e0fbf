"""Tests lie where the modules lie: `tests/capture/test_calls.py` is for `src/attnguide/capture/calls.py`."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from tests.wheel import ROOT

SOURCE, TESTS = ROOT / "src/attnguide", ROOT / "tests"
#: Folders of tests that belong to no single module of the core.
ELSEWHERE = ("behaviour", "contract", "docs", "examples", "benchmarks", "plugins", "helpers")
#: Modules without a test file of their own, and where they are tested.
TESTED_BY = {
    "main__": "cli/test_main.py",
    "sources/running": "sources/test_captum.py",
    "tables": "guiding/test_check.py",
    "adapters/holder": "behaviour/test_adapters_beside_a_model.py",
    "commands/evaluate": "evaluation/test_evaluate.py",
    "commands/explain/run": "commands/explain/test_command.py",
    "commands/report": "evaluation/test_report.py",
    "contract": "contract/test_every_part.py",
    "data/addresses": "test_dataset.py",
    "data/maps": "test_dataset.py",
    "data/procedural/painting": "data/procedural/test_faces.py",
    "data/procedural/parts": "data/procedural/test_faces.py",
    "data/records": "test_dataset.py",
    "guiding/guide": "behaviour/test_training_modes.py",
    "layers/outputs": "layers/test_reach.py",
    "interfaces": "contract/test_every_part.py",
    "masks/entries": "masks/test_labelme.py",
    "pytest": "commands/test_plugin.py",
    "parts/hookspecs": "parts/test_registry.py",
    "models/building": "models/test_loading.py",
    "models/described": "training/test_running.py",
    "models/downloading": "models/test_loading.py",
    "models/embedded_model": "models/test_loading.py",
    "models/loaded_model": "models/test_loading.py",
    "models/timm": "models/test_loading.py",
    "models/torchvision": "models/test_loading.py",
    "training/dry_run": "training/test_running.py",
    "training/packing": "training/test_engine.py",
    "training/preparing": "training/test_running.py",
}
#: Test files whose name is not that of a module, and the module that they are for.
TESTS_OF = {
    "metrics/test_occlusion.py": "metrics/faithfulness",
    "training/test_processes.py": "training/running",
}


def plain(path: PurePosixPath) -> str:
    """The name of a module or of a test, without suffix, `test_` and leading underscores."""
    return (path.parent / path.stem.removeprefix("test_").lstrip("_")).as_posix()


MODULES = sorted(
    plain(PurePosixPath(file.relative_to(SOURCE).as_posix()))
    for file in SOURCE.rglob("*.py")
    if file.name != "__init__.py"
)
TEST_FILES = sorted(
    PurePosixPath(file.relative_to(TESTS).as_posix())
    for file in TESTS.rglob("test_*.py")
    if file.relative_to(TESTS).parts[0] not in ELSEWHERE
)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_tests_of_its_name(module: str) -> None:
    if module in TESTED_BY:
        assert (TESTS / TESTED_BY[module]).is_file()
    else:
        folder, _, name = module.rpartition("/")
        assert module in map(plain, TEST_FILES), f"write tests/{folder}{'/' * bool(folder)}test_{name}.py"


@pytest.mark.parametrize("file", TEST_FILES, ids=str)
def test_every_test_file_has_a_module_of_its_name(file: PurePosixPath) -> None:
    assert TESTS_OF.get(file.as_posix(), plain(file)) in MODULES
