from .folding import Folded as Folded
from .saving import (
    Adapted as Adapted,
    SavedAdapters as SavedAdapters,
    feature_sizes as feature_sizes,
    seen_by as seen_by,
)
