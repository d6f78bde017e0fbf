"""Second derivatives of common operations, written out where PyTorch's own are slow.

A gradient that is taken with `create_graph=True` gets a graph, which is differentiated later. Hooks on the
nodes of the graph of the forward pass exchange that graph, and leave the values of the gradient as they are:
the forward pass, its first derivatives and what hooks on modules see stay PyTorch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Derivatives", "differentiate_gelu", "differentiate_silu"]

#: A node of the graph, as `Tensor.grad_fn` gives it.
Node = Any
#: What a hook on a node is given and returns: the gradients of the inputs of its operation.
Gradients = tuple[Tensor | None, ...]
#: Gives the gradients of a node's first inputs another graph, from the gradient of its output.
Twin = Callable[[Node, Gradients, Tensor], Gradients | None]
#: Differentiates the product of a gradient and an activation's derivative; see `_Activation`.
Derivative = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None]]


class Derivatives:
    """Gives the operations between layers and logits second derivatives that cost little.

    It holds for the graph of one forward pass, and for as long as it lives itself.

    Args:
        logits: The logits of the pass.
        features: The layers; what comes before the first of them is not looked at.
    """

    def __init__(self, logits: Tensor, features: Iterable[Tensor]) -> None:
        #: Here and not in the hooks, which their nodes hold: cycles of nodes are never freed.
        self.nodes: list[Node] = []
        for node in _nodes_after(logits, features):
            twin = _TWINS.get(node.name())
            if twin is not None and "attnguide" not in node.metadata:
                node.metadata["attnguide"] = True
                node.register_hook(partial(_exchange, ref(self), len(self.nodes), twin))
                self.nodes.append(node)


def _nodes_after(logits: Tensor, features: Iterable[Tensor]) -> Iterable[Node]:
    """List the nodes between layers and logits, and some beside them."""
    # Nodes of a forward pass are numbered as they are made.
    first = min((0 if x.grad_fn is None else x.grad_fn._sequence_nr() for x in features), default=0)
    found, stack = set(), [logits.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in found and node._sequence_nr() > first:
            found.add(node)
            stack += [before for before, _ in node.next_functions]
    return found


def _exchange(
    owner: ReferenceType[Derivatives],
    number: int,
    twin: Twin,
    inputs: Gradients,
    outputs: Gradients,
) -> Gradients | None:
    """Exchange the graphs of the first inputs' gradients; None keeps them."""
    derivatives, given = owner(), outputs[0]
    if (
        derivatives is None
        or not torch.is_grad_enabled()
        or given is None
        or torch._C._functorch.is_batchedtensor(given)  # a function of ours would have no derivative there
    ):
        return None
    try:
        exchanged = twin(derivatives.nodes[number], inputs, given)
    except _NotSavedError:
        return None
    return None if exchanged is None else (*exchanged, *inputs[len(exchanged) :])


def _of_one(exchange: Callable[[Node, Tensor, Tensor], Tensor | None]) -> Twin:
    """Make a twin of what exchanges the graph of the first input's gradient alone."""

    def twin(node: Node, inputs: Gradients, gradient: Tensor) -> Gradients | None:
        found = inputs[0]
        if found is None or not found.requires_grad:
            return None
        exchanged = exchange(node, found, gradient)
        return None if exchanged is None else (exchanged,)

    return twin


class _NotSavedError(Exception):
    """What a node saved can't be had: it was freed, or activation checkpointing gives it out only once."""


def _saved(node: Node, name: str) -> Any:
    try:
        return getattr(node, f"_saved_{name}")
    except RuntimeError as error:
        raise _NotSavedError from error


# ---------------------------------------------------------------- convolution


def _convolution(node: Node, found: Tensor, gradient: Tensor) -> Tensor | None:
    if node._saved_transposed or _prefers_loop(node, found, gradient):
        return None
    settings = (node._saved_stride, node._saved_padding, node._saved_dilation, node._saved_groups)
    exchanged: Tensor = _InputSide.apply(gradient, _saved(node, "weight"), found.detach(), settings)
    return exchanged


