from .finetuning import Epoch as Epoch, finetune as finetune, prepare as prepare
