"""NumPy arrays between ranks.

Moving an array keeps its dtype, shape and values to the bit, whatever its layout in memory; only a
foreign byte order becomes the native one. All ranks learn of one rank's bad input (see
:mod:`chainer_dist.collectives.objects`).
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist.collectives import reduction
from chainer_dist.collectives.agreement import check_same
from chainer_dist.collectives.messages import pack, post, raise_failure
from chainer_dist.collectives.objects import ObjectCommunicator
from chainer_dist.collectives.operation import collective, point_to_point

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from chainer_dist._typing import Array, ArrayOrTuple

# Bytes up to which arrays are copied into one message; larger ones are sent from where they lie.
SMALL = 64 << 10


class ArrayCommunicator(ObjectCommunicator, abc.ABC):
    """Sends, broadcasts, gathers, scatters, exchanges and reduces NumPy arrays.

    Arrays may be of any bool, integer, float or complex dtype, of any shape (empty and
    0-dimensional too), of any layout, read-only, and of any size. What is received is always a
    new, writable array that no other rank shares.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "mean_arrays" in vars(cls):  # each kind of communicator overrides it
            watched = collective("arrays")(cls.mean_arrays)
            cls.mean_arrays = watched  # type: ignore[method-assign]  # the same to its callers

    @abc.abstractmethod
    def mean_arrays(self, arrays: Sequence[Array]) -> None:
        """Replace each array by its mean over the ranks, in place. Collective.

        Args:
            arrays: Writable float arrays of any layout. Their number, shapes, dtypes and order are the
                same on every rank, which is not checked. The same array may be among them twice.
                float16 is summed in float32.
        """

    @point_to_point
    def send(self, data: ArrayOrTuple | list[Array], dest: int, tag: int) -> None:
        """Send an array, or a tuple of arrays, to rank ``dest``, which must call :meth:`recv`.

        Args:
            data: An array, or a tuple or list of arrays.
            dest: Receiving rank.
            tag: Message tag, not negative.

        Raises:
            TypeError: If ``data`` is anything else; the receiver then raises as well.
        """
        message, error = pack(self.rank, lambda: _checked_arrays(data, "send"))
        post(self.mpi_comm, message, dest, tag, limit=SMALL).wait()
        raise_failure(message, error)

    @point_to_point
    def recv(self, source: int, tag: int) -> ArrayOrTuple:
        """Receive what rank ``source`` sent with :meth:`send`.

        Args:
            source: Sending rank.
            tag: Message tag.

        Returns:
            A new array; a tuple of new arrays if a tuple or list was sent.
        """
        received = self.recv_obj(source, tag=tag)
        return _writable_all(received) if isinstance(received, tuple) else _writable(received)

    @collective("root")
    def bcast(self, x: Array | None, root: int = 0, *, max_buf_len: int | None = None) -> Array:
        """Broadcast an array from rank ``root``. Collective.

        Args:
            x: The array on root; ignored elsewhere.
            root: Sending rank, the same on every rank.
            max_buf_len: Accepted for ChainerMN scripts; no limit has to be set.

        Returns:
            ``x`` itself on root, a new array elsewhere.

        Raises:
            TypeError: On every rank, if ``x`` is not an array on root.
        """
        del max_buf_len
        received = self._bcast(lambda: _checked_array(x, "bcast"), root)
        if self.rank != root:
            return _writable(received)
        assert x is not None  # noqa: S101 - for the type checker: None was refused above
        return x

    @collective("root")
    def gather(self, x: Array, root: int = 0) -> tuple[Array, ...] | None:
        """Gather one array from every rank on rank ``root``. Collective.

        Args:
            x: This rank's array; shapes and dtypes may differ between ranks.
            root: Receiving rank, the same on every rank.

        Returns:
            A tuple of ``size`` new arrays in the order of rank on root, None elsewhere.

        Raises:
            TypeError: On every rank, if any rank passes no array.
        """
        arrays = self._gather(lambda: _checked_array(x, "gather"), root)
        return None if arrays is None else _writable_all(arrays)

    @collective()
    def allgather(self, x: Array) -> tuple[Array, ...]:
        """Gather one array from every rank on every rank. Collective.

        Args:
            x: This rank's array; shapes and dtypes may differ between ranks.

        Returns:
            A tuple of ``size`` new arrays in the order of rank.

        Raises:
            TypeError: On every rank, if any rank passes no array.
        """
        return _writable_all(self._allgather(lambda: _checked_array(x, "allgather")))

    @collective()
    def alltoall(self, xs: Sequence[Array]) -> tuple[Array, ...]:
        """Send the i-th array to rank i, and receive one from each. Collective.

        Args:
            xs: ``size`` arrays, of any shapes and dtypes.

        Returns:
            A tuple of ``size`` new arrays, in the order of the ranks that sent them.

        Raises:
            TypeError, ValueError: On every rank, if any rank passes something else.
        """
        return _writable_all(self._alltoall(lambda: _checked_per_rank(xs, self.size, "alltoall")))

    @collective("root")
    def scatter(self, xs: Array | Sequence[Array] | None, root: int = 0) -> Array:
        """Give each rank one of the arrays that rank ``root`` has. Collective.

        Args:
            xs: On root, ``size`` arrays, or one array of shape ``(size, ...)`` whose rows are
                given away; ignored elsewhere.
            root: Sending rank, the same on every rank.

        Returns:
            A new array, equal to ``xs[rank]`` on root.

        Raises:
            TypeError, ValueError: On every rank, if root passes something else.
        """
        return _writable(self._scatter(lambda: _checked_per_rank(xs, self.size, "scatter"), root))

    @collective("x", "op")
    def allreduce(self, x: Array, op: str = "sum") -> Array:
        """Combine the arrays of all ranks element by element. Collective.

        Args:
            x: This rank's array, of the same shape and dtype on every rank.
            op: ``sum``, ``mean``, ``max``, ``min`` or ``prod``, the same on every rank.

        Returns:
            A new array of the shape of ``x``, the same bits on every rank. Its dtype is that of
            ``x``, except that the mean of integers or bools is float64. float16 is computed in
            float32 and rounded once. Integers wrap around, and the sum of bools is their logical
            or, as with NumPy's ``+``. NaN wins in max and min, as in NumPy's ``maximum``.

        Raises:
            RankMismatchError: On every rank, if shape, dtype or op differ.
            TypeError: If ``x`` is no such array, or is complex for max and min.
            ValueError: If ``op`` is none of these.
        """
        error, description = None, "not an array that can be reduced"
        try:
            array = np.ascontiguousarray(_checked_array(x, "allreduce")).reshape(x.shape)
            reduction.check_op(op, array.dtype)
            description = f"{array.shape} {array.dtype} for {op}"
        except (TypeError, ValueError) as caught:
            error = caught  # compared by one small allreduce, which together() would double
        check_same(self, [("the argument of allreduce", description)])
        if error is not None:
            raise error
        return reduction.allreduce(self.mpi_comm, array, op)


