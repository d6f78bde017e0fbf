from .adapted import (
    METHODS as METHODS,
    Average as Average,
    RegionAdapters as RegionAdapters,
    attach as attach,
    load_adapters as load_adapters,
)
from .attributes import (
    CELEBA as CELEBA,
    attribute_table as attribute_table,
    load_attributes as load_attributes,
)
from .boxes import (
    landmark_boxes as landmark_boxes,
)
from .datasets import (
    LabelMaps as LabelMaps,
    ParsingSample as ParsingSample,
    celebamask as celebamask,
    helen as helen,
    lapa as lapa,
    read_labels as read_labels,
)
from .figures import (
    colors as colors,
    region_weights as region_weights,
    sheet as sheet,
    top_channels as top_channels,
    weights_figure as weights_figure,
)
from .finder import (
    FINDERS as FINDERS,
    RegionFinder as RegionFinder,
)
from .gating import (
    SSG as SSG,
    MaskChannels as MaskChannels,
)
from .lfwa import (
    LFWA as LFWA,
)
from .metrics import (
    balanced_bce as balanced_bce,
    region_iou as region_iou,
    right_regions as right_regions,
)
from .network import (
    JointNetwork as JointNetwork,
    attribute_network as attribute_network,
)
from .parser import (
    EMBEDDED as EMBEDDED,
    Parser as Parser,
    load_parser as load_parser,
    save_parser as save_parser,
    standardized as standardized,
)
from .parsing import (
    ParsingNetwork as ParsingNetwork,
    parsing_loss as parsing_loss,
)
from .pooling import (
    SSP as SSP,
    PyramidPooling as PyramidPooling,
    region_means as region_means,
)
from .prior import (
    SegmentationPrior as SegmentationPrior,
)
from .region_source import (
    ParsedRegions as ParsedRegions,
)
from .regions import (
    PARTS as PARTS,
    REGIONS as REGIONS,
    SCHEMES as SCHEMES,
    around_landmarks as around_landmarks,
    as_masks as as_masks,
    merged as merged,
    normalized as normalized,
    resized as resized,
)
