"""Lists the layers that can be looked at, and chooses among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import isnan, prod

import torch
from torch import Tensor, nn

from attnguide.capture.calls import Call, Tap, images_name
from attnguide.capture.model_state import unwrap
from attnguide.errors import LayerError
from attnguide.layers import _layout as layouts
from attnguide.layers._probe import (
    FirstPass,
    Output,
    Positions,
    Subject,
    first_pass,
    is_active,
    kinds_of,
    measure,
    respond,
)
from attnguide.trace import How, Kind, Layer, Layout, Shortcuts

__all__ = ["Candidate", "choose", "images_as_layer", "list_candidates", "stages"]

#: Share of positions that must carry a gradient; global max pooling leaves few, a class token none.
_SPREAD = 0.1

#: An agreement that leaves nothing to look for.
_CLEAR = 0.95

#: So many grids are tried for patches out of order; each costs a forward of about ten images.
_TRIES = 2


@dataclass(frozen=True)
class Candidate:
    """A layer that can be attributed, and what the automatic choice needs to know of it.

    Attributes:
        layer: The layer, by the outermost module that gives its output.
        names: All names of the layer, from the module that computed the output outwards.
        type: Name of the module's class.
        shape: Shape of the output, without the batch axis.
        active: Whether the layer computes features; pooling and projections inside attention don't.
        centered: Whether it is the output of a layer normalization, or a sum of such, perhaps rearranged: its
            mean over the channels is zero, until these are trained.
    """

    layer: Layer
    names: tuple[str, ...]
    type: str
    shape: tuple[int, ...]
    active: bool
    centered: bool = False

    @property
    def usable(self) -> bool:
        """Whether the automatic choice may take it."""
        return self.active and self.layer.spread > _SPREAD

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.shape[0] if self.layer.layout.channels_first else self.shape[-1]

    def named(self, name: str) -> Candidate:
        """Return the candidate with another name of its layer."""
        return replace(self, layer=replace(self.layer, name=name))

    def __str__(self) -> str:
        layer = self.layer
        sure = f" (agreement {layer.agreement:.2f})" if layer.how == "measured" else ""
        return f"{layer.name}: {layer.layout}, {layer.how}{sure}, gradient over {layer.spread:.0%}"


def images_as_layer(model: nn.Module, images: Tensor) -> Layer:
    """Return the images themselves, `(B, C, H, W)`, as a layer."""
    size = images.shape[-2], images.shape[-1]
    return Layer(images_name(model), Layout("nchw", size), how="measured", agreement=1.0, spread=1.0)


def list_candidates(
    model: nn.Module,
    images: Tensor,
    *,
    measure: bool = True,
    wanted: Callable[[list[Output]], list[Output]] | None = None,
    call: Call | None = None,
    seeds: Sequence[int] = (0,),
) -> list[Candidate]:
    """Run a probe and list every layer whose output has rows and columns.

    Costs one forward and one backward pass of at most two images, and one forward of five (of up to sixteen
    more for a model that shuffles its patches). Training flags, buffers and gradients of the model are left
    as they were.

    Args:
        model: Any classifier.
        images: Images that it accepts, `(B, C, H, W)`; the first two are used.
        measure: Measure where positions look; otherwise layouts are assumed from shapes.
        wanted: Chooses among the outputs that the model's modules gave; None for all of them.
        call: How the model is called with the images, if not `model(images)`.
        seeds: Seeds of the noise; each costs a pass of five images.

    Returns:
        Candidates in the order in which they ran.
    """
    subject = Subject.of(unwrap(model), images, call)
    model = subject.model
    seen = first_pass(subject, wanted)
    found = _layouts(subject, seen.outputs, seeds) if measure else {}
    modules = dict(model.named_modules())
    prefix = getattr(model, "num_prefix_tokens", None)
    candidates = []
    for index, output in enumerate(seen.outputs):
        assumed = layouts.assume((1, *output.shape), subject.size, prefix)
        if index in found:
            candidates.append(_candidate(output, *found[index], modules, seen))
        elif assumed is not None:
            candidates.append(_candidate(output, assumed, "assumed", float("nan"), modules, seen))
    return candidates


def _candidate(
    output: Output,
    layout: Layout,
    how: How,
    agreement: float,
    modules: dict[str, nn.Module],
    seen: FirstPass,
) -> Candidate:
    spread = 0.0 if output.in_graph else float("nan")
    if output.gradient is not None:
        spread = _spread(layout.flat(output.gradient))
    pooled = seen.pooled(layout, output) if spread > _SPREAD else None
    rowwise, queries = seen.idle(modules[""], layout, output) if spread > _SPREAD else ((), ())
    shortcuts = Shortcuts(None if pooled is None else str(pooled), seen.head, rowwise, queries)
    return Candidate(
        Layer(output.name, layout, how, agreement, spread, shortcuts),
        names=tuple(str(tap) for tap in output.taps),
        type=type(modules[Tap.parse(output.name).module]).__name__,
        shape=output.shape,
        active=is_active(modules, output.taps[0].module),
        centered=output.centered,
    )


def _spread(gradient: Tensor) -> float:
    """Share of the positions of `(B, C, places)` at which any channel has a gradient."""
    size = gradient.float().abs().amax(dim=1)
    return float((size > 1e-6 * size.amax()).float().mean()) if bool(size.amax() > 0) else 0.0


# -------------------------------------------------------------------- layouts


def _layouts(
    subject: Subject, outputs: Sequence[Output], seeds: Sequence[int]
) -> dict[int, tuple[Layout, How, float]]:
    """Find the layout of each output, by its index, from how it changes with perturbed images."""
    prefix = getattr(subject.model, "num_prefix_tokens", None)
    taps = [Tap.parse(output.name) for output in outputs]
    positions = _positions(subject, taps, seeds)
    found: dict[int, tuple[Layout, How, float]] = {}
    for index, output in enumerate(outputs):
        ways = positions.get(taps[index])
        best = None if ways is None else _best_fit(output.shape, ways, subject.size, prefix)
        if best is not None and best[0] >= layouts.needed(prod(best[1].grid)):
            found[index] = best[1], "measured", best[0]
    left = [index for index in range(len(outputs)) if index not in found]
    found |= _decoded(subject, {index: outputs[index] for index in left}, taps, positions)
    measured = {outputs[index].shape: layout for index, (layout, _, _) in found.items()}
    for index in left:
        if index not in found and outputs[index].shape in measured:
            found[index] = measured[outputs[index].shape], "inherited", float("nan")
    return found


def _positions(
    subject: Subject, taps: Sequence[Tap], seeds: Sequence[int]
) -> dict[Tap, dict[Kind, Positions]]:
    """Measure the part of the image that each position depends on; the noise is drawn once for each seed."""
    drawn = [measure(subject, taps, seed) for seed in seeds]
    return {
        tap: {
            kind: Positions(
                torch.stack([one[tap][kind].rows for one in drawn]).mean(dim=0),
                torch.stack([one[tap][kind].columns for one in drawn]).mean(dim=0),
            )
            for kind in ways
        }
        for tap, ways in drawn[0].items()
    }


def _best_fit(
    shape: tuple[int, ...], ways: dict[Kind, Positions], size: tuple[int, int], prefix: int | None
) -> tuple[float, Layout] | None:
    """Find the layout that agrees best with measured positions."""
    likely = layouts.assume((1, *shape), size, prefix)
    if likely is not None:
        # Nearly always this is it. What could be mistaken for it is a class token at the other end.
        turned = replace(likely, prefix=likely.suffix, suffix=likely.prefix)
        way = ways[likely.kind]
        scores = [layouts.agreement(layout, way.rows, way.columns) for layout in (likely, turned)]
        if scores[0] >= max(_CLEAR, scores[1]):
            return scores[0], likely
    fits = [
        best
        for kind, places in kinds_of(shape).items()
        if layouts.is_informative(ways[kind].rows)
        and layouts.is_informative(ways[kind].columns)
        and (best := layouts.fit(kind, places, ways[kind].rows, ways[kind].columns, size)) is not None
    ]
    return max(fits, key=lambda item: item[0], default=None)


def _decoded(
    subject: Subject,
    outputs: dict[int, Output],
    taps: Sequence[Tap],
    positions: dict[Tap, dict[Kind, Positions]],
) -> dict[int, tuple[Layout, How, float]]:
    """Find an unusual order of patches, by noise that encodes their rows and columns; see `codes`."""
    shuffled = {
        index: (kind, places)
        for index, output in outputs.items()
        for kind, places in kinds_of(output.shape).items()
        if kind in ("tokens", "nct", "windows")
        and taps[index] in positions
        # With four axes it is windows only if it cannot be an ordinary map.
        and (kind != "windows" or layouts.assume((1, *output.shape), subject.size) is None)
        and _is_informative(positions[taps[index]][kind])
    }
    found: dict[int, tuple[Layout, How, float]] = {}
    if not shuffled:
        return found
    # The grid is that of the deepest: a model that shuffles does so throughout.
    _, places = shuffled[max(shuffled)]
    for grid in layouts.likely_grids(prod(places), subject.size, spare=len(places) == 1)[:_TRIES]:
        extras = prod(places) - prod(grid)
        answers = respond(subject, layouts.codes(grid, subject.size), [taps[index] for index in shuffled])
        for index, (kind, axes) in shuffled.items():
            if prod(axes) != prod(places) or taps[index] not in answers:
                continue
            layout = layouts.decode(kind, grid, extras, answers[taps[index]][kind])
            if layout is not None:
                way = positions[taps[index]][kind]
                found[index] = layout, "measured", layouts.agreement(layout, way.rows, way.columns)
        if found:
            break
    return found


def _is_informative(positions: Positions) -> bool:
    """Whether positions depend on different parts of the image."""
    return min(float(positions.rows.std()), float(positions.columns.std())) > 0.1


# --------------------------------------------------------------------- choice


def choose(model: nn.Module, candidates: Sequence[Candidate], stage: int | None = None) -> Candidate:
    """Choose the layer: the last that passes, of a width that the model's metadata names, if it names any.

    Args:
        model: The classifier.
        candidates: Its layers, as [`list_candidates`][attnguide.layers.list_candidates] gives them.
        stage: Choose within this of the [`stages`][attnguide.layers.stages] instead, −1 for the last.

    Raises:
        LayerError: If none passes, or there is no such stage; the candidates are listed.
    """
    if stage is not None:
        groups = stages(candidates, _modules_of_metadata(model))
        if not -len(groups) <= stage < len(groups):
            raise LayerError(
                f"layer 'stage:{stage}': {type(unwrap(model)).__name__} has {len(groups)} stages, 0 to "
                f"{len(groups) - 1}, or −1 for the last. The last layers of each: "
                f"{', '.join(group[-1].layer.name for group in groups)}."
            )
        return groups[stage][-1]
    usable = [candidate for candidate in candidates if candidate.usable]
    if not usable and any(candidate.active and isnan(candidate.layer.spread) for candidate in candidates):
        raise LayerError(
            f"{type(unwrap(model)).__name__} runs its layers under torch.no_grad() or inference_mode(), so "
            "that no gradient of the logits reaches them. To freeze a part, leave no_grad out of the forward "
            "and call part.requires_grad_(False)."
        )
    if not usable:
        listed = "\n".join(f"  {candidate}" for candidate in candidates[-12:])
        raise LayerError(
            f"no layer of {type(unwrap(model)).__name__} has rows and columns and a gradient spread over "
            "them, so that there is nothing to look at. Name one with layer='…', or use a larger image or "
            "a model with a classifier head."
            + (f" Layers with rows and columns:\n{listed}" if listed else "")
        )
    widths = _widths(model)
    chosen = ([candidate for candidate in usable if candidate.channels in widths] or usable)[-1]
    named = _modules_of_metadata(model)[-1:]
    return chosen.named(named[0]) if named and named[0] in chosen.names else chosen


def stages(candidates: Sequence[Candidate], named: Sequence[str] = ()) -> list[list[Candidate]]:
    """Group the layers that pass: by stages that the model names, by grid, or by block if it has one grid.

    Within a grid the outermost layers count: the first layers of a block that reduces its input still have
    the grid of the stage before, but not all passes through them.

    Args:
        candidates: As [`list_candidates`][attnguide.layers.list_candidates] gives them.
        named: Names of the modules that end the stages, in order, as timm's metadata gives them.

    Returns:
        The groups in the order in which they ran; the last layer of a group ends the stage.
    """
    usable = [candidate for candidate in candidates if candidate.usable]
    groups = [_of_module(usable, name) for name in named]
    if groups and all(groups):
        return groups
    grids = list(dict.fromkeys(candidate.layer.layout.grid for candidate in usable))
    if len(grids) < 2:
        return [list(group) for _, group in groupby(usable, key=block_of)]
    groups = []
    for grid in grids:
        group = [candidate for candidate in usable if candidate.layer.layout.grid == grid]
        outermost = min(map(_depth, group))
        groups.append([candidate for candidate in group if _depth(candidate) == outermost])
    return groups


def _of_module(candidates: Sequence[Candidate], name: str) -> list[Candidate]:
    """The layer of a module; if it does not pass, as in the last block before a class token, those in it."""
    found = [candidate.named(name) for candidate in candidates if name in candidate.names]
    inner = [
        candidate for candidate in candidates if any(each.startswith(f"{name}.") for each in candidate.names)
    ]
    return found[-1:] or inner


def _depth(candidate: Candidate) -> int:
    """How many modules the layer is inside of, by its outermost name."""
    return min(Tap.parse(name).module.count(".") for name in candidate.names)


def block_of(candidate: Candidate) -> str:
    """Name of the outermost numbered module that a layer belongs to."""
    steps = candidate.names[0].split(".")
    ends = [depth for depth, step in enumerate(steps, 1) if step[:1].isdigit()]
    return ".".join(steps[: ends[0]]) if ends else steps[0]


def _widths(model: nn.Module) -> set[object]:
    """Widths of features that the model's metadata names; empty if there is none."""
    info = _metadata(model)
    if not info:
        return set()
    model = unwrap(model)
    names = ("num_features", "head_hidden_size", "embed_dim")
    return {entry.get("num_chs") for entry in info} | {
        width for name in names if isinstance(width := getattr(model, name, None), int)
    }


def _modules_of_metadata(model: nn.Module) -> list[str]:
    """Names of the modules that end the stages, in timm's metadata; empty if there is none."""
    return [module for entry in _metadata(model) if isinstance(module := entry.get("module"), str)]


def _metadata(model: nn.Module) -> list[dict[str, object]]:
    """Timm's description of a model's features; empty if there is none."""
    info = getattr(unwrap(model), "feature_info", None)
    info = getattr(info, "info", info)
    return [entry for entry in info if isinstance(entry, dict)] if isinstance(info, list) else []
