"""Multi-channel attention: which features matter to an attribute, and which attributes are alike.

Each attribute has its own classifier, with a mask over all channels and positions of the features. The masks
show which channels matter to an attribute, which channels are alike, and which attributes are:

```python
adapted = attach(model, images[:2])
...  # train as ever
analysis = analyze(adapted, batches, classes)
analysis.correlated(5)
```
"""

import lazy_loader

# The names and where they live: `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
