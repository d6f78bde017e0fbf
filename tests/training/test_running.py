"""A run writes what it should, and an interrupted one ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.helpers.clip import folder as clip_folder
from tests.helpers.recipes import network, pictures, recipe

from attnguide import models
from attnguide.errors import AttnGuideError, DataError, InputError
from attnguide.priors import TeacherPrior, TextPrior
from attnguide.training import Trained, Trainer, dry_run, prepare, read_settings, train

pytest.importorskip("accelerate")

QUICK = "[train]\nepochs = 3\nbatch_size = 8\nlearning_rate = 0.003\nsave_every = 2\ntensorboard = false\n"
CPU = torch.device("cpu")


def run(path: Path, out: str, **options: Any) -> Trained:
    return train(read_settings(path), path.parent / out, device=CPU, **options)


def same(one: Path, other: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


class KilledError(Exception):
    pass


def interrupting(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the process die in a step, as far as can be from within."""
    original = Trainer.step

    def dying(self: Trainer, parts: Any) -> None:
        if self.steps == step:
            raise KilledError
        original(self, parts)

    monkeypatch.setattr(Trainer, "step", dying)


def test_what_a_run_leaves(tmp_path: Path) -> None:
    path = recipe(tmp_path, QUICK)
    told: list[str] = []
    before = torch.get_rng_state()
    result = run(path, "out", on_epoch=told.append)
    out = tmp_path / "out"
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(file.name for file in out.iterdir()) == [
        "classes.txt",
        "log.jsonl",
        "model.safetensors",
        "recipe.toml",
        "result.json",
        "start.safetensors",
    ]
    assert (result.select, result.weight, len(result.epochs)) == ("swapped", 10.0, 3)
    scores = [epoch.swapped for epoch in result.epochs]
    assert None not in scores
    assert result.chosen == 1 + scores.index(max(score or 0 for score in scores))
    assert len(told) == len(logged(out)) == 3
    assert "with exchanged surroundings" in told[0]
    assert (out / "classes.txt").read_text() == "blue\nred\n"
    loaded = models.load(checkpoint=out / "model.safetensors")
    assert (loaded.classes, loaded.multi_label) == (("blue", "red"), False)
    # All settings are there: the same training again gives the same weights.
    again = train(read_settings(out / "recipe.toml"), tmp_path / "again", device=CPU)
    assert again.chosen == result.chosen
    assert same(out, tmp_path / "again")
    # Finished is finished.
    assert run(path, "out", resume=True).epochs == result.epochs


@pytest.mark.parametrize(
    "method",
    [
        'recipe = "right-for-real"\n',
        "",
        '[guide]\nloss = "outside"\nwarmup = 5\n',
        # The model as it was before the first step.
        '[guide]\nprior = { name = "teacher", source = "cam" }\n',
    ],
)
@pytest.mark.parametrize("step", [0, 1, 4, 7])
def test_an_interrupted_run_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, step: int
) -> None:
    """Twenty images are three steps an epoch; there are checkpoints after each second step and epoch."""
    path = recipe(tmp_path, method + QUICK)
    run(path, "whole")
    with monkeypatch.context() as context:
        interrupting(context, step)
        with pytest.raises(KilledError):
            run(path, "parts")
    run(path, "parts", resume=True)
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def test_the_weight_is_chosen_by_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = QUICK + "weights = [0, 5]\nsearch_epochs = 2\n[intervention]\nweight = 'auto'\n"
    path = recipe(tmp_path, text)
    told: list[str] = []
    result = run(path, "out", on_note=told.append)
    assert [each.weight for each in result.tried] == [0.0, 5.0]
    best = max(result.tried, key=lambda each: each.score)
    assert result.weight == max(each.weight for each in result.tried if each.score >= best.score - best.error)
    assert told[-1] == f"λ = {result.weight:g} is the largest within one standard error of the best."
    assert [line["tried"]["weight"] for line in logged(tmp_path / "out")[:2]] == [0.0, 5.0]
    assert (tmp_path / "out" / "search" / "0" / "model.safetensors").exists()
    with monkeypatch.context() as context:
        interrupting(context, 4)  # in the second epoch of the first trial
        with pytest.raises(KilledError):
            run(path, "parts")
    again = run(path, "parts", resume=True)
    assert again.tried == result.tried
    assert same(tmp_path / "out", tmp_path / "parts")


