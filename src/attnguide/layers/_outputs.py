"""What layers give while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from attnguide.capture.calls import Tap, select, tensors_in
from attnguide.capture.own_hooks import Handles, in_this_thread

__all__ = ["Given", "given_at", "outputs_of"]


class Given(NamedTuple):
    """What a layer gives, and whether it is one of the tensors that the layer was given."""

    tensor: Tensor
    carried: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


@contextmanager
def outputs_of(
    model: nn.Module, taps: Iterable[Tap], *, cloned: bool = False
) -> Iterator[dict[Tap, list[Given]]]:
    """Collect what taps give in the passes that this thread runs meanwhile, call by call.

    Args:
        model: The model, without a wrapper.
        taps: The taps.
        cloned: Keep copies, since what comes next may work in place.
    """
    calls: dict[Tap, list[Given]] = {tap: [] for tap in taps}
    handles = Handles()

    def looking(tap: Tap) -> Callable[[nn.Module, object, object], None]:
        def look(module: nn.Module, args: object, output: object) -> None:
            tensor = select(args if tap.given else output, tap.path)
            if tensor is not None:
                carried = any(tensor is other for _, other in tensors_in(args))
                calls[tap].append(Given(tensor.clone() if cloned else tensor, carried))

        return look

    try:
        for tap in calls:
            hook = in_this_thread(looking(tap))
            handles.keep(model.get_submodule(tap.module).register_forward_hook(hook))
        yield calls
    finally:
        handles.remove()


def given_at(calls: Mapping[Tap, Sequence[Given]], tap: Tap) -> Given | None:
    """Return what a tap gave in the call that it names, or in the last one; None if it did not run."""
    found = calls[tap]
    if not found[tap.call or 0 :]:
        return None
    return found[-1 if tap.call is None else tap.call]
