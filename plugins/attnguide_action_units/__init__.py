"""Action-unit codebook: guide a classifier of expressions by where the face moves (arXiv 2402.00281).

An expression is made by some muscles of the face, the action units, and landmarks tell where these are. So
the label and the landmarks of an image say where to look, without any annotation by hand:

```python
guide = ag.Guide.from_recipe(model, "au-codebook")
loss = criterion(model(images), labels) + guide.loss(labels, landmarks=landmarks)
```
"""
