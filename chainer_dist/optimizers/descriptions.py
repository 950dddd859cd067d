"""Texts that are the same for equal values, in whichever process they are made."""

from __future__ import annotations

import functools
import numbers
import types
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["describe", "is_of_chainer", "is_plain", "name_of"]

_DEEPEST = 5  # sequences within sequences
_LONGEST = 1000  # a longer sequence within an object is taken for data

# Attributes of a user's objects that are each rank's own.
_OF_A_RANK = frozenset({"rank", "intra_rank", "inter_rank", "local_rank"})


def is_plain(value: Any) -> bool:
    """Return whether a value is a number, a string or the like, and no object with attributes. Local."""
    return value is None or isinstance(value, (str, bytes, numbers.Number, np.generic, np.ndarray))


def is_of_chainer(value: Any) -> bool:
    """Return whether an object is of a class of Chainer's, or of one derived from such. Local."""
    return any(base.__module__.partition(".")[0] == "chainer" for base in type(value).__mro__)


def name_of(kind: Any) -> str:
    """Return module and name of a class or function. Local."""
    return f"{kind.__module__}.{kind.__qualname__}"


def describe(value: Any, depth: int = 0) -> str:
    """Return a text that is the same for equal values. Local.

    Numbers are compared by value, whatever their type, arrays by shape and content, sequences,
    sets and dicts by what is in them. Functions and other objects are compared by their class and
    the numbers in them: what they hold besides, such as a file, a model or a rank's own data, may
    differ on ranks that do the same.

    Args:
        value: Anything.
        depth: Number of objects within which it is.
    """
    return name_of(type(value)) if depth > _DEEPEST else _describe(value, depth)


@functools.singledispatch
def _describe(value: Any, depth: int) -> str:
    return f"{name_of(type(value))}({_describe_items(_attributes(value), depth)})"


@_describe.register(str)
@_describe.register(bytes)
@_describe.register(type(None))
def _describe_text(value: Any, depth: int) -> str:
    del depth
    return repr(value)


@_describe.register(numbers.Number)
@_describe.register(np.bool_)
def _describe_number(value: Any, depth: int) -> str:
    del depth
    try:
        if isinstance(value, numbers.Integral):
            return str(int(value))
        if isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real):
            return repr(complex(value))
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # a Fraction, say, may be beyond all floats
        return repr(value)
    return str(int(number)) if number.is_integer() else repr(number)


@_describe.register(np.ndarray)
def _describe_array(value: np.ndarray[Any, Any], depth: int) -> str:
    if value.dtype == object or not value.ndim:
        return (
            f"array {value.shape} {describe(value.tolist(), depth + 1)}"
            if value.ndim
            else (describe(value.item(), depth + 1))
        )
    wide = value.astype(np.float64) if value.dtype.kind in "biuf" else value
    return f"array {value.shape} with checksum {zlib.crc32(np.ascontiguousarray(wide).tobytes()):x}"


@_describe.register(list)
@_describe.register(tuple)
def _describe_sequence(value: Any, depth: int) -> str:
    return f"[{', '.join(describe(each, depth + 1) for each in value)}]"


@_describe.register(set)
@_describe.register(frozenset)
def _describe_set(value: Any, depth: int) -> str:
    return f"{{{', '.join(sorted(describe(each, depth + 1) for each in value))}}}"


@_describe.register(dict)
def _describe_dict(value: dict[Any, Any], depth: int) -> str:
    return f"{{{_describe_items(value, depth)}}}"


@_describe.register(type)
def _describe_class(value: type, depth: int) -> str:
    del depth
    return name_of(value)


@_describe.register(types.MethodType)
def _describe_method(value: types.MethodType, depth: int) -> str:
    return f"{name_of(value.__func__)} of {describe(value.__self__, depth + 1)}"


@_describe.register(types.FunctionType)
def _describe_function(value: types.FunctionType, depth: int) -> str:
    code = value.__code__
    items: dict[Any, Any] = {
        "constants": [each for each in code.co_consts if _is_numeric(each)],
        **dict(enumerate(value.__defaults__ or ())),
        **(value.__kwdefaults__ or {}),
        **dict(zip(code.co_freevars, map(_content, value.__closure__ or ()))),
    }
    return f"function {name_of(value)}({_describe_items(_numbers_in(items), depth)})"


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _describe_items(items: Mapping[Any, Any], depth: int) -> str:
    named = [
        (key if isinstance(key, str) else describe(key, depth + 1), it) for key, it in items.items()
    ]
    return ", ".join(
        f"{key}={describe(value, depth + 1)}"
        for key, value in sorted(named, key=lambda item: item[0])
    )


def _attributes(value: Any) -> dict[Any, Any]:
    """Return the attributes of an object that hold numbers, as far as they are known."""
    found: dict[Any, Any] = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                found[name] = getattr(value, name)
    if isinstance(value, functools.partial):
        found = {**dict(enumerate(value.args)), **value.keywords}
    return _numbers_in(found)


def _numbers_in(items: Mapping[Any, Any]) -> dict[Any, Any]:
    return {
        key: value for key, value in items.items() if key not in _OF_A_RANK and _is_numeric(value)
    }


def _is_numeric(value: Any, depth: int = 0) -> bool:
    """Return whether a value is a number, or numbers in a sequence, a set or a dict."""
    if isinstance(value, (numbers.Number, np.bool_)):
        return True
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biufc" and value.size <= _LONGEST
    if isinstance(value, dict):
        value = list(value.values())
    return (
        isinstance(value, (list, tuple, set, frozenset))
        and len(value) <= _LONGEST
        and depth < _DEEPEST
        and all(_is_numeric(each, depth + 1) for each in value)
    )
