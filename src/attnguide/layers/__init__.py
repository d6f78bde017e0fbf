"""Finds the layer to look at, and how its output is arranged in space.

A layer is named by the user, or found: the deepest whose output has rows and columns over which the
logits' gradient is spread. How the output is arranged (channels first or last, tokens with or without
prefix, windows) is measured: see `probe`.
"""

from attnguide.layers.attending import Attending, find_attention
from attnguide.layers.candidates import Candidate, Layer, choose, list_candidates, stages
from attnguide.layers.finding import LayerSpec, check_layer, check_reach, find_layers
from attnguide.layers.layout import Layout

__all__ = [
    "Attending",
    "Candidate",
    "Layer",
    "LayerSpec",
    "Layout",
    "check_layer",
    "check_reach",
    "choose",
    "find_attention",
    "find_layers",
    "list_candidates",
    "stages",
]
