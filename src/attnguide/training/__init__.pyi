from .choosing import Tried as Tried, choose_epoch as choose_epoch, choose_weight as choose_weight
from .dry_run import dry_run as dry_run
from .engine import Measured as Measured, Trainer as Trainer, accelerator_on as accelerator_on
from .images import Batch as Batch, Images as Images, Loader as Loader, unseeded as unseeded
from .listing import (
    Listing as Listing,
    Sample as Sample,
    draw_share as draw_share,
    list_images as list_images,
)
from .preparing import Method as Method, Prepared as Prepared, method_of as method_of, prepare as prepare
from .running import Epoch as Epoch, Trained as Trained, train as train
from .settings import (
    AugmentSettings as AugmentSettings,
    DataSettings as DataSettings,
    LoopSettings as LoopSettings,
    MaskSettings as MaskSettings,
    ModelSettings as ModelSettings,
    Settings as Settings,
    read_settings as read_settings,
)
