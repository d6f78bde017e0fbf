"""Make any image classifier look where it should.

```python
import attnguide as ag

guide = ag.Guide(model, source="grad_cam", prior="mask", loss="iou", weight=0.5)
loss = criterion(model(images), labels) + guide.loss(labels, mask=masks)
```
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnguide import data, functional, layers, metrics, registry, visual
    from attnguide.auditing import AuditReport, AuditWarning, audit
    from attnguide.check import CheckReport
    from attnguide.errors import AttnGuideError
    from attnguide.explanation import Explanation, explain
    from attnguide.guide import Guide
    from attnguide.hookspecs import Part, hookimpl
    from attnguide.interfaces import Adapter, AlignmentLoss, AttributionSource, PriorMaps, TargetPrior
    from attnguide.pairs import Pairs
    from attnguide.terms import Term, TermMaps
    from attnguide.trace import Trace

__version__ = "0.1.0"

# Public names and where they live. They are imported at first use, so that `attnguide --help` and a plugin's
# declaration of its parts cost no torch.
_HOMES = {
    "Adapter": "interfaces",
    "AlignmentLoss": "interfaces",
    "AttnGuideError": "errors",
    "AttributionSource": "interfaces",
    "AuditReport": "auditing",
    "AuditWarning": "auditing",
    "CheckReport": "check",
    "Explanation": "explanation",
    "Guide": "guide",
    "Pairs": "pairs",
    "Part": "hookspecs",
    "PriorMaps": "interfaces",
    "TargetPrior": "interfaces",
    "Term": "terms",
    "TermMaps": "terms",
    "Trace": "trace",
    "audit": "auditing",
    "explain": "explanation",
    "hookimpl": "hookspecs",
}
_MODULES = ("data", "functional", "layers", "metrics", "registry", "visual")

__all__ = [
    "Adapter",
    "AlignmentLoss",
    "AttnGuideError",
    "AttributionSource",
    "AuditReport",
    "AuditWarning",
    "CheckReport",
    "Explanation",
    "Guide",
    "Pairs",
    "Part",
    "PriorMaps",
    "TargetPrior",
    "Term",
    "TermMaps",
    "Trace",
    "audit",
    "data",
    "explain",
    "functional",
    "hookimpl",
    "layers",
    "metrics",
    "registry",
    "visual",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"attnguide.{name}")
    if name in _HOMES:
        value = getattr(import_module(f"attnguide.{_HOMES[name]}"), name)
        globals()[name] = value  # next time without this function
        return value
    raise AttributeError(f"module 'attnguide' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
