"""Objects on their way between two ranks, and what is sent instead of an object that cannot be pickled.

mpi4py's pkl5 does the transport: pickle protocol 5, with large buffers sent as they lie in
memory, and any size beyond 2 GiB.

Messages between two ranks begin in the way of mpi4py's ``send``. An object that fits one message is all
of it, so that mpi4py's ``send`` and ``recv`` on the same communicator understand those here.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, NamedTuple, Union, cast

from chainer_dist.collectives.failures import Failure, describe_error, raise_first

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi4py import MPI
    from mpi4py.util import pkl5

__all__ = [
    "Failed",
    "Message",
    "Pickled",
    "pack",
    "pack_each",
    "post",
    "raise_failure",
    "receive",
    "unpack",
]

# Bytes of an object that are sent as one message; MPI counts up to 2 ** 31 - 1 of them.
_ONE_MESSAGE = 1 << 30


class Pickled(NamedTuple):
    """An object on its way.

    Attributes:
        data: Its pickle.
        buffers: The large buffers that were left out of the pickle.
        number: Number of the gradient that is to come back for it, or None.
    """

    data: pickle.PickleBuffer
    buffers: list[pickle.PickleBuffer]
    number: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return sum(each.raw().nbytes for each in (self.data, *self.buffers))


class Failed(NamedTuple):
    """The error of an object that its rank could not send.

    Attributes:
        rank: The rank.
        failure: Description of the error.
    """

    rank: int
    failure: Failure


Message = Union[Pickled, Failed]


class _Inline:
    """A pickled object, with its buffers, that is unpickled to the object itself."""

    def __init__(self, message: Pickled) -> None:
        self._message = message

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (self._message.data, *self._message.buffers)


class _Announcement:
    """Says that an object follows, as pkl5 sends it."""


def _load(data: Any, *buffers: Any) -> Any:
    return pickle.loads(data, buffers=buffers)


def pack(rank: int, make: Callable[[], Any]) -> tuple[Message, BaseException | None]:
    """Pickle an object. Local.

    Args:
        rank: This rank.
        make: Function that returns the object, or raises why there is none.

    Returns:
        A message for :func:`post`, and the error that it has instead of an object, or None.
    """
    from mpi4py.util import pkl5

    try:
        data, buffers = pkl5.pickle.dumps_oob(make())
    except BaseException as error:  # noqa: BLE001 - others wait for what reduce methods raise
        return Failed(rank, describe_error(error)), error
    wrapped = [pickle.PickleBuffer(cast("bytes", each)) for each in (data, *buffers)]
    return Pickled(wrapped[0], wrapped[1:]), None


def pack_each(
    rank: int, size: int, make: Callable[[], Sequence[Any]]
) -> tuple[list[Message], BaseException | None]:
    """Pickle one object for each rank; if one fails, all messages have its error. Local.

    Args:
        rank: This rank.
        size: Number of ranks.
        make: Function that returns ``size`` objects, or raises why there are none.

    Returns:
        A message for each rank, and the error that they have, or None.
    """
    try:
        attempts = [pack(rank, lambda each=each: each) for each in make()]  # type: ignore[misc]
    except BaseException as error:  # noqa: BLE001 - `make` raises what is wrong with its input
        return [Failed(rank, describe_error(error))] * size, error
    for message, failure in attempts:
        if failure is not None:
            return [message] * size, failure
    return [message for message, _ in attempts], None


def unpack(message: Message) -> Any:
    """Return the object of a message, or raise why it was not sent. Local."""
    from mpi4py.util import pkl5

    raise_failure(message, None)
    assert not isinstance(message, Failed)  # noqa: S101 - for the type checker
    return pkl5.pickle.loads_oob(message.data, message.buffers)


def raise_failure(message: Message, cause: BaseException | None) -> None:
    """Raise why the object of a message was not sent, if it was not. Local."""
    if isinstance(message, Failed):
        raise_first({message.rank: message.failure}, cause)


def post(
    comm: MPI.Intracomm, message: Message, dest: int, tag: int, limit: int = _ONE_MESSAGE
) -> pkl5.Request:
    """Begin to send a message. Local.

    Args:
        comm: Communicator of mpi4py.
        message: Message that :func:`pack` has made.
        dest: Receiving rank.
        tag: Message tag.
        limit: Bytes up to which all of it is one message of MPI.

    Returns:
        A request to wait for.
    """
    from mpi4py import MPI
    from mpi4py.util import pkl5

    if isinstance(message, Pickled) and message.nbytes > limit:
        first = comm.isend(_Announcement(), dest=dest, tag=tag)
        return pkl5.Request([first, *pkl5.Intracomm(comm).isend(message, dest=dest, tag=tag)])
    data: Any = message
    if isinstance(message, Pickled) and message.number is None:
        data = _Inline(message)
    packed = pickle.dumps(data, protocol=5)
    return pkl5.Request([comm.Isend([packed, MPI.BYTE], dest=dest, tag=tag)])


def receive(
    comm: MPI.Intracomm, source: int, tag: int | None, status: MPI.Status | None = None
) -> tuple[Any, int | None]:
    """Receive an object that another rank has sent. Waits for it.

    Args:
        comm: Communicator of mpi4py.
        source: Sending rank, or ``MPI.ANY_SOURCE``.
        tag: Message tag; None takes any.
        status: Filled with source and tag where given.

    Returns:
        The object, and the number of the gradient that is to come back for it, or None.

    Raises:
        Exception: The error that the sender had instead of an object, or why it cannot be unpickled.
    """
    from mpi4py import MPI
    from mpi4py.util import pkl5

    status = MPI.Status() if status is None else status
    tag = MPI.ANY_TAG if tag is None else tag
    message = comm.recv(source=source, tag=tag, status=status)
    if isinstance(message, _Announcement):
        message = pkl5.Intracomm(comm).recv(source=status.Get_source(), tag=status.Get_tag())
    if isinstance(message, (Pickled, Failed)):
        return unpack(message), getattr(message, "number", None)
    return message, None
