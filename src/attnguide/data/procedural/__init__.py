"""Drawn faces with exact labels, masks and landmarks.

```python
from attnguide.data.procedural import ProceduralFaces, template
```
"""

import lazy_loader

# The names and where they live: `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
