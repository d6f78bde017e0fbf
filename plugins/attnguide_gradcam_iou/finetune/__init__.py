"""Fine-tunes a pretrained classifier of several attributes towards painted regions.

The loss is that of arXiv 1905.00593: w_a · binary cross entropy + w_g · (−ln IoU).
"""

import lazy_loader

# The names and where they live: `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
