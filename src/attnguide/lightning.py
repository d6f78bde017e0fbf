"""Guidance in Lightning: a callback beside a module that stays as it is.

```python
from attnguide.lightning import Guidance

trainer = lightning.Trainer(callbacks=[Guidance(weight=0.5, loss="energy")])
trainer.fit(module, loader)  # batches (images, labels, masks)
```
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from attnguide.capture.logits import find_logits
from attnguide.errors import GuidanceError, InputError, MissingPackageError, nearest
from attnguide.guiding.guide import Guide
from attnguide.guiding.intervention import Intervened, Intervention
from attnguide.guiding.recipe import load_recipe

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingPackageError("attnguide.lightning", "lightning", "lightning") from error

__all__ = ["Guidance"]

_OPTIONS = [
    name for name in inspect.signature(Guide).parameters if name not in ("model", "adapters", "process_group")
]
_Step = Callable[..., Any]
#: Strategies whose gradients are those of one process, or averaged by DistributedDataParallel.
_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")


class Guidance(Callback):  # type: ignore[misc]
    """Adds the guidance to the loss that `training_step` returns.

    The module needs no change: it is looked at by hooks during `training_step` alone. Precision, gradient
    accumulation and `DDPStrategy` are taken care of; over accumulated batches and all processes the guidance
    is a mean over the annotated pairs, whatever batch they are in. Its state is part of Lightning's
    checkpoints, so that a run goes on where it was. `guidance` is logged in each step.

    With the recipe of an [`Intervention`][attnguide.Intervention], such as `"right-for-real"`, the classifier
    runs once, on the images and the exchanged ones, before `training_step`, whose call of the classifier then
    returns what it answered to the exchanged ones: these are what the module learns from. Over accumulated
    batches the guidance is the mean of theirs.

    Args:
        read: Makes of a batch, as the loader gives it, a dict of `images`, `labels` and what the priors read,
            such as `mask`. By default batches are (images, labels, masks), or dicts with these names.
        model: Name of the submodule that is the classifier. By default the only one with weights; if there
            are several, the module itself, whose `forward` then is the classifier.
        hide_masks: `training_step` gets the first two entries of each batch alone, as without guidance.
        recipe: A recipe, whose settings `options` replace, as for
            [`Guide.from_recipe`][attnguide.Guide.from_recipe] or
            [`Intervention.from_recipe`][attnguide.Intervention.from_recipe].
        **options: Options of [`Guide`][attnguide.Guide]: `source`, `prior`, `loss`, `weight`, `layer`,
            `targets` or `terms`, and `logits`; or of an intervention.

    Attributes:
        guide: The guide or intervention while a fit runs; None before and after.

    Raises:
        InputError: If an option is unknown.

    Source: Lightning's documentation of callbacks and automatic optimization.
    """

    def __init__(
        self,
        read: Callable[[Any], Mapping[str, Any]] | None = None,
        *,
        model: str | None = None,
        hide_masks: bool = False,
        recipe: str | Path | None = None,
        **options: Any,
    ) -> None:
        for name in options:
            if name == "adapters":
                raise InputError(
                    "adapters have weights that belong in the module's own optimizer: put them on with "
                    "attnguide.adapters.AdapterSet in the module's __init__, and add their loss there."
                )
            if name not in _OPTIONS and recipe is None:
                raise InputError(f"a guide has no option {name!r}.{nearest(name, _OPTIONS)}")
        self.guide: Guide | Intervention | None = None
        self._read = _read if read is None else read
        self._model, self._hide_masks, self._recipe, self._options = model, hide_masks, recipe, options
        self._state: dict[str, Any] | None = None
        self._whole: list[float] | None = None
        self._own_step: Callable[..., Any] | None = None

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; one for each guided model."""
        key: str = self._generate_state_key(model=self._model)
        return key

    # ------------------------------------------------------------ Lightning's hooks

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the guide on the model.

        Raises:
            GuidanceError: If the module optimizes by itself, or the strategy is not supported.
            InputError: If the module has no such submodule, or an option has a wrong value.
        """
        if not pl_module.automatic_optimization:
            raise GuidanceError(
                f"{type(pl_module).__name__} optimizes by itself (automatic_optimization = False), so its "
                "loss cannot be added to. Build an attnguide.Guide in it, and add guide.loss(…) to the loss."
            )
        if not any(kind.__name__ in _STRATEGIES for kind in type(trainer.strategy).__mro__):
            raise GuidanceError(
                f"guidance does not know {type(trainer.strategy).__name__}. Use strategy='ddp', or one "
                "device."
            )
        self.remove()
        model = self._classifier(pl_module)
        if self._recipe is None:
            self.guide = Guide(model, **self._options)
        elif load_recipe(self._recipe).intervention is None:
            self.guide = Guide.from_recipe(model, self._recipe, **self._options)
        else:
            # The strategy averages gradients, and the classifier lies inside of its wrapper.
            options = {"process_group": dist.group.WORLD} if trainer.world_size > 1 else {}
            self.guide = Intervention.from_recipe(model, self._recipe, **{**options, **self._options})
        if self._state is not None:
            self.guide.load_state_dict(self._state)
        step, self._own_step = pl_module.training_step, vars(pl_module).get("training_step")
        if isinstance(self.guide, Intervention):
            guided = self._intervening(step, pl_module, self.guide)
        else:
            # A strategy calls the module with whole batches instead of images.
            self.guide.recording = False
            guided = self._guided(step, trainer, pl_module, self.guide)
        pl_module.training_step = wraps(step)(guided)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the guide off, and keep its state."""
        self._leave(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the guide off when a fit is interrupted."""
        self._leave(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the guide."""
        return self.guide.state_dict() if self.guide is not None else self._state or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the guide, which is built as a fit begins."""
        self._state = state_dict or None

    # ------------------------------------------------------------------- the step

    def _given(self, batch: Any, *names: str) -> dict[str, Any]:
        given = dict(self._read(batch))
        for name in ("images", "labels", *names):
            if name not in given:
                raise InputError(f"read(batch) gave no {name!r}, only {', '.join(given) or 'nothing'}.")
        return given

    def _intervening(self, step: _Step, module: LightningModule, intervention: Intervention) -> _Step:
        def guided(batch: Any, *args: Any, **kwargs: Any) -> Any:
            given = self._given(batch, "mask")
            with _answering(intervention, given, type(module).__name__) as both:
                output = step(batch[:2] if self._hide_masks else batch, *args, **kwargs)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if loss is None:
                return output  # Lightning leaves this batch out
            module.log("guidance", both.loss.detach(), batch_size=len(both.logits))
            # Lightning divides what is returned by the number of accumulated batches.
            return {**output, "loss": loss + both.loss} if isinstance(output, Mapping) else loss + both.loss

        return guided

    def _guided(self, step: _Step, trainer: Trainer, module: LightningModule, guide: Guide) -> _Step:
        def guided(batch: Any, *args: Any, **kwargs: Any) -> Any:
            given = self._given(batch)
            guide.recording = True
            try:
                output = step(batch[:2] if self._hide_masks else batch, *args, **kwargs)
                loss = output.get("loss") if isinstance(output, Mapping) else output
                if loss is None:
                    return output  # Lightning leaves this batch out
                images = given.pop("images")
                every, place = trainer.accumulate_grad_batches, trainer.fit_loop.batch_idx
                if every > 1 and (self._whole is None or place % every == 0):
                    ahead = [dict(self._read(item)) for item in _ahead(trainer, every - 1 - place % every)]
                    counts = [guide.count(**each) for each in [{"images": images, **given}, *ahead]]
                    self._whole = [sum(each) for each in zip(*counts, strict=True)]
                whole = self._whole if every > 1 else None
                # Lightning divides what is returned by the number of accumulated batches.
                guidance = guide.loss(normalize_by=whole, **given) * every
            finally:
                guide.recording = False
            module.log("guidance", guidance.detach() / every, batch_size=len(images))
            return {**output, "loss": loss + guidance} if isinstance(output, Mapping) else loss + guidance

        return guided

    def _classifier(self, module: LightningModule) -> nn.Module:
        if self._model is not None:
            try:
                chosen: nn.Module = module.get_submodule(self._model)
            except AttributeError:
                names = [name for name, _ in module.named_children()]
                raise InputError(
                    f"{type(module).__name__} has no submodule {self._model!r}.{nearest(self._model, names)}"
                ) from None
            return chosen
        weighty: list[nn.Module] = [
            child for child in module.children() if next(child.parameters(), None) is not None
        ]
        whole: nn.Module = module
        return weighty[0] if len(weighty) == 1 else whole

    def _leave(self, module: LightningModule) -> None:
        if self.guide is not None:
            self._state = self.guide.state_dict()
            vars(module).pop("training_step", None)
            if self._own_step is not None:
                module.training_step = self._own_step
        self.remove()

    def remove(self) -> None:
        """Take the guide off the model. May be called twice."""
        if isinstance(self.guide, Guide):
            self.guide.remove()
        self.guide, self._whole = None, None


def _read(batch: Any) -> Mapping[str, Any]:
    """Read batches of three, or dicts."""
    if isinstance(batch, Mapping):
        return batch
    if isinstance(batch, Sequence) and len(batch) == 3:
        return dict(zip(("images", "labels", "mask"), batch, strict=True))
    got = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, Sequence) else type(batch).__name__
    raise InputError(
        f"a batch is a {got}, not (images, labels, masks). Give Guidance(read): a function of a batch that "
        "returns a dict of images, labels and what the prior reads."
    )


@contextmanager
def _answering(intervention: Intervention, given: Mapping[str, Any], name: str) -> Iterator[Intervened]:
    """Intervene, and let the next call of the classifier return the answers to the exchanged images.

    Raises:
        GuidanceError: If the classifier is not called once inside.
    """
    model, images = intervention.model, given["images"]
    answers: list[Any] = []

    def call(images_too: Tensor, rows: Tensor) -> Any:
        def exchanged(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and len(value) == len(images) + len(rows):
                return value[: len(images)].index_copy(0, rows, value[len(images) :])
            return value

        output = model(images_too)
        answers.append(tree_map(exchanged, output))
        return output

    both = intervention._through(call, images, given["labels"], given["mask"])
    if len(find_logits(answers[0], intervention._logits)) != len(images):
        raise GuidanceError(
            f"{type(model).__name__} returns a {type(answers[0]).__name__}, from which the answers to "
            "exchanged images cannot be taken. Return a tensor, a tuple or a dict."
        )
    calls = 0

    def answer(*_: Any, **__: Any) -> Any:
        nonlocal calls
        calls += 1
        return answers[0]

    own = vars(model).get("forward")
    vars(model)["forward"] = answer
    try:
        yield both
    finally:
        del vars(model)["forward"]
        if own is not None:
            vars(model)["forward"] = own
    if calls != 1:
        raise GuidanceError(
            f"training_step of {name} called {type(model).__name__} {calls} times, and with an intervention "
            "it has to be once. Name the submodule that is the classifier: Guidance(model=…)."
        )


class _Peekable(Iterator[Any]):
    """An iterator whose next items can be seen before they are taken."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items, self._seen = items, deque[Any]()

    def __next__(self) -> Any:
        return self._seen.popleft() if self._seen else next(self._items)

    def peek(self, count: int) -> list[Any]:
        """Return up to `count` items that come next."""
        while len(self._seen) < count:
            try:
                self._seen.append(next(self._items))
            except StopIteration:
                break
        return list(self._seen)[:count]


def _ahead(trainer: Trainer, count: int) -> list[Any]:
    """Return the batches that come next, as the loader gives them; fewer at the end of an epoch."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    if not hasattr(fetcher, "iterator") or not hasattr(fetcher, "batches"):
        raise GuidanceError(
            f"batches cannot be counted ahead in {type(fetcher).__name__}, as accumulation needs it. Use "
            "accumulate_grad_batches=1."
        )
    if not isinstance(fetcher.iterator, _Peekable):
        fetcher.iterator = _Peekable(fetcher.iterator)
    items = [*fetcher.batches, *fetcher.iterator.peek(count - len(fetcher.batches))]
    return [batch for batch, _, _ in items[:count]]