def _prefers_loop(node: Node, found: Tensor, gradient: Tensor) -> bool:
    """Whether PyTorch's loop over the groups is faster.

    Measured on a CPU, batches of 16: written out it takes 1/1.3 to 1/2.6 of the time without groups, 1/2 to
    1/40 with one channel in a group, 1/1.5 to 1/2.8 with eight or more and with strides, as long with two;
    with four or six channels in a group and stride 1 it takes 1.3 times as long. On a GPU the loop launches
    kernels for each group.
    """
    groups = node._saved_groups
    return (
        found.device.type == "cpu"
        and groups > 1
        and 2 < found.shape[1] // groups < 8
        and all(step == 1 for step in node._saved_stride)
    )


class _InputSide(torch.autograd.Function):
    """The gradient of a convolution's input, from that of its output; its value is known already.

    PyTorch differentiates it with a loop over the groups. It is linear in the output's gradient, the adjoint
    of which is the convolution itself, and in the weight, the adjoint of which is the weight's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, weight: Tensor, value: Tensor, settings: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(gradient, weight)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, outer: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        if outer is None:
            return None, None, None, None
        gradient, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        still = [0] * len(stride)
        output_side = weight_side = None
        if ctx.needs_input_grad[0]:
            output_side = torch.convolution(
                outer, weight, None, stride, padding, dilation, False, still, groups
            )
        if ctx.needs_input_grad[1]:
            weight_side = torch.ops.aten.convolution_backward(
                gradient, outer, weight, None, stride, padding, dilation, False, still, groups,
                [False, True, False],
            )[1]  # fmt: skip
        return output_side, weight_side, None, None


# -------------------------------------------------------------- normalization


class _Known(torch.autograd.Function):
    """The gradient of what a normalization normalizes; its value is known already."""

    @staticmethod
    def forward(
        ctx: Any,
        gradient: Tensor,
        values: Tensor,
        weight: Tensor | None,
        value: Tensor,
        mean: Tensor,
        scale: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(gradient, values, weight, value, mean, scale)
        ctx.set_materialize_grads(False)
        return value.detach()


def _batch_norm(node: Node, found: Tensor, gradient: Tensor) -> Tensor | None:
    values, weight = _saved(node, "input"), _saved(node, "weight")
    if not node._saved_training or values.ndim < 3:
        return None
    mean, scale = _saved(node, "result1").detach(), _saved(node, "result2").detach()
    exchanged: Tensor = _NormGradient.apply(gradient, values, weight, found.detach(), mean, scale)
    return exchanged


class _NormGradient(_Known):
    """The gradient of what batch normalization normalizes, in training; its value is known already.

    With x̂ the normalized values, s one over their deviation, γ the weight, n values in a channel and
    P g = g − mean g − x̂ · mean(g·x̂), it is γ·s·P g. P is its own adjoint, which gives the derivative with
    respect to g. PyTorch's own goes through some twenty large temporary tensors.
    """

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor | None) -> tuple[Tensor | None, ...]:
        if outer is None:
            return (None,) * 6
        gradient, values, weight, value, mean, scale = ctx.saved_tensors
        count = values.numel() // values.shape[1]
        # Per channel: Σ g·x̂ and Σ g, Σ u·x̂ and Σ u, and Σ u·g, where u is the outer gradient.
        _, gradient_along, gradient_sum = _norm_backward(
            gradient, values, weight, mean, scale, [False, True, True]
        )
        output_side, outer_along, outer_sum = _norm_backward(
            outer, values, weight, mean, scale, [True, True, True]
        )
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        _, product, _ = _norm_backward(outer, gradient, None, zero, one, [False, True, False])
        product = product - (outer_sum * gradient_sum + outer_along * gradient_along) / count  # Σ u·P g
        weight_side = None if weight is None else (scale * product).to(weight.dtype)
        # s changes by −s²·x̂/n with x, Σ u·x̂ by s·P u, and Σ g·x̂ by s·P g.
        factor = -scale / count
        along = scale * factor * product if weight is None else weight * scale * factor * product
        shape = (-1,) + (1,) * (values.ndim - 2)
        # Normalization with other settings: (x − mean)·s·along.
        total = torch.batch_norm(values, along * scale, None, mean, one, False, 0.0, 0.0, False)
        total.addcmul_(output_side, (factor * gradient_along).view(shape))
        total.addcmul_(value, (factor * outer_along).view(shape))
        return output_side, total, weight_side, None, None, None


def _norm_backward(
    gradient: Tensor,
    values: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate batch normalization: γ·s·P g, Σ g·x̂ and Σ g."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        gradient, values, weight, None, None, mean, scale, True, 0.0, wanted
    )
    return found


# -------------------------------------------------------- layer normalization


def _layer_norm(node: Node, found: Tensor, gradient: Tensor) -> Tensor | None:
    values, weight = _saved(node, "input"), _saved(node, "weight")
    if len(node._saved_normalized_shape) != 1:
        return None
    mean, scale = _saved(node, "result1").detach(), _saved(node, "result2").detach()
    exchanged: Tensor = _LayerNormGradient.apply(gradient, values, weight, found.detach(), mean, scale)
    return exchanged


class _LayerNormGradient(_Known):
    """The gradient of what layer normalization normalizes; its value is known already.

    As `_NormGradient`, with the last dimension in place of a channel: s·P(γ·g).
    """

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor | None) -> tuple[Tensor | None, ...]:
        if outer is None:
            return (None,) * 6
        gradient, values, weight, value, mean, scale = ctx.saved_tensors
        size = values.shape[-1:]
        weighted = gradient if weight is None else gradient * weight
        projected, _, _ = torch.ops.aten.native_layer_norm_backward(
            outer, values, size, mean, scale, None, None, [True, False, False]
        )
        normalized = (values - mean).mul_(scale)
        product = _dot(outer, value)  # s·Σ u·P g
        outer_along, gradient_along = _dot(outer, normalized), _dot(weighted, normalized)
        factor = -scale / size[0]
        total = normalized.mul_(factor * product)
        total.addcmul_(projected, factor * gradient_along).addcmul_(value, factor * outer_along)
        if weight is None:
            return projected, total.to(value.dtype), None, None, None, None
        weight_side = (gradient * projected).flatten(0, -2).sum(0)
        return projected * weight, total.to(value.dtype), weight_side, None, None, None


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Sum the products along the last dimension, and keep it."""
    return (first * second).sum(-1, keepdim=True)


