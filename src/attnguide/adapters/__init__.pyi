from .folding import Folded as Folded
from .holder import AdapterSet as AdapterSet
from .saving import SavedAdapters as SavedAdapters, feature_sizes as feature_sizes, trace_for as trace_for
