"""Texts that are the same for equal values, in whichever process they are made."""

from __future__ import annotations

import functools
import numbers
import types
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["describe", "is_of_chainer", "is_plain", "name_of"]

_DEEPEST = 5  # objects within objects

# Attributes of a user's objects that are each rank's own.
_OF_A_RANK = frozenset(
    {"comm", "communicator", "rank", "intra_rank", "inter_rank", "local_rank", "logger"}
)


def is_plain(value: Any) -> bool:
    """Tell whether a value is a number, a string or the like, and no object with attributes. Local."""
    return value is None or isinstance(value, (str, bytes, numbers.Number, np.generic, np.ndarray))


def is_of_chainer(value: Any) -> bool:
    """Tell whether an object is of a class of Chainer's, or of one derived from such. Local."""
    return any(base.__module__.partition(".")[0] == "chainer" for base in type(value).__mro__)


def name_of(kind: Any) -> str:
    """Return module and name of a class or function. Local."""
    return f"{kind.__module__}.{kind.__qualname__}"


def describe(value: Any, depth: int = 0) -> str:
    """Return a text that is the same for equal values. Local.

    Numbers are compared by value, whatever their type, arrays by shape and content, sequences,
    sets and dicts by what is in them, functions by name, constants and what they enclose, and other
    objects by class and attributes. What cannot be looked into is compared by its class.

    Args:
        value: Anything.
        depth: In how many other objects it is.
    """
    return name_of(type(value)) if depth > _DEEPEST else _describe(value, depth)


@functools.singledispatch
def _describe(value: Any, depth: int) -> str:
    return f"{name_of(type(value))}({_describe_items(_attributes(value).items(), depth)})"


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
    return f"{{{_describe_items(value.items(), depth)}}}"


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
    items = [
        ("constants", [each for each in code.co_consts if is_plain(each)]),
        ("names", code.co_names),
        ("defaults", value.__defaults__),
        ("keywords", value.__kwdefaults__),
        *zip(code.co_freevars, map(_content, value.__closure__ or ())),
    ]
    return f"function {name_of(value)}({_describe_items(items, depth)})"


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _describe_items(items: Iterable[tuple[Any, Any]], depth: int) -> str:
    named = [(key if isinstance(key, str) else describe(key, depth + 1), it) for key, it in items]
    return ", ".join(
        f"{key}={describe(value, depth + 1)}"
        for key, value in sorted(named, key=lambda item: item[0])
        if key not in _OF_A_RANK
    )


def _attributes(value: Any) -> dict[str, Any]:
    """Return what an object consists of, as far as it can be told."""
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                found[name] = getattr(value, name)
    if not found:
        try:  # an object of C, such as functools.partial
            reduced = value.__reduce_ex__(4)
        except Exception:  # noqa: BLE001 - what cannot be pickled has its class only
            return {}
        if isinstance(reduced, tuple):
            found["content"] = [each for each in reduced[1:3] if each is not None]
    return found
