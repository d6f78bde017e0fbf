"""Grad-CAM-IoU: guide a classifier by masks that a user paints (arXiv 1905.00593).

The method is the recipe `"gradcam-iou"`; your own training loop needs nothing else:

```python
guide = ag.Guide.from_recipe(model, "gradcam-iou", prior=MaskPrior(template.masks))
```

[`attnguide.masks`][attnguide.masks] reads painted masks, and
[`finetune`][attnguide_gradcam_iou.finetune] prepares and fine-tunes a pretrained model.

```python
from attnguide_gradcam_iou.finetune import finetune, prepare

loaded = prepare("torchvision/alexnet", ["Wearing_Lipstick", "Smiling"], pretrained=True)
data = CelebA(root, attributes=loaded.classes, transform=loaded.transform)
history = finetune(loaded.model, data, template="regions/", classes=loaded.classes)
```
"""

import lazy_loader

# The names and where they live: `__init__.pyi`. `finetune` is the package, as in
# `from attnguide_gradcam_iou.finetune import finetune`: one name cannot be the function too.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
