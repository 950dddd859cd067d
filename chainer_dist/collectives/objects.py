"""Python objects between ranks.

mpi4py's pkl5 does the transport: pickle protocol 5, with large buffers sent as they lie in
memory, and any size beyond 2 GiB. What is added here is that an object which cannot be pickled, or
unpickled on some rank, raises on all ranks, instead of leaving some of them waiting.

Messages between two ranks begin in the way of mpi4py's ``send``. An object that fits one message is all
of it, so that mpi4py's ``send`` and ``recv`` on the same communicator understand those here.
"""

from __future__ import annotations

import functools
import operator
import pickle
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from chainer_dist.collectives.failures import Failure, describe_error, raise_first, raise_together
from chainer_dist.collectives.group import Group
from chainer_dist.collectives.operation import collective, point_to_point

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi4py import MPI
    from mpi4py.util import pkl5


# Bytes of an object that are sent as one message; MPI counts up to 2 ** 31 - 1 of them.
_ONE_MESSAGE = 1 << 30


class _Pickled(NamedTuple):
    """An object on its way: its pickle, and the large buffers that were left out of it."""

    data: pickle.PickleBuffer
    buffers: list[pickle.PickleBuffer]
    number: int | None = None  # of the gradient that is to come back for it

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return sum(each.raw().nbytes for each in (self.data, *self.buffers))


class _Inline:
    """A pickled object, with its buffers, that is unpickled to the object itself."""

    def __init__(self, message: _Pickled) -> None:
        self._message = message

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (self._message.data, *self._message.buffers)


class _Announcement:
    """Tells that an object follows, as pkl5 sends it."""


def _load(data: Any, *buffers: Any) -> Any:
    return pickle.loads(data, buffers=buffers)


class _Failed(NamedTuple):
    """What travels instead of an object that its rank could not send."""

    rank: int
    failure: Failure


