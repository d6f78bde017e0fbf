from .hookspecs import KINDS as KINDS, Kind as Kind, Part as Part, hookimpl as hookimpl
from .registry import Broken as Broken, Owned as Owned, Registry as Registry
