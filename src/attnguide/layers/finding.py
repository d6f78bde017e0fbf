"""Finds the layers that a user asks for, once for a model and a size of images, and remembers them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import isnan, prod

import torch
from torch import Tensor, nn

from attnguide.capture.calls import INPUT, Call, Tap, images_name
from attnguide.capture.model_state import evaluating, muted, unwrap
from attnguide.capture.parallel import refuse_sharded
from attnguide.capture.suitable import check_images, suitable
from attnguide.errors import LayerError, nearest
from attnguide.functional import full_precision
from attnguide.layers import _memory as memory
from attnguide.layers._outputs import Given, given_at, outputs_of
from attnguide.layers._probe import Output, Subject, is_active
from attnguide.layers.candidates import Candidate, choose, images_as_layer, list_candidates, stages
from attnguide.trace import Layer, Layout

__all__ = ["LayerSpec", "check_layer", "find_layers", "out_of_reach"]

#: What `"auto"` means to a source that takes the mean over channels.
UNCENTRED = "uncentred"
#: How a user names layers: `"auto"`, `"stage:-2"`, `"input"`, a module's name, a pattern, a
#: [`Layer`][attnguide.trace.Layer] that was found before, or several.
LayerSpec = str | Layer | Sequence[str | Layer]

#: The automatic choice looks at so many layers from the end; further only if none of them passes.
_NEAR_THE_END = 32
#: So many sizes of images are measured for a transformer; for more, what was measured is carried over.
_MEASURED_SIZES = 8
#: A stage deeper than a layer with so many rows and columns has at least two of them, and could be chosen.
_ROOMY = 4


def check_layer(model: nn.Module, layer: LayerSpec) -> tuple[str, ...]:
    """Return what a user asked for, as the unwrapped model knows it.

    Raises:
        LayerError: If a name is unknown (the nearest is offered), a pattern matches nothing, or there is no
            name at all.
    """
    names = [name for name, _ in unwrap(model).named_modules() if name]
    of_images = (INPUT, images_name(unwrap(model)))
    asked = [each.name if isinstance(each, Layer) else each for each in _asked(layer)]
    return tuple(text if text in of_images else _checked(text, names) for text in asked)


def _asked(layer: LayerSpec) -> tuple[str | Layer, ...]:
    """Return the names of a specification, one or several.

    Raises:
        LayerError: If it is of another type, or there is no name at all.
    """
    asked = tuple(layer) if isinstance(layer, (list, tuple)) else (layer,)
    if not asked:
        raise LayerError("layer=[] names no layer; leave it out for 'auto', or name at least one.")
    for name in asked:
        if not isinstance(name, (str, Layer)):
            raise LayerError(
                f"layer={name!r} must be a name, 'auto', 'stage:N', a pattern, or a list of them."
            )
    return asked


def out_of_reach(layer: Layer) -> LayerError:
    """Make the error for a layer on which the logits do not depend: its maps would be empty."""
    return LayerError(
        f"the logits do not depend on layer {layer.name!r} where it has rows and columns. Choose a layer "
        "that the output is computed from. In the last block of a transformer with a class token only the "
        "first norm is; layer='auto' takes it."
    )


def _checked(text: str, names: Sequence[str]) -> str:
    if text in ("auto", UNCENTRED) or _stage(text) is not None:
        return text
    # A wrapper for parallel training, which was taken off, puts "module." before the names.
    for form in (text, text.removeprefix("module.")):
        if (
            any(_matches(name, form) for name in names)
            if _is_pattern(form)
            else Tap.parse(form).module in names
        ):
            return form
    if _is_pattern(text):
        raise LayerError(f"layer {text!r} matches no module of the model; * stands for one part of a name.")
    raise LayerError(f"the model has no layer {text!r}.{nearest(text, names)}")


def _stage(text: str) -> int | None:
    kind, _, number = text.partition(":")
    if kind != "stage":
        return None
    try:
        return int(number)
    except ValueError:
        raise LayerError(f"layer {text!r}: a stage has a number, as in 'stage:0' or 'stage:-2'.") from None


def _is_pattern(text: str) -> bool:
    return "*" in text or "?" in text


def _matches(name: str, pattern: str) -> bool:
    """Compare part by part, so that * does not reach into a module."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def find_layers(
    model: nn.Module,
    images: Tensor,
    layer: LayerSpec = "auto",
    *,
    measure: bool = True,
    call: Call | None = None,
) -> list[Layer]:
    """Find the layers to look at.

    What was found is remembered: for the model as long as it lives, for its like (same classes, same
    settings, same shapes of weights) in this process, and for models of timm, torchvision and transformers
    on disk. What was measured of a layer with axes for rows and columns holds for images of any size.

    Args:
        model: Any classifier.
        images: Images that it accepts, `(B, C, H, W)`.
        layer: `"auto"`: the deepest with rows and columns and a spread-out gradient; `"uncentred"`: the same,
            but no `LayerNorm`, whose channels have a mean of zero; `"stage:-2"`: the last of a stage;
            `"input"`: the images themselves; a module's name; a pattern such as `"blocks.*.norm1"`, in which
            * stands for one part of a name; a `Layer` that was found before, whose layout is then believed;
            or several of these.
        measure: Measure how the layer's output is arranged. Without it, shapes and what the model says of
            itself must do.
        call: How the model is called with the images, if not `model(images)`.

    Returns:
        The layers, without repetition, in the order asked for.

    Raises:
        LayerError: If a name is unknown, or no layer passes.
        InputError: If the model was scripted, exported or quantized, or has no weights yet, or the images are
            not `(B, C, H, W)`.
        GuidanceError: If the model was sharded before they were found.
    """
    model = unwrap(model)
    if not isinstance(images, Tensor) or images.ndim != 4:
        check_images(images)
    # What was found was checked: asking again must cost nothing.
    asked = layer if layer and type(layer) is tuple and {*map(type, layer)} == {str} else _asked(layer)
    of_images = (INPUT, images_name(model))
    if any(isinstance(each, Layer) or each in of_images for each in asked):
        groups = [_stored_or_found(model, images, each, measure, call) for each in asked]
        return list({layer.name: layer for group in groups for layer in group}.values())
    question = memory.Question(tuple(map(str, asked)), measure, () if call is None else call.signature)
    known = memory.recall(model, images, question)
    if known is None:
        refuse_sharded(model, "the layers of a model are found")
        checked = check_layer(model, asked)
        subject = Subject.of(suitable(model), images, call)
        carried = _carried_over(subject, checked, memory.other_sizes(model, images, question))
        layers = _found(subject, checked, measure) if carried is None else carried
        memory.remember(model, images, question, layers, probed=carried is None)
        return layers
    return list(known)


