from .checkpoints import digest as digest, load_into as load_into, read_weights as read_weights
from .loading import (
    EMBEDDED as EMBEDDED,
    LoadedModel as LoadedModel,
    embedded as embedded,
    load as load,
    write_embedded as write_embedded,
)
from .networks import small_cnn as small_cnn
