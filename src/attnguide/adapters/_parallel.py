"""Keeps adapters equal in all processes: `DistributedDataParallel` knows of the model's weights alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from attnguide.capture.model_state import muting
from attnguide.capture.own_hooks import Handles
from attnguide.capture.parallel import parallel_of

__all__ = ["Synchronizer"]


class Synchronizer:
    """Gives adapters the weights of the first process, and averages their gradients over all processes.

    The first process sends weights and buffers before the first pass that is trained. Gradients are averaged
    at the end of each backward pass, except after a forward inside `no_sync()`, and then the buffers are sent
    again. A parameter that only some processes used has a gradient of zero in the others.

    Args:
        model: The model, without a wrapper.
        adapters: The adapters.
    """

    def __init__(self, model: nn.Module, adapters: nn.ModuleList) -> None:
        self._model, self._adapters = model, adapters
        self._sent = False
        #: The wrapper whose backward pass is awaited.
        self._awaited: DistributedDataParallel | None = None
        #: Whether the backward pass that is running ends with `_average`.
        self._queued = False
        self._hooks: dict[nn.Parameter, RemovableHandle] = {}
        self._handles = Handles()
        self._handles.keep(model.register_forward_pre_hook(self._begin))

    def remove(self) -> None:
        """Remove every hook. May be called twice."""
        self._handles.remove()
        for handle in self._hooks.values():
            handle.remove()
        self._hooks = {}
        self._awaited = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model has no adapters of its own: its hook does nothing."""
        return _inert, ()

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if muting.depth or module is not self._model or not torch.is_grad_enabled():
            return
        wrapper = parallel_of(module)
        if wrapper is None:
            return
        if not self._sent:
            self._send(wrapper, [*self._adapters.parameters(), *self._adapters.buffers()])
            self._sent = True
        self._awaited = wrapper if wrapper.require_backward_grad_sync else None
        self._queued = False
        # Any weight tells that a backward pass is running: in one of the processes it may reach no adapter.
        for parameter in (*self._adapters.parameters(), *self._model.parameters()):
            if parameter.requires_grad and parameter not in self._hooks:
                handle = parameter.register_post_accumulate_grad_hook(self._reached)  # type: ignore[no-untyped-call]
                self._hooks[parameter] = handle

    def _reached(self, parameter: Tensor) -> None:
        if self._awaited is not None and not self._queued:
            self._queued = True
            Variable._execution_engine.queue_callback(self._average)

    def _average(self) -> None:
        wrapper, self._awaited = self._awaited, None
        if wrapper is None:
            return
        group = wrapper.process_group
        trained = [weight for weight in self._adapters.parameters() if weight.requires_grad]
        if trained:
            used = torch.tensor([weight.grad is not None for weight in trained], dtype=torch.float32)
            used = used.to(trained[0].device)
            dist.all_reduce(used, group=group)
            for weight, users in zip(trained, used, strict=True):
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                # Divided first, as a sum may overflow in half precision.
                gradient.div_(dist.get_world_size(group))
                dist.all_reduce(gradient, group=group)
                # What nobody used stays without a gradient, so that an optimizer leaves it alone.
                if weight.grad is None and bool(users > 0):
                    weight.grad = gradient
        if wrapper.broadcast_buffers:
            self._send(wrapper, list(self._adapters.buffers()))

    @staticmethod
    def _send(wrapper: DistributedDataParallel, tensors: list[Tensor]) -> None:
        first = dist.get_global_rank(wrapper.process_group, 0)
        for tensor in tensors:
            # Not as a change that autograd notices: a graph may still hold the statistics.
            dist.broadcast(tensor.data, first, group=wrapper.process_group)


def _inert() -> Synchronizer:
    """Make a synchronizer that is attached to nothing, for the hook in a copy of a model."""
    synchronizer = Synchronizer(nn.Identity(), nn.ModuleList())
    synchronizer.remove()
    return synchronizer
