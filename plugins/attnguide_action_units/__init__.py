"""Action-unit codebook: guide a classifier of expressions by where the face moves (arXiv 2402.00281).

An expression is made by muscles of the face, the action units, and landmarks show where these are. So the
label and the landmarks of an image give the prior, without annotation by hand:

```python
guide = ag.Guide.from_recipe(model, "au-codebook")
loss = criterion(model(images), labels) + guide.loss(labels, landmarks=landmarks)
```
"""

import lazy_loader

# The names and where they live: `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
