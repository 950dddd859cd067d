"""Fewer bits for each number: float16, bfloat16, or eight bits with a scale for each block."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import numpy as np

from chainer_dist._counts import checked_count
from chainer_dist.communicators.shared_memory.communicator import SharedMemoryCommunicator
from chainer_dist.compression.compression import (
    Compression,
    NodeCompression,
    are_too_large,
    flatten,
    unpack,
)

if TYPE_CHECKING:
    from chainer_dist._typing import Array
    from chainer_dist.communicators import CommunicatorBase
    from chainer_dist.compression.compression import Nodes


_U32 = np.uint32


class Quantized(NodeCompression):
    """Sends each number in a coarser format twice: to the rank that sums it, and back.

    Every rank gets a slice of all gradients from the others, sums it in float32, and sends the sum to
    all: each number is rounded twice, however many ranks there are.
    """

    block = 1  # elements that are encoded together

    @abc.abstractmethod
    def encode(self, values: Array) -> Array:
        """Return float32 values of shape ``(rows, n)`` as bytes, ``(rows, m)`` uint8. Local.

        ``n`` is a multiple of ``block``.
        """

    @abc.abstractmethod
    def decode(self, code: Array) -> Array:
        """Return what :meth:`encode` encoded, float32 of shape ``(rows, n)``. Local."""

    def mean_over_nodes(self, nodes: Nodes, grads: dict[str, Array]) -> None:
        """See :meth:`NodeCompression.mean_over_nodes`."""
        comm = nodes.mpi_comm
        values = flatten(grads)
        values *= nodes.weight
        length = -(-values.size // comm.size)
        length += -length % self.block
        parts = np.zeros((comm.size, length), np.float32)
        parts.reshape(-1)[: values.size] = values
        self._before("parts", parts)
        code = self.encode(parts)
        self._after("parts", parts, code)
        received = np.empty_like(code)
        comm.Alltoall(code, received)
        total = self.decode(received[:1])
        for row in range(1, comm.size):
            total += self.decode(received[row : row + 1])
        self._before("total", total)
        code = self.encode(total)
        self._after("total", total, code)
        everyone = np.empty((comm.size, code.shape[1]), np.uint8)
        comm.Allgather(code, everyone)
        self.sent = 2 * code.nbytes * (comm.size - 1)
        unpack(self.decode(everyone).reshape(-1), grads.values())

    def _before(self, stage: str, values: Array) -> None:
        """Change values before they are encoded."""

    def _after(self, stage: str, values: Array, code: Array) -> None:
        """Take note of how values were encoded."""


class Rounded(Quantized):
    """Sends each number in a coarser format of its own, and leaves everything else as it is.

    With the communicator ``shared_memory`` gradients go the way that they go without compression, and
    only between nodes as :meth:`encode` makes them: so the exchange overlaps with backward, and the
    update is sharded. Between two nodes each number is rounded once.
    """

    def mean(self, comm: CommunicatorBase, grads: dict[str, Array]) -> None:
        """See :meth:`Compression.mean`."""
        if isinstance(comm, SharedMemoryCommunicator):
            self.sent = 0
            comm.mean_arrays(list(grads.values()), code=self)
        else:
            super().mean(comm, grads)


def as_codec(compression: Compression | None) -> Rounded | None:
    """Return a way of compressing if all it does is to round, or None. Local.

    A subclass that averages in a way of its own does more.
    """
    if not isinstance(compression, Rounded):
        return None
    kind = type(compression)
    inherits = kind.mean is Rounded.mean and kind.mean_over_nodes is Rounded.mean_over_nodes
    return compression if inherits else None


def _set_nan(code: Array, values: Array, nan: int) -> None:
    """Write the code of NaN where values are NaN, in place. Local."""
    where = np.isnan(values)
    if where.any():
        code[where] = nan


class Float16(Rounded):
    """Sends float16: half the bytes, 11 bits of precision.

    Numbers beyond 65504 become infinite, below 6e-8 zero; loss scaling keeps small ones. For those
    of large range take :class:`BFloat16`.

    Rounding is to nearest, ties to even, as that of NumPy, which takes up to 50 times as long: the
    arithmetic is that of Maratyszcza's FP16 library, on whole arrays.
    """

    def encode(self, values: Array) -> Array:
        """See :meth:`Quantized.encode`."""
        bits = values.view(np.uint32)
        with np.errstate(over="ignore"):  # what is too large becomes infinite here
            rounded = np.abs(values) * np.float32(2.0**112)
            rounded *= np.float32(2.0**-110)
        # A number so large is added that of the sum just the bits of a float16 are left.
        work = bits & _U32(0x7F800000)
        np.maximum(work, _U32(0x38800000), out=work)
        work += _U32(0x07800000)
        rounded += work.view(np.float32)
        half = rounded.view(np.uint32)
        np.right_shift(half, _U32(13), out=work)  # exponents
        work &= _U32(0x7C00)
        half &= _U32(0x0FFF)
        half += work
        _set_nan(half, values, 0x7E00)
        np.right_shift(bits, _U32(16), out=work)  # signs
        work &= _U32(0x8000)
        half |= work
        code: Array = half.astype(np.uint16).view(np.uint8)
        return code

    def decode(self, code: Array) -> Array:
        """See :meth:`Quantized.decode`."""
        bits = code.view(np.uint16).astype(np.uint32)
        signs = bits & _U32(0x8000)
        signs <<= _U32(16)
        bits &= _U32(0x7FFF)
        # Subnormal numbers lack the leading one: made larger by it, and less by as much.
        subnormal = (bits < _U32(1 << 10)).astype(np.uint32)
        bits <<= _U32(13)
        bits += _U32(0xE0 << 23)
        bits += subnormal << _U32(23)
        values: Array = bits.view(np.float32)
        values *= np.float32(2.0**-112)
        subnormal *= _U32(0x38800000)
        values -= subnormal.view(np.float32)
        bits |= signs
        return values


class BFloat16(Rounded):
    """Sends bfloat16: half the bytes, the range of float32, 8 bits of precision."""

    def encode(self, values: Array) -> Array:
        """See :meth:`Quantized.encode`."""
        bits = values.view(np.uint32)
        # Rounding to nearest, ties to even; a NaN could turn infinite by that.
        rounded = bits >> _U32(16)
        rounded &= _U32(1)
        rounded += _U32(0x7FFF)
        rounded += bits
        rounded >>= _U32(16)
        _set_nan(rounded, values, 0x7FC0)
        code: Array = rounded.astype(np.uint16).view(np.uint8)
        return code

    def decode(self, code: Array) -> Array:
        """See :meth:`Quantized.decode`."""
        bits = code.view(np.uint16).astype(np.uint32)
        bits <<= _U32(16)
        values: Array = bits.view(np.float32)
        return values


class Int8(Quantized):
    """Sends eight bits for each number and a float32 scale for each block: about a quarter of the bytes.

    Rounding errors are kept and added to the next gradients (error feedback).

    Args:
        block: Number of values that have a scale in common, 1 or more.

    Raises:
        ValueError: If ``block`` is not at least 1.
    """

    needs_all = True

    def __init__(self, block: int = 1024) -> None:
        super().__init__()
        self.block = checked_count("block", block, 1)

    def encode(self, values: Array) -> Array:
        """See :meth:`Quantized.encode`."""
        blocks = values.reshape(len(values), -1, self.block)
        scales = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(127)
        safe = np.where(scales > 0, scales, np.float32(1))
        with np.errstate(invalid="ignore"):  # NaN and Inf: the scale has them
            numbers = np.rint(blocks / safe).astype(np.int8)
        code = np.concatenate([scales.view(np.uint8), numbers.view(np.uint8)], axis=2)
        return code.reshape(len(values), -1)

    def decode(self, code: Array) -> Array:
        """See :meth:`Quantized.decode`."""
        blocks = code.reshape(len(code), -1, 4 + self.block)
        scales = np.ascontiguousarray(blocks[:, :, :4]).view(np.float32)
        with np.errstate(invalid="ignore"):
            values = np.ascontiguousarray(blocks[:, :, 4:]).view(np.int8) * scales
        return values.reshape(len(code), -1)

    def _before(self, stage: str, values: Array) -> None:
        self._residual.add_to({stage: values})

    def _after(self, stage: str, values: Array, code: Array) -> None:
        with np.errstate(invalid="ignore"):  # of what overflows nothing is kept
            rest = values - self.decode(code)
        if are_too_large(values):
            before = self._residual.get(stage, values.shape)
            large = [are_too_large(block) for block in values.reshape(-1, self.block)]
            kept = 0 if before is None else before.reshape(-1, self.block)[large]
            rest.reshape(-1, self.block)[large] = kept
        self._residual.keep(stage, rest)