def test_ctrl_c_ends_after_a_step_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(tmp_path, QUICK)
    original = Trainer.step

    def interrupted(self: Trainer, parts: Any) -> None:
        if self.steps == 4:
            signal.raise_signal(signal.SIGINT)
        original(self, parts)

    # A test may run where Ctrl-C is ignored, as behind nohup.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as context:
            context.setattr(Trainer, "step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(path, "parts")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "parts" / "checkpoint.safetensors").exists()
    run(path, "parts", resume=True)
    run(path, "whole")
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_without_masks_for_validation_it_says_so(tmp_path: Path) -> None:
    path = recipe(tmp_path, QUICK)
    for mask in (tmp_path / "masks").rglob("*.png"):
        if int(mask.stem) > 8:
            mask.unlink()
    pictures(tmp_path / "other", 3, masks=0)
    path.write_text(path.read_text().replace('"photos"', '{ path = "photos", validation = "other/photos" }'))
    told: list[str] = []
    # Masks are found by name, so those of the other folder must not share one.
    for file in (tmp_path / "other" / "photos").rglob("*.png"):
        file.rename(file.with_name(f"v{file.name}"))
    result = run(path, "out", on_note=told.append)
    assert told == ["No masks for validation: the last epoch is kept, whatever it looks at."]
    assert (result.select, result.chosen) == ("last", 3)
    for extra in ('[intervention]\nweight = "auto"\n', 'select = "swapped"\n'):
        text = path.read_text()
        other = tmp_path / "auto.toml"
        other.write_text(text + extra)
        with pytest.raises(InputError, match="needs masks for at least two of the 6 validation images"):
            run(other, "auto")
    settings = read_settings(path, {"train.select": "accuracy", "data.validation": 0})
    with pytest.raises(InputError, match="needs validation images"):
        train(settings, tmp_path / "none", device=CPU)


def test_attributes_and_a_prior_without_masks(tmp_path: Path) -> None:
    pictures(tmp_path, 6)
    network(tmp_path, classes=2, multi_label=True)
    rows = [
        f"photos/{name}/{n}.png,{int(name == 'red')},{n % 2},1 2 20 24"
        for name in ("red", "blue")
        for n in range(6)
    ]
    (tmp_path / "labels.csv").write_text("file,red,odd,boxes\n" + "\n".join(rows) + "\n")
    path = tmp_path / "mine.toml"
    path.write_text(
        'data = "labels.csv"\nmodel = { checkpoint = "network.safetensors", freeze = ["block1"] }\n'
        '[guide]\nprior = "boxes"\nloss = "outside"\n' + QUICK
    )
    result = run(path, "out")
    assert result.select == "swapped"
    before, after = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("start", "model"))
    frozen = [name for name in before if name.startswith("block1")]
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["head.weight"], after["head.weight"])
    assert models.load(checkpoint=tmp_path / "out" / "model.safetensors").multi_label


