from . import codebook as codebook
from .codebook import (
    ActionUnit as ActionUnit,
    Codebook as Codebook,
    Region as Region,
)
from .datasets import (
    RAFDB as RAFDB,
    AffectNet as AffectNet,
    ExpressionSample as ExpressionSample,
    FaceTable as FaceTable,
)
from .evaluation import (
    CAMS as CAMS,
    Report as Report,
    evaluate as evaluate,
)
from .extraction import (
    Extractor as Extractor,
    extract as extract,
    face_mesh as face_mesh,
)
from .landmarks import (
    CANONICAL as CANONICAL,
    FROM_98 as FROM_98,
    FROM_MESH as FROM_MESH,
    MIRROR as MIRROR,
    FaceLandmarks as FaceLandmarks,
    to_68 as to_68,
)
from .prior import (
    ActionUnitPrior as ActionUnitPrior,
)
from .region_source import (
    LandmarkRegions as LandmarkRegions,
)
from .tables import (
    LandmarkTable as LandmarkTable,
    read_landmarks as read_landmarks,
)
