from .faces import (
    ATTRIBUTES as ATTRIBUTES,
    ATTRIBUTE_REGIONS as ATTRIBUTE_REGIONS,
    EXPRESSIONS as EXPRESSIONS,
    EXPRESSION_UNITS as EXPRESSION_UNITS,
    HELEN_LABELS as HELEN_LABELS,
    PREVALENCE as PREVALENCE,
    TEMPLATES as TEMPLATES,
    FaceSample as FaceSample,
    ProceduralFaces as ProceduralFaces,
    template as template,
)
