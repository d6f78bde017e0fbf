"""Face parsing as a guide: region priors, and SSP and SSG on any backbone (Kalayeh, Gong, Shah; CVPR 2017).

Most attributes of a face are seen in one region of it. A segmentation of the face tells where that is; it
can guide a classifier as a prior, or route what the classifier pools:

```python
guide = ag.Guide(model, prior=SegmentationPrior(classes=names))
adapted = attach(model, images[:2], "ssp")
```
"""
