"""The communicator that packs arrays into one buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist.collectives import reduction
from chainer_dist.collectives.operation import PACK, UNPACK, Operation
from chainer_dist.communicators.communicator_base import CommunicatorBase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist._typing import Array


class FlatCommunicator(CommunicatorBase):
    """Averages all arrays of a dtype in one packed buffer and one MPI call.

    One latency for any number of arrays, at the price of a copy into the buffer and back. The
    buffer, as large as all gradients together, is kept from call to call.
    """

    name = "flat"

    def mean_arrays(self, arrays: Sequence[Array]) -> None:
        """See :meth:`CommunicatorBase.mean_arrays`."""
        groups: dict[np.dtype[Any], list[Array]] = {}
        for array in arrays:
            groups.setdefault(reduction.wire_dtype(array.dtype), []).append(array)
        for dtype, group in groups.items():
            self._mean_packed(self._buffer(dtype, sum(array.size for array in group)), group)

    def _mean_packed(self, buffer: Array, arrays: list[Array]) -> None:
        slots, start = [], 0
        with Operation(PACK):
            for array in arrays:
                slot = buffer[start : start + array.size].reshape(array.shape)
                np.copyto(slot, array)
                slots.append(slot)
                start += array.size
        scale = self._reduce(buffer)
        with Operation(UNPACK):
            for slot, array in zip(slots, arrays):
                np.multiply(slot, scale, out=array, casting="same_kind")

    def _reduce(self, buffer: Array) -> float:
        """Sum the buffer over the ranks in place; return what makes a mean of it. Collective."""
        reduction.sum_in_place(self.mpi_comm, buffer)
        return 1.0 / self.size

    def _buffer(self, dtype: np.dtype[Any], size: int) -> Array:
        buffers: dict[np.dtype[Any], Array] = self.__dict__.setdefault("_buffers", {})
        if dtype not in buffers or buffers[dtype].size < size:
            buffers[dtype] = np.empty(size, dtype=dtype)
        return buffers[dtype][:size]

    def finalize(self) -> None:
        """Give buffers and MPI communicators back. Collective; a second call does nothing."""
        self.__dict__.pop("_buffers", None)
        super().finalize()