def _checked_array(x: object, operation: str) -> Array:
    """Return ``x`` as a plain array, contiguous in C or Fortran order, in native byte order."""
    if not isinstance(x, (np.ndarray, np.generic)):
        hint = "; pass its .array" if hasattr(x, "array") else ""
        raise TypeError(f"{operation} takes a NumPy array, got {type(x).__name__}{hint}")
    array = np.asarray(x)
    if array.dtype.kind not in "biufc":
        other = "mpi_comm.alltoall" if operation == "alltoall" else f"{operation}_obj"
        raise TypeError(
            f"{operation} takes bool, integer, float or complex arrays, got {array.dtype}; "
            f"use {other} for anything else"
        )
    # NumPy's pickle loses the byte order of long doubles.
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return array if array.flags.forc else np.ascontiguousarray(array)


def _checked_arrays(data: object, operation: str) -> ArrayOrTuple:
    if isinstance(data, (tuple, list)):
        return tuple(_checked_array(x, operation) for x in data)
    return _checked_array(data, operation)


def _checked_per_rank(xs: object, size: int, operation: str) -> list[Array]:
    """Return ``xs`` as a list of ``size`` arrays."""
    if isinstance(xs, np.ndarray) and xs.ndim == 0:
        raise ValueError(f"{operation} cannot split a 0-dimensional array over {size} ranks")
    if not isinstance(xs, (tuple, list, np.ndarray)):
        raise TypeError(f"{operation} takes {size} NumPy arrays, got {type(xs).__name__}")
    if len(xs) != size:
        raise ValueError(f"{operation} takes {size} arrays, one a rank, got {len(xs)}")
    return [_checked_array(x, operation) for x in xs]


def _writable(x: Array) -> Array:
    """Return ``x``, or a copy where pickle kept it read-only as it was on the sender."""
    return x if x.flags.writeable else np.array(x, order="K")


def _writable_all(xs: Iterable[Array]) -> tuple[Array, ...]:
    return tuple(_writable(x) for x in xs)
