"""Images and tensors are found in what goes in and out of a model, and replaced there."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnguide.capture.calls import INPUT, Call, Tap, images_name, replace, select, tensors_in
from attnguide.errors import InputError, LayerError

Two = namedtuple("Two", ["first", "second"])
A, B, C = torch.zeros(2, 3), torch.ones(2, 3), torch.full((2, 3), 2.0)
NESTED: dict[str, Any] = {
    "tuple": (A, (B, 3)),
    "list": [A, [B, None]],
    "dict": {"a": A, "b": {"deep": B}},
    "ordered dict": OrderedDict(a=A, b=[B]),
    "named tuple": Two(A, {"x": B}),
}


@pytest.mark.parametrize(
    "text", ["fc", "blocks.2", "norm#0", "blocks.2[1]", "fc:input", "a.b:input#3[x][0]", "body[features]"]
)
def test_names_of_taps_are_read_as_they_are_written(text: str) -> None:
    assert str(Tap.parse(text)) == text


def test_parts_of_a_tap() -> None:
    assert Tap.parse("a.b:input#3[x][0]") == Tap("a.b", 3, ("x", 0), True)
    for wrong in ("", "a[", "a#x", "a]1[", "a#1#2"):
        with pytest.raises(LayerError, match="is not understood"):
            Tap.parse(wrong)


@pytest.mark.parametrize("kind", NESTED)
def test_a_tensor_is_replaced_where_it_was_found(kind: str) -> None:
    output = NESTED[kind]
    paths = [path for path, _ in tensors_in(output)]
    assert [select(output, path) is tensor for path, tensor in zip(paths, (A, B), strict=True)] == [
        True,
        True,
    ]
    assert select(output, ()) is A
    assert select(output, ("nowhere",)) is None
    changed = replace(output, paths[1], C)
    assert type(changed) is type(output)
    assert [tensor for _, tensor in tensors_in(changed)] == [A, C] or select(changed, paths[1]) is C
    assert select(changed, ()) is A
    assert select(output, paths[1]) is B  # the original stays


def test_images_are_the_first_tensor_with_rows_and_columns() -> None:
    images = torch.zeros(2, 3, 8, 8)
    assert Call.of((A, "text", images), {}).images is images
    assert Call.of((), {"flag": True, "pixels": images}).images is images
    with pytest.raises(InputError, match=r"got Tensor, int"):
        Call.of((A, 3), {})
    with pytest.raises(InputError, match=r"got nothing"):
        Call.of((), {})


def test_a_call_is_repeated_with_other_images() -> None:
    images, weights = torch.zeros(4, 3, 8, 8), torch.arange(4.0)
    call = Call.of((images,), {"weights": weights, "scale": 2.0})
    assert call.images is images
    assert call.signature == ("scale=2.0", "weights=Tensor")
    others = torch.ones(6, 3, 8, 8)
    args, kwargs = call.arguments(others)
    assert args[0] is others
    assert kwargs["scale"] == 2.0
    assert kwargs["weights"].tolist() == [0.0] * 6  # one for each image: the first repeats


def test_the_images_have_a_name_that_no_module_has() -> None:
    class Net(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images

    assert images_name(Net()) == "input"
    named = Net()
    named.input = nn.Identity()
    assert images_name(named) == INPUT != "input"