class ObjectCommunicator(Group):
    """Sends, broadcasts, gathers, scatters and reduces Python objects."""

    @point_to_point
    def send_obj(self, obj: Any, dest: int, tag: int = 0) -> None:
        """Send an object to rank ``dest``, which must call :meth:`recv_obj`.

        Up to 1 GiB can as well be received by ``mpi_comm.recv``.

        Args:
            obj: Any picklable object, of any size.
            dest: Receiving rank.
            tag: Message tag, not negative.

        Raises:
            Exception: If the object cannot be pickled; the receiver then raises as well.
        """
        message, error = self._attempt(lambda: obj)
        self._post(message, dest, tag).wait()
        self._raise_failure(message, error)

    def isend_obj(self, obj: Any, dest: int, tag: int = 0) -> pkl5.Request:
        """Begin to send an object to rank ``dest``, which must call :meth:`recv_obj`. Returns at once.

        Args:
            obj: Any picklable object, of any size. Arrays in it stay unchanged until it is sent.
            dest: Receiving rank.
            tag: Message tag, not negative.

        Returns:
            An mpi4py request, to ``wait()`` for or to ``test()`` until its first value is true. A large
            object gets on only while this rank is in some call of MPI.

        Raises:
            Exception: If the object cannot be pickled; the receiver then raises as well.
        """
        message, error = self._attempt(lambda: obj)
        request = self._post(message, dest, tag)
        if error is not None:
            request.wait()
        self._raise_failure(message, error)
        return request

    @point_to_point
    def recv_obj(
        self, source: int, status: MPI.Status | None = None, tag: int | None = None
    ) -> Any:
        """Receive an object that rank ``source`` sent with :meth:`send_obj` or :meth:`isend_obj`.

        Or with ``mpi_comm.send`` or ``mpi_comm.isend``.

        Args:
            source: Sending rank, or ``MPI.ANY_SOURCE``.
            status: Filled with source and tag where given.
            tag: Message tag; None or ``MPI.ANY_TAG`` takes any.

        Raises:
            Exception: If the sender could not pickle its object, with its error; or if the object
                cannot be unpickled here, of which the sender learns nothing.
        """
        return self._receive(source, tag, status)[0]

    @collective("root")
    def bcast_obj(self, obj: Any, max_buf_len: int = 256 * 1024 * 1024, root: int = 0) -> Any:
        """Broadcast an object from rank ``root``. Collective.

        Args:
            obj: Any picklable object on root; ignored elsewhere.
            max_buf_len: Accepted for ChainerMN scripts. No limit has to be set: objects of any
                size travel.
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

        Returns:
            A list in the order of rank on root, None elsewhere.

        Raises:
            Exception: On every rank, if any rank's object cannot be pickled, or unpickled on root.
        """
        return self._gather(lambda: obj, root)

    @collective()
    def allgather_obj(self, obj: Any) -> list[Any]:
        """Gather one object from every rank on every rank. Collective.

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
        message, error = self._attempt(lambda: obj)
        messages = self._pkl5.gather(message, root=0)
        if messages is not None:
            failed = [each for each in messages if isinstance(each, _Failed)]
            # `add`, not `+=`: the objects are the caller's
            message, error = (
                (failed[0], error)
                if failed
                else self._attempt(
                    lambda: functools.reduce(operator.add, map(self._opened, messages))
                )
            )
        (total,) = self._settled([self._pkl5.bcast(message, root=0)], error)
        return total

    @property
    def _pkl5(self) -> pkl5.Intracomm:
        from mpi4py.util import pkl5

        return pkl5.Intracomm(self.mpi_comm)

    def _post(
        self, message: _Pickled | _Failed, dest: int, tag: int, limit: int = _ONE_MESSAGE
    ) -> pkl5.Request:
        """Begin to send what :meth:`_attempt` made; up to ``limit`` bytes in one message. Local."""
        from mpi4py import MPI
        from mpi4py.util import pkl5

        if isinstance(message, _Pickled) and message.nbytes > limit:
            first = self.mpi_comm.isend(_Announcement(), dest=dest, tag=tag)
            return pkl5.Request([first, *self._pkl5.isend(message, dest=dest, tag=tag)])
        data: Any = message
        if isinstance(message, _Pickled) and message.number is None:
            data = _Inline(message)
        packed = pickle.dumps(data, protocol=5)
        return pkl5.Request([self.mpi_comm.Isend([packed, MPI.BYTE], dest=dest, tag=tag)])

    def _receive(
        self, source: int, tag: int | None, status: MPI.Status | None = None
    ) -> tuple[Any, int | None]:
        """Return an object that another rank has sent, and the number of its gradient or None."""
        from mpi4py import MPI

        status = MPI.Status() if status is None else status
        tag = MPI.ANY_TAG if tag is None else tag
        message = self.mpi_comm.recv(source=source, tag=tag, status=status)
        if isinstance(message, _Announcement):
            message = self._pkl5.recv(source=status.Get_source(), tag=status.Get_tag())
        if isinstance(message, (_Pickled, _Failed)):
            return self._opened(message), getattr(message, "number", None)
        return message, None

    # The five below are shared with arrays: `make` returns the object, or raises what is wrong
    # with it, and all ranks are told.

    def _bcast(self, make: Callable[[], Any], root: int) -> Any:
        """Return root's object; None on root itself."""
        if self.rank != root:
            return self._settled([self._pkl5.bcast(None, root=root)], None)[0]
        message, error = self._attempt(make)
        self._pkl5.bcast(message, root=root)
        self._settled([], error)
        return None

    def _gather(self, make: Callable[[], Any], root: int) -> list[Any] | None:
        message, error = self._attempt(make)
        opened = self._settled(self._pkl5.gather(message, root=root) or [], error)
        return opened if self.rank == root else None

    def _allgather(self, make: Callable[[], Any]) -> list[Any]:
        message, error = self._attempt(make)
        return self._settled(self._pkl5.allgather(message), error)

    def _scatter(self, make: Callable[[], Sequence[Any]], root: int) -> Any:
        messages, error = None, None
        if self.rank == root:
            messages, error = self._attempt_each(make)
        return self._settled([self._pkl5.scatter(messages, root=root)], error)[0]

    def _alltoall(self, make: Callable[[], Sequence[Any]]) -> list[Any]:
        messages, error = self._attempt_each(make)
        return self._settled(self._pkl5.alltoall(messages), error)

    def _settled(
        self, messages: Sequence[_Pickled | _Failed], error: BaseException | None
    ) -> list[Any]:
        """Return the objects that came; raise on every rank what went wrong on one. Collective.

        Args:
            messages: That this rank has received.
            error: Why this rank could not send its own.
        """
        opened = []
        if error is None and not any(isinstance(each, _Failed) for each in messages):
            try:
                opened = [self._opened(each) for each in messages]
            except BaseException as caught:  # noqa: BLE001 - it is raised on every rank
                error = caught
        raise_together(self, error)
        return opened

    def _attempt(self, make: Callable[[], Any]) -> tuple[_Pickled | _Failed, BaseException | None]:
        from mpi4py.util import pkl5

        try:
            data, buffers = pkl5.pickle.dumps_oob(make())
        except BaseException as error:  # noqa: BLE001 - others wait for what reduce methods raise
            return _Failed(self.rank, describe_error(error)), error
        wrapped = [pickle.PickleBuffer(cast("bytes", each)) for each in (data, *buffers)]
        return _Pickled(wrapped[0], wrapped[1:]), None

    def _attempt_each(
        self, make: Callable[[], Sequence[Any]]
    ) -> tuple[list[_Pickled | _Failed], BaseException | None]:
        """Pickle one object for each rank; if one fails, every rank is told of the failure."""
        try:
            attempts = [self._attempt(lambda each=each: each) for each in make()]  # type: ignore[misc]
        except BaseException as error:  # noqa: BLE001 - `make` raises what is wrong with its input
            return [_Failed(self.rank, describe_error(error))] * self.size, error
        for message, failure in attempts:
            if failure is not None:
                return [message] * self.size, failure
        return [message for message, _ in attempts], None

    def _opened(self, message: _Pickled | _Failed) -> Any:
        """Return the object of a message, or raise why it was not sent."""
        from mpi4py.util import pkl5

        self._raise_failure(message, None)
        assert not isinstance(message, _Failed)  # noqa: S101 - for the type checker
        return pkl5.pickle.loads_oob(message.data, message.buffers)

    def _raise_failure(self, message: _Pickled | _Failed, cause: BaseException | None) -> None:
        """Raise why a message was not sent, if it was not."""
        if isinstance(message, _Failed):
            raise_first({message.rank: message.failure}, cause)