def _stored_or_found(
    model: nn.Module, images: Tensor, asked: str | Layer, measure: bool, call: Call | None
) -> list[Layer]:
    """Find what one of several names asks for, one of which names the images or is a layer found before."""
    name = asked.name if isinstance(asked, Layer) else asked
    if name in (INPUT, images_name(model)):
        return [images_as_layer(suitable(model), images)]
    if not isinstance(asked, Layer):
        return find_layers(model, images, asked, measure=measure, call=call)
    # A question of its own, so that nobody who asks for the name alone gets what was not measured here.
    signature = ("stored", repr(asked), *(() if call is None else call.signature))
    question = memory.Question((name,), False, signature)
    known = memory.recall(model, images, question)
    if known is None:
        check_layer(model, [name, *(Tap.parse(watched).module for watched in asked.watched)])
        fitted = _fitted(Subject.of(suitable(model), images, call), [asked], None)
        if fitted is None:
            raise LayerError(
                f"layer {asked} was found for images of another size, or in another model: it does not fit "
                f"the output for {images.shape[-2]}×{images.shape[-1]} images. Name it, and it is measured: "
                f"layer={name!r}."
            )
        known = tuple(fitted)
        memory.remember(model, images, question, known, probed=False)
    return list(known)


def _found(subject: Subject, asked: Sequence[str], measure: bool) -> list[Layer]:
    if subject.call is None or subject.call.logits is None:
        _check_head(subject.model)
    layers: dict[str, Layer] = {}
    for text in asked:
        for candidate in _candidates_for(subject, text, measure):
            layers.setdefault(candidate.layer.name, candidate.layer)
    return list(layers.values())


