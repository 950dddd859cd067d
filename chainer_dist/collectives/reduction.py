"""Element-wise reductions over ranks: the dtype of the computation, pieces that MPI can count, and MPI ops."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mpi4py import MPI

    from chainer_dist._typing import Array

OPS = ("sum", "mean", "max", "min", "prod")

# MPI counts are 32-bit before MPI 4; a piece stays below that.
MAX_COUNT = 1 << 30


def check_op(op: str, dtype: np.dtype[Any]) -> None:
    """Check that there is a reduction for a dtype. Local.

    Args:
        op: Name of the reduction.
        dtype: Dtype of the array.

    Raises:
        ValueError: If the reduction is unknown.
        TypeError: If the dtype has no such reduction.
    """
    if op not in OPS:
        raise ValueError(f"op is one of {', '.join(OPS)}, got {op!r}")
    if op in ("max", "min") and dtype.kind == "c":
        raise TypeError(f"complex numbers have no order, so no {op}: got {dtype}")


def wire_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of a reduction's computation: float32 for float16, in native byte order. Local."""
    if dtype.char == "e":
        return np.dtype(np.float32)
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def allreduce(mpi_comm: MPI.Intracomm, x: Array, op: str) -> Array:
    """Return the reduction of a C-contiguous native array over the ranks as a new array. Collective.

    See :meth:`~chainer_dist.collectives.arrays.ArrayCommunicator.allreduce`.
    """
    is_mean = op == "mean"
    dtype = np.dtype(np.float64) if is_mean and x.dtype.kind in "biu" else x.dtype
    result = x.astype(wire_dtype(dtype), order="C")
    _in_place(mpi_comm, result, _mpi_op("sum" if is_mean else op, result.dtype))
    if is_mean:
        np.true_divide(result, mpi_comm.size, out=result)
    return result.astype(dtype, copy=False)


def sum_in_place(mpi_comm: MPI.Intracomm, x: Array) -> None:
    """Replace a C-contiguous array of a wire dtype by its sum over the ranks. Collective."""
    _in_place(mpi_comm, x, _mpi_op("sum", x.dtype))


def begin_sum(mpi_comm: MPI.Intracomm, x: Array) -> MPI.Request:
    """Begin to replace a C-contiguous array of a wire dtype by its sum over the ranks. Collective.

    Args:
        mpi_comm: The communicator over whose ranks the sum is taken.
        x: An array of less than ``MAX_COUNT`` elements, which no other code touches until the request is done.
    """
    from mpi4py import MPI

    return mpi_comm.Iallreduce(MPI.IN_PLACE, x, _mpi_op("sum", x.dtype))


def mean_in_place(mpi_comm: MPI.Intracomm, x: Array) -> None:
    """Replace a float array of any layout by its mean over the ranks. Collective."""
    dtype = wire_dtype(x.dtype)
    # Ranks may hold one gradient in different layouts, so raw memory is used in C order only.
    work = x if x.flags.c_contiguous and x.dtype == dtype else x.astype(dtype, order="C")
    sum_in_place(mpi_comm, work)
    np.multiply(work, 1.0 / mpi_comm.size, out=x, casting="same_kind")


def pieces(x: Array) -> Iterator[Array]:
    """Yield 1-dimensional views of a C-contiguous array, each small enough for MPI's counts. Local."""
    flat = x.reshape(-1)
    for start in range(0, flat.size, MAX_COUNT):
        yield flat[start : start + MAX_COUNT]


def _in_place(mpi_comm: MPI.Intracomm, x: Array, op: MPI.Op) -> None:
    from mpi4py import MPI

    for piece in pieces(x):
        mpi_comm.Allreduce(MPI.IN_PLACE, piece, op)


def _mpi_op(op: str, dtype: np.dtype[Any]) -> MPI.Op:
    from mpi4py import MPI

    if dtype.kind == "b":
        return MPI.LOR if op in ("sum", "max") else MPI.LAND
    if dtype.kind == "f" and op in ("max", "min"):
        return _nan_aware_op(op, dtype.char)
    ops: dict[str, MPI.Op] = {
        "sum": MPI.SUM,
        "max": MPI.MAX,
        "min": MPI.MIN,
        "prod": MPI.PROD,
    }
    return ops[op]


@functools.cache
def _nan_aware_op(op: str, char: str) -> MPI.Op:
    """Return an MPI op whose result is NaN if any value is; MPI's own max and min do not define that."""
    from mpi4py import MPI

    combine: Callable[..., Any] = np.maximum if op == "max" else np.minimum

    def function(source: Any, target: Any, datatype: MPI.Datatype) -> None:
        del datatype
        out = np.frombuffer(target, dtype=char)
        combine(np.frombuffer(source, dtype=char), out, out=out)

    return MPI.Op.Create(function, commute=True)