# ------------------------------------------------------- squeeze and excitation


class _ScaledGradient(torch.autograd.Function):
    """The gradients g·s and Σ g·x of a product x·s of features and a factor for each channel.

    Their values are known already. PyTorch's own derivative makes four tensors of the features' size.
    """

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, features: Tensor, scale: Tensor, value: Tensor, along: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(gradient, features, scale)
        return value.detach(), along.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor, outer_along: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        gradient, features, scale = ctx.saved_tensors
        inner = outer * gradient
        scale_side = inner.sum((2, 3), keepdim=True)
        torch.mul(outer, scale, out=inner).addcmul_(outer_along, features)
        return inner, outer_along * gradient, scale_side, None, None


def _product(node: Node, inputs: Gradients, gradient: Tensor) -> Gradients | None:
    values = [each.detach() for each in inputs if each is not None and each.requires_grad]
    if len(values) < 2:
        return None
    first, second = _saved(node, "self"), _saved(node, "other")
    # Features and factors come in either order.
    step = 1 if first.shape == gradient.shape else -1
    features, scale = (first, second)[::step]
    if (
        gradient.ndim != 4
        or features.shape != gradient.shape
        or scale.shape != (*gradient.shape[:2], 1, 1)
        or scale.dtype != features.dtype
    ):
        return None
    exchanged: Gradients = _ScaledGradient.apply(gradient, features, scale, *values[::step])
    return exchanged[::step]


class _MeanGradient(torch.autograd.Function):
    """The gradient of what a mean is taken of; its value is known already.

    PyTorch differentiates the division in it first, at the full size, and sums afterwards.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, value: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
        ctx.settings = dims, keepdim
        return value.detach()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        return outer.mean(*ctx.settings), None, None, None


def _mean(node: Node, found: Tensor, gradient: Tensor) -> Tensor | None:
    # Negative dimensions are given out without their sign.
    dims = tuple(dim - 2**64 if dim >= 2**63 else dim for dim in node._saved_dim)
    if not dims:  # all of them
        return None
    exchanged: Tensor = _MeanGradient.apply(gradient, found.detach(), dims, node._saved_keepdim)
    return exchanged


# ---------------------------------------------------------------- activations


class _Activation(torch.autograd.Function):
    """The derivative of an activation times a gradient; its value is known already.

    Args:
        gradient: Gradient of the activation's output.
        values: What the derivative is computed from: the activation's input, of a ReLU its output.
        value: The product.
        differentiate: Returns from the outer gradient and these three the derivatives of the product with
            respect to the gradient and the values; None for zeros.
    """

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, values: Tensor, value: Tensor, differentiate: Derivative
    ) -> Tensor:
        ctx.save_for_backward(gradient, values, value)
        ctx.differentiate = differentiate
        ctx.set_materialize_grads(False)
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        if outer is None:
            return None, None, None, None
        return *ctx.differentiate(outer, *ctx.saved_tensors), None, None


def _activation(
    differentiate: Derivative, node: Node, found: Tensor, gradient: Tensor, *, saved: str = "self"
) -> Tensor | None:
    exchanged: Tensor = _Activation.apply(gradient, _saved(node, saved), found.detach(), differentiate)
    return exchanged


def _relu(outer: Tensor, _gradient: Tensor, values: Tensor, _value: Tensor) -> tuple[Tensor, None]:
    """PyTorch's own adds zeros to the gradient of the values, two passes through memory."""
    return torch.ops.aten.threshold_backward(outer, values, 0), None


