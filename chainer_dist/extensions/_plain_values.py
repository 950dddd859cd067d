"""Plain values as JSON and arrays: numbers, text, arrays, variables, random generators, and lists of these.

What is unpacked is what was packed, of the same types and to the bit, and no pickle is needed.
"""

from __future__ import annotations

import collections
import random
from typing import TYPE_CHECKING, Any

import chainer
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist._typing import Array

__all__ = ["NotPlainError", "pack", "unpack"]

# With more elements, or arrays in it, a list is data rather than state, and takes long.
MOST_ELEMENTS = 100_000
MOST_ARRAYS = 1000

_SCALARS = (bool, int, float, str, type(None))
_BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")


class NotPlainError(TypeError):
    """A value has in it what is neither a number nor anything else that can be packed."""


def pack(value: Any, *, is_small: bool = False) -> tuple[Any, list[Array]]:
    """Return a value as something that JSON has, and arrays that it refers to by number. Local.

    Args:
        value: The value to pack.
        is_small: Whether values with many elements are refused as well.

    Raises:
        NotPlainError: If there is something in it of any other kind.
    """
    arrays = _Arrays()
    arrays.is_small = is_small
    try:
        return _pack(value, arrays), arrays
    except RecursionError as error:
        raise NotPlainError("it contains itself, or is nested too deeply") from error


def unpack(packed: Any, arrays: Sequence[Array], current: Any = None) -> Any:
    """Return the value that was packed. Local.

    Args:
        packed: First result of :func:`pack`.
        arrays: Second result of :func:`pack`.
        current: Present value. A random generator of the kind that was packed is set to its state, so
            that all code that draws from it goes on from there.

    Raises:
        ValueError: If nothing of the kind was packed.
    """
    if isinstance(packed, _SCALARS):
        return packed
    try:
        ((kind, content),) = packed.items()
        return _UNPACK[kind](content, arrays, current)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"no plain value was packed here: {packed!r:.100}") from error


def _pack(value: Any, arrays: _Arrays) -> Any:
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind in _PACK:
        return {kind.__name__: _PACK[kind](value, arrays)}
    if isinstance(value, np.generic):
        return {"number": _keep(np.asarray(value), arrays)}
    raise NotPlainError(f"an object of {kind.__name__} is no plain value")


class _Arrays(list["Array"]):
    """The arrays of a value, in the order in which they were met."""

    is_small = False


def _pack_each(value: Any, arrays: _Arrays) -> list[Any]:
    if arrays.is_small and len(value) > MOST_ELEMENTS:
        raise NotPlainError(f"there are {len(value)} elements in it")
    return [_pack(each, arrays) for each in value]


def _pack_items(value: Any, arrays: _Arrays) -> list[Any]:
    return _pack_each([*value.items()], arrays)


def _pack_variable(value: Any, arrays: _Arrays) -> list[Any]:
    array = value.array
    number = None if array is None else _keep(array, arrays)
    # Backward adds gradients up in an order that the ranks in the graph decide.
    return [number, value.requires_grad, value.rank]


def _keep(array: Any, arrays: _Arrays) -> int:
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        raise NotPlainError("an array of objects is no plain value")
    if arrays.is_small and len(arrays) == MOST_ARRAYS:
        raise NotPlainError(f"there are more than {MOST_ARRAYS} arrays in it")
    arrays.append(array)
    return len(arrays) - 1


def _each(content: Any, arrays: Sequence[Array]) -> list[Any]:
    return [unpack(each, arrays) for each in content]


def _variable(content: Any, arrays: Sequence[Array], current: Any) -> Any:
    del current
    number, requires_grad, rank = content
    array = None if number is None else np.array(arrays[number])
    variable = chainer.Variable(array, requires_grad=requires_grad)
    variable.node._rank = int(rank)  # noqa: SLF001 - Chainer's
    return variable


def _random_state(content: Any, arrays: Sequence[Array], current: Any) -> Any:
    found = current if type(current) is np.random.RandomState else np.random.RandomState(0)
    found.set_state(unpack(content, arrays))
    return found


def _generator(content: Any, arrays: Sequence[Array], current: Any) -> Any:
    state = unpack(content, arrays)
    name = state["bit_generator"]
    if name not in _BIT_GENERATORS:
        raise KeyError(name)
    if type(current) is not np.random.Generator or current.bit_generator.state["bit_generator"] != (
        name
    ):
        current = np.random.Generator(getattr(np.random, name)(0))
    current.bit_generator.state = state
    return current


def _python_random(content: Any, arrays: Sequence[Array], current: Any) -> Any:
    found = current if type(current) is random.Random else random.Random()  # noqa: S311 - not for secrets
    found.setstate(unpack(content, arrays))
    return found


_PACK: dict[type, Any] = {
    list: _pack_each,
    tuple: _pack_each,
    set: _pack_each,
    frozenset: _pack_each,
    collections.deque: lambda value, arrays: [value.maxlen, _pack_each(value, arrays)],
    dict: _pack_items,
    collections.OrderedDict: _pack_items,
    chainer.Variable: _pack_variable,
    np.ndarray: _keep,
    np.random.RandomState: lambda value, arrays: _pack(value.get_state(), arrays),
    np.random.Generator: lambda value, arrays: _pack(value.bit_generator.state, arrays),
    random.Random: lambda value, arrays: _pack(value.getstate(), arrays),
}

_UNPACK: dict[str, Any] = {
    "list": lambda content, arrays, _: _each(content, arrays),
    "tuple": lambda content, arrays, _: tuple(_each(content, arrays)),
    "set": lambda content, arrays, _: set(_each(content, arrays)),
    "frozenset": lambda content, arrays, _: frozenset(_each(content, arrays)),
    "deque": lambda content, arrays, _: collections.deque(
        _each(content[1], arrays), maxlen=content[0]
    ),
    "dict": lambda content, arrays, _: dict(_each(content, arrays)),
    "OrderedDict": lambda content, arrays, _: collections.OrderedDict(_each(content, arrays)),
    "Variable": _variable,
    "number": lambda content, arrays, _: arrays[content][()],
    "ndarray": lambda content, arrays, _: np.array(arrays[content]),
    "RandomState": _random_state,
    "Generator": _generator,
    "Random": _python_random,
}
