from .faces import (
    ATTRIBUTE_REGIONS as ATTRIBUTE_REGIONS,
    ATTRIBUTES as ATTRIBUTES,
    EXPRESSION_UNITS as EXPRESSION_UNITS,
    EXPRESSIONS as EXPRESSIONS,
    HELEN_LABELS as HELEN_LABELS,
    PREVALENCE as PREVALENCE,
    TEMPLATES as TEMPLATES,
    FaceSample as FaceSample,
    ProceduralFaces as ProceduralFaces,
    template as template,
)
