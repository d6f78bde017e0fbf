from .celeba import CelebA as CelebA
from .decoy import DecoyMNIST as DecoyMNIST, read_digits as read_digits
from .images import find_images as find_images, read_image as read_image
from .procedural.faces import (
    FaceSample as FaceSample,
    ProceduralFaces as ProceduralFaces,
    template as template,
)
