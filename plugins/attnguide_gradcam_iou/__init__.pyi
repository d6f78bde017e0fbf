from . import finetune as finetune
from .finetune import Epoch as Epoch, prepare as prepare
