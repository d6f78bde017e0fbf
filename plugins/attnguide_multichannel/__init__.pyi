from .adapted import (
    attach as attach,
    load_adapters as load_adapters,
    multichannel_of as multichannel_of,
)
from .analysis import (
    Analysis as Analysis,
    Likeness as Likeness,
    MaskStatistics as MaskStatistics,
    analyze as analyze,
    clustered as clustered,
)
from .attention import (
    Masks as Masks,
    MultiChannel as MultiChannel,
    Reconstructor as Reconstructor,
)
from .figures import (
    correlation_figure as correlation_figure,
    mask_figure as mask_figure,
    place_figure as place_figure,
    reconstruction_sheet as reconstruction_sheet,
)
from .masking import (
    FullMasks as FullMasks,
    Masking as Masking,
    SharedMasks as SharedMasks,
)
from .pruning import (
    magnitude_ranking as magnitude_ranking,
    prune as prune,
    without_channels as without_channels,
)
from .report import (
    write_report as write_report,
)
from .source import (
    MultiChannelMaps as MultiChannelMaps,
)
from .transform import (
    emphasized as emphasized,
    important as important,
    suppressed as suppressed,
    transformed as transformed,
)
