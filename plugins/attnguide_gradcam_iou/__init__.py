"""Grad-CAM-IoU: guide a classifier by masks that a user paints (arXiv 1905.00593).

The method is the recipe `"gradcam-iou"`; in a training loop of one's own nothing else is needed:

```python
guide = ag.Guide.from_recipe(model, "gradcam-iou", prior=MaskPrior(template.masks))
```

[`attnguide.masks`][attnguide.masks] reads painted masks, and
[`finetune`][attnguide_gradcam_iou.finetune] prepares and fine-tunes a pretrained model.

```python
from attnguide_gradcam_iou.finetune import finetune, prepare

loaded = prepare("torchvision/alexnet", ["Wearing_Lipstick", "Smiling"], pretrained=True)
history = finetune(loaded.model, data, template="regions/", classes=loaded.classes)
```
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnguide_gradcam_iou import finetune
    from attnguide_gradcam_iou.finetune import Epoch, WithMasks, prepare, with_head

# Imported at first use: listing what the plugin provides imports this package and must cost no torch.
# `finetune` is the module, as in `from attnguide_gradcam_iou.finetune import finetune`: one name cannot be
# the function too.
__all__ = ["Epoch", "WithMasks", "finetune", "prepare", "with_head"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.finetune")
    return module if name == "finetune" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
