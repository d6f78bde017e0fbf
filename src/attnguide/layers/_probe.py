"""Measures which part of the image each position of a layer's output depends on.

A model is run on a few perturbed images, and differentiated once.

Two passes. The first runs two images and takes one gradient of the logits: it finds the tensors that modules
give, and the share of their positions that the logits depend on. The second runs a base image and copies of
it with noise whose strength rises or falls along the rows, or the columns. How much stronger a position
changes with the rising noise than with the falling one shows where in the image it looks; thus rows, columns
and channels are distinguished without knowing anything of the model.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from attnguide.capture.calls import Call, Tap, replace, select, tensors_in
from attnguide.capture.class_token import FirstQueries
from attnguide.capture.logits import find_logits
from attnguide.capture.model_state import evaluating, muted
from attnguide.capture.own_hooks import in_this_thread
from attnguide.errors import LayerError
from attnguide.functional import full_precision
from attnguide.trace import Kind, Layout

__all__ = [
    "FirstPass",
    "Output",
    "Positions",
    "Subject",
    "first_pass",
    "is_active",
    "kinds_of",
    "measure",
    "respond",
    "stand_ins",
]

#: Modules that hand on what they are given: their output says nothing about who made it.
_PASS_ON = (nn.modules.dropout._DropoutNd, nn.Flatten, nn.Identity, nn.Unflatten)
#: So many outputs from the end are looked at as what may follow a layer: more than a block has.
_TAIL = 24
#: Modules whose output only resamples or projects what another layer found.
_PASSIVE = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.Linear, nn.MaxPool2d, nn.Upsample)
_ATTENTION = re.compile("attention|attn", re.IGNORECASE)
_CONTAINER = re.compile("block|layer|stage|net$|former$", re.IGNORECASE)


@dataclass(eq=False)
class Output:
    """A tensor that modules returned in the first pass.

    Attributes:
        taps: Where it was seen, from the module that made it outwards.
        value: The tensor, detached.
        gradient: Gradient of the logits with respect to it; None if there is none, or it was not asked for.
        given: What each of these modules was given first, if that is a tensor.
        dropped: Whether some of it is dropped in training before others see it.
        in_graph: Whether it has a graph at all.
        centered: Whether it is the output of a layer normalization, or a sum of such, perhaps rearranged.
    """

    taps: list[Tap]
    value: Tensor
    gradient: Tensor | None = None
    given: list[Tensor | None] = field(default_factory=list)
    dropped: bool = False
    in_graph: bool = True
    centered: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, without the batch axis."""
        return tuple(self.value.shape[1:])

    @property
    def name(self) -> str:
        """Name of the outermost module that gave it as it is, rather than in a tuple."""
        return next((str(tap) for tap in reversed(self.taps) if not tap.path), str(self.taps[-1]))


