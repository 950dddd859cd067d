"""Messages with Python objects, or with the error of an object that cannot be pickled.

mpi4py's pkl5 does the transport: pickle protocol 5, with large buffers sent from where they are in
memory, and any size, also above 2 GiB.

A message between two ranks begins with a message of mpi4py's ``send``. If the object fits, that is all of it,
so mpi4py's ``send`` and ``recv`` on the same communicator are compatible with the functions here.
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
    """A pickled object.

    Attributes:
        data: Pickle of the object.
        buffers: Large buffers that are not in the pickle.
        number: Number of the gradient that the receiver sends back for it, or None.
    """

    data: pickle.PickleBuffer
    buffers: list[pickle.PickleBuffer]
    number: int | None = None

    @property
    def nbytes(self) -> int:
        """Number of bytes of pickle and buffers."""
        return sum(each.raw().nbytes for each in (self.data, *self.buffers))


class Failed(NamedTuple):
    """The error because of which a rank could not send an object.

    Attributes:
        rank: Number of the rank.
        failure: Description of the error.
    """

    rank: int
    failure: Failure


Message = Union[Pickled, Failed]


class _Inline:
    """A message that ``pickle.loads`` turns into the object itself."""

    def __init__(self, message: Pickled) -> None:
        self._message = message

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (self._message.data, *self._message.buffers)


class _Announcement:
    """A message that announces an object, which pkl5 sends next."""


def _load(data: Any, *buffers: Any) -> Any:
    return pickle.loads(data, buffers=buffers)


def pack(rank: int, make: Callable[[], Any]) -> tuple[Message, BaseException | None]:
    """Pickle an object. Local.

    Args:
        rank: This rank.
        make: Function that returns the object, or raises the reason why it cannot be sent.

    Returns:
        A message for :func:`post`, and the error that the message has instead of an object, or None.
    """
    from mpi4py.util import pkl5

    try:
        data, buffers = pkl5.pickle.dumps_oob(make())
    except BaseException as error:  # noqa: BLE001 - methods of users may raise anything, and other ranks wait
        return Failed(rank, describe_error(error)), error
    wrapped = [pickle.PickleBuffer(cast("bytes", each)) for each in (data, *buffers)]
    return Pickled(wrapped[0], wrapped[1:]), None


def pack_each(
    rank: int, size: int, make: Callable[[], Sequence[Any]]
) -> tuple[list[Message], BaseException | None]:
    """Pickle one object for each rank; if one of them fails, all messages have its error. Local.

    Args:
        rank: This rank.
        size: Number of ranks.
        make: Function that returns ``size`` objects, or raises the reason why they cannot be sent.

    Returns:
        One message per rank, and the error that they have instead of objects, or None.
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
    """Return the object of a message, or raise the error that it has instead of an object. Local."""
    from mpi4py.util import pkl5

    raise_failure(message, None)
    assert not isinstance(message, Failed)  # noqa: S101 - for the type checker
    return pkl5.pickle.loads_oob(message.data, message.buffers)


def raise_failure(message: Message, cause: BaseException | None) -> None:
    """Raise the error that a message has instead of an object, if it has one; ``cause`` is its cause. Local."""
    if isinstance(message, Failed):
        raise_first({message.rank: message.failure}, cause)


def post(
    comm: MPI.Intracomm, message: Message, dest: int, tag: int, limit: int = _ONE_MESSAGE
) -> pkl5.Request:
    """Begin to send a message. Local.

    Args:
        comm: Communicator of mpi4py.
        message: Message of :func:`pack`.
        dest: Receiving rank.
        tag: Message tag.
        limit: Largest number of bytes that are sent as one message of MPI.

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
    """Wait for an object that another rank sends, and return it.

    Args:
        comm: Communicator of mpi4py.
        source: Sending rank, or ``MPI.ANY_SOURCE``.
        tag: Message tag; None for any.
        status: Status that takes source and tag, or None.

    Returns:
        The object, and the number of the gradient that this rank sends back for it, or None.

    Raises:
        Exception: If the sender had an error instead of an object, or the object cannot be unpickled here.
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
