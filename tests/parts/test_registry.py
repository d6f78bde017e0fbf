"""Parts from other packages: found by name, owned by name, and harmless when broken."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from attnguide.errors import PluginError, UnknownNameError
from attnguide.interfaces import TargetPrior
from attnguide.parts.hookspecs import Part, hookimpl
from attnguide.parts.registry import Registry, registry
from attnguide.parts.standard import attnguide_parts

PLUGIN = """
import attnguide

@attnguide.hookimpl
def attnguide_parts():
    return [attnguide.Part("prior", "centre", "centred.priors:Centre", "the middle of the image")]
"""
PRIOR = """
import torch
import attnguide

class Centre(attnguide.TargetPrior):
    def __call__(self, trace, pairs, size, *, share=0.5):
        maps = torch.zeros(len(pairs), *size)
        rows, columns = (round(side * (1 - share) / 2) for side in size)
        maps[:, rows : size[0] - rows, columns : size[1] - columns] = 1
        return maps
"""


def install(folder: Path, name: str, files: dict[str, str], entry: str, version: str = "1.0") -> None:
    """Lay a distribution on the disk, as pip would."""
    for path, text in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[attnguide]\n{entry}\n")


def run(folder: Path, code: str) -> str:
    """Run code in a process that sees the packages in a folder."""
    program = f"import sys; sys.path.insert(0, {str(folder)!r})\n" + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_prior_of_twenty_lines_guides(tmp_path: Path) -> None:
    lines = [line for line in (PLUGIN + PRIOR).splitlines() if line.strip()]
    assert len(lines) <= 20
    files = {"centred/__init__.py": "", "centred/plugin.py": PLUGIN, "centred/priors.py": PRIOR}
    install(tmp_path, "attnguide_centred", files, "centred = centred.plugin")
    output = run(
        tmp_path,
        """
        import sys, attnguide as ag
        from attnguide.parts.registry import registry
        assert "centre" in registry().names("prior")
        assert "centred.priors" not in sys.modules and "torch" not in sys.modules
        print(registry().find("prior", "centre"))
        import torch
        from attnguide.models.networks import small_cnn
        model = small_cnn(4, width=4, reduction=8).eval()
        guide = ag.Guide(model, prior="centre")
        model(torch.rand(2, 3, 32, 32))
        guide.loss(torch.tensor([0, 1]), share=0.5).backward()
        print(guide.records()[0].prior[0].int().tolist(), guide)
        """,
    )
    assert "centred (attnguide_centred 1.0)" in output
    assert "the middle of the image" in output
    assert "[[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]" in output


BROKEN = {
    "raises": ("raise RuntimeError('no licence')", ["RuntimeError", "no licence"]),
    "exits": ("raise SystemExit(3)", ["SystemExit"]),
    "imports": ("import a_package_that_nobody_has", ["ModuleNotFoundError", "a_package_that_nobody_has"]),
    "misspells": (PLUGIN.replace("attnguide_parts", "attnguide_prts"), ["attnguide_prts"]),
    "invents": (PLUGIN.replace('"prior"', '"priour"'), ["'priour'", "source, prior, loss"]),
    "forgets": (
        PLUGIN.replace("centred.priors:Centre", "centred.priors.Centre"),
        ["package.module:attribute"],
    ),
    "is_nameless": (PLUGIN.replace('"centre"', "None"), ["name and path must be text"]),
    "is_silent": ("answer = 42", ["declares no part"]),
    "is_empty": (PLUGIN[: PLUGIN.index("[")] + "[]", ["declares no part"]),
    "fails": (PLUGIN[: PLUGIN.index("return")] + "return [1 / 0]", ["ZeroDivisionError"]),
    "gives_junk": (PLUGIN[: PLUGIN.index("[")] + "[('prior',)]", ["TypeError"]),
}


def test_broken_plugins_are_named_and_hurt_nobody(tmp_path: Path) -> None:
    for name, (text, _) in BROKEN.items():
        install(tmp_path, f"dist_{name}", {f"mod_{name}.py": text}, f"{name} = mod_{name}")
    install(tmp_path, "dist_gone", {}, "gone = a_module_that_is_gone")
    files = {"centred/__init__.py": "", "centred/plugin.py": PLUGIN, "centred/priors.py": PRIOR}
    install(tmp_path, "attnguide_centred", files, "centred = centred.plugin")
    output = run(
        tmp_path,
        """
        from attnguide.parts.registry import registry
        from attnguide.interfaces import TargetPrior
        for broken in registry().broken:
            print("BROKEN", broken.owner, broken.reason.replace("\\n", " "))
        for name in ("centre", "mask", "boxes"):
            print(registry().create("prior", name, TargetPrior))
        """,
    )
    reports = {line.split()[1]: line for line in output.splitlines() if line.startswith("BROKEN")}
    for name, (_, parts) in {
        **BROKEN,
        "gone": ("", ["ModuleNotFoundError", "a_module_that_is_gone"]),
    }.items():
        assert f"{name} (dist_{name} 1.0)" in reports[name]
        for part in parts:
            assert part in reports[name]
    assert "Centre()" in output
    assert "MaskPrior(" in output
    assert "centred" not in reports
    assert "standard" not in reports


def test_of_two_that_claim_a_name_both_owners_are_told(tmp_path: Path) -> None:
    double = PLUGIN.replace('"centre"', '"mask"')
    files = {"double.py": double, "centred/__init__.py": "", "centred/priors.py": PRIOR}
    install(tmp_path, "attnguide_double", files, "double = double", "2.3")
    output = run(
        tmp_path,
        """
        import attnguide as ag
        from attnguide.parts.registry import registry
        from attnguide.interfaces import TargetPrior
        from attnguide.priors.mask import MaskPrior
        from attnguide.models.networks import small_cnn
        model = small_cnn(4)
        try:
            ag.Guide(model, prior="mask")
        except ag.AttnGuideError as error:
            print(type(error).__name__, error)
        assert not model._forward_hooks
        print(ag.Guide(model, prior="boxes"), ag.Guide(model, prior=MaskPrior()))
        """,
    )
    assert "PluginError prior 'mask' is claimed by" in output
    assert "double (attnguide_double 2.3)" in output
    assert "standard (attnguide" in output
    assert "BoxPrior()" in output


# ---------------------------------------------------------------- one at a time


class _Plugin:
    def __init__(self, *parts: object) -> None:
        self.parts = parts

    @hookimpl
    def attnguide_parts(self) -> tuple[object, ...]:
        return self.parts


def made_of(*parts: object) -> Registry:
    found = Registry()
    found._add(_Plugin(*parts), "mine (dist 1.0)")
    return found


def test_parts_may_be_tuples() -> None:
    found = made_of(("prior", "a", "m:A"), ("prior", "b", "m:B", "about b"), Part("loss", "c", "m:C"))
    assert found.names("prior") == ["a", "b"]
    assert found.names("loss") == ["c"]
    assert found.find("prior", "b").part.summary == "about b"
    assert found.find("prior", "a").owner == "mine (dist 1.0)"


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown prior 'maks'\. Did you mean 'mask'\? Known: .*boxes"
    ) as caught:
        registry().find("prior", "maks")
    assert (caught.value.kind, caught.value.name) == ("prior", "maks")
    assert "mask" in caught.value.known
    with pytest.raises(UnknownNameError, match="There are none"):
        Registry().find("prior", "mask")


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("no.such.module:Prior", "ModuleNotFoundError"),
        ("attnguide.priors.mask:MaskPriour", "MaskPriour"),
        ("tests.helpers.leaving:Prior", "SystemExit: 3"),
        ("attnguide.priors.mask:_as_float", "cannot be made.*_as_float"),
        ("attnguide.losses.overlap:IoU", "gives IoU.*not an attnguide.TargetPrior"),
        ("attnguide.priors.boxes:BoxPrior.nothing", "nothing"),
    ],
)
def test_parts_that_cannot_be_used(path: str, parts: str) -> None:
    found = made_of(Part("prior", "odd", path))
    with pytest.raises(PluginError, match=rf"(?s)prior 'odd'.*mine \(dist 1.0\).*{parts}"):
        found.create("prior", "odd", TargetPrior)


def test_the_standard_parts_come_through_the_same_door() -> None:
    declared = attnguide_parts()
    assert {part.kind for part in declared} == {"source", "prior", "loss", "recipe"}
    for part in declared:
        owned = registry().find(part.kind, part.name)
        assert owned.part == part
        assert owned.owner.startswith("standard (attnguide ")
        assert part.summary
        assert registry().load_part(part.kind, part.name)
