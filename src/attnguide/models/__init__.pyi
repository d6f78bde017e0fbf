from .checkpoints import digest as digest, load_into as load_into, read_weights as read_weights
from .described import metadata_of as metadata_of
from .embedded_model import EMBEDDED as EMBEDDED, embedded as embedded, write_embedded as write_embedded
from .heads import with_head as with_head
from .loaded_model import LoadedModel as LoadedModel
from .loading import load as load
from .networks import small_cnn as small_cnn
from .preprocessing import (
    Pictures as Pictures,
    Preprocessing as Preprocessing,
    preprocessing_of as preprocessing_of,
)
