from .annotations import LabelledMasks as LabelledMasks, read_coco as read_coco, read_labelme as read_labelme
from .class_names import ClassNames as ClassNames
from .folders import (
    MaskFolder as MaskFolder,
    Template as Template,
    load_template as load_template,
    read_mask as read_mask,
)
from .legends import LegendEntry as LegendEntry, read_legend as read_legend
