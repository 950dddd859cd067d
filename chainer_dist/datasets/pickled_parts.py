"""Parts of data as pickles: arrays stay out of them, and an object that several parts hold is pickled once."""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Common", "CommonObjects", "PartUnpickler", "Pickled", "pickle_part"]


# A smaller array is not worth a place of its own; it is copied within the pickle.
_OUT_OF_BAND_BYTES = 4096


class Common:
    """Something that several parts hold in full: sent and stored once a node.

    Args:
        value: Any picklable object.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


class Pickled(NamedTuple):
    """A pickle and the buffers that were left out of it, as contiguous bytes."""

    pieces: list[memoryview]  # the pickle first
    commons: list[int]  # numbers of the common objects that it refers to


class CommonObjects:
    """Common objects in the order in which the root meets them. Each is pickled once."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._values: list[Any] = []  # keeps their ids from being given to other objects
        self.pickled: list[Pickled] = []

    def number(self, common: Common) -> int:
        """Return the number of a common object, pickling it if it is new."""
        value = common.value
        if id(value) not in self._numbers:
            # What is common within a common object is pickled as a part of it.
            pickled = _dump_with(
                lambda file, callback: pickle.Pickler(file, protocol=5, buffer_callback=callback),
                value,
            )
            self._numbers[id(value)] = len(self._values)
            self._values.append(value)
            self.pickled.append(Pickled(pickled, []))
        return self._numbers[id(value)]


class _PartPickler(pickle.Pickler):
    """Pickles a part; common objects become numbers."""

    def __init__(
        self, file: io.BytesIO, callback: Callable[[Any], Any], table: CommonObjects
    ) -> None:
        super().__init__(file, protocol=5, buffer_callback=callback)
        self._table = table
        self.met: list[int] = []

    def persistent_id(self, obj: Any) -> int | None:
        """Return the number of a common object, None for anything else."""
        if type(obj) is not Common:
            return None
        number = self._table.number(obj)
        if number not in self.met:
            self.met.append(number)
        return number


class PartUnpickler(pickle.Unpickler):
    """Reads what :class:`_PartPickler` wrote."""

    def __init__(self, file: Any, buffers: list[memoryview], commons: dict[int, Common]) -> None:
        super().__init__(file, buffers=buffers)
        self._commons = commons

    def persistent_load(self, pid: int) -> Common:
        """Return the common object of that number."""
        return self._commons[pid]


def pickle_part(part: Any, rank: int, table: CommonObjects) -> Pickled:
    """Pickle a part. Local.

    Args:
        part: Any picklable object.
        rank: Rank whose part it is, for errors.
        table: Common objects that were pickled already; changed in place.

    Raises:
        PicklingError: If it cannot be pickled.
    """
    picklers: list[_PartPickler] = []

    def make(file: io.BytesIO, callback: Callable[[Any], Any]) -> pickle.Pickler:
        picklers.append(_PartPickler(file, callback, table))
        return picklers[0]

    try:
        pieces = _dump_with(make, part)
    except Exception as error:
        raise pickle.PicklingError(
            f"the part of rank {rank} cannot be pickled: {type(error).__name__}: {error}. "
            "Everything in a dataset must be something other processes can have: for example, a "
            "transform must be a function of an importable module, not a lambda, and a file must "
            "be opened where it is read"
        ) from error
    return Pickled(pieces, picklers[0].met)


def _dump_with(
    make_pickler: Callable[[io.BytesIO, Callable[[Any], Any]], pickle.Pickler], value: Any
) -> list[memoryview]:
    """Pickle ``value``; return the pickle and the buffers left out of it."""
    buffers: list[memoryview] = []

    def keep_in_band(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < _OUT_OF_BAND_BYTES:
            return True
        buffers.append(raw)
        return False

    file = io.BytesIO()
    make_pickler(file, keep_in_band).dump(value)
    return [file.getbuffer(), *buffers]
