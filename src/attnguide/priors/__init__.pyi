from .boxes import BoxPrior as BoxPrior
from .finding import FindingPrior as FindingPrior
from .landmarks import LandmarkPrior as LandmarkPrior
from .mask import MaskPrior as MaskPrior
from .segmenter import SegmenterPrior as SegmenterPrior
from .teacher import TeacherPrior as TeacherPrior
from .text import TextPrior as TextPrior
from .token_cut import TokenCutPrior as TokenCutPrior, token_cut as token_cut
