from ._levels import read_levels as read_levels
from ._shapes import (
    Bitmap as Bitmap,
    Circle as Circle,
    Polygon as Polygon,
    RunLengths as RunLengths,
    Shape as Shape,
)
from .annotations import LabeledMasks as LabeledMasks
from .class_names import ClassNames as ClassNames, class_key as class_key
from .coco import read_coco as read_coco
from .completing import MaskCompletion as MaskCompletion
from .datasets import WithMasks as WithMasks
from .face_parts import (
    FACE_PARTS as FACE_PARTS,
    as_landmarks as as_landmarks,
    face_parts as face_parts,
)
from .folders import (
    MaskFolder as MaskFolder,
    Template as Template,
    images_in as images_in,
    load_template as load_template,
    read_mask as read_mask,
)
from .inside import Inside as Inside, InsideValues as InsideValues, as_inside as as_inside
from .labelme import read_labelme as read_labelme
from .legends import LegendEntry as LegendEntry, read_legend as read_legend
from .sizes import (
    Size as Size,
    as_size as as_size,
    check_fit as check_fit,
    check_proportions as check_proportions,
    fits as fits,
)
from .swapping import Exchange as Exchange, SwapOutside as SwapOutside, Swapped as Swapped
