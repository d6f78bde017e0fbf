"""Masks: images, templates, folders, legends, LabelMe and COCO files.

```python
from attnguide.masks import MaskFolder, load_template, read_mask
```
"""

import lazy_loader

# The names and where they live: `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
