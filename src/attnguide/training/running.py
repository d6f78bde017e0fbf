"""Runs a training in a folder: chooses λ, trains, goes on after an interruption, and writes what it gives."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from attnguide import __version__
from attnguide.data.files import atomic_write, check_writable, read_text
from attnguide.errors import DataError, InputError, LayerError
from attnguide.guiding.guide import Guide
from attnguide.metrics import SwappedAccuracy
from attnguide.models import metadata_of
from attnguide.training._completing import completed
from attnguide.training._packing import load_packed, save_packed
from attnguide.training.choosing import Tried, choose_epoch, choose_weight
from attnguide.training.engine import Trainer, accelerator_on, joined
from attnguide.training.images import Batch, Loader, seeding, unseeded
from attnguide.training.preparing import Prepared, prepare
from attnguide.training.settings import Settings

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Epoch", "Trained", "annotated_batch", "train"]

RECIPE, LOG, CHECKPOINT, START, BEST, MODEL = (
    "recipe.toml",
    "log.jsonl",
    "checkpoint.safetensors",
    "start.safetensors",
    "best.safetensors",
    "model.safetensors",
)
_CLASSES, _RESULT = "classes.txt", "result.json"


@dataclass(frozen=True)
class Epoch:
    """What an epoch gave; see [`Trained`][attnguide.training.Trained].

    Attributes:
        epoch: Its number, from 1.
        steps: Number of steps that are done.
        learning_rate: Learning rate of the last step.
        seconds: Time that it took, with its validation.
        loss: Mean classification loss of the training.
        guidance: Mean guidance loss; None without guidance.
        energy: Mean share of the attribution inside the masks, on the validation images; None if not
            measured, as for all that follow.
        iou: Mean soft IoU of attribution and region.
        accuracy: Share of the labels that are predicted right.
        swapped: The same on images with exchanged surroundings.
        swapped_error: Its standard error.
    """

    epoch: int
    steps: int
    learning_rate: float
    seconds: float
    loss: float | None
    guidance: float | None
    energy: float | None
    iou: float | None
    accuracy: float | None
    swapped: float | None
    swapped_error: float | None

    def __str__(self) -> str:
        parts = [] if self.loss is None else [f"loss {self.loss:.4f}"]
        parts += [] if self.guidance is None else [f"guidance {self.guidance:.4f}"]
        parts += [] if self.accuracy is None else [f"accuracy {self.accuracy:.1%}"]
        if self.swapped is not None:
            error = self.swapped_error
            margin = "" if error is None or math.isnan(error) else f" ± {100 * error:.1f}"
            parts.append(f"with exchanged surroundings {self.swapped:.1%}{margin}")
        parts += [] if self.energy is None else [f"energy in the masks {self.energy:.1%}"]
        return f"epoch {self.epoch}: {', '.join(parts)}"


@dataclass(frozen=True)
class Trained:
    """What a training gave.

    Attributes:
        folder: Its folder.
        epochs: All epochs.
        chosen: Number of the epoch whose weights are kept, from 1.
        select: What it was chosen by.
        weight: λ; 0 without guidance.
        tried: The λ that were tried, with the accuracy of each; empty if λ was given.
        main: Whether this is the process that writes.
    """

    folder: Path
    epochs: list[Epoch]
    chosen: int
    select: str
    weight: float
    tried: list[Tried]
    main: bool = True


def train(
    settings: Settings,
    folder: str | Path,
    *,
    resume: bool = False,
    device: torch.device | None = None,
    progress: bool = False,
    on_epoch: Callable[[str], object] = lambda line: None,
    on_note: Callable[[str], object] = lambda line: None,
) -> Trained:
    """Train a model, and write it to a folder.

    The folder gets `model.safetensors`, `classes.txt`, `recipe.toml` with all settings, `log.jsonl` with a
    line for each epoch, `start.safetensors` with the weights before the first step, and `result.json`. While
    it runs there is a checkpoint, from which a training that was stopped, or killed at any moment, goes on;
    on the CPU its weights are then the same bits as without the interruption.

    In several processes (`torchrun`, `accelerate launch`) each calls this.

    Args:
        settings: The settings; see [`read_settings`][attnguide.training.read_settings].
        folder: The folder; made if it does not exist.
        resume: Go on with the training that the folder holds; begin if it holds none.
        device: The device; by default the one that Accelerate chooses.
        progress: Whether to show a bar on stderr.
        on_epoch: Called with a line of text after each epoch.
        on_note: Called with lines that say what was decided.

    Returns:
        What was measured, and chosen.

    Raises:
        InputError: If settings do not fit, or the folder holds another training.
        MissingPackageError: If Accelerate is not installed.
        DataError: If a file cannot be read.
        GuidanceError: If the guidance reaches no weight, or a loss is not finite.
        KeyboardInterrupt: At Ctrl-C, after a checkpoint was written.
    """
    with unseeded():
        return _train(settings, Path(folder), resume, device, progress, on_epoch, on_note)


def _train(
    settings: Settings,
    folder: Path,
    resume: bool,
    device: torch.device | None,
    progress: bool,
    on_epoch: Callable[[str], object],
    on_note: Callable[[str], object],
) -> Trained:
    accelerator = accelerator_on(device, settings.train.precision)
    main = accelerator.is_main_process
    if main:
        check_writable(folder)
        for part in _parts(folder):  # what a run that was killed was writing
            for file in part.glob(".attnguide-*.*"):
                file.unlink()
    else:
        on_epoch = on_note = _silent
    _check_folder(settings, folder, resume)
    accelerator.wait_for_everyone()
    prepared = completed(
        prepare(settings),
        folder,
        accelerator,
        keep=_is_begun(folder),
        show=progress and main,
        on_note=on_note,
    )
    for line in prepared.listing.notes:
        on_note(line)
    method = prepared.method
    if settings.masks is not None and method.kind != "none" and "mask" not in method.annotations:
        on_note(f"{method.recipe} reads no masks: those of [masks] are not used, in validation neither.")
    run = _Run(prepared, accelerator, progress and main, on_epoch)
    select = run.select(on_note)
    if main and not _is_begun(folder):
        _save_weights(prepared.loaded.model, folder / START, metadata_of(prepared.loaded))
        _write(folder / RECIPE, prepared.settings.as_toml())
    accelerator.wait_for_everyone()
    # What could not be had, such as pretrained weights, may be there now; the training began without.
    prepared.loaded.model.load_state_dict(load_file(folder / START))
    tried: list[Tried] = []
    weight = prepared.method.weight
    if weight is None:
        tried = run.search(folder, select, on_note)
        weight = choose_weight(tried).weight
        on_note(f"λ = {weight:g} is the largest within one standard error of the best.")
    result = run.fit(folder, weight, settings.train.epochs, select, tried)
    if main:
        _finish(prepared, result)
    accelerator.wait_for_everyone()
    return result


def _silent(line: str) -> None:
    """Say nothing, in processes other than the first."""


def _check_folder(settings: Settings, folder: Path, resume: bool) -> None:
    file = folder / RECIPE
    if not _is_begun(folder):
        return
    if not resume:
        raise InputError(
            f"{folder} holds a training already. Give --resume to go on with it, or another --out."
        )
    before, now = read_text(file), settings.as_toml()
    pairs = zip(before.splitlines(), now.splitlines(), strict=False)
    other = next(((old, new) for old, new in pairs if old != new and not new.startswith("pretrained")), None)
    if other is not None or len(before.splitlines()) != len(now.splitlines()):
        old, new = other or ("fewer or more settings", "")
        raise InputError(
            f"{folder} holds a training with other settings: {old} there, {new} now. Give --out for another "
            f"training, or go on with `attnguide train --resume --out {folder}`."
        )


def _is_begun(folder: Path) -> bool:
    """Whether a folder holds a training that has come to its first checkpoint."""
    return any((part / name).exists() for part in _parts(folder) for name in (CHECKPOINT, _RESULT))


def _parts(folder: Path) -> list[Path]:
    """The folder, and those of the λ that were tried."""
    return [folder, *folder.glob("search/*")]


class _Run:
    """A training, and those that choose its λ, on the same images."""

    def __init__(
        self, prepared: Prepared, accelerator: Accelerator, show: bool, on_epoch: Callable[[str], object]
    ) -> None:
        self.prepared, self.accelerator, self.show, self.on_epoch = prepared, accelerator, show, on_epoch
        self.settings = prepared.settings.train
        train = self.settings
        self.loader = Loader(
            prepared.train,
            train.batch_size,
            train.seed,
            train.workers,
            accelerator.process_index,
            accelerator.num_processes,
            train.accumulate,
        )
        self.validation = (
            Loader(prepared.validation, train.batch_size, workers=train.workers)
            if len(prepared.validation)
            else None
        )

    def select(self, on_note: Callable[[str], object]) -> str:
        """Decide by what the epoch is chosen.

        Raises:
            InputError: If what was asked for needs images or masks that are not there.
        """
        wanted, images = self.settings.select, self.prepared.validation
        automatic = self.prepared.method.weight is None
        if wanted in ("accuracy", "swapped") and not len(images):
            raise InputError(f'train.select = "{wanted}" needs validation images: data.validation.')
        if wanted != "swapped" and not automatic and wanted != "auto":
            return wanted
        masked = self._has_surroundings()
        if not masked and (automatic or wanted == "swapped"):
            setting = 'weight = "auto"' if automatic else 'train.select = "swapped"'
            raise InputError(
                f"{setting} needs masks for at least two of the {len(images)} validation images, and there "
                "are none. Add some, or give a number and train.select."
            )
        if wanted == "auto":
            if not masked and self.prepared.method.kind != "none":
                on_note("No masks for validation: the last epoch is kept, whatever it looks at.")
            return "swapped" if masked else "last"
        return wanted

    def _has_surroundings(self) -> bool:
        """Whether surroundings of validation images can be exchanged."""
        images, method = self.prepared.validation, self.prepared.method
        found = [] if method.kind == "none" else images.annotated(2)
        if len(found) < 2 or method.prior is None:
            return len(found) == 2 and "mask" in method.annotations
        try:
            masks = joined(
                method.prior, next(Loader(images.subset(found), 2).single()), len(images.loaded.classes)
            )
        except LayerError:  # the prior is made of what the model sees
            return False
        return bool((masks < 0.5).any())  # which NaN, for no region, is not

    def search(self, folder: Path, select: str, on_note: Callable[[str], object]) -> list[Tried]:
        """Try each λ for some epochs."""
        epochs = self.settings.search_epochs or max(1, math.ceil(self.settings.epochs / 2))
        tried = []
        for weight in self.prepared.method.weights:
            part = folder / "search" / str(weight).removesuffix(".0")
            if self.accelerator.is_main_process:
                part.mkdir(parents=True, exist_ok=True)
            self.accelerator.wait_for_everyone()
            result = self.fit(part, weight, epochs, "swapped" if select == "swapped" else "last")
            if self.accelerator.is_main_process:
                _finish(self.prepared, result)
            self.accelerator.wait_for_everyone()
            epoch = result.epochs[result.chosen - 1]
            score, error = epoch.swapped or 0.0, epoch.swapped_error or 0.0
            tried.append(Tried(weight, score, error))
            on_note(f"λ = {weight:g}: {score:.1%} with exchanged surroundings, epoch {epoch.epoch}")
        return tried

    def fit(
        self, folder: Path, weight: float, epochs: int, select: str, tried: Sequence[Tried] = ()
    ) -> Trained:
        """Train with a λ; go on where a checkpoint in the folder was."""
        if (folder / _RESULT).exists():
            return _read_result(folder)
        return _Fit(self, folder, weight, epochs, select, tried)()


class _Fit:
    """One training with one λ."""

    def __init__(
        self, run: _Run, folder: Path, weight: float, epochs: int, select: str, tried: Sequence[Tried]
    ) -> None:
        self.tried = list(tried)
        self.run, self.folder, self.weight, self.epochs, self.select = run, folder, weight, epochs, select
        self.main = run.accelerator.is_main_process
        self.history: list[Epoch] = []
        self.elapsed = 0.0

    def __call__(self) -> Trained:
        run, prepared = self.run, self.run.prepared
        model = prepared.fresh().to(run.accelerator.device)
        wrapped = run.accelerator.prepare_model(model)
        with ExitStack() as stack:
            stack.callback(run.accelerator.free_memory)  # it keeps what it has prepared
            guidance = prepared.method.on(wrapped, self.weight)
            if isinstance(guidance, Guide):
                stack.callback(guidance.remove)
            seeding(run.settings.seed)
            if isinstance(guidance, Guide):
                batch = annotated_batch(prepared, run.settings.batch_size).to(run.accelerator.device)
                guidance.check(batch.images, batch.labels, **batch.annotations)
            self.trainer = self._trainer(model, wrapped, guidance)
            if (folder := self.folder / CHECKPOINT).exists():
                state = load_packed(folder)
                self.trainer.load_state_dict(state["trainer"])
                self.history = [Epoch(**each) for each in state["history"]]
                self.elapsed = state["elapsed"]
                if self.trainer.schedule is not None:
                    self.trainer.schedule(self.trainer.steps)
            if self.main:  # what was logged after the checkpoint is repeated
                lines = [{"tried": asdict(each)} for each in self.tried]
                lines += [asdict(each) for each in self.history]
                _write(self.folder / LOG, "".join(json.dumps(line) + "\n" for line in lines))
            self._loop(stack)
        chosen = len(self.history)
        if self.select != "last":
            chosen = 1 + choose_epoch(self._scores())
        return Trained(self.folder, self.history, chosen, self.select, self.weight, self.tried, self.main)

    def _trainer(self, model: nn.Module, wrapped: nn.Module, guidance: Any) -> Trainer:
        from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
        from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]

        settings, steps = self.run.settings, self.run.loader.steps
        try:
            optimizer: Any = create_optimizer_v2(
                model,
                opt=settings.optimizer,
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                momentum=settings.momentum,
            )
        except (ValueError, AssertionError, ImportError, TypeError) as error:
            raise InputError(f"train.optimizer = {settings.optimizer!r} cannot be used: {error}") from error
        schedule = None
        if settings.schedule != "none":
            try:
                schedule, _ = create_scheduler_v2(
                    optimizer,
                    sched=settings.schedule,
                    num_epochs=self.epochs,
                    warmup_epochs=min(settings.warmup_epochs, self.epochs - 1),
                    step_on_epochs=False,
                    updates_per_epoch=steps,
                )
            except (ValueError, AssertionError, TypeError) as error:
                raise InputError(f"train.schedule = {settings.schedule!r} cannot be used: {error}") from error
        return Trainer(
            wrapped,
            self.run.accelerator.prepare_optimizer(optimizer),
            self.run.accelerator,
            guidance,
            task_weight=settings.task_weight,
            prior=self.run.prepared.method.prior,
            schedule=schedule and schedule.step_update,
            clip=settings.clip,
            seed=settings.seed,
        )

    def _loop(self, stack: ExitStack) -> None:
        from attnguide.cli.console import progress as bar

        run, trainer, loader = self.run, self.trainer, self.run.loader
        judged = 0 if run.validation is None else run.validation.steps
        total = self.epochs * (loader.steps + judged)
        advance = stack.enter_context(bar("", total, show=run.show, keep=True))
        advance(trainer.steps + len(self.history) * judged)
        board = stack.enter_context(
            _board(self.folder, run.settings.tensorboard and self.main, trainer.steps)
        )
        ending = stack.enter_context(_finishing_steps(run.accelerator.num_processes == 1))
        begun = time.monotonic() - self.elapsed
        while len(self.history) < self.epochs:
            number = len(self.history)
            self._to_training_mode()
            for parts in loader.epoch(number, trainer.steps - number * loader.steps):
                trainer.step(parts)
                advance(description=f"epoch {number + 1}/{self.epochs}")
                self.elapsed = time.monotonic() - begun
                if ending or trainer.steps % run.settings.save_every == 0:
                    self._save()
                if ending:
                    ending.end()
            self._measure(advance, board, begun)
            begun = time.monotonic()
            self.elapsed = 0.0
            self._save()
            if ending:
                ending.end()

    def _to_training_mode(self) -> None:
        self.trainer.model.train()
        for name in self.run.prepared.frozen:
            self.trainer.unwrapped.get_submodule(name).eval()

    def _measure(self, advance: Callable[..., None], board: Any, begun: float) -> None:
        run, trainer = self.run, self.trainer
        rate = float(trainer.optimizer.param_groups[0]["lr"])
        measured = trainer.finish_epoch()
        if run.validation is not None:
            metric = None
            if self.select == "swapped" or run.prepared.method.weight is None:
                metric = SwappedAccuracy(trainer.unwrapped, draws=run.settings.draws).to(trainer.device)
            found = trainer.measure(
                run.validation.single(),
                swapped=metric,
                batch_size=run.settings.batch_size,
                on_batch=advance,
            )
            measured = replace(found, loss=measured.loss, guidance=measured.guidance)
            if metric is not None and found.swapped is None:
                raise InputError(
                    "no validation image could be given other surroundings: at least two need masks that "
                    "leave "
                    'something outside. Give train.select = "last", and a number as weight.'
                )
        seconds = round(time.monotonic() - begun, 2)
        epoch = Epoch(len(self.history) + 1, trainer.steps, rate, seconds, **asdict(measured))
        self.history.append(epoch)
        if self.main:
            if self.select != "last" and choose_epoch(self._scores()) == len(self.history) - 1:
                _save_weights(trainer.unwrapped, self.folder / BEST)
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(epoch)) + "\n")
            if board is not None:
                for name, value in asdict(epoch).items():
                    if value is not None and name not in ("epoch", "steps"):
                        board.add_scalar(name, value, trainer.steps)
            self.run.on_epoch(str(epoch))

    def _scores(self) -> list[float | None]:
        return [each.accuracy if self.select == "accuracy" else each.swapped for each in self.history]

    def _save(self) -> None:
        if self.main:
            history = [asdict(each) for each in self.history]
            if self.select == "last" and len(self.history) == self.epochs:
                _save_weights(self.trainer.unwrapped, self.folder / BEST)
            state = {"trainer": self.trainer.state_dict(), "history": history, "elapsed": self.elapsed}
            save_packed(self.folder / CHECKPOINT, state)
        self.run.accelerator.wait_for_everyone()


def annotated_batch(prepared: Prepared, size: int) -> Batch:
    """Return a batch of training images that are annotated, as the model's own preprocessing gives them.

    Raises:
        InputError: If no training image is annotated.
    """
    found = prepared.plain.annotated(size)
    if not found:
        what = ", ".join(prepared.method.annotations)
        raise InputError(
            f"none of the {len(prepared.plain)} training images has an annotation ({what}), so there is "
            "nothing to guide by. Masks are named like the images, or like the classes."
        )
    return next(Loader(prepared.plain.subset(found), size).single())


@contextmanager
def _board(folder: Path, wanted: bool, steps: int) -> Iterator[Any]:
    """Open a log for TensorBoard, if that is installed; entries of steps that are repeated are dropped."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        wanted = False
    if not wanted:
        yield None
        return
    make: Any = SummaryWriter
    with make(folder / "tensorboard", purge_step=steps or None) as writer:
        yield writer


