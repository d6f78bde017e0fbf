"""Replaces the last layer of a classifier."""

from __future__ import annotations

from torch import nn

from attnguide.errors import InputError

__all__ = ["with_head"]


def with_head(model: nn.Module, classes: int) -> nn.Module:
    """Replace a classifier's head by a fresh one.

    A model of timm knows its head. Of any other model it is the last linear layer or convolution among its
    modules.

    Args:
        model: Any classifier; it is changed in place.
        classes: Number of outputs.

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
    kinds = (nn.Linear, nn.Conv2d)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kinds)]
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
