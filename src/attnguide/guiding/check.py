"""Proves that a loss reaches the weights of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor, nn
from torch.func import functional_call

from attnguide import _tables
from attnguide.capture.model_state import evaluating, unwrap
from attnguide.capture.recorder import aside
from attnguide.errors import GuidanceError
from attnguide.layers._probe import stand_ins
from attnguide.layers._reach import reach
from attnguide.layers.finding import find_layers

__all__ = ["CheckReport", "ParameterGroup", "check"]


#: Share of the image from which on a position is said to depend on much of it.
_MUCH = 0.25
#: Images that it is measured on.
_LOOKED_AT = 8


@dataclass(frozen=True)
class ParameterGroup:
    """The parameters of one module.

    Attributes:
        name: Name of the module.
        parameters: Number of values.
        trainable: Whether any of them requires a gradient.
        norm: Euclidean norm of the guidance gradient.
    """

    name: str
    parameters: int
    trainable: bool
    norm: float

    @property
    def reached(self) -> bool:
        """Whether any gradient arrives."""
        return self.norm > 0


@dataclass(frozen=True)
class CheckReport:
    """Where the guidance gradient arrives.

    Attributes:
        loss: The guidance loss of the batch.
        layers: The layers that the guide looks at.
        groups: One group for each module that holds parameters, in the model's order.
        replaced: Weights that are all zero (a fresh head, as some models have) and were replaced for the
            check, because no gradient passes zeros.
        sees: Share of the image that a position of each layer depends on, in [0, 1]; see
            [`layers.reach`][attnguide.layers.reach].
    """

    loss: float
    layers: list[str]
    groups: list[ParameterGroup]
    replaced: list[str]
    sees: dict[str, float]

    @property
    def reached(self) -> list[str]:
        """Names of the modules that the gradient reaches."""
        return [group.name for group in self.groups if group.reached]

    @property
    def unreached(self) -> list[str]:
        """Names of the trainable modules that it does not reach."""
        return [group.name for group in self.groups if group.trainable and not group.reached]

    def __str__(self) -> str:
        lines = [self._title()]
        width = max(len(group.name) for group in self.groups)
        for group in self.groups:
            state = f"|gradient| {group.norm:.3g}" if group.reached else "-" if group.trainable else "frozen"
            lines.append(f"  {group.name:{width}}  {group.parameters:>10,}  {state}")
        if self.replaced:
            lines.append(f"  all-zero weights replaced for this check: {', '.join(self.replaced)}")
        lines += [
            f"  a position of {name} depends on {share:.0%} of the image: what is outside of a region can be "
            "read inside it, so the right map proves little; audit the model, or guide it with "
            "attnguide.Intervention"
            for name, share in self.sees.items()
            if share > _MUCH
        ]
        return "\n".join(lines)

    def _title(self) -> str:
        where = ", ".join(self.layers)
        return f"guidance loss {self.loss:.4g} at {where}; reaches {len(self.reached)} modules"

    def _repr_html_(self) -> str:
        top = max(group.norm for group in self.groups) or 1.0
        rows = [
            (
                f"<code>{escape(group.name)}</code>",
                f"{group.parameters:,}",
                _tables.bar(group.norm / top, f"{group.norm:.3g}")
                if group.reached
                else f'<span style="color:{_tables.POOR}">not reached</span>'
                if group.trainable
                else "frozen",
            )
            for group in self.groups
        ]
        replaced = ", ".join(map(escape, self.replaced))
        note = f"All-zero weights replaced for this check: {replaced}" if replaced else ""
        return _tables.table(self._title(), ("module", "parameters", "|gradient|"), rows, note)


def check(
    model: nn.Module, images: Tensor, loss: Callable[[], Tensor], layers: Callable[[], list[str]]
) -> CheckReport:
    """Run the model once, and see which weights the gradient of a loss reaches.

    Args:
        model: The model; it stays as it is.
        images: `(B, C, H, W)`.
        loss: Computes the loss of the forward pass that has just run.
        layers: Names the layers that were looked at, for the report.

    Returns:
        The report.

    Raises:
        GuidanceError: If the gradient reaches nothing.
    """
    # Parallel wrappers have nothing to add, but wait for other processes.
    model = unwrap(model)
    # Zeros would hide a path that opens with the first step of training.
    replaced = {name: value.requires_grad_() for name, value in stand_ins(model).items()}
    parameters = {name: replaced.get(name, weight) for name, weight in model.named_parameters()}
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model), aside(model):
        functional_call(model, replaced, (images,))
        value = loss()
        wanted = {
            name: weight
            for (name, weight), original in zip(parameters.items(), model.parameters(), strict=True)
            if original.requires_grad
        }
        found = torch.autograd.grad(value, list(wanted.values()), allow_unused=True) if wanted else ()
    gradients = dict(zip(wanted, found, strict=True))
    members: dict[str, list[str]] = defaultdict(list)
    for name in parameters:
        members[name.rpartition(".")[0] or "(model)"].append(name)
    groups = [
        ParameterGroup(
            name=module,
            parameters=sum(parameters[name].numel() for name in names),
            trainable=any(name in wanted for name in names),
            norm=_norm([gradients.get(name) for name in names]),
        )
        for module, names in members.items()
    ]
    names = layers()
    sees = reach(model, images[:_LOOKED_AT], find_layers(model, images[:_LOOKED_AT], names))
    report = CheckReport(float(value.detach()), names, groups, list(replaced), sees)
    if not report.reached:
        raise GuidanceError(
            "the guidance gradient arrives at no weight. Likely reasons: no sample of the batch is "
            "annotated, every layer up to and "
            "including the guided one is frozen, or the attribution of every pair is zero (no evidence yet "
            "for any of these "
            f"classes: try after some training, or a larger batch).\n{report}"
        )
    return report


def _norm(gradients: list[Tensor | None]) -> float:
    squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
    return float(torch.stack([square.cpu() for square in squares]).sum().sqrt()) if squares else 0.0