@dataclass(frozen=True)
class FirstPass:
    """What the first pass recorded.

    Attributes:
        outputs: Tensors that may have rows and columns, in the order in which they were last seen.
        vectors: Tensors with one value for each channel, such as pooled features.
        tail: The last outputs of all, those of inner modules too, with gradients.
        head: Name of the linear layer that gives the logits as they are, if there is one.
        only_logits: Whether the model answers with nothing but logits that could be part of a loss.
        repeated: Names of modules that ran more than once.
        found_idle: What `idle` has found, by the numbers of tokens and of those before the patches.
    """

    outputs: list[Output]
    vectors: list[Output]
    tail: list[Output]
    head: str | None
    only_logits: bool
    repeated: frozenset[str]
    found_idle: dict[tuple[int, int], tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)

    def idle(
        self, model: nn.Module, layout: Layout, output: Output
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Name the modules behind a layer whose patches the logits do not depend on, but the tokens before.

        Such are those at and behind the last attention of a transformer with a class token: their patches
        need no gradient, which is zero.

        Returns:
            Names of modules that treat each token by itself, and of attention modules.
        """
        if not self.only_logits or layout.kind != "tokens" or not layout.prefix or layout.suffix:
            return (), ()
        if output.gradient is None:
            return (), ()
        key = (output.shape[0], layout.prefix)
        if key not in self.found_idle:
            self.found_idle[key] = self._idle(model, *key)
        return self.found_idle[key]

    def _idle(self, model: nn.Module, tokens: int, prefix: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        rowwise: list[str] = []
        queries: list[str] = []
        with torch.inference_mode(False), torch.no_grad(), _on_its_own(model):
            for other in self.tail:
                if (
                    other.gradient is None
                    or other.shape[:-1] != (tokens,)
                    or bool(other.gradient[:, prefix:].any())
                ):
                    continue
                runs = {
                    tap.module: (model.get_submodule(tap.module), given.detach())
                    for tap, given in zip(other.taps, other.given, strict=True)
                    if given is not None
                    and given.ndim == 3
                    and given.shape[1] == tokens
                    and tap.module not in self.repeated
                }
                # Of modules that treat tokens by themselves the outermost stands for those inside it.
                for name in reversed(runs):
                    if _is_rowwise(*runs[name], prefix):
                        rowwise = [inner for inner in rowwise if not inner.startswith(f"{name}.")]
                        rowwise.append(name)
                        break
                # Of modules that hold attention, the innermost.
                for name in runs:
                    nested = any(inner.startswith(f"{name}.") for inner in queries)
                    if not nested and _only_first_ask(*runs[name], prefix):
                        queries.append(name)
                        break
        return tuple(rowwise), tuple(queries)

    def pooled(self, layout: Layout, output: Output) -> Tap | None:
        """Return where the mean of an output over its places appears, if the logits depend on nothing else.

        The gradient of the logits is then the same at each place, and can be taken at the mean instead.
        """
        if output.gradient is None or output.dropped:
            return None
        feature, gradient = layout.flat(output.value).float(), layout.flat(output.gradient).float()
        mean, slope = feature.mean(dim=2), gradient.mean(dim=2)
        for vector in self.vectors:
            if (
                vector.gradient is not None
                and vector.value.numel() == mean.numel()
                and _alike(vector.value.float().view_as(mean), mean)
                and _alike(vector.gradient.float().view_as(mean) / feature.shape[2], slope)
                and _alike(gradient, slope[:, :, None].expand_as(gradient))
            ):
                return vector.taps[0]
        return None


def _is_rowwise(module: nn.Module, given: Tensor, prefix: int) -> bool:
    """Whether a module computes the same for the first tokens if it is given only these."""
    whole, alone = _whole_and_alone(module, given, prefix)
    return alone is not None and _alike(alone.float(), whole[:, :prefix].float())


def _only_first_ask(module: nn.Module, given: Tensor, prefix: int) -> bool:
    """Whether a module attends once, and its first tokens do not depend on the queries of the others."""
    whole, alone = _whole_and_alone(module, given, prefix)
    if alone is None:
        return False
    with FirstQueries(prefix, blank=True) as attention:
        found = module(given)
    return attention.calls == 1 and _alike(found[:, :prefix].float(), whole[:, :prefix].float())


def _whole_and_alone(module: nn.Module, given: Tensor, prefix: int) -> tuple[Tensor, Tensor | None]:
    """Outputs of a module with weights for all tokens, and for the first alone; None if it fails."""
    # With state of its own (statistics of the batch, a count, a power iteration) it must run as ever.
    if next(module.parameters(), None) is None or next(module.buffers(), None) is not None:
        return given, None
    try:
        whole, alone = module(given), module(given[:, :prefix])
    except (TypeError, RuntimeError):  # it takes more arguments, or another number of tokens
        return given, None
    if not (isinstance(whole, Tensor) and isinstance(alone, Tensor) and whole.ndim == 3 == alone.ndim):
        return given, None
    return whole, alone if alone.shape == whole[:, :prefix].shape else None


def _alike(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().amax() <= 1e-4 * b.abs().amax())


@dataclass(frozen=True)
class Positions:
    """Rows and columns of the image, in [0, 1], that the positions of an output depend on, `(places,)`."""

    rows: Tensor
    columns: Tensor


def kinds_of(shape: Sequence[int]) -> dict[Kind, tuple[int, ...]]:
    """List the ways to take an output apart into channels and places.

    Args:
        shape: Shape without the batch axis.

    Returns:
        For each way the sizes of the axes that are not channels; empty if there can be no rows and columns.
    """
    shape = tuple(shape)
    if len(shape) == 3:
        return {"nchw": shape[1:], "nhwc": shape[:-1], "windows": shape[:-1]}
    if len(shape) == 2:
        return {"tokens": shape[:-1], "nct": shape[1:]}
    return {"windows": shape[:-1]} if len(shape) in (4, 5) else {}


def _over_channels(tensor: Tensor, kind: Kind, reduce: Callable[..., Tensor]) -> Tensor:
    """Reduce `(B, …)` over the channels to `(B, places)`."""
    return reduce(tensor, dim=1 if kind in ("nchw", "nct") else -1).flatten(1)


@dataclass(frozen=True)
class Subject:
    """A model, images that it accepts, and how it is called.

    Attributes:
        model: Any classifier, unwrapped.
        images: `(B, C, H, W)`.
        call: How the model was called with these images; None for `model(images)`.
        weights: What stands in for weights of the model in every pass, by name.
    """

    model: nn.Module
    images: Tensor
    call: Call | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, images: Tensor, call: Call | None = None) -> Subject:
        """Prepare a model, with stand-ins for weights that are zero.

        They are put into a copy of the model's structure, so that another thread, which may run the model
        meanwhile, does not see them. A model whose forward was replaced on the instance has no such copy.
        """
        weights = stand_ins(model)
        if weights and not any("forward" in vars(module) for module in model.modules()):
            return cls(_structure(model, weights), images, call)
        return cls(model, images, call, weights)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the images."""
        return self.images.shape[-2], self.images.shape[-1]

    def find_logits(self, output: Any) -> Tensor:
        """Return the logits in an output of the model."""
        return find_logits(output, None if self.call is None else self.call.logits)

    def run(self, images: Tensor) -> Any:
        """Run other images."""
        args, kwargs = ((images,), {}) if self.call is None else self.call.arguments(images)
        return functional_call(self.model, dict(self.weights), args, kwargs)


# -------------------------------------------------------------------- first pass


def first_pass(subject: Subject, wanted: Callable[[list[Output]], list[Output]] | None = None) -> FirstPass:
    """Run a forward and a backward pass of at most two images, and list the outputs of the modules.

    Args:
        subject: The model, and images.
        wanted: Chooses the outputs that are listed and get a gradient, among all of them; None for all.

    Returns:
        The tensors.
    """
    model = subject.model
    modules = dict(model.named_modules())
    seen: list[Output] = []
    vectors: list[Output] = []
    #: By identity of the tensor that was handed on: which output it is, and of which version.
    handed_on: dict[int, tuple[Output, Tensor, int]] = {}
    counts: dict[str, int] = {}

    #: Modules with weights of their own, in the order in which they ran.
    weighted: list[nn.Module] = []

    #: Linear layers by identity of what they gave.
    linear: dict[int, tuple[str, Tensor]] = {}

    def look_at(name: str, tap: Tap, tensor: Tensor, args: tuple[Any, ...]) -> Tensor | None:
        given = _first(args)
        known, _, version = handed_on.get(id(tensor), (None, None, 0))
        if known is not None and _version(tensor) == version:
            if isinstance(modules[name], _PASS_ON):  # no layer to name: what it hands on is another's
                dropout = isinstance(modules[name], nn.modules.dropout._DropoutNd)
                known.dropped |= dropout and modules[name].p > 0
            elif not any(
                tensor is other for _, other in tensors_in(args)
            ):  # else it was only carried through
                known.taps.append(tap)
                known.given.append(given)
                seen.remove(known)
                seen.append(known)
            return None
        if _is_vector(tensor, batch):
            vectors.append(Output([tap], tensor))
        elif kinds_of(tensor.shape[1:]) and not isinstance(modules[name], _PASS_ON):
            seen.append(Output([tap], tensor, given=[given]))
            # A copy goes on, lest the next layer works in place and overwrites what this one gave.
            passed_on = tensor.clone()
            handed_on[id(passed_on)] = seen[-1], passed_on, _version(passed_on)
            return passed_on
        return None

    def record(name: str, args: tuple[Any, ...], output: Any) -> Any:
        call = counts[name] = counts.get(name, -1) + 1
        if any(weight is not None for weight in modules[name]._parameters.values()):
            weighted.append(modules[name])
        changed = None
        for path, tensor in list(tensors_in(output)):
            if tensor.is_floating_point() and tensor.ndim > 1 and len(tensor) == batch:
                passed_on = look_at(name, Tap(name, call, path), tensor, args)
                if passed_on is not None:
                    output = changed = replace(output, path, passed_on)
        given = _first(args)
        if isinstance(modules[name], nn.Linear) and _is_plain(modules[name], given, output):
            linear[id(output)] = (name, output) if not counts[name] else ("", output)
        if given is not None and given.is_floating_point() and _is_vector(given, batch):
            vectors.append(Output([Tap(name, call, given=True)], given))
        return changed

    # The probe may be called from a validation loop that records no graph.
    with torch.inference_mode(False), torch.enable_grad(), _on_its_own(model), _watching(model, record):
        probe = subject.images[:2].detach().clone()
        batch = len(probe)
        # A frozen model has a graph only if it begins at the images.
        probe.requires_grad_(probe.is_floating_point())
        raw = subject.run(probe)
        answer = subject.find_logits(raw)
        if subject.call is None or subject.call.logits is None:
            _check_end(model, weighted)
        only_logits = sum(other.requires_grad for _, other in tensors_in(raw)) == 1
        head, _ = linear.get(id(answer), ("", None))
        logits = answer.float()
        # Unequal weights: probabilities, which sum to one, would have no gradient otherwise.
        score = (logits * torch.linspace(1, 2, logits.shape[1], device=logits.device)).sum()
        for output in (*seen, *vectors):
            output.taps = [_plain(tap, counts) for tap in output.taps]
        outputs = seen if wanted is None else wanted(seen)
        tail = seen[-_TAIL:]
        asked = {id(output): output for output in (*outputs, *vectors, *tail)}.values()
        _differentiate(score, [output for output in asked if output.value.requires_grad])
    for output in asked:
        output.in_graph = output.value.requires_grad
        output.centered = _is_centered(output.value.grad_fn)
        output.value = output.value.detach()
    repeated = frozenset(name for name, call in counts.items() if call)
    return FirstPass(outputs, vectors, tail, head or None, only_logits, repeated)


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; tensors made in inference mode do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _check_end(model: nn.Module, weighted: Sequence[nn.Module]) -> None:
    """Refuse a model that ends in a normalization, as a backbone does whose classifier was taken off.

    Batch normalization of what a linear layer gave is the end of some classifiers.
    """
    if not weighted or "Norm" not in type(weighted[-1]).__name__:
        return
    if isinstance(weighted[-1], nn.BatchNorm1d) and isinstance(weighted[-2 % len(weighted)], nn.Linear):
        return
    raise LayerError(
        f"{type(model).__name__} has no classifier head: its last weights are those of a "
        f"{type(weighted[-1]).__name__}, so that there is no class to explain. Put it into a model with a "
        "head. If its output is the logits nevertheless, say so: logits=lambda output: output."
    )


#: Operations that only rearrange values, by the names of their nodes in the graph.
_REARRANGED = re.compile(
    r"(Permute|Transpose|View|UnsafeView|ReshapeAlias|Clone|Slice|Split|Squeeze|Unsqueeze|Roll|T|Alias|"
    r"AsStrided|Select|UnbindBackward|Contiguous|ToCopy|Expand|Movedim)Backward\d*"
)


def _is_centered(node: torch.autograd.graph.Node | None) -> bool:
    """Whether values are what a layer normalization gave, or a sum of such, in whatever arrangement."""
    while node is not None and _REARRANGED.fullmatch(node.name()) and node.next_functions:
        node = node.next_functions[0][0]
    if node is None or not node.name().startswith("AddBackward"):
        return node is not None and "LayerNorm" in node.name()
    # Networks that normalize what a block adds have nothing else on the residual path.
    return all(_is_centered(term) for term, _ in reversed(node.next_functions))


def _first(args: tuple[Any, ...]) -> Tensor | None:
    return args[0] if args and isinstance(args[0], Tensor) else None


def _is_plain(module: nn.Module, given: object, output: object) -> bool:
    """Whether a linear layer computed exactly weights times vectors plus bias."""
    if not (isinstance(given, Tensor) and isinstance(output, Tensor) and given.ndim == 2 == output.ndim):
        return False
    assert isinstance(module, nn.Linear)  # noqa: S101
    with torch.no_grad():
        expected = F.linear(given.to(module.weight.dtype), module.weight, module.bias)
    return expected.shape == output.shape and _alike(expected.float(), output.float())


def _is_vector(tensor: Tensor, batch: int) -> bool:
    """Whether there is one value for each channel, as in `(B, C)` or `(B, C, 1, 1)`."""
    return tensor.ndim > 1 and len(tensor) == batch and tensor.numel() == batch * max(tensor.shape[1:])


def _differentiate(score: Tensor, outputs: Sequence[Output]) -> None:
    if outputs and score.requires_grad:
        values = [output.value for output in outputs]
        try:
            gradients = torch.autograd.grad(score, values, allow_unused=True)
        except RuntimeError as error:
            if "checkpoint" not in str(error):
                raise
            raise LayerError(
                "the model uses activation checkpointing of the old kind, of which no gradients but those of "
                "weights can be taken. Use checkpoint(…, use_reentrant=False), or switch it off."
            ) from error
        for output, gradient in zip(outputs, gradients, strict=True):
            output.gradient = gradient


def is_active(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a module computes features of its own: no pooling, no projection, no part of an attention."""
    steps = name.split(".")
    ancestors = (modules[".".join(steps[:depth])] for depth in range(1, len(steps)))
    return not isinstance(modules[name], _PASSIVE) and not any(
        _ATTENTION.search(type(ancestor).__name__) and not _CONTAINER.search(type(ancestor).__name__)
        for ancestor in ancestors
    )


def _plain(tap: Tap, counts: dict[str, int]) -> Tap:
    """Shorten a tap: the last call and the first tensor are the defaults."""
    call = None if tap.call == counts[tap.module] else tap.call
    return Tap(tap.module, call, () if not any(tap.path) else tap.path, tap.given)


def stand_ins(model: nn.Module) -> dict[str, Tensor]:
    """Stand-ins for all-zero weights, which let no gradient pass.

    Fresh heads are such, and the last scale of a residual branch, which begins as nothing in many models.
    """
    return {
        name: _stand_in(weight)
        for name, weight in model.named_parameters()
        if not name.rpartition(".")[2].endswith("bias") and not bool(weight.any())
    }


def _structure(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Copy the modules of a model, which share its weights but for some that are replaced.

    Args:
        model: The model.
        weights: The replacements, by name.
    """
    replaced = {id(model.get_parameter(name)): nn.Parameter(value) for name, value in weights.items()}
    copies: dict[int, nn.Module] = {}
    for module in model.modules():
        copies[id(module)] = copy = type(module).__new__(type(module))
        attributes = copy.__dict__
        for key, value in vars(module).items():
            attributes[key] = (
                value.copy() if key.startswith("_") and type(value) in (dict, OrderedDict) else value
            )
        parameters = attributes["_parameters"]
        for key, value in parameters.items():
            parameters[key] = replaced.get(id(value), value)
    for copy in copies.values():
        modules = copy._modules
        for key, part in modules.items():
            modules[key] = None if part is None else copies[id(part)]
    return copies[id(model)]


def _stand_in(weight: Tensor) -> Tensor:
    if weight.ndim < 2:
        return torch.ones_like(weight, requires_grad=False)
    values = torch.linspace(-1, 1, weight.numel(), device=weight.device)
    return values.view_as(weight).to(weight.dtype)


@contextmanager
def _on_its_own(model: nn.Module) -> Iterator[None]:
    """Run the model unseen by recorders, in evaluation mode, and as if it had seen data.

    Fresh statistics of batch normalisation let the signal fade with depth, until rounding hides it.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(muted())
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and _is_fresh(module):
                stack.callback(module.register_forward_pre_hook(in_this_thread(_standardise)).remove)
        yield


def _is_fresh(module: nn.modules.batchnorm._BatchNorm) -> bool:
    mean, variance = module.running_mean, module.running_var
    return mean is not None and variance is not None and not bool(mean.any()) and bool((variance == 1).all())


def _standardise(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give the input of a batch normalisation mean 0 and variance 1, all images alike."""
    values = args[0]
    channels = values.shape[1]
    if values.numel() == channels:  # one image, without rows and columns: nothing to take a mean over
        return args
    mean, variance = full_precision(values.new_zeros(channels)), full_precision(values.new_ones(channels))
    with torch.no_grad():  # the statistics are to be constants
        F.batch_norm(values.detach(), mean, variance, training=True, momentum=1.0)
    return (F.batch_norm(values, mean, variance, training=False, eps=1e-12), *args[1:])


@contextmanager
def _watching(
    model: nn.Module, record: Callable[[str, Any, Any], Any], names: frozenset[str] | None = None
) -> Iterator[None]:
    """Call `record(name, args, output)` after every module's forward; what it gives replaces the output."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name and (names is None or name in names):
                handle = module.register_forward_hook(in_this_thread(partial(_pass_to, record, name)))
                stack.callback(handle.remove)
        yield


def _pass_to(
    record: Callable[[str, Any, Any], Any], name: str, module: nn.Module, args: object, output: object
) -> Any:
    return record(name, args, output)


# ------------------------------------------------------------------- second pass


def measure(subject: Subject, taps: Sequence[Tap], seed: int = 0) -> dict[Tap, dict[Kind, Positions]]:
    """Run perturbed copies of the first image, and measure the positions of outputs in it.

    Args:
        subject: The model, and images.
        taps: The outputs to measure.
        seed: Seed of the noise.

    Returns:
        For each output that was seen, and each way to take its channels, the positions of its places.
    """
    height, width = subject.size
    down = _ramp(height)[:, None].expand(height, width)
    right = _ramp(width).expand(height, width)
    answers = respond(subject, torch.stack([down, 1 - down, right, 1 - right]), taps, seed)
    return {
        tap: {kind: Positions(_balance(*sizes[:2]), _balance(*sizes[2:])) for kind, sizes in ways.items()}
        for tap, ways in answers.items()
    }


def _ramp(length: int) -> Tensor:
    return (torch.arange(length) + 0.5) / length


def _balance(rising: Tensor, falling: Tensor) -> Tensor:
    """Share of the change that comes from the rising noise; one half where nothing changes."""
    total = rising + falling
    return torch.where(total > 0, rising / torch.where(total > 0, total, 1), 0.5)


def respond(
    subject: Subject, patterns: Tensor, taps: Sequence[Tap], seed: int = 0
) -> dict[Tap, dict[Kind, Tensor]]:
    """Run the first image with noise in given patterns, and measure how strongly outputs change.

    Args:
        subject: The model, and images.
        patterns: Strength of the noise, `(P, H, W)` in [0, 1].
        taps: The outputs to measure.
        seed: Seed of the noise.

    Returns:
        For each output that was seen, and each way to take its channels, the root mean square of the change,
        `(P, places)`.
    """
    wanted: dict[str, dict[int | None, list[Tap]]] = {}
    for tap in taps:
        wanted.setdefault(tap.module, {}).setdefault(tap.call, []).append(tap)
    answers: dict[Tap, dict[Kind, Tensor]] = {}
    counts: dict[str, int] = {}

    def record(name: str, args: object, output: object) -> None:
        call = counts[name] = counts.get(name, -1) + 1
        # What has no number is measured at every call, so that the last one stays.
        for tap in (*wanted[name].get(call, ()), *wanted[name].get(None, ())):
            tensor = select(output, tap.path)
            if tensor is None or not tensor.is_floating_point() or len(tensor) != len(batch):
                continue
            change = (tensor[1:].detach() - tensor[:1].detach()).float()
            # Deep in a model with fresh weights the squares may be too small for float32.
            peak = change.abs().amax()
            change = change / torch.where(peak > 0, peak, 1)
            answers[tap] = {
                kind: _over_channels(change.square(), kind, torch.mean).sqrt().cpu()
                for kind in kinds_of(tensor.shape[1:])
            }

    with (
        torch.inference_mode(False),
        torch.no_grad(),
        _on_its_own(subject.model),
        _watching(subject.model, record, frozenset(wanted)),
    ):
        batch = _perturbed(subject.images[:1].detach(), patterns.to(subject.images.device), seed)
        subject.run(batch)
    return answers


def _perturbed(image: Tensor, patterns: Tensor, seed: int) -> Tensor:
    """Return the image `(1, C, H, W)` and a noisy copy of it for each pattern."""
    generator = torch.Generator().manual_seed(seed)
    fine = torch.randn(image.shape, generator=generator)
    # Stems blur and pool: some of the noise has to be coarse.
    small = [max(side // 8, 1) for side in image.shape[-2:]]
    coarse = torch.randn(*image.shape[:2], *small, generator=generator)
    noise = fine + F.interpolate(coarse, size=image.shape[-2:], mode="nearest")
    noise = noise.to(image.device)
    base = image.float()
    spread = base.std()
    scale = torch.where(spread > 0, spread, torch.ones_like(spread))
    batch = torch.cat([base, base + scale * noise * patterns[:, None]])
    return batch.to(image.dtype) if image.is_floating_point() else batch.round().clamp(0, 255).to(image.dtype)
