"""Multi-channel attention: which features matter to an attribute, and what is alike.

Each attribute has a classifier of its own, with a mask over all channels and positions of the features. The
masks tell which channels matter to it, which channels are alike, and which attributes are:

```python
adapted = attach(model, images[:2])
...  # train as ever
analysis = analyze(adapted, batches, classes)
analysis.correlated(5)
```
"""
