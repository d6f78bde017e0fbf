from . import finetune as finetune
from .finetune import Epoch as Epoch, WithMasks as WithMasks, prepare as prepare
