from .hookspecs import (
    KINDS as KINDS,
    Kind as Kind,
    Part as Part,
    attnguide_parts as attnguide_parts,
    hookimpl as hookimpl,
)
from .registry import Broken as Broken, Owned as Owned, Registry as Registry