@pytest.mark.parametrize(("threshold", "select"), [("", "last"), (", threshold = 0.9", "swapped")])
def test_words_of_the_classes_need_no_masks(tmp_path: Path, threshold: str, select: str) -> None:
    """Maps of random weights are more than one half everywhere: without a threshold nothing is outside."""
    path = recipe(tmp_path)
    clip_folder(tmp_path / "clip")
    text = path.read_text().replace('masks = "masks"', "")
    prior = f'{{ name = "text", model = "hf:{tmp_path / "clip"}"{threshold} }}'
    path.write_text(f"{text}[guide]\nprior = {prior}\n{QUICK}")
    assert run(path, "out").select == select
    line = dry_run(read_settings(path), tmp_path / "batch.png", CPU)
    assert "guidance: [guide]" in line
    # The words are the names of the classes, which the tokenizer knows.
    prepared = prepare(read_settings(path))
    assert isinstance(prepared.method.prior, TextPrior)
    assert prepared.method.prior.names == ("blue", "red")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer = 'adamq'\n", "train.optimizer = 'adamq' cannot be used"),
        ("schedule = 'slope'\n", "train.schedule = 'slope'"),
        ("accumulate = 20\n", "cannot be shared by 1 processes in 20 parts"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(recipe(tmp_path, QUICK + change), "out")


@pytest.mark.parametrize(
    ("name", "value"), [("guide.source", "cxam"), ("guide.loss", "iuo"), ("guide.layer", "layerX")]
)
def test_a_wrong_name_is_an_error_before_anything_is_written(tmp_path: Path, name: str, value: str) -> None:
    settings = read_settings(recipe(tmp_path, QUICK), {"recipe": "signed-evidence", name: value})
    with pytest.raises(AttnGuideError, match=value):
        train(settings, tmp_path / "out", device=CPU)
    assert not list((tmp_path / "out").iterdir())


def test_masks_that_nothing_reads_are_mentioned(tmp_path: Path) -> None:
    settings = read_settings(recipe(tmp_path, QUICK), {"recipe": "gain", "train.epochs": 1})
    told: list[str] = []
    train(settings, tmp_path / "out", device=CPU, on_note=told.append)
    assert "gain reads no masks: those of [masks] are not used, in validation neither." in told


def test_another_training_in_the_folder(tmp_path: Path) -> None:
    path = recipe(tmp_path, QUICK.replace("epochs = 3", "epochs = 1"))
    run(path, "out")
    with pytest.raises(InputError, match="holds a training already"):
        run(path, "out")
    other = read_settings(path, {"train.batch_size": 4})
    with pytest.raises(InputError, match="batch_size = 8 there, batch_size = 4 now"):
        train(other, tmp_path / "out", resume=True, device=CPU)
    (tmp_path / "out" / "result.json").unlink()
    (tmp_path / "out" / "checkpoint.safetensors").write_bytes(b"broken")
    with pytest.raises(DataError, match="is not a checkpoint"):
        run(path, "out", resume=True)


KILLED = """
import os, random, signal, sys, time
import torch
from attnguide.training import read_settings, train


def begin(folder):
    child = os.fork()  # everything is imported, so that few of the moments are before the first step
    if child == 0:
        train(read_settings(sys.argv[1]), folder, resume=True, device=torch.device("cpu"))
        os._exit(0)
    return child


begun = time.monotonic()
assert os.waitpid(begin("whole"), 0)[1] == 0
seconds = time.monotonic() - begun
moments, killed = random.Random(int(sys.argv[2])), 0
while killed < 20:
    child = begin("parts")
    time.sleep(seconds * moments.uniform(0.02, 0.4))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    killed += os.WIFSIGNALED(status)
    if not os.WIFSIGNALED(status):  # it was faster
        assert status == 0
        break
assert os.waitpid(begin("parts"), 0)[1] == 0
print("killed", killed, "times")
"""


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(
    "method",
    [
        '[guide]\nloss = "outside"\nweight = 5\nwarmup = 9\n',
        'recipe = "right-for-real"\n',
        "masks.complete = true\n",
    ],
)
def test_killed_at_random_moments(tmp_path: Path, method: str) -> None:
    path = recipe(tmp_path, method + QUICK.replace("epochs = 3", "epochs = 8"))
    if "complete" in method:
        path.write_text(path.read_text().replace('masks = "masks"', 'masks.path = "masks"'))
        for mask in (tmp_path / "masks").rglob("[5-9].png"):
            mask.unlink()
    (tmp_path / "program.py").write_text(KILLED)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), str(path), "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[1]) >= 5
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")
    assert not [file for file in (tmp_path / "parts").rglob("*") if file.name.startswith(".")]


def test_attention_mining_needs_no_masks(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    path.write_text(path.read_text().replace('masks = "masks"', 'recipe = "gain"') + QUICK)
    result = run(path, "out")
    assert (result.select, result.weight) == ("last", 1.0)
    for epoch in result.epochs:
        assert epoch.energy is None  # there is no region
        assert epoch.guidance is not None
        assert 0 < epoch.guidance < 1
    assert "gain" in dry_run(read_settings(path), tmp_path / "batch.png", CPU)


def test_a_teacher_has_a_trained_head(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    plain = path.read_text().replace('masks = "masks"', 'recipe = "distillation"') + QUICK
    # The network of the file has two classes, as the data: it is its own teacher.
    path.write_text(plain)
    prepared = prepare(read_settings(path))
    assert isinstance(prepared.method.prior, TeacherPrior)
    path.write_text(plain.replace("network.safetensors", "three.safetensors"))
    network(tmp_path, classes=3).rename(tmp_path / "three.safetensors")
    with pytest.raises(InputError, match=r"distillation has no teacher.*Name one"):
        prepare(read_settings(path))
    network(tmp_path)
    teacher = {"name": "teacher", "model": str(tmp_path / "network.safetensors"), "source": "cam"}
    result = train(read_settings(path, {"guide.prior": teacher}), tmp_path / "out", device=CPU)
    assert result.epochs[-1].guidance is not None
    again = read_settings(tmp_path / "out" / "recipe.toml")
    assert again.guide == {"prior": teacher}
