"""What processes that train one model together share: the wrapper that a pass runs in, and sums over all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attnguide.capture.model_state import modules_of
from attnguide.errors import GuidanceError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["joint_sum", "parallel_of"]


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
