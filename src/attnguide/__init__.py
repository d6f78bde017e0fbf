"""Make any image classifier look where it should.

```python
import attnguide as ag

guide = ag.Guide(model, source="grad_cam", prior="mask", loss="iou", weight=0.5)
loss = criterion(model(images), labels) + guide.loss(labels, mask=masks)
```
"""

import lazy_loader

# The names and where they live: `__init__.pyi`. They are imported at first use, so
# that `attnguide --help` and a plugin's declaration of its parts cost no torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"

#: The public modules. Public are the names in `attnguide.__all__` and those in the `__all__` of these
#: modules; every other module is internal and may change in any release.
PUBLIC_MODULES: tuple[str, ...] = (
    "attnguide.adapters",
    "attnguide.cli.console",
    "attnguide.cli.options",
    "attnguide.concepts",
    "attnguide.data",
    "attnguide.data.procedural",
    "attnguide.errors",
    "attnguide.evaluation",
    "attnguide.functional",
    "attnguide.interfaces",
    "attnguide.layers",
    "attnguide.lightning",
    "attnguide.losses",
    "attnguide.masks",
    "attnguide.metrics",
    "attnguide.models",
    "attnguide.pairs",
    "attnguide.parts",
    "attnguide.priors",
    "attnguide.ray",
    "attnguide.sources",
    "attnguide.testing",
    "attnguide.trace",
    "attnguide.training",
    "attnguide.transformers",
    "attnguide.visual",
)
