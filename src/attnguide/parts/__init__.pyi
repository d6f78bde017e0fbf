from .hookspecs import (
    KINDS as KINDS,
    Kind as Kind,
    Part as Part,
    attnguide_parts as attnguide_parts,
    hookimpl as hookimpl,
)
from .recipe import Recipe as Recipe, load_recipe as load_recipe
from .registry import Broken as Broken, Owned as Owned, Registry as Registry