def _hard_tanh(node: Node, found: Tensor, gradient: Tensor) -> Tensor | None:
    low, high = node._saved_min_val, node._saved_max_val

    def differentiate(
        outer: Tensor, _gradient: Tensor, values: Tensor, _value: Tensor
    ) -> tuple[Tensor, None]:
        return torch.ops.aten.hardtanh_backward(outer, values, low, high), None

    return _activation(differentiate, node, found, gradient)


def _hard_swish(outer: Tensor, gradient: Tensor, values: Tensor, _value: Tensor) -> tuple[Tensor, Tensor]:
    """The second derivative is ⅓ between the kinks at ±3."""
    slope = torch.addcmul(gradient.new_zeros(()), gradient, outer, value=1 / 3)
    torch.ops.aten.hardtanh_backward(slope, values, -3, 3, grad_input=slope)
    return torch.ops.aten.hardswish_backward(outer, values), slope


def differentiate_silu(
    outer: Tensor, gradient: Tensor, values: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Differentiate the gradient of SiLU: with σ the sigmoid and f its derivative, σ + f·(1 − 2σ).

    Args:
        outer: Gradient with respect to the gradient of `values`.
        gradient: Gradient of the SiLU's output.
        values: The SiLU's input.
        value: The gradient of `values`.

    Returns:
        The gradients of `gradient` and `values`.
    """
    slope = torch.sub(gradient, value, alpha=2)
    sigmoid = values.sigmoid()
    torch.addcmul(value, slope, sigmoid, out=slope)
    # Into the same memory: new memory costs more than what is computed there.
    return torch.ops.aten.silu_backward(outer, values, grad_input=sigmoid), slope.mul_(outer)


def differentiate_gelu(outer: Tensor, gradient: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiate the gradient of x·Φ(x), whose second derivative is φ(x)·(2 − x²).

    Args:
        outer: Gradient with respect to the gradient of `values`.
        gradient: Gradient of the GELU's output.
        values: The GELU's input.

    Returns:
        The gradients of `gradient` and `values`.
    """
    square = values.square()
    density = square.mul(-0.5).exp_()
    slope = square.neg_().add_(2).mul_(density).mul_(1 / math.sqrt(2 * math.pi))
    # Into the same memory, as above.
    return torch.ops.aten.gelu_backward(outer, values, grad_input=density), slope.mul_(gradient).mul_(outer)


def _gelu(node: Node, found: Tensor, gradient: Tensor) -> Tensor | None:
    if node._saved_approximate != "none":
        return None

    def differentiate(
        outer: Tensor, gradient: Tensor, values: Tensor, _value: Tensor
    ) -> tuple[Tensor, Tensor]:
        return differentiate_gelu(outer, gradient, values)

    return _activation(differentiate, node, found, gradient)


#: What exchanges the graph of a gradient, by the name of the node that computes it.
_TWINS: dict[str, Twin] = {
    "ConvolutionBackward0": _of_one(_convolution),
    "NativeBatchNormBackward0": _of_one(_batch_norm),
    "NativeLayerNormBackward0": _of_one(_layer_norm),
    "MulBackward0": _product,
    "MeanBackward1": _of_one(_mean),
    "ReluBackward0": _of_one(partial(_activation, _relu, saved="result")),
    "HardtanhBackward0": _of_one(_hard_tanh),
    "HardswishBackward0": _of_one(partial(_activation, _hard_swish)),
    "SiluBackward0": _of_one(partial(_activation, differentiate_silu)),
    "GeluBackward0": _of_one(_gelu),
}
