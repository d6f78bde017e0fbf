"""Guidance in the Trainer of Hugging Face's transformers.

```python
from attnguide.transformers import GuidedTrainer

guide = ag.Guide(model, weight=0.5)
trainer = GuidedTrainer(guide, model=model, args=args, train_dataset=data)  # with a column "mask"
trainer.train()
```
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attnguide.capture.model_state import modules_of
from attnguide.data.files import atomic_write
from attnguide.errors import DataError, GuidanceError, InputError, MissingPackageError
from attnguide.guiding.guide import Guide
from attnguide.guiding.intervention import Intervention
from attnguide.pairs import IGNORE_INDEX

if TYPE_CHECKING:
    from torch import Tensor, nn

try:
    from transformers import PreTrainedModel, Trainer
except ImportError as error:
    raise MissingPackageError("attnguide.transformers", "transformers", "transformers") from error

__all__ = ["GuidedTrainer"]

#: The state of the guide in a checkpoint's folder.
_STATE = "guide.safetensors"


class GuidedTrainer(Trainer):  # type: ignore[misc]
    """A `Trainer` that adds the guidance to the loss of each training step.

    It keeps the columns that the priors read, and does not give them to the model. The guidance is a mean
    over the annotated pairs of all batches that are accumulated, and of all processes; λ is not multiplied by
    the number of accumulated batches. A checkpoint holds the state of the guide, so that a warm-up goes on
    where it was. In evaluation there is no guidance. A `compute_loss_func`, label smoothing and the like stay
    as they are.

    With an [`Intervention`][attnguide.Intervention] the model runs once, on the images and the exchanged
    ones. Where an image was exchanged, the label of its original is −100, so that the model's own loss is
    that of the exchanged images. Over accumulated batches the guidance is the mean of theirs.

    Args:
        guide: A guide on the model that is trained, with any terms, or an intervention. A guide stays on the
            model after training; `guide.remove()` takes it off.
        **options: Options of `transformers.Trainer`: `model`, `args` … Each sample is a dict with
            `pixel_values`, `labels`, and what the priors read, such as `mask`: tensors of one size, NaN for a
            mask that is missing.

    Raises:
        InputError: If the guide has adapters or is not on the model, or the model is made by `model_init`.
        GuidanceError: If the processes of one machine share the batch by `DataParallel`, DeepSpeed or FSDP.

    Source: the documentation of `transformers.Trainer`, subclassing.
    """

    def __init__(self, guide: Guide | Intervention, **options: Any) -> None:
        model = options.get("model")
        if model is None:
            raise InputError(
                "GuidedTrainer needs model=, the one that the guide is on; model_init= makes others."
            )
        if all(module is not guide.model for module in modules_of(model)):
            raise InputError(
                f"{guide!r} is not on this {type(model).__name__}. Build it with the model that is given "
                "here."
            )
        if isinstance(guide, Guide) and len(guide.adapters):
            raise InputError(
                "GuidedTrainer does not train adapters, whose weights are not the model's. Guide without "
                "adapters=."
            )
        self.guide = guide
        readers = guide._readers if isinstance(guide, Guide) else ()
        self._annotations = sorted({name for reader in readers for name in reader.annotations}) or ["mask"]
        self._window: list[Any] = []
        self._whole: list[float] | None = None
        self._load_result: Any = None
        super().__init__(**options)
        wrapped = (
            "DataParallel" if self.args.n_gpu > 1 else
            "DeepSpeed" if self.is_deepspeed_enabled else
            "FSDP" if self.is_fsdp_enabled else
            None
        )  # fmt: skip
        if wrapped is not None:
            raise GuidanceError(
                f"GuidedTrainer does not work with {wrapped}. Start one process for each GPU, as torchrun "
                "and accelerate launch do; one GPU alone is chosen by CUDA_VISIBLE_DEVICES."
            )

    # ------------------------------------------------------------------- columns

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns
        self._signature_columns: list[str] = [
            *columns, *(name for name in self._annotations if name not in columns)
        ]  # fmt: skip

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch without what the priors read."""
        return super().prediction_step(model, self._split(inputs)[0], *args, **kwargs)

    def _split(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Separate what the model takes from what the priors read."""
        ours = {name: value for name, value in inputs.items() if name in self._annotations}
        return {name: value for name, value in inputs.items() if name not in ours}, ours

    # ---------------------------------------------------------------------- loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Note the batches of the next step of the optimizer, whose annotated pairs are counted."""
        found = super().get_batch_samples(*args, **kwargs)
        self._window, self._whole = found[0], None
        return found

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the model's own loss, and in training add the guidance.

        Raises:
            InputError: If a batch has no labels, or lacks what a prior reads.
        """
        inputs, annotations = self._split(inputs)
        labels = inputs.get("labels")
        outputs: Any = None
        loss: Any = None

        def run(inputs: dict[str, Any]) -> Any:
            nonlocal loss, outputs
            loss, outputs = super(GuidedTrainer, self).compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
            return outputs

        if not (model.training and torch.is_grad_enabled()):
            run(inputs)
        elif labels is None:
            raise InputError(f"a batch has no 'labels', only {', '.join(inputs)}; guidance needs them.")
        else:
            if isinstance(self.guide, Intervention):
                guidance = self._intervene(self.guide, run, model, inputs, annotations)
            else:
                run(inputs)
                guidance = self.guide.loss(labels, normalize_by=self._annotated(self.guide), **annotations)
            scaled = getattr(self, "loss_is_scaled_for_ga", None)
            if scaled is None:
                counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
                scaled = counted or self.compute_loss_func is not None
            # A loss that is not scaled by then is divided by the number of accumulated batches.
            loss = loss + guidance * (1 if scaled else self.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    def _intervene(
        self,
        intervention: Intervention,
        run: Callable[[dict[str, Any]], Any],
        model: nn.Module,
        inputs: dict[str, Any],
        annotations: dict[str, Any],
    ) -> Tensor:
        """Run the model and its loss on the images and the exchanged ones; return this batch's guidance."""
        name, labels = self._images_name, inputs["labels"]
        if labels.ndim != 1:
            raise InputError(
                "an intervention in GuidedTrainer needs class indices as labels (B,), got "
                f"{tuple(labels.shape)}."
            )

        def call(images: Tensor, rows: Tensor) -> Any:
            own = torch.cat([labels.index_fill(0, rows, IGNORE_INDEX), labels[rows]])
            return run({**inputs, name: images, "labels": own})

        intervention.model = model  # wrapped, where there are several processes
        both = intervention._through(call, inputs[name], labels, annotations.get("mask"))
        share: Tensor = both.loss / self.current_gradient_accumulation_steps
        return share

    @property
    def _images_name(self) -> str:
        return getattr(self.model, "main_input_name", "pixel_values")

    def _annotated(self, guide: Guide) -> list[float] | None:
        """Annotated pairs of all batches of this step, of each term; None for those of one batch."""
        if len(self._window) > 1:
            counts = []
            for batch in self._window:
                inputs, annotations = self._split(batch)
                counts.append(guide.count(inputs[self._images_name], inputs["labels"], **annotations))
            self._whole = [sum(each) for each in zip(*counts, strict=True)]
            self._window = []
        return self._whole

    # --------------------------------------------------------------- checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = self.guide.state_dict()
            names = {name: value for name, value in state.items() if isinstance(value, str)}
            numbers = {
                name: torch.as_tensor(value, dtype=torch.float64)
                for name, value in state.items()
                if name not in names
            }
            with atomic_write(Path(output_dir) / _STATE) as file:
                save_file(numbers, file, metadata=names)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        self._load_result = load_result

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_result = None
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        result: Any = self._load_result
        if result is None:
            return
        if result.missing_keys and isinstance(model, PreTrainedModel):
            # Version 5 saves weights under their published names, which this trainer, unlike from_pretrained,
            # looks for under the names of the modules.
            model.load_state_dict(type(model).from_pretrained(resume_from_checkpoint).state_dict())
        else:
            super()._issue_warnings_after_load(result)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        file = Path(checkpoint) / _STATE
        if not file.is_file():
            raise DataError(
                f"{file} is missing: the checkpoint is not that of a guided run. Begin with its weights, "
                "as from_pretrained does, rather than resume from it."
            )
        try:
            state: dict[str, Any] = dict(load_file(file))
            with safe_open(file, "pt") as stored:
                state |= stored.metadata() or {}
        except Exception as error:
            raise DataError(f"{file} cannot be read: {error}.") from error
        self.guide.load_state_dict(state)
