"""Trains classifiers with guidance from a file of settings; what `attnguide train` runs."""

import lazy_loader

# The names and where they live: `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