#: Names of the classifier in models of timm and torchvision.
_HEADS = ("classifier", "fc", "head", "heads", "last_linear")


def _check_head(model: nn.Module) -> None:
    """Refuse a backbone without a classifier, whose channels would be taken for classes.

    Raises:
        LayerError: If it is one, as far as its type and its parts show.
    """
    kind, reason = type(model), None
    heads = [part for name in _HEADS if (part := model._modules.get(name)) is not None]
    if getattr(model, "num_classes", None) == 0:
        reason = "num_classes=0"
    elif kind.__module__.startswith("transformers.") and "Classification" not in kind.__name__:
        reason = "its transformers class with a head is named …ForImageClassification"
    elif heads and not any(type(each) is not nn.Identity for head in heads for each in head.modules()):
        reason = "it is replaced by nn.Identity"
    if reason is not None:
        raise LayerError(
            f"{kind.__name__} has no classifier head ({reason}), so that there is no class to explain. Build "
            "it with a head of K classes, or put it into a model with a head. If its output is the logits "
            "nevertheless, say so: logits=lambda output: output."
        )


def _candidates_for(subject: Subject, text: str, measure: bool) -> list[Candidate]:
    model = subject.model

    def listed(wanted: Callable[[list[Output]], list[Output]] | None = None) -> list[Candidate]:
        return list_candidates(model, subject.images, measure=measure, wanted=wanted, call=subject.call)

    if text in ("auto", UNCENTRED):

        def allowed(candidates: list[Candidate]) -> list[Candidate]:
            if text == "auto":
                return candidates
            # Without a gradient, as in a model that runs under no_grad, this source sees as well.
            return [
                replace(each, layer=replace(each.layer, spread=1.0)) if isnan(each.layer.spread) else each
                for each in candidates
                if not each.centered and "LayerNorm" not in each.type
            ]

        near = allowed(listed(lambda outputs: _active(model, outputs)[-_NEAR_THE_END:]))
        chosen = choose(model, near if any(candidate.usable for candidate in near) else allowed(listed()))
        return [_surer(subject, chosen) if measure else chosen]
    stage = _stage(text)
    if stage is not None:
        return [choose(model, listed(lambda outputs: _active(model, outputs)), stage)]
    if not _is_pattern(text):
        return [_named(subject, listed(lambda outputs: [o for o in outputs if _has(o, text)]), text)]
    found = [
        candidate.named(name)
        for candidate in listed(
            lambda outputs: [o for o in outputs if any(_matches(tap.module, text) for tap in o.taps)]
        )
        for name in [name for name in candidate.names if _matches(name, text)][-1:]
    ]
    if not found:
        raise LayerError(f"no layer that matches {text!r} gives rows and columns.{_alternatives(subject)}")
    return found


def _surer(subject: Subject, chosen: Candidate) -> Candidate:
    """Measure a candidate again, with other noise, if the first measurement was not clear."""
    if chosen.layer.how == "measured":
        return chosen
    again = list_candidates(
        subject.model,
        subject.images,
        wanted=lambda outputs: [output for output in outputs if _has(output, chosen.names[0])],
        call=subject.call,
        seeds=(1, 2),
    )
    return again[-1].named(chosen.layer.name) if again and again[-1].layer.how == "measured" else chosen


#: Fields of an answer that models of transformers fill in on request alone.
_ON_REQUEST = {"hidden_states", "reshaped_hidden_states", "attentions", "feature_maps"}


def _active(model: nn.Module, outputs: list[Output]) -> list[Output]:
    modules = dict(model.named_modules())
    return [
        output
        for output in outputs
        if is_active(modules, output.taps[0].module) and not _ON_REQUEST.intersection(output.taps[0].path)
    ]


def _has(output: Output, text: str) -> bool:
    return any(str(tap) == text for tap in output.taps)


def _named(subject: Subject, found: list[Candidate], text: str) -> Candidate:
    if found:
        return found[-1].named(text)
    (given,) = _given(subject, Tap.parse(text))
    if given is None:
        reason = "did not run, or gives no tensor"
    elif given.carried:
        reason = "hands on a tensor that it was given; name the layer that made it"
    else:
        reason = (
            f"gives a tensor of shape {given.shape}, in which no rows and columns of a "
            f"{subject.size[0]}×{subject.size[1]} image can be found"
        )
    raise LayerError(f"layer {text!r} {reason}.{_alternatives(subject)}")


