from ._memory import forget as forget
from ._reach import find_local as find_local, reach as reach
from .attending import find_attention as find_attention
from .candidates import (
    Candidate as Candidate,
    choose as choose,
    list_candidates as list_candidates,
    stages as stages,
)
from .finding import (
    LayerSpec as LayerSpec,
    check_layer as check_layer,
    find_layers as find_layers,
    out_of_reach as out_of_reach,
)
