"""Pruning: removes channels that matter to no attribute from the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attnguide.adapters import AdapterSet, feature_sizes
from attnguide.capture.calls import Tap
from attnguide.capture.model_state import evaluating, unwrap
from attnguide.capture.recorder import aside
from attnguide.errors import AttnGuideError, InputError, LayerError
from attnguide.layers import find_layers
from attnguide_multichannel.adapted import multichannel_of
from attnguide_multichannel.attention import MultiChannel

__all__ = ["magnitude_ranking", "prune", "without_channels"]


def prune(adapted: AdapterSet, images: Tensor, ranking: Tensor | Sequence[int], share: float) -> AdapterSet:
    """Make a smaller model without the first channels of a ranking.

    Channels of the masked layer are removed, and with them everything that is tied to them: the filters that
    compute them, their normalisation, the channels that residual connections add to them, and the weights
    that read them.

    ```python
    smaller = prune(adapted, images[:2], analysis.ranking, share=0.3)
    logits = smaller.model(images)
    ```

    Args:
        adapted: The model and its multi-channel attention; both stay as they are.
        images: Some images, `(B, 3, H, W)`.
        ranking: All channels `(C,)`, in the order of removal; see
            [`Analysis.ranking`][attnguide_multichannel.analysis.Analysis].
        share: Share of the channels to remove, in [0, 1).

    Returns:
        A smaller copy of the model, with its multi-channel attention.

    Raises:
        InputError: If the share or the ranking is wrong, or torch-pruning is not installed
            (`pip install attnguide[pruning]`).
        LayerError: If the model's channels cannot be removed, or torch-pruning cannot follow them.
    """
    adapter = multichannel_of(adapted)
    channels = adapter.masking.channels
    order = torch.as_tensor(ranking).tolist()
    if sorted(order) != list(range(channels)):
        raise InputError(f"ranking must hold each of the {channels} channels once.")
    if not 0 <= share < 1:
        raise InputError(f"share={share} must be at least 0 and below 1.")
    removed = sorted(order[: min(round(share * channels), channels - 1)])
    kept = sorted(set(range(channels)) - set(removed))
    layer = find_layers(unwrap(adapted.model), images, adapter.layer or "auto")[0].name
    model = _bare(unwrap(adapted.model))
    if removed:
        _remove(model, images, _maker(adapted, images, layer), removed)
    smaller = without_channels(adapter, kept)
    # "auto" could mean another layer of the smaller model.
    smaller.layer = smaller.settings["layer"] = layer
    with _following(layer):
        count = feature_sizes(model, images, layer)[0]
    if count != len(kept):
        raise LayerError(
            f"the channels of layer {layer!r} cannot be removed: other channels are tied to them."
        )
    return AdapterSet.put_on(model, [smaller], images)


def without_channels(adapter: MultiChannel, kept: Sequence[int]) -> MultiChannel:
    """Make a multi-channel attention for features with a part of the channels.

    Args:
        adapter: Attention over all channels; it stays as it is.
        kept: Indices of the channels that are kept, at least one.
    """
    smaller = MultiChannel(**{**adapter.settings, "channels": len(kept)})
    # Axes of the channels in each weight; other weights have none.
    axes = {f"masking.{name}": each for name, each in adapter.masking.channel_axes.items()}
    axes |= {"weight": (1,), "classifier.weight": (1,), "reconstructor.first.weight": (1,)}
    index = torch.tensor(list(kept), device=adapter.weight.device)
    weights = {}
    for name, value in adapter.state_dict().items():
        for axis in axes.get(name, ()):
            value = value.index_select(axis, index)
        weights[name] = value
    smaller.load_state_dict(weights)
    return smaller.to(adapter.weight.device, adapter.weight.dtype)


def magnitude_ranking(adapted: AdapterSet, images: Tensor) -> Tensor:
    """Rank channels by the norm of their filters, the smallest first: a baseline for `Analysis.ranking`.

    Args:
        adapted: The model and its multi-channel attention.
        images: Some images, `(B, 3, H, W)`.

    Returns:
        Channels `(C,)`.

    Raises:
        LayerError: If the channels do not come from a convolution.
    """
    adapter = multichannel_of(adapted)
    model = unwrap(adapted.model)
    layer = find_layers(model, images, adapter.layer or "auto")[0].name
    maker = model.get_submodule(_maker(adapted, images, layer))
    assert isinstance(maker, nn.Conv2d)  # noqa: S101  (`_maker` returns convolutions only)
    sizes: Tensor = maker.weight.detach().flatten(1).norm(dim=1)
    return sizes.argsort(stable=True).cpu()


def _bare(model: nn.Module) -> nn.Module:
    """Copy a model without hooks."""
    bare = copy.deepcopy(model)
    for module in bare.modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, kind).clear()
    return bare


def _maker(adapted: AdapterSet, images: Tensor, layer: str) -> str:
    """Find the convolution whose output are the channels of a layer."""
    model, channels = unwrap(adapted.model), multichannel_of(adapted).masking.channels
    makers: list[str] = []
    done = False

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not done:
                makers.append(name)

        return hook

    def finish(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal done
        done = True

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and module.out_channels == channels:
                stack.callback(module.register_forward_hook(note(name)).remove)
        last = model.get_submodule(Tap.parse(layer).module)
        stack.callback(last.register_forward_hook(finish).remove)
        for context in (torch.no_grad(), evaluating(model), aside(model)):
            stack.enter_context(context)
        model(images[:1])
    if not makers:
        raise LayerError(
            f"the {channels} channels of layer {layer!r} do not come from a convolution, and cannot be "
            "pruned. Models without convolutions, such as transformers, are not supported."
        )
    return makers[-1]


@contextmanager
def _following(name: str) -> Iterator[None]:
    """Turn an error of torch-pruning, or of the model that it left, into one that names the layer.

    It can fail in any way where it cannot follow the channels: through a shuffle, a reshape, a split.
    """
    try:
        yield
    except AttnGuideError:
        raise
    except Exception as error:
        raise LayerError(
            f"torch-pruning cannot follow the channels of {name!r} through this model "
            f"({type(error).__name__}: {error}). Prune a model without shuffles or splits of channels, such "
            "as a ResNet."
        ) from error


def _remove(model: nn.Module, images: Tensor, maker: str, channels: Sequence[int]) -> None:
    """Remove channels from a model, with everything that is tied to them."""
    try:
        import torch_pruning as pruning
    except ImportError as error:
        raise InputError("pruning needs torch-pruning: pip install 'attnguide[pruning]'.") from error
    module = model.get_submodule(maker)
    training = model.training
    state = [parameter.requires_grad for parameter in model.parameters()]
    graph = pruning.DependencyGraph()
    with _following(maker), torch.enable_grad(), warnings.catch_warnings():
        # Parameters outside torch's own modules, such as position embeddings and the scales of layers, have
        # their channels last.
        warnings.filterwarnings("ignore", message=".*[Uu]nwrapped parameters.*")
        warnings.filterwarnings("ignore", message=".*Converting a tensor with requires_grad=True.*")
        graph.build_dependency(model.eval().requires_grad_(), example_inputs=images[:1].clone())
        remove = graph.get_pruner_of_module(module).prune_out_channels
        group = graph.get_pruning_group(module, remove, idxs=list(channels))
        if not graph.check_pruning_group(group):
            raise LayerError(f"the output channels of {maker!r} cannot be removed from this model.")
        group.prune()
    model.train(training)
    for parameter, trained in zip(model.parameters(), state, strict=True):
        parameter.requires_grad_(trained)
