"""Adapters on a model: saved apart from it, loaded again, and exported with it as one module."""

import lazy_loader

# The names and where they live: `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
