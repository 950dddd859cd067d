"""Fewer bits for each number: float16, bfloat16, or eight bits with a scale for each block."""

from __future__ import annotations

import abc
import operator
from typing import TYPE_CHECKING

import numpy as np

from chainer_dist.compression.compression import NodeCompression

if TYPE_CHECKING:
    from chainer_dist.communicators.arrays import Array
    from chainer_dist.compression.compression import Nodes


class Quantized(NodeCompression):
    """Sends each number in a coarser format, once to who sums it and once back.

    Every rank gets a part of all gradients from the others, sums it in float32, and sends the sum to
    all: each number is rounded twice, however many ranks there are.
    """

    block = 1  # elements that are encoded together

    @abc.abstractmethod
    def encode(self, values: Array) -> Array:
        """Return float32 values of shape ``(rows, n)`` as bytes, ``(rows, m)`` uint8. Local.

        ``n`` is a multiple of :attr:`block`.
        """

    @abc.abstractmethod
    def decode(self, code: Array) -> Array:
        """Return what :meth:`encode` encoded, float32 of shape ``(rows, n)``. Local."""

    def mean_over_nodes(self, nodes: Nodes, grads: dict[str, Array]) -> None:
        """See :meth:`NodeCompression.mean_over_nodes`."""
        comm = nodes.mpi_comm
        flat = np.concatenate([np.ravel(grad) for grad in grads.values()]).astype(np.float32)
        flat *= nodes.weight
        length = -(-flat.size // comm.size)
        length += -length % self.block
        parts = np.zeros((comm.size, length), np.float32)
        parts.reshape(-1)[: flat.size] = flat
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
        mean = self.decode(everyone).reshape(-1)
        start = 0
        for grad in grads.values():
            grad[...] = mean[start : start + grad.size].reshape(grad.shape)
            start += grad.size

    def _before(self, stage: str, values: Array) -> None:
        """Change values before they are encoded."""

    def _after(self, stage: str, values: Array, code: Array) -> None:
        """Take note of how values were encoded."""


class Float16(Quantized):
    """Sends float16: half the bytes, 11 bits of precision.

    Numbers beyond 65504 become infinite, below 6e-8 zero; loss scaling keeps small ones. For those
    of large range take :class:`BFloat16`.
    """

    def encode(self, values: Array) -> Array:
        """See :meth:`Quantized.encode`."""
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint8)

    def decode(self, code: Array) -> Array:
        """See :meth:`Quantized.decode`."""
        return code.view(np.float16).astype(np.float32)


class BFloat16(Quantized):
    """Sends bfloat16: half the bytes, the range of float32, 8 bits of precision."""

    def encode(self, values: Array) -> Array:
        """See :meth:`Quantized.encode`."""
        bits = values.view(np.uint32)
        # Rounding to nearest, ties to even; a NaN could turn infinite by that.
        rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
        rounded[np.isnan(values)] = 0x7FC0
        return rounded.astype(np.uint16).view(np.uint8)

    def decode(self, code: Array) -> Array:
        """See :meth:`Quantized.decode`."""
        return (code.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


class Int8(Quantized):
    """Sends eight bits for each number and a float32 scale for each block: about a quarter of the bytes.

    Rounding errors are kept and added to the next gradients (error feedback).

    Args:
        block: Numbers that have a scale in common.

    Raises:
        ValueError: If ``block`` is not at least 1.
    """

    def __init__(self, block: int = 1024) -> None:
        super().__init__()
        self.block = operator.index(block)
        if self.block < 1:
            raise ValueError(f"block is {block}, expected 1 or more")

    def encode(self, values: Array) -> Array:
        """See :meth:`Quantized.encode`."""
        blocks = values.reshape(len(values), -1, self.block)
        scales = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(127)
        safe = np.where(scales > 0, scales, np.float32(1))
        with np.errstate(invalid="ignore"):  # NaN and Inf: the scale tells
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
        rest = values - self.decode(code)
        self._residual.keep(stage, np.where(np.isfinite(rest), rest, np.float32(0)))
