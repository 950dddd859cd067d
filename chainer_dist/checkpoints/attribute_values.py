"""Attributes that are plain values, as entries of a checkpoint: numbers, text, arrays, and lists of these."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist.extensions._plain_values import NotPlainError, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from chainer_dist._typing import Array

__all__ = ["are_alike", "describe_value", "plain_values", "read_alike", "write_values"]


def plain_values(attributes: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the named attributes that are plain values. Local."""
    found = {}
    for name in names:
        value = attributes.get(name)
        try:
            pack(value, is_small=True)
        except NotPlainError:
            continue
        found[name] = value
    return found


def describe_value(value: Any) -> str:
    """Return a text that is the same for the same value only. Local."""
    packed, arrays = pack(value)
    text = json.dumps(packed)
    for array in arrays:
        content = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        text += f" {array.dtype.str} {array.shape} {content}"
    return text


def write_values(serializer: Any, values: dict[str, Any], was: dict[str, str | None]) -> None:
    """Save attributes. Local.

    Args:
        serializer: Chainer's serializer.
        values: Their values, by name.
        was: Texts of :func:`describe_value` for the values that their object was made with, where these are known.
    """
    packed, arrays = pack(values)
    text = json.dumps({"values": [pair["tuple"] for pair in packed["dict"]], "was": was})
    serializer("values", np.frombuffer(text.encode(), dtype=np.uint8))
    for number, array in enumerate(arrays):
        serializer(str(number), array)


class _Numbered:
    """Arrays by number."""

    def __init__(self, source: Mapping[str, Array], prefix: str) -> None:
        self._source = source
        self._prefix = prefix

    def __getitem__(self, number: int) -> Array:
        return self._source[f"{self._prefix}{number}"]


def _read(
    source: Mapping[str, Array], prefix: str, current: Mapping[str, Any]
) -> Iterator[tuple[str, Any, str | None]]:
    """Yield name, value, and the text of the first value, of what one rank has saved."""
    if f"{prefix}values" not in source:
        return
    content = json.loads(source[f"{prefix}values"].tobytes())
    arrays: Any = _Numbered(source, prefix)
    for name, packed in content["values"]:
        yield name, unpack(packed, arrays, current.get(name)), content["was"].get(name)


def read_alike(
    own: Sequence[Mapping[str, Array]], prefix: str, current: Mapping[str, Any]
) -> Iterator[tuple[str, Any, str | None]]:
    """Yield the attributes that all ranks have saved with the same value. Local.

    Args:
        own: Entries of each rank that has saved.
        prefix: Beginning of the names of entries.
        current: Attributes that the object has now.

    Yields:
        Name, value, and the text of the value that the object was made with, or None.
    """
    if len(own) == 1:
        yield from _read(own[0], prefix, current)
        return
    known = [
        {name: (describe_value(value), was) for name, value, was in _read(source, prefix, {})}
        for source in own
    ]
    for name, value, was in _read(own[0], prefix, {}):
        if all(theirs.get(name) == known[0][name] for theirs in known):
            yield name, value, was


def are_alike(own: Sequence[Mapping[str, Array]], prefix: str) -> bool:
    """Return whether all ranks have saved the same below a prefix. Local."""
    if len(own) == 1:
        return True
    keys = [{key for key in source if key.startswith(prefix)} for source in own]
    return all(
        theirs == keys[0] and all(np.array_equal(source[key], own[0][key]) for key in theirs)
        for source, theirs in zip(own, keys)
    )
