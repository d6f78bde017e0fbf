from . import data as data, functional as functional, layers as layers, metrics as metrics, visual as visual
from .auditing.audit import AuditReport as AuditReport, AuditWarning as AuditWarning, audit as audit
from .data.maps import Maps as Maps, read_maps as read_maps
from .dataset import DatasetReport as DatasetReport, explain_dataset as explain_dataset
from .errors import AttnGuideError as AttnGuideError
from .explanation import Explanation as Explanation, explain as explain
from .guiding.check import CheckReport as CheckReport
from .guiding.guide import Guide as Guide
from .guiding.intervention import Intervened as Intervened, Intervention as Intervention
from .guiding.recipe import Recipe as Recipe, load_recipe as load_recipe
from .guiding.terms import Term as Term, TermRecord as TermRecord
from .interfaces import (
    Adapter as Adapter,
    AlignmentLoss as AlignmentLoss,
    AttributionSource as AttributionSource,
    PriorMaps as PriorMaps,
    TargetPrior as TargetPrior,
)
from .pairs import Pairs as Pairs
from .parts.hookspecs import Part as Part, hookimpl as hookimpl
from .parts.registry import registry as registry
from .trace import Trace as Trace

__version__: str
PUBLIC_MODULES: tuple[str, ...]
