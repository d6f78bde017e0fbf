"""The guide: one added term in a training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnguide.adapters.holder import AdapterSet
from attnguide.capture.calls import Call
from attnguide.capture.logits import LogitsSpec, check_spec
from attnguide.capture.model_state import unwrap
from attnguide.capture.parallel import group_of, joint_sum, refuse_sharded
from attnguide.capture.recorder import Plan, Recorder, adapters_of
from attnguide.capture.suitable import suitable
from attnguide.errors import GuidanceError, InputError, nearest
from attnguide.functional import full_precision_mode, may_read, reading
from attnguide.guiding import check as checking, state as states
from attnguide.guiding.compiling import check_uncompiled, compile_before
from attnguide.guiding.recipe import load_recipe
from attnguide.guiding.terms import BoundTerm, Records, Term, TermRecord, Weighed, mean
from attnguide.interfaces import Adapter, AlignmentLoss, AttributionSource, TargetPrior, check_annotations
from attnguide.layers import LayerSpec, find_attention
from attnguide.pairs import Pairs, Targets
from attnguide.trace import Attending, Layer, Trace, trace_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from attnguide.auditing.audit import AuditReport

__all__ = ["Guide"]


class Guide:
    """Guides a classifier by attribution maps in training, through hooks alone.

    ```python
    guide = ag.Guide(model, source="grad_cam", prior="mask", loss="iou", weight=0.5)
    for images, labels, masks in loader:
        loss = criterion(model(images), labels) + guide.loss(labels, mask=masks)
        ...
    guide.remove()
    ```

    Works in training and evaluation mode, under `torch.autocast`, with gradient accumulation, frozen
    backbones, any memory format and models wrapped in `DataParallel` or `DistributedDataParallel` (wrap
    first, then guide); with the latter the loss is that of the joint batch.

    Args:
        model: Any classifier: an `nn.Module` whose output is logits, or a tuple, dict or object with
            `.logits`.
        source: Attribution source; see [`Term`][attnguide.Term], as for all up to `targets`.
        prior: Target prior.
        loss: Alignment loss.
        weight: λ.
        layer: Layer whose attribution is guided; `"auto"` is found at the first forward, with its images.
        targets: Which (sample, class) pairs.
        terms: One or several terms, instead of the arguments from `source` to `targets`; a
            [`Term`][attnguide.Term] has further settings.
        adapters: Adapters that are trained beside the model, or an
            [`AdapterSet`][attnguide.adapters.AdapterSet]
            on it, which the guide takes over; see `guide.parameters()`.
        logits: Which part of the model's output is the logits, as in [`explain`][attnguide.explain].
        process_group: The processes whose gradients are averaged, where another wrapper than
            `DistributedDataParallel` does that: `guide.loss` then takes its mean over the annotated pairs of
            all of them. With `DistributedDataParallel` nothing need be given.

    Raises:
        UnknownNameError: If a part's name is unknown.
        LayerError: If the model has no such layer.
        GuidanceError: If a source cannot guide.
        InputError: If an argument has a wrong value.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        source: str | AttributionSource = "grad_cam",
        prior: str | TargetPrior = "mask",
        loss: str | AlignmentLoss = "iou",
        weight: float = 1.0,
        layer: LayerSpec = "auto",
        targets: Targets = "labels",
        terms: Sequence[Term] | None = None,
        adapters: Sequence[Adapter] | AdapterSet = (),
        logits: LogitsSpec = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_spec(logits)
        single = Term(source, prior, loss, weight, layer, targets)
        if terms is not None and vars(single) != vars(Term()):
            raise InputError("give either terms=[…] or source=, prior=, loss=, weight=, layer=, targets=.")
        check_uncompiled(suitable(model))
        self.model = model
        self.terms: list[Term] = [single] if terms is None else _listed(terms)
        if not self.terms and not len(adapters):
            raise InputError("terms is empty; a guide needs at least one term or adapter.")
        self._bound = [BoundTerm(term, model) for term in self.terms]
        self.adapters = adapters if isinstance(adapters, AdapterSet) else AdapterSet(model, adapters)
        self.adapters.hand_over()
        self.logits = self.adapters.logits = logits if logits is not None else self.adapters.logits
        #: The priors and adapters, which read annotations.
        self._readers: list[TargetPrior | Adapter] = [bound.prior for bound in self._bound]
        self._readers += self.adapters
        self._process_group = process_group
        self._attending: Attending | None = None
        self._layers: list[Layer] = []
        self._adapters_on_model: tuple[nn.Module, ...] = ()
        self._records: list[TermRecord] = []
        self._steps = 0
        #: Whether the annotations of a step were checked.
        self._checked = False
        self._removed = False
        self._compiled: list[nn.Module] = []
        self._recorder = Recorder(
            model,
            plan=self._plan,
            differentiated_twice=any(
                bound.source.needs_gradient or bound.source.only_gradients for bound in self._bound
            ),
            after=self.adapters.predict if len(self.adapters) else None,
            adapters=self.adapters.modules,
            logits=self.logits,
        )
        try:
            self.adapters.put_on_hooks()
        except BaseException:
            self.remove()
            raise

    @classmethod
    def from_recipe(
        cls,
        model: nn.Module,
        recipe: str | Path,
        *,
        adapters: Sequence[Adapter] | AdapterSet = (),
        logits: LogitsSpec = None,
        process_group: ProcessGroup | None = None,
        **overrides: Any,
    ) -> Guide:
        """Build a guide from a named method with its published settings, or from a recipe file.

        Args:
            model: Any classifier.
            recipe: A registered name such as `"gradcam-iou"`, or the path of a TOML file.
            adapters: As for [`Guide`][attnguide.Guide].
            logits: As for [`Guide`][attnguide.Guide].
            process_group: As for [`Guide`][attnguide.Guide].
            **overrides: Fields of [`Term`][attnguide.Term] that replace the recipe's.

        Returns:
            The guide.

        Raises:
            UnknownNameError: If the recipe or a part in it is unknown.
            InputError: If the file cannot be read, a setting is unknown, or the recipe is an intervention.
        """
        known = [field.name for field in fields(Term)]
        for name in overrides:
            if name not in known:
                raise InputError(f"a term has no setting {name!r}.{nearest(name, known)}")
        loaded = load_recipe(recipe)
        if loaded.intervention is not None:
            raise InputError(
                f"the recipe {loaded.name!r} exchanges what is outside of the masks, and has no map: use "
                "attnguide.Intervention.from_recipe."
            )
        term = Term(**{**loaded.guide, **overrides})
        return cls(model, terms=[term], adapters=adapters, logits=logits, process_group=process_group)

    # ------------------------------------------------------------ the loss

    def loss(
        self,
        labels: Tensor,
        *,
        sample_weight: Tensor | None = None,
        normalize_by: float | Sequence[float] | Tensor | None = None,
        **annotations: Any,
    ) -> Tensor:
        """Return the guidance loss of the last forward pass of the model.

        After a pass through `DistributedDataParallel` the mean is that of the batches of all processes, so
        each of them has to call this, also one without any annotation. What it returns is scaled so that the
        wrapper's average of the gradients is the gradient of that mean.

        Args:
            labels: Class indices `(B,)`, or multi-hot `(B, K)` floats or bools.
            sample_weight: How much each annotation counts, `(B,)` or `(B, K)`, at least 0; 0 drops a pair.
            normalize_by: Number of annotated pairs (with `sample_weight` their sum of weights) that the sum
                of the losses is divided by, instead of that of this batch. For gradient accumulation, give
                that of all the batches together that this process accumulates; other processes' are added.
                One number, or one for each term.
            **annotations: What the priors read, for example `mask=`, `boxes=`.

        Returns:
            A scalar: Σ λ · mean over the annotated pairs, with the λ of this step. Where no pair is
            annotated it is an exact zero that can be differentiated.

        Raises:
            GuidanceError: If there was no forward, it ran without gradients, or the guide was removed; or if
                other processes do not call it.
            LayerError: If a layer did not run, or its output has no rows and columns.
            InputError: If labels or annotations are wrong, missing or unknown, or `normalize_by` is less
                than this batch alone has.
        """
        return self._loss(True, labels, sample_weight=sample_weight, normalize_by=normalize_by, **annotations)

    def _loss(
        self,
        joint: bool,
        labels: Tensor,
        /,
        *,
        sample_weight: Tensor | None = None,
        normalize_by: float | Sequence[float] | Tensor | None = None,
        **annotations: Any,
    ) -> Tensor:
        """Compute the loss; `joint`: over all processes, where there are several."""
        check_annotations(self._readers, annotations)
        trace = self._trace()
        if not trace.logits.requires_grad:
            raise GuidanceError(
                "the last forward recorded no graph: it ran under torch.no_grad() or inference_mode(), or "
                "every parameter is frozen. Run it with gradients enabled; skip guide.loss in validation."
            )
        if self._recorder.shards.modules and len(self.adapters):
            raise GuidanceError(
                "adapters do not work on a model that is sharded by fully_shard: nobody would average their "
                "gradients. Use DistributedDataParallel."
            )
        group = self._group() if joint else None
        # An empty sum is an exact zero with a graph, whatever the logits are.
        total = trace.logits.flatten()[:0].sum().float()
        fusions = [r.fusion for r in self._recorder.recordings.values() if r.fusion is not None]
        second_order = self._recorder.second_order
        # Behind a pooling there is little to differentiate.
        if second_order is not None and not all(layer.shortcuts.pooled for layer in self._layers):
            self._recorder.prepare()
        with (
            full_precision_mode(trace.logits.device),
            nullcontext() if second_order is None else second_order.held(fusions),
            self._recorder.shards.held(),
            # On an accelerator values are checked in the first step: later nothing waits for it.
            nullcontext() if self._checked else reading(),
        ):
            moment = (self._steps, 0 if group is None else dist.get_rank(group))
            compared = [bound(trace, labels, sample_weight, annotations, moment) for bound in self._bound]
            terms = [losses for _, losses in compared]
            for bound, losses, weights in zip(
                self._bound, terms, self._weights(terms, normalize_by, group), strict=True
            ):
                term_mean = mean(losses, weights)
                if term_mean is not None:
                    total = total + bound.term.weight_at(self._steps) * term_mean
            if group is not None:
                # The wrapper divides the sum of the gradients by the number of processes.
                total = total * dist.get_world_size(group)
            if self.adapters.layers:
                for loss in self.adapters.losses(trace, labels, annotations):
                    if normalize_by is not None:
                        raise InputError(
                            "normalize_by= cannot hold for the losses of adapters, which are means over each "
                            "batch. Put the adapters on with AdapterSet(model, …) instead of adapters=, and "
                            "divide adapters.loss(…) by the number of batches that are accumulated."
                        )
                    total = total + loss
        self._steps, self._checked = self._steps + 1, True
        self._records = [record for records, _ in compared for record in records]
        if second_order is not None:
            second_order.follow(total, fusions)
        return total

    def _group(self) -> ProcessGroup | None:
        """The processes that share the mean of the last pass; None for this one alone."""
        wrapper = next(
            (r.parallel for r in self._recorder.recordings.values() if r.parallel is not None), None
        )
        if wrapper is not None and wrapper._join_config.enable:
            raise GuidanceError(
                "the mean over all processes cannot be taken inside model.join(), where some of them have "
                "run out of batches. Give each process equally many batches, as DistributedSampler does."
            )
        if self._process_group is not None:
            return self._process_group
        return group_of(self._recorder.shards.modules) if wrapper is None else wrapper.process_group

    @staticmethod
    def _weights(
        terms: Sequence[Sequence[Weighed]],
        normalize_by: float | Sequence[float] | Tensor | None,
        group: ProcessGroup | None,
    ) -> Sequence[Tensor]:
        """What the losses of each term are divided by, at each of its layers."""
        sizes = [len(losses) for losses in terms]
        if not sizes:
            return []
        weights = torch.stack([part.weights for losses in terms for part in losses])
        if normalize_by is not None:
            weights = _whole(normalize_by, weights, sizes)
        if group is not None:
            weights = joint_sum(weights, group)
        return torch.split(weights, sizes)

    def records(self) -> Records:
        """Return the record of each term at each of its layers in the last call of `loss`, detached.

        A list of [`TermRecord`][attnguide.TermRecord]s, which a notebook shows as pictures.
        """
        return Records(self._records)

    def count(
        self, images: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None, **annotations: Any
    ) -> list[float]:
        """Count the annotated pairs of a batch, which need not have passed through the model.

        The sum over the batches of one step of the optimizer is what
        [`loss`][attnguide.Guide.loss] takes as `normalize_by=`. Call it after a first forward, which shows
        the layers and the number of classes.

        Args:
            images: `(B, C, H, W)`, on any device.
            labels: As for [`loss`][attnguide.Guide.loss], like the rest.
            sample_weight: How much each annotation counts.
            **annotations: What the priors read.

        Returns:
            For each term the sum of the weights of its annotated pairs; without `sample_weight` their number.

        Raises:
            GuidanceError: If there was no forward yet, or the guide was removed.
            InputError: If labels or annotations are wrong, or the pairs depend on the prediction.
        """
        check_annotations(self._readers, annotations)
        trace = self._trace()
        logits = torch.zeros(len(images), trace.logits.shape[1], device=images.device)
        batch = replace(trace, images=images, logits=logits)
        with torch.no_grad():
            return [bound.count(batch, labels, sample_weight, annotations) for bound in self._bound]

    def check(self, images: Tensor, labels: Tensor, **annotations: Any) -> checking.CheckReport:
        """Prove that the guidance term reaches the weights, and report which.

        Runs one forward pass in evaluation mode and one backward pass; the model, its gradients and buffers
        stay as they are. Call it once before training, with a batch that has annotations.

        Args:
            images: `(B, C, H, W)`.
            labels: As for [`loss`][attnguide.Guide.loss].
            **annotations: As for [`loss`][attnguide.Guide.loss].

        Returns:
            A report; print it for a table.

        Raises:
            GuidanceError: If the gradient arrives nowhere.
        """
        refuse_sharded(unwrap(self.model), "check a guide")
        before = self._records, self._steps, self._checked
        try:
            return checking.check(
                self.model, images, lambda: self._loss(False, labels, **annotations), lambda: self.layers
            )
        finally:
            self._records, self._steps, self._checked = before

    def audit(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        term: int = 0,
        before: AuditReport | None = None,
        tolerance: float = 0.1,
        **annotations: Any,
    ) -> AuditReport:
        """Check whether predictions depend on the right region, not only the map; see `ag.audit`.

        Args:
            images: `(B, C, H, W)`, none of which was trained on.
            labels: As for [`loss`][attnguide.Guide.loss].
            term: Which of the terms.
            before: The report of the model before guidance, or of its unguided twin, on the same images.
            tolerance: Share of the answers, less chance, that may change with what is outside the prior.
            **annotations: What the prior reads.

        Returns:
            The report; print it.

        Raises:
            InputError: If there is no such term, labels or annotations do not fit, nothing is annotated, or
                no two images are of different classes.

        Warns:
            AuditWarning: If the map looks right and other measurements say otherwise.
        """
        from attnguide.auditing.audit import audit  # here, since it brings torchmetrics, which takes its time

        check_annotations(self._readers, annotations)
        if not isinstance(term, int) or not 0 <= term < len(self._bound):
            raise InputError(
                f"term={term!r} is not one of the terms: the guide has {len(self._bound)}, numbered from 0."
            )
        bound = self._bound[term]

        def masks_of(pairs: Pairs, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
            self.model(images)
            return bound.prior_at(self._trace(), pairs, size, annotations)

        return audit(
            self.model,
            images,
            labels,
            masks_of,
            source=bound.term.source if isinstance(bound.term.source, str) else bound.source,
            layer=bound.names,
            targets=bound.term.targets,
            evidence=bound.term.evidence,
            before=before,
            tolerance=tolerance,
            logits=self.logits,
        )

    # ------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what training has changed, for a checkpoint.

        Returns:
            The number of steps (`warmup` and the draws of `max_classes` depend on it), λ of each term, and
            the weights and buffers of the adapters: plain numbers and tensors, as
            `torch.load(…, weights_only=True)` reads them.
        """
        return states.state_of(self._steps, self.terms, self.adapters.modules)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where a guide with the same settings was when its `state_dict()` was taken.

        Args:
            state_dict: What `state_dict()` returned. It sets λ of each term too; to go on with another one,
                set `guide.terms[0].weight` afterwards.

        Raises:
            InputError: If names are missing or unknown, or a value does not fit; nothing is changed then.
        """
        self._steps = states.restore(state_dict, self.terms, self.adapters.modules)

    # ------------------------------------------------------ coming and going

    @property
    def layers(self) -> list[str]:
        """Names of the layers looked at; before the first forward, what was asked for."""
        return [name for bound in self._bound for name in bound.names]

    @property
    def recording(self) -> bool:
        """Whether forward passes are recorded; set to False, they go by unseen, as in validation.

        With adapters it stays True, since they answer in every pass.
        """
        return not self._recorder.inert

    @recording.setter
    def recording(self, value: bool) -> None:
        if not value and len(self.adapters):
            raise GuidanceError("the adapters of this guide answer in every pass; keep recording on.")
        self._recorder.inert = not value

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the adapters, for the optimiser; none without adapters."""
        return self.adapters.parameters()

    def compile(self, images: Tensor, **options: Any) -> list[str]:
        """Compile the part of the model that comes before the guided layers, with `torch.compile`.

        What comes after them is differentiated twice, which compiled code refuses, and a model that is
        compiled as a whole hides its layers. `remove()` undoes it.

        Args:
            images: `(B, C, H, W)`, as they will be in training; the layers are found with them.
            **options: Options of `torch.compile`: `mode`, `dynamic`, `backend` …

        Returns:
            Names of the modules that were compiled.

        Raises:
            GuidanceError: If nothing can be compiled, or the guide was removed.
        """
        if self._removed:
            raise GuidanceError("this guide was removed from its model; build a new one.")
        model = unwrap(self.model)
        self._recorder.record(self._plan(Call.of((images,), {}, self.logits)))
        names = compile_before(model, self._layers, images, options)
        if self._recorder.second_order is not None:
            self._recorder.second_order.leave_alone(names)
        self._compiled += [model.get_submodule(name) for name in names]
        return names

    def remove(self) -> None:
        """Remove every hook; the model is as it was. May be called twice."""
        self._recorder.remove()
        self.adapters.remove()
        for module in self._compiled:
            module._compiled_call_impl = None
        self._compiled = []
        self._records = []
        self._removed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Guide({type(unwrap(self.model)).__name__}: {', '.join(map(repr, self._bound))})"

    # -------------------------------------------------------------- helpers

    def _plan(self, call: Call) -> Plan:
        """Find the layers for images of this size, and say what to record."""
        model = unwrap(self.model)
        for bound in self._bound:
            bound.find(self.model, call)
        self.adapters.find(call)
        self._adapters_on_model = adapters_of(model)
        layers = [*(layer for bound in self._bound for layer in bound.layers), *self.adapters.layers]
        if self._adapters_on_model:
            # An adapter may use the whole feature, so that the logits depend on more than the pooled one.
            layers = [layer.plain() for layer in layers]
        layers = self._layers = list({layer.name: layer for layer in layers}.values())
        check_uncompiled(model, layers)
        attention: tuple[str, ...] = ()
        transformers = [bound for bound in self._bound if bound.source.reads_attention]
        if transformers:
            tokens = max(layer.tokens for bound in transformers for layer in bound.layers)
            self._attending = find_attention(model, call.images, tokens, call=call)
            attention = self._attending.modules
        return Plan(
            layers=[layer.name for layer in layers],
            watched=[name for layer in layers for name in layer.watched],
            attention=attention,
            class_token=layers[0].class_token if self._only_logits_matter(layers) else {},
        )

    def _only_logits_matter(self, layers: Sequence[Layer]) -> bool:
        """Whether nothing but the logits can become part of the loss, as far as that can be known.

        That is so for one class alone whose forward is known, while one term guides it by gradients. What a
        model of the user's own keeps or returns beside the logits cannot be known.
        """
        kind = type(unwrap(self.model))
        return (
            f"{kind.__module__}.{kind.__qualname__}" == "timm.models.vision_transformer.VisionTransformer"
            and len(layers) == len(self._bound) == 1
            and self._bound[0].source.needs_gradient
            and not self._bound[0].source.reads_attention
            and not len(self.adapters)
        )

    def _trace(self) -> Trace:
        if self._removed:
            raise GuidanceError("this guide was removed from its model; build a new one.")
        recordings = self._recorder.recordings
        if not recordings:
            raise GuidanceError("guide.loss was called before a forward; call model(images) first.")
        return trace_of(
            sorted(recordings.values(), key=lambda recording: recording.images.device.index or 0),
            self._layers,
            differentiable=True,
            adapters=self._adapters_on_model,
            attending=self._attending,
            model=self._recorder.model,
            output=self.logits,
        )


def _whole(normalize_by: float | Sequence[float] | Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return what to divide by instead of the weights `(L,)` of a batch, for the L layers of all terms."""
    try:
        given = torch.as_tensor(normalize_by, dtype=torch.float32, device=weights.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"normalize_by={normalize_by!r} must be a number: {error}.") from error
    if given.shape not in ((), (len(sizes),)):
        raise InputError(
            f"normalize_by has shape {tuple(given.shape)}; give one number, or one for each of the "
            f"{len(sizes)} terms."
        )
    whole = given.expand(len(sizes)).repeat_interleave(
        torch.tensor(sizes, device=weights.device), output_size=sum(sizes)
    )
    # Written so that NaN fails too; the margin is for sums in float32.
    wrong = ~(whole * (1 + 1e-5) >= weights) | whole.isinf()
    if may_read(wrong) and bool(wrong.any()):
        raise InputError(
            f"normalize_by={given.tolist()} cannot be the annotated pairs of all accumulated batches: this "
            f"one alone has {weights[wrong][0].item():g}. Give their number (with sample_weight the sum of "
            "their weights) in all the batches that go into one step of the optimizer."
        )
    return whole


def _listed(terms: Sequence[Term]) -> list[Term]:
    listed = list(terms) if isinstance(terms, Sequence) else [terms]
    for term in listed:
        if not isinstance(term, Term):
            raise InputError(f"terms must be a list of attnguide.Term, got {term!r} in it.")
    return listed
