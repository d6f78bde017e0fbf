"""What processes that train one model together share: the wrapper of a pass, sharded weights, and sums.

`fully_shard` (FSDP2) changes modules in place, and frees their whole weights after each pass forward and
backward. A gradient that is part of a loss goes backward twice, so that the weights have to stay until the
second time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attnguide.capture.model_state import modules_of
from attnguide.errors import GuidanceError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Shards", "group_of", "joint_sum", "parallel_of", "refuse_sharded", "shards_of"]


def parallel_of(model: nn.Module) -> DistributedDataParallel | None:
    """Return the `DistributedDataParallel` whose forward is running, if the model is part of it.

    The wrapper need not be known: trainers wrap a module that holds the model. A pass through the model
    itself, beside the wrapper, is a matter of one process.
    """
    wrapper = DistributedDataParallel._active_ddp_module
    return wrapper if wrapper is not None and any(part is model for part in modules_of(wrapper)) else None


def joint_sum(values: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of a tensor over all processes of a group, without a graph.

    Raises:
        GuidanceError: If the processes do not meet.
    """
    values = values.detach().clone()
    try:
        dist.all_reduce(values, group=group)
    except RuntimeError as error:
        raise GuidanceError(
            f"the {dist.get_world_size(group)} processes did not meet in guide.loss: {error} Call it in each "
            "process after each forward that is trained, with mask=None (or what the prior reads) where "
            "nothing is annotated."
        ) from error
    return values


def shards_of(modules: Iterable[nn.Module]) -> list[Any]:
    """List the modules that `fully_shard` was called on."""
    # By its method, since importing the class costs a second that most never need.
    return [module for module in modules if hasattr(type(module), "_get_fsdp_state")]


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Refuse what replaces weights, or runs a model in one process alone, on a sharded model.

    Raises:
        GuidanceError: If `fully_shard` was called on the model, or on a part of it.
    """
    if shards_of(modules_of(model)):
        raise GuidanceError(
            f"{what} before fully_shard, not after: weights are in pieces now, and no process has all of "
            "them. Build the guide, call guide.check(images, labels, …) with images of the size of the "
            "training, and shard the model then."
        )


def group_of(modules: Iterable[Any]) -> ProcessGroup | None:
    """Return the processes that average the gradients of sharded modules; None if there are none.

    Raises:
        GuidanceError: If the weights are both sharded and replicated, so that it takes several groups.
    """
    meshes = [group.mesh_info.mesh for module in modules for group in _groups(module)]
    if not meshes:
        return None
    if any(mesh.ndim != 1 for mesh in meshes):
        raise GuidanceError(
            "the model is sharded over a mesh of several dimensions. Say which processes average the "
            "gradients: process_group=, that of all of them."
        )
    found: ProcessGroup = meshes[0].get_group()
    return found


class Shards:
    """The sharded modules of a guided model, which keep their whole weights for two passes backward.

    Attributes:
        modules: The modules that `fully_shard` was called on, at the last forward pass.
    """

    def __init__(self) -> None:
        self.modules: list[Any] = []
        self._before: dict[int, tuple[Any, Any]] = {}

    def keep_whole(self) -> None:
        """From this forward pass on, keep whole weights until the loss has gone backward."""
        for module in self.modules:
            for group in _groups(module):
                if id(group) not in self._before:
                    self._before[id(group)] = group, group.post_forward_mesh_info
            module.set_reshard_after_forward(False, recurse=False)

    def restore(self) -> None:
        """Free whole weights after each pass forward, as before."""
        for group, mesh in self._before.values():
            group.post_forward_mesh_info = mesh
        self._before = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Take gradients that are part of the loss: nothing is freed or averaged after them."""
        groups = [group for module in self.modules for group in _groups(module)]
        before = [
            (group.reshard_after_backward, group.reduce_grads, group.all_reduce_grads) for group in groups
        ]
        contexts = {
            id(each): each for each in (module._get_fsdp_state()._state_ctx for module in self.modules)
        }
        last = [(context, context.is_last_backward) for context in contexts.values()]
        try:
            for group in groups:
                group.reshard_after_backward = group.reduce_grads = group.all_reduce_grads = False
            for context, _ in last:
                context.is_last_backward = False
            yield
        finally:
            for group, values in zip(groups, before, strict=True):
                group.reshard_after_backward, group.reduce_grads, group.all_reduce_grads = values
            for context, value in last:
                context.is_last_backward = value


def _groups(module: Any) -> list[Any]:
    """The groups of weights of a sharded module; one, before PyTorch had several."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return list(groups) if groups is not None else [g for g in [state._fsdp_param_group] if g is not None]
