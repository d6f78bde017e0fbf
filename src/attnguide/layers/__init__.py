"""Layers: which layer to attribute, and how its output is arranged in space.

A layer is named by the user, or found: the deepest whose output has rows and columns over which the gradient
of
the logits is spread. Its layout (channels first or last, tokens with or without prefix, windows) is measured
by running the model on a few perturbed images.
"""

import lazy_loader

# The names and where they live: `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
