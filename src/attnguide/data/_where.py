"""Conditions on rows of maps, as text: `class = 'hen' and score > .9`."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from functools import reduce
from operator import and_, or_
from typing import TYPE_CHECKING, Any

from attnguide.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    import pyarrow.compute as pc

__all__ = ["condition"]

_TOKEN = re.compile(
    r"\s*(?P<text>'(?:[^'\\]|''|\\.)*'|\"(?:[^\"\\]|\\.)*\")|\s*(?P<word>[A-Za-z_]\w*)"
    r"|\s*(?P<number>\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)"
    r"|\s*(?P<sign><>|!=|<=|>=|==|=|<|>|\(|\)|,|-)"
)
#: Words and signs of SQL in Python.
_PYTHON = {"=": "==", "<>": "!=", "null": "None", "true": "True", "false": "False"}
_LOGIC = ("and", "or", "not", "in", "is")
#: Before names, since `class` is a word of Python.
_NAME = "column_"


def condition(text: str, columns: Sequence[str]) -> pc.Expression:
    """Read a condition: comparisons of columns with values, joined by and, or, not, in, and parentheses.

    Args:
        text: The condition, such as `class in ('hen', 'cock') and not score <= .9`, or `error is not null`.
        columns: Names of the columns.

    Returns:
        An expression of pyarrow.

    Raises:
        UnknownNameError: If there is no such column.
        InputError: If the text is not a condition.
    """
    try:
        tree = ast.parse(_as_python(text), mode="eval")
        return _truth(tree.body, columns)
    except (SyntaxError, TypeError, ValueError, AttributeError, RecursionError, MemoryError) as error:
        raise InputError(
            f"the condition {text!r:.80} is not understood ({error}). Write for example: class = 'hen' and "
            "score > .9"
        ) from error


def _as_python(text: str) -> str:
    words, position = [], 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"at {text[position : position + 10]!r}")
        position = match.end()
        kind, token = str(match.lastgroup), str(match[str(match.lastgroup)])
        if kind == "text":
            words.append(repr(token[1:-1].replace("''", "'") if token[0] == "'" else token[1:-1]))
        elif kind == "word":
            lower = token.lower()
            words.append(lower if lower in _LOGIC else _PYTHON.get(lower, _NAME + token))
        else:
            words.append(_PYTHON.get(token, token))
    return " ".join(words)


def _truth(node: ast.expr, columns: Sequence[str]) -> Any:
    """Turn a comparison, or several that are joined, into an expression."""
    match node:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~_truth(operand, columns)
        case ast.BoolOp(op=ast.And(), values=values):
            return reduce(and_, [_truth(each, columns) for each in values])
        case ast.BoolOp(values=values):
            return reduce(or_, [_truth(each, columns) for each in values])
        case ast.Compare(left=left, ops=signs, comparators=others):
            sides = [_value(each, columns) for each in (left, *others)]
            return reduce(and_, map(_compared, signs, sides, sides[1:]))
    raise ValueError(f"{ast.unparse(node).replace(_NAME, '')!r} is not a comparison")


def _value(node: ast.expr, columns: Sequence[str]) -> Any:
    """Turn a side of a comparison into a column, a value, or a list of values."""
    import pyarrow.compute as pc

    match node:
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, columns)
        case ast.Name(id=name):
            name = name.removeprefix(_NAME)
            if name not in columns:
                raise UnknownNameError("column", name, columns)
            return pc.field(name)
        case ast.Tuple(elts=elements):
            return [_value(each, columns) for each in elements]
    raise ValueError(f"{ast.unparse(node).replace(_NAME, '')!r} is neither a column nor a value")


_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: lambda one, other: one == other,
    ast.NotEq: lambda one, other: one != other,
    ast.Lt: lambda one, other: one < other,
    ast.LtE: lambda one, other: one <= other,
    ast.Gt: lambda one, other: one > other,
    ast.GtE: lambda one, other: one >= other,
}


def _compared(operator: ast.cmpop, one: Any, other: Any) -> Any:
    if isinstance(operator, (ast.In, ast.NotIn)):
        inside = one.isin(other if isinstance(other, list) else [other])
        return inside if isinstance(operator, ast.In) else ~inside
    if isinstance(operator, (ast.Is, ast.IsNot)):
        if other is not None:
            raise ValueError("after 'is' only null is possible")
        return one.is_null() if isinstance(operator, ast.Is) else one.is_valid()
    if other is None:
        raise ValueError("null is compared by 'is null'")
    return _COMPARISONS[type(operator)](one, other)
