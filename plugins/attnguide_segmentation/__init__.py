"""Face parsing as a guide: region priors, and SSP and SSG on any backbone (Kalayeh, Gong, Shah; CVPR 2017).

Most attributes show in one region of the face. A segmentation of the face finds this region; it can guide a
classifier as a prior, or route the features that the classifier pools:

```python
guide = ag.Guide(model, prior=SegmentationPrior(classes=names))
adapted = attach(model, images[:2], "ssp")
```
"""

import lazy_loader

# The names and where they live: `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
