"""Replaces the head of a classifier."""

from __future__ import annotations

from torch import nn

from attnguide.errors import InputError

__all__ = ["with_head"]

_HEADS = (nn.Linear, nn.Conv2d)


def with_head(model: nn.Module, classes: int) -> nn.Module:
    """Replace a classifier's head by a new one with random weights.

    A model of timm has a method for that. In any other model the head is the last linear layer or convolution
    among the modules.

    Args:
        model: Any classifier; it is changed in place.
        classes: Number of logits of the new head.

    Returns:
        The same model.

    Raises:
        InputError: If the number is not positive, or no head is found.
    """
    if classes < 1:
        raise InputError(f"classes={classes} must be at least 1.")
    reset = getattr(model, "reset_classifier", None)
    if callable(reset):
        reset(classes)
        return model
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _HEADS)]
    if not layers or not layers[-1][0]:
        raise InputError(
            f"{type(model).__name__} contains no linear layer or convolution that could be its head. Replace "
            "the head yourself."
        )
    name, old = layers[-1]
    new: nn.Module
    bias = old.bias is not None
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, classes, bias)
    else:
        new = nn.Conv2d(old.in_channels, classes, 1, bias=bias)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new.to(old.weight).train(old.training))
    return model
