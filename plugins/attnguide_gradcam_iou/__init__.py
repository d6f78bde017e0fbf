"""Grad-CAM-IoU: guide a classifier by masks that a user paints (arXiv 1905.00593).

The method is the recipe `"gradcam-iou"`; in a training loop of one's own nothing else is needed:

```python
guide = ag.Guide.from_recipe(model, "gradcam-iou", prior=MaskPrior(template.masks))
```

Two modules help with the rest: [`masks`][attnguide_gradcam_iou.masks] reads what was painted, and
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
    from attnguide_gradcam_iou import finetune, masks
    from attnguide_gradcam_iou.finetune import Epoch, WithMasks, prepare, with_head
    from attnguide_gradcam_iou.masks import (
        LabelledMasks,
        MaskFolder,
        Template,
        load_template,
        read_coco,
        read_labelme,
        read_mask,
    )

# Imported at first use: listing what the plugin provides imports this package and must cost no torch.
# `finetune` is the module, as in `from attnguide_gradcam_iou.finetune import finetune`: one name cannot be
# the function too.
_MODULES = ("finetune", "masks")
_HOMES = {
    "Epoch": "finetune",
    "LabelledMasks": "masks",
    "MaskFolder": "masks",
    "Template": "masks",
    "WithMasks": "finetune",
    "load_template": "masks",
    "prepare": "finetune",
    "read_coco": "masks",
    "read_labelme": "masks",
    "read_mask": "masks",
    "with_head": "finetune",
}

__all__ = [
    "Epoch",
    "LabelledMasks",
    "MaskFolder",
    "Template",
    "WithMasks",
    "finetune",
    "load_template",
    "masks",
    "prepare",
    "read_coco",
    "read_labelme",
    "read_mask",
    "with_head",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
