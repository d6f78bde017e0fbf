"""What tests of parts have in common: small models, a batch, and a look at all that must stay as it was.

`pytest --attnguide NAME` tests a part, or all parts of a plugin, by the contract that the parts of the
library are tested by: what it gives, gradients, several classes at once, wrong arguments, interruptions, and
what is left on a model. It needs `pip install 'attnguide[testing]'`. A plugin whose parts need more than a
mask or boxes gives that by the hooks of [`ContractHooks`][attnguide.testing.ContractHooks] in its
`conftest.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnguide.errors import MissingPackageError
from attnguide.models.networks import small_cnn

if TYPE_CHECKING:
    from attnguide._pytest import ContractHooks

__all__ = ["CLASSES", "ContractHooks", "batch", "hooks", "process", "snapshot", "tiny_cnn", "tiny_vit"]

#: Number of classes of the models.
CLASSES = 4


def __getattr__(name: str) -> Any:
    """Import what needs pytest when it is asked for."""
    if name != "ContractHooks":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from attnguide._pytest import ContractHooks
    except ImportError as error:
        raise MissingPackageError(f"{__name__}.{name}", "pytest", "testing") from error
    return ContractHooks


def tiny_cnn(classes: int = CLASSES, width: int = 4) -> nn.Module:
    """Make a CNN with batch normalization, for images of 32 pixels or more.

    Args:
        classes: Number of logits.
        width: Channels of its first block.
    """
    return small_cnn(classes, width=width, reduction=8)


def tiny_vit(classes: int = CLASSES, depth: int = 2, size: int = 32, **options: Any) -> nn.Module:
    """Make a vision transformer of timm with fused attention and a class token.

    Args:
        classes: Number of logits.
        depth: Number of blocks.
        size: Side of the images in pixels; patches have 8.
        **options: Further arguments of timm's `VisionTransformer`.
    """
    from timm.models import VisionTransformer

    settings = {"patch_size": 8, "embed_dim": 12, "depth": depth, "num_heads": 2, **options}
    model = VisionTransformer(img_size=size, num_classes=classes, **settings)
    with torch.no_grad():  # timm's fresh head is close to nothing
        nn.init.normal_(model.get_parameter("head.weight"), std=0.5)
    return model


def batch(size: int = 4, side: int = 32, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    """Make images, class indices, and masks with a rectangle each; the same each time.

    Args:
        size: Number of images.
        side: Their side in pixels.
        classes: Number of classes.

    Returns:
        Images `(B, 3, H, W)` in [0, 1], labels `(B,)`, and masks `(B, H, W)` of 0 and 1.
    """
    generator = torch.Generator().manual_seed(size)
    images = torch.rand(size, 3, side, side, generator=generator)
    labels = torch.arange(size) % classes
    masks = torch.zeros(size, side, side)
    for sample in range(size):
        top = (sample * side // 5) % (side // 2)
        masks[sample, top : top + side // 2, side // 8 : side // 2] = 1
    return images, labels, masks


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
        "flash": torch.backends.cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
        "math": torch.backends.cuda.math_sdp_enabled(),  # type: ignore[no-untyped-call]
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
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
