from .boxes import BoxPrior as BoxPrior
from .mask import MaskPrior as MaskPrior
