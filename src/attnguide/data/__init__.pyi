from .celeba import CelebA as CelebA
from .decoy import DecoyMNIST as DecoyMNIST, Protocol as Protocol, read_digits as read_digits
from .files import (
    atomic_write as atomic_write,
    check_file as check_file,
    check_target as check_target,
    check_writable as check_writable,
    natural_key as natural_key,
    read_json as read_json,
    read_rows as read_rows,
    read_text as read_text,
)
from .images import (
    IMAGE_SUFFIXES as IMAGE_SUFFIXES,
    MAX_PIXELS as MAX_PIXELS,
    decode_image as decode_image,
    find_images as find_images,
    gray_levels as gray_levels,
    image_size as image_size,
    load_image as load_image,
    open_image as open_image,
    read_image as read_image,
    rgb_image as rgb_image,
    save_picture as save_picture,
    to_rgb as to_rgb,
)
from .maps import MapRow as MapRow
from .mixing import Mixed as Mixed, mix as mix
from .procedural import (
    FaceSample as FaceSample,
    ProceduralFaces as ProceduralFaces,
    template as template,
)
from .records import Records as Records, open_records as open_records