def _alternatives(subject: Subject) -> str:
    candidates = list_candidates(subject.model, subject.images, measure=False, call=subject.call)
    usable = [group[-1].layer.name for group in stages(candidates)]
    return f" Layers that would do: {', '.join(usable[-12:])}." if usable else " Leave layer='auto'."


def _given(subject: Subject, *taps: Tap) -> list[Given | None]:
    """Return what layers give for the first of the images; None for one that did not run."""
    with outputs_of(subject.model, taps) as calls:
        with torch.inference_mode(False), torch.no_grad(), evaluating(subject.model), muted():
            subject.run(subject.images[:1].detach())
        return [given_at(calls, tap) for tap in taps]


def _carried_over(
    subject: Subject, asked: Sequence[str], known: Sequence[memory.Known]
) -> list[Layer] | None:
    """Carry what was measured at other sizes of images over to these; None where it must be measured."""
    if not known:
        return None
    largest = max(known, key=lambda each: prod(each.size))
    # Rows and columns that are axes are so at any size, but which layer is the deepest that has them is not.
    certain = all(layer.layout.has_axes for layer in largest.layers) and (
        all(not _chosen(text) for text in asked)
        or all(new <= old for new, old in zip(subject.size, largest.size, strict=True))
        or all(min(layer.layout.grid) >= _ROOMY for layer in largest.layers)
    )
    if not certain and len(known) < _MEASURED_SIZES:
        return None
    carried = _fitted(subject, largest.layers, largest.size)
    # In a single row there is nothing to see: another layer is chosen.
    return None if carried is None or any(min(layer.layout.grid) < 2 for layer in carried) else carried


def _chosen(text: str) -> bool:
    """Whether it depends on the sizes of outputs which layers a text means."""
    return text in ("auto", UNCENTRED) or _stage(text) is not None or _is_pattern(text)


def _fitted(subject: Subject, layers: Sequence[Layer], size: tuple[int, int] | None) -> list[Layer] | None:
    """Fit layers that were measured at another size of images to these, in one forward of one image.

    Args:
        subject: The model, and the images.
        layers: The layers.
        size: `(H, W)` of the images that they were measured with; None if it is not known.

    Returns:
        The layers; None if one of them did not run, or cannot be arranged like this.
    """
    taps = [Tap.parse(layer.name) for layer in layers]
    means = [None if (name := layer.shortcuts.pooled) is None else Tap.parse(name) for layer in layers]
    wanted = list(dict.fromkeys([*taps, *(tap for tap in means if tap is not None)]))
    given = dict(zip(wanted, _given(subject, *wanted), strict=True))
    fitted = []
    for layer, tap, mean in zip(layers, taps, means, strict=True):
        if (output := given[tap]) is None:
            return None
        same = size is None and layer.layout.fits(output.shape)
        layout: Layout | None = layer.layout if same else None
        if not same and (size is not None or layer.layout.has_axes):
            layout = layer.layout.resized(size or subject.size, output.shape, subject.size)
        if layout is None:
            return None
        shortcuts = layer.shortcuts
        # A pooling of fixed windows gives the mean at some sizes and not at others.
        pooled = None if mean is None else given[mean]
        if pooled is None or not _is_mean(pooled.tensor, layout.flat(output.tensor)):
            shortcuts = replace(shortcuts, pooled=None)
        layer = replace(layer, layout=layout, shortcuts=shortcuts)
        fitted.append(layer if same else replace(layer, how="inherited", agreement=float("nan")))
    return fitted


def _is_mean(pooled: Tensor, flat: Tensor) -> bool:
    """Whether a tensor holds the mean of an output `(1, C, h·w)` over its places."""
    mean = full_precision(flat).mean(dim=2)
    if pooled.numel() != mean.numel():
        return False
    difference = (full_precision(pooled).reshape(mean.shape) - mean).abs().amax()
    return bool(difference <= 1e-4 * mean.abs().amax())
