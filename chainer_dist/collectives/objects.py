"""Python objects between ranks.

mpi4py does the transport (see :mod:`chainer_dist.collectives.messages`). In addition, an object that cannot be
pickled, or unpickled on some rank, raises an error on all ranks, where some would otherwise wait forever.
"""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any

from chainer_dist.collectives.extremes import arrive
from chainer_dist.collectives.failures import together
from chainer_dist.collectives.group import Group
from chainer_dist.collectives.messages import (
    Failed,
    pack,
    pack_each,
    post,
    raise_failure,
    receive,
    unpack,
)
from chainer_dist.collectives.operation import collective, point_to_point

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi4py import MPI
    from mpi4py.util import pkl5

    from chainer_dist.collectives.messages import Message


class ObjectCommunicator(Group):
    """Sends, broadcasts, gathers, scatters and reduces Python objects."""

    @point_to_point
    def send_obj(self, obj: Any, dest: int, tag: int = 0) -> None:
        """Send an object to rank ``dest``, which must call :meth:`recv_obj`.

        ``mpi_comm.recv`` can receive objects of up to 1 GiB as well.

        Args:
            obj: Any picklable object, of any size.
            dest: Receiving rank.
            tag: Message tag, not negative.

        Raises:
            Exception: If the object cannot be pickled; the receiver then raises as well.
        """
        message, error = pack(self.rank, lambda: obj)
        post(self.mpi_comm, message, dest, tag).wait()
        raise_failure(message, error)

    def isend_obj(self, obj: Any, dest: int, tag: int = 0) -> pkl5.Request:
        """Begin to send an object to rank ``dest``, which must call :meth:`recv_obj`, and return at once.

        Args:
            obj: Any picklable object, of any size. Arrays in it stay unchanged until it is sent.
            dest: Receiving rank.
            tag: Message tag, not negative.

        Returns:
            A request of mpi4py; call its ``wait()``, or its ``test()`` until the first value is true. A large
            object is sent only while this rank is in some call of MPI.

        Raises:
            Exception: If the object cannot be pickled; the receiver then raises as well.
        """
        message, error = pack(self.rank, lambda: obj)
        request = post(self.mpi_comm, message, dest, tag)
        if error is not None:
            request.wait()
        raise_failure(message, error)
        return request

    @point_to_point
    def recv_obj(
        self, source: int, status: MPI.Status | None = None, tag: int | None = None
    ) -> Any:
        """Receive an object that rank ``source`` sent with :meth:`send_obj` or :meth:`isend_obj`.

        It may also come from ``mpi_comm.send`` or ``mpi_comm.isend``.

        Args:
            source: Sending rank, or ``MPI.ANY_SOURCE``.
            status: Status that takes source and tag, or None.
            tag: Message tag; None or ``MPI.ANY_TAG`` for any.

        Raises:
            Exception: If the sender could not pickle its object, or if the object cannot be unpickled
                here. In the latter case the sender gets no error.
        """
        return receive(self.mpi_comm, source, tag, status)[0]

    @collective("root")
    def bcast_obj(self, obj: Any, max_buf_len: int = 256 * 1024 * 1024, root: int = 0) -> Any:
        """Broadcast an object from rank ``root``. Collective.

        Args:
            obj: Any picklable object on root; ignored elsewhere.
            max_buf_len: Not used; accepted for ChainerMN scripts. Objects may have any size.
            root: Sending rank, the same on every rank.

        Returns:
            The object itself on root, a copy elsewhere.

        Raises:
            Exception: On every rank, if root's object cannot be pickled, or unpickled on some rank.
        """
        del max_buf_len
        received = self._bcast(lambda: obj, root)
        return obj if self.rank == root else received

    @collective("root")
    def gather_obj(self, obj: Any, root: int = 0) -> list[Any] | None:
        """Gather one object from every rank on rank ``root``. Collective.

        Args:
            obj: Any picklable object.
            root: Receiving rank, the same on every rank.

        Returns:
            A list in the order of rank on root, None elsewhere.

        Raises:
            Exception: On every rank, if any rank's object cannot be pickled, or unpickled on root.
        """
        return self._gather(lambda: obj, root)

    @collective()
    def allgather_obj(self, obj: Any) -> list[Any]:
        """Gather one object from every rank on every rank. Collective.

        Args:
            obj: Any picklable object.

        Returns:
            A list in the order of rank, on every rank.

        Raises:
            Exception: On every rank, if any rank's object cannot be pickled, or unpickled on some.
        """
        return self._allgather(lambda: obj)

    @collective("root")
    def scatter_obj(self, objs: Sequence[Any] | None, root: int = 0) -> Any:
        """Give each rank one object of a sequence that rank ``root`` has. Collective.

        Args:
            objs: On root a sequence of ``size`` picklable objects; ignored elsewhere.
            root: Sending rank, the same on every rank.

        Returns:
            A copy of ``objs[rank]``.

        Raises:
            ValueError: On every rank, if root's sequence is not of length ``size``.
            Exception: On every rank, if one of the objects cannot be pickled, or unpickled.
        """

        def checked() -> Sequence[Any]:
            if objs is None or len(objs) != self.size:
                got = "None" if objs is None else f"{len(objs)} objects"
                raise ValueError(f"scatter_obj needs {self.size} objects, one a rank, got {got}")
            return objs

        return self._scatter(checked, root)

    @collective()
    def allreduce_obj(self, obj: Any) -> Any:
        """Sum one object from every rank with ``+``, in the order of rank. Collective.

        Args:
            obj: Any picklable object with ``+``: numbers, arrays, lists, strings.

        Returns:
            ``((x0 + x1) + x2) + ...``, the same on every rank.

        Raises:
            Exception: On every rank, if an object cannot be pickled, unpickled or added.
        """
        arrive(self)
        message, error = pack(self.rank, lambda: obj)
        messages = self._pkl5.gather(message, root=0)
        if messages is not None:
            failed = [each for each in messages if isinstance(each, Failed)]
            # Not by `+=`, which would change the caller's objects.
            message, error = (
                (failed[0], error)
                if failed
                else pack(self.rank, lambda: functools.reduce(operator.add, map(unpack, messages)))
            )
        (total,) = self._settled([self._pkl5.bcast(message, root=0)], error)
        return total

    @property
    def _pkl5(self) -> pkl5.Intracomm:
        from mpi4py.util import pkl5

        return pkl5.Intracomm(self.mpi_comm)

    # The five methods below are for arrays as well. `make` returns the object, or raises an error, which is
    # then raised on all ranks.

    def _bcast(self, make: Callable[[], Any], root: int) -> Any:
        """Return root's object; None on root itself."""
        arrive(self)
        if self.rank != root:
            return self._settled([self._pkl5.bcast(None, root=root)], None)[0]
        message, error = pack(self.rank, make)
        self._pkl5.bcast(message, root=root)
        self._settled([], error)
        return None

    def _gather(self, make: Callable[[], Any], root: int) -> list[Any] | None:
        arrive(self)
        message, error = pack(self.rank, make)
        opened = self._settled(self._pkl5.gather(message, root=root) or [], error)
        return opened if self.rank == root else None

    def _allgather(self, make: Callable[[], Any]) -> list[Any]:
        arrive(self)
        message, error = pack(self.rank, make)
        return self._settled(self._pkl5.allgather(message), error)

    def _scatter(self, make: Callable[[], Sequence[Any]], root: int) -> Any:
        arrive(self)
        messages, error = None, None
        if self.rank == root:
            messages, error = pack_each(self.rank, self.size, make)
        return self._settled([self._pkl5.scatter(messages, root=root)], error)[0]

    def _alltoall(self, make: Callable[[], Sequence[Any]]) -> list[Any]:
        arrive(self)
        messages, error = pack_each(self.rank, self.size, make)
        return self._settled(self._pkl5.alltoall(messages), error)

    def _settled(self, messages: Sequence[Message], error: BaseException | None) -> list[Any]:
        """Return the objects of messages, or raise an error of any rank on every rank. Collective.

        Args:
            messages: Messages that this rank has received.
            error: The error because of which this rank could not send its own, or None.
        """
        opened = []
        with together(self):
            if error is not None:
                raise error
            if not any(isinstance(each, Failed) for each in messages):  # else another rank raises
                opened = [unpack(each) for each in messages]
        return opened
