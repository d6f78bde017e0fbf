"""Everything about a model and the process that the library must leave as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


def hooks(model: nn.Module) -> dict[str, list[int]]:
    """Keys of all hooks of all modules; empty for a model without any."""
    found = {
        f"{name}.{kind}": list(getattr(module, kind, ()))
        for name, module in model.named_modules()
        for kind in _HOOKS
    }
    found |= {f"{name}.grad hooks": list(p._backward_hooks or ()) for name, p in model.named_parameters()}
    return {key: value for key, value in found.items() if value}


def process() -> dict[str, Any]:
    """Switches of the process that a library could leave in another position."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "autocast type": torch.get_autocast_dtype("cpu"),
        "type": torch.get_default_dtype(),
        "random": torch.get_rng_state().tolist(),
    }


def snapshot(model: nn.Module) -> dict[str, Any]:
    """State of a model and of the process, comparable with ==."""
    return {
        "process": process(),
        "hooks": hooks(model),
        "training": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {
            name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters()
        },
        "places": {name: p.data_ptr() for name, p in model.named_parameters()},
        "values": {
            name: value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist()
            for name, value in model.state_dict().items()
        },
    }
