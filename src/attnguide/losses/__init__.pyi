from .erase import Erase as Erase
from .overlap import (
    KL as KL,
    Correlation as Correlation,
    Cosine as Cosine,
    Dice as Dice,
    Energy as Energy,
    IoU as IoU,
)
from .pointwise import (
    L1 as L1,
    MSE as MSE,
    PPCE as PPCE,
    InsideOutside as InsideOutside,
    Outside as Outside,
    Pointwise as Pointwise,
)