class _Ending:
    """A signal that asks to end, which waits for the end of a step; a second one ends at once."""

    def __init__(self) -> None:
        self._number = 0
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return bool(self._number)

    def take(self) -> None:
        """Take Ctrl-C and SIGTERM."""
        for number in (signal.SIGINT, signal.SIGTERM):
            # Ignored signals, as of nohup, stay ignored; those of other languages are not ours.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._note)

    def give_back(self) -> None:
        """Restore what was before."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def end(self) -> None:
        """Do what the signal would have done."""
        self.give_back()
        signal.raise_signal(self._number)

    def _note(self, number: int, frame: object) -> None:
        self._number = number
        self.give_back()


@contextmanager
def _finishing_steps(active: bool) -> Iterator[_Ending]:
    """Let steps end before the process does; several processes could not agree on the last one."""
    ending = _Ending()
    if active and threading.current_thread() is threading.main_thread():
        ending.take()
    try:
        yield ending
    finally:
        ending.give_back()


def _save_weights(model: nn.Module, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    # Copies, since weights that share memory are refused.
    weights = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    with atomic_write(path) as temporary:
        save_file(weights, temporary, metadata=dict(metadata or {}))


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _finish(prepared: Prepared, result: Trained) -> None:
    """Write what a training gives; the result last, since it says that all is there."""
    folder, loaded = result.folder, prepared.loaded
    if (folder / BEST).exists():
        with atomic_write(folder / MODEL) as temporary:
            save_file(load_file(folder / BEST), temporary, metadata=metadata_of(loaded))
    _write(folder / _CLASSES, "".join(f"{name}\n" for name in loaded.classes))
    values = {**asdict(result), "folder": ".", "attnguide": __version__, "torch": torch.__version__}
    _write(folder / _RESULT, json.dumps(values, indent=2) + "\n")
    for name in (BEST, CHECKPOINT):
        (folder / name).unlink(missing_ok=True)


def _read_result(folder: Path) -> Trained:
    try:
        values = json.loads(read_text(folder / _RESULT))
        epochs = [Epoch(**each) for each in values["epochs"]]
        tried = [Tried(**each) for each in values["tried"]]
        return Trained(folder, epochs, values["chosen"], values["select"], values["weight"], tried)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / _RESULT} is not the result of a training: {error!r}.") from error
