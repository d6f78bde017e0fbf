"""The guide: one added term in a training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attnguide.capture.calls import Call, replace_logits
from attnguide.capture.host_sync import reading
from attnguide.capture.model_state import full_precision_mode
from attnguide.capture.recorder import Recorder, Shard, adapters_of, is_answered_beside, unwrap
from attnguide.errors import GuidanceError, InputError, nearest
from attnguide.guiding import check as checking
from attnguide.guiding.compiling import check_uncompiled, compile_before
from attnguide.guiding.terms import BoundTerm, Term, TermRecord
from attnguide.interfaces import Adapter, AlignmentLoss, AttributionSource, TargetPrior
from attnguide.layers import Attending, Layer, LayerSpec, check_layer, find_attention, find_layers
from attnguide.pairs import Evidence, Pairs, Targets
from attnguide.parts.recipe import load_recipe
from attnguide.trace import Trace
from attnguide.tracing import trace_of

if TYPE_CHECKING:
    from attnguide.auditing.audit import AuditReport

__all__ = ["Guide"]


class Guide:
    """Guides a classifier to look where it should, through hooks alone.

    ```python
    guide = ag.Guide(model, source="grad_cam", prior="mask", loss="iou", weight=0.5)
    for images, labels, masks in loader:
        loss = criterion(model(images), labels) + guide.loss(labels, mask=masks)
        ...
    guide.remove()
    ```

    Works in training and evaluation mode, under `torch.autocast`, with gradient accumulation, frozen
    backbones, any memory format and models wrapped in `DataParallel` or `DistributedDataParallel` (wrap
    first, then guide).

    Args:
        model: Any classifier: an `nn.Module` whose output is logits, or a tuple, dict or object with
            `.logits`.
        source: See [`Term`][attnguide.Term], as for all that follow.
        prior: Where to look.
        loss: The distance.
        weight: λ.
        layer: Layer to look at; `"auto"` is found at the first forward, from the images that come.
        targets: Which (sample, class) pairs.
        evidence: `"logit"` or `"decision"`.
        combine: How the maps of several layers are joined; None compares each with the prior.
        max_classes: How many classes of each sample are compared in a step.
        warmup: Number of steps in which λ grows to `weight`.
        terms: Several terms at once, instead of the arguments from `source` to `warmup`.
        adapters: Parts that train something of their own beside the model; see `guide.parameters()`.
        second_order: Differentiate the channel weights of the maps too. With False they are constants: a step
            is a little cheaper, and the guidance another one. Only the features are moved, not what the
            head reads from them, and the gradient may point elsewhere: its cosine to the exact one was
            0.45 to 0.89 on the models measured.
        measure: Measure how the layers' outputs are arranged, once for a model and a size of images.

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
        evidence: Evidence = "logit",
        combine: str | None = None,
        max_classes: int | Literal["auto"] | None = "auto",
        warmup: int = 0,
        terms: Sequence[Term] | None = None,
        adapters: Sequence[Adapter] = (),
        second_order: bool = True,
        measure: bool = True,
    ) -> None:
        single = Term(source, prior, loss, weight, layer, targets, evidence, combine, max_classes, warmup)
        if terms is not None and vars(single) != vars(Term()):
            raise InputError(f"give either terms=[…] or {'=, '.join(vars(single))}=.")
        check_uncompiled(unwrap(model))
        self.model = model
        self.terms: list[Term] = [single] if terms is None else _listed(terms)
        if not self.terms and not adapters:
            raise InputError("terms is empty; a guide needs at least one term or adapter.")
        self.second_order, self.measure = second_order, measure
        self._bound = [BoundTerm(term, model) for term in self.terms]
        alone = [bound.source for bound in self._bound if bound.source.only_gradients]
        if alone and not second_order:
            raise InputError(
                f"second_order=False takes gradients for constants, and the maps of {alone[0]!r} are "
                "gradients alone: nothing would be guided. Leave it out."
            )
        self.adapters = nn.ModuleList(adapters)
        self._adapter_asked = [
            check_layer(model, adapter.layer) for adapter in adapters if adapter.layer is not None
        ]
        self._adapter_layers: list[Layer] = []
        self._attending: Attending | None = None
        self._records: list[TermRecord] = []
        self._steps = 0
        self._removed = False
        self._compiled: list[nn.Module] = []
        self._recorder = Recorder(
            model,
            second_order=second_order
            and any(bound.source.needs_gradient or bound.source.only_gradients for bound in self._bound),
            before=self._find_layers,
            after=self._adapt if adapters else None,
            adapters=adapters,
        )
        # Not among the library's own: these hooks change what others see.
        self._adapter_hooks: list[RemovableHandle] = []
        try:
            for adapter in adapters:
                self._adapter_hooks += adapter.attach(unwrap(model))
        except BaseException:
            self.remove()
            raise

    @classmethod
    def from_recipe(cls, model: nn.Module, recipe: str | Path, **overrides: Any) -> Guide:
        """Build a guide from a named method with its published settings, or from a recipe file.

        Args:
            model: Any classifier.
            recipe: A registered name such as `"gradcam-iou"`, or the path of a TOML file.
            **overrides: Arguments of [`Guide`][attnguide.Guide] that take the place of the recipe's.

        Returns:
            The guide.

        Raises:
            UnknownNameError: If the recipe or a part in it is unknown.
            InputError: If the file cannot be read or names unknown settings.
        """
        return cls(model, **{**load_recipe(recipe).guide, **overrides})

    # ------------------------------------------------------------ the loss

    def loss(self, labels: Tensor, *, sample_weight: Tensor | None = None, **annotations: Any) -> Tensor:
        """Return the guidance loss of the last forward pass of the model.

        Args:
            labels: Class indices `(B,)`, or multi-hot `(B, K)` floats or bools.
            sample_weight: How much each annotation counts, `(B,)` or `(B, K)`, at least 0; 0 drops a pair.
            **annotations: What the priors read, for example `mask=`, `boxes=`.

        Returns:
            A scalar: Σ λ · mean over the annotated pairs, with the λ of this step. Where no pair is
            annotated it is an exact zero that can be differentiated.

        Raises:
            GuidanceError: If there was no forward, it ran without gradients, or the guide was removed.
            LayerError: If a layer did not run, or its output has no rows and columns.
            InputError: If labels or annotations are wrong, missing or unknown.
        """
        self._check_names(annotations)
        trace = self._trace()
        if not trace.logits.requires_grad:
            raise GuidanceError(
                "the last forward recorded no graph: it ran under torch.no_grad() or inference_mode(), or "
                "every parameter is frozen. Run it with gradients enabled; skip guide.loss in validation."
            )
        # An empty sum is an exact zero with a graph, whatever the logits are.
        total = trace.logits.flatten()[:0].sum().float()
        records: list[TermRecord] = []
        with (
            full_precision_mode(trace.logits.device),
            self._recorder.differentiating(),
            # On an accelerator values are checked in the first step: later nothing waits for it.
            reading(self._steps == 0),
        ):
            for bound in self._bound:
                seen, mean = bound(trace, labels, sample_weight, annotations)
                records += seen
                if mean is not None:
                    total = total + bound.term.weight_at(self._steps) * mean
            for adapter, layer in self._readers():
                own = adapter.loss(
                    trace.at(layer.name), labels, **self._annotations_for(adapter, annotations)
                )
                total = total if own is None else total + own
        self._steps += 1
        self._records = records
        self._recorder.follow(total)
        return total

    def records(self) -> list[TermRecord]:
        """Return what each term saw at each of its layers in the last call of `loss`, detached."""
        return list(self._records)

    def check(self, images: Tensor, labels: Tensor, **annotations: Any) -> checking.CheckReport:
        """Prove that the guidance term reaches the weights, and tell which.

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
        records, steps = self._records, self._steps
        try:
            return checking.check(
                self.model, images, lambda: self.loss(labels, **annotations), lambda: self.layers
            )
        finally:
            self._records, self._steps = records, steps

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
        """Tell whether the model looks where it should, or only the map does; see [`audit`][attnguide.audit].

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
            InputError: If labels or annotations do not fit, nothing is annotated, or no two images are of
                different classes.

        Warns:
            AuditWarning: If the map looks right and other measurements say otherwise.
        """
        from attnguide.auditing.audit import audit  # here, since it brings torchmetrics, which takes its time

        self._check_names(annotations)
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
        )

    # ------------------------------------------------------ coming and going

    @property
    def layers(self) -> list[str]:
        """Names of the layers looked at; before the first forward, what was asked for."""
        return [name for bound in self._bound for name in bound.names]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the adapters, for the optimiser; none without adapters."""
        return self.adapters.parameters()

    def compile(self, images: Tensor, **options: Any) -> list[str]:
        """Compile the part of the model that comes before the guided layers, with `torch.compile`.

        What comes after them is differentiated twice, which compiled code refuses, and a model that is
        compiled as a whole hides its layers. `remove()` gives the model back as it was.

        Args:
            images: `(B, C, H, W)`, as they will be in training; the layers are found with them.
            **options: For `torch.compile`: `mode`, `dynamic`, `backend` …

        Returns:
            Names of the modules that were compiled.

        Raises:
            GuidanceError: If nothing can be compiled, or the guide was removed.
        """
        if self._removed:
            raise GuidanceError("this guide was removed from its model; build a new one.")
        self._find_layers(Call.of((images,), {}))
        names = compile_before(unwrap(self.model), self._known_layers(), images, options)
        self._recorder.leave_alone(names)
        self._compiled += [unwrap(self.model).get_submodule(name) for name in names]
        return names

    def remove(self) -> None:
        """Take every hook off; the model is as it was. May be called twice."""
        self._recorder.remove()
        for handle in self._adapter_hooks:
            handle.remove()
        self._adapter_hooks = []
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

    def _known_layers(self) -> list[Layer]:
        layers = [*(layer for bound in self._bound for layer in bound.layers), *self._adapter_layers]
        if self.adapters or is_answered_beside(self.model):
            # An adapter may answer from the whole feature, so that the pooled one is not all there is.
            layers = [layer.plain() for layer in layers]
        return list({layer.name: layer for layer in layers}.values())

    def _find_layers(self, call: Call) -> None:
        """Find the layers for images of this size; remembered, so that it costs nothing the second time."""
        model = unwrap(self.model)
        if self.adapters.training != model.training:
            self.adapters.train(model.training)  # as the parts of the model that they stand beside
        for bound in self._bound:
            bound.find(self.model, call, measure=self.measure)
        asked = [layer.name for layer in self._adapter_layers] or self._adapter_asked
        self._adapter_layers = [
            find_layers(self.model, call.images, name, measure=self.measure, call=call)[0] for name in asked
        ]
        layers = self._known_layers()
        check_uncompiled(unwrap(self.model), layers)
        readers = [bound for bound in self._bound if bound.source.reads_attention]
        if readers:
            tokens = max(layer.tokens for bound in readers for layer in bound.layers)
            self._attending = find_attention(model, call.images, tokens, call=call)
            self._recorder.attach_attention(self._attending.modules)
        watched = [name for layer in layers for name in layer.watched]
        self._recorder.attach([layer.name for layer in layers], watched)
        self._recorder.leave_out(layers[0].idle if self._only_logits_matter(layers) else {})

    def _only_logits_matter(self, layers: Sequence[Layer]) -> bool:
        """Whether nothing but the logits can become part of the loss, as far as that can be known.

        That is so for one class alone whose forward is known, while one term guides it by gradients. What a
        model of the user's own keeps or returns beside the logits cannot be known.
        """
        model = unwrap(self.model)
        kind = type(model)
        return (
            f"{kind.__module__}.{kind.__qualname__}" == "timm.models.vision_transformer.VisionTransformer"
            and len(layers) == len(self._bound) == 1
            and self._bound[0].source.needs_gradient
            and not self._bound[0].source.reads_attention
            and not self.adapters
        )

    def _trace(self) -> Trace:
        if self._removed:
            raise GuidanceError("this guide was removed from its model; build a new one.")
        shards = self._recorder.shards
        if not shards:
            raise GuidanceError("guide.loss was called before a forward; call model(images) first.")
        return trace_of(
            shards,
            self._known_layers(),
            differentiable=True,
            second_order=self.second_order,
            adapters=adapters_of(self.model),
            attending=self._attending,
            model=unwrap(self.model),
        )

    def _adapter_modules(self) -> list[Adapter]:
        return [adapter for adapter in self.adapters if isinstance(adapter, Adapter)]

    def _readers(self) -> Iterator[tuple[Adapter, Layer]]:
        """The adapters that read a layer, with that layer."""
        readers = [adapter for adapter in self._adapter_modules() if adapter.layer is not None]
        return zip(readers, self._adapter_layers, strict=True)

    def _adapt(self, shard: Shard, output: Any) -> Any:
        """Let the adapters answer in place of the model."""
        for adapter, layer in self._readers():
            trace = trace_of([shard], [layer.plain()], differentiable=True)
            logits = adapter(trace)
            if logits is not None:
                shard.logits = logits
                output = replace_logits(output, logits)
        return output

    @staticmethod
    def _annotations_for(adapter: Adapter, annotations: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in annotations.items() if name in adapter.annotations}

    def _check_names(self, annotations: Mapping[str, Any]) -> None:
        """Refuse annotations that nobody reads, and name those that are missing."""
        readers: list[TargetPrior | Adapter] = [
            *(bound.prior for bound in self._bound),
            *self._adapter_modules(),
        ]
        known = sorted({name for reader in readers for name in reader.annotations})
        for name in annotations:
            if name not in known:
                raise InputError(f"no prior of this guide reads {name}=.{nearest(name, known)}")
        for reader in readers:
            for name, required in reader.annotations.items():
                if required and name not in annotations:
                    raise InputError(
                        f"{reader!r} needs {name}=: pass guide.loss(labels, {name}=…), None for a batch "
                        "without any."
                    )


def _listed(terms: Sequence[Term]) -> list[Term]:
    listed = list(terms) if isinstance(terms, Sequence) else [terms]
    for term in listed:
        if not isinstance(term, Term):
            raise InputError(f"terms must be a list of attnguide.Term, got {term!r} in it.")
    return listed
