"""Messages of :func:`~chainer_dist.functions.send`, which never wait, and the gradients they bring back.

A message is posted as a copy and sent while the rank goes on computing. This is what lets the
stages of a pipeline work at the same time, and two ranks that send to each other can never wait
for each other. Each message that wants a gradient has a number, which comes back with it: however
many messages are under way, each gets its own gradient. :meth:`CommunicatorBase.recv` takes such
messages as well, and :func:`take` takes messages of :meth:`CommunicatorBase.send`.
"""

from __future__ import annotations

import atexit
import itertools
import operator
import sys
import time
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chainer_dist.collectives import messages
from chainer_dist.collectives.arrays import SMALL
from chainer_dist.collectives.failures import describe_error, raise_first
from chainer_dist.collectives.operation import point_to_point

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainer_dist.collectives.failures import Failure
    from chainer_dist.communicators import CommunicatorBase

# Bytes that may be on their way from a rank before its next send() waits for them to arrive.
ROOM = 1 << 30
# Seconds that a rank waits at its end for its messages to be received.
_PATIENCE = 60.0

_numbers = itertools.count()


class _Posted(NamedTuple):
    """A message on its way; the request holds on to its memory."""

    request: Any
    n_bytes: int
    description: str


_posted: list[_Posted] = []

# The purposes of the highest tags: gradients, messages of the ranks of a model on their components,
# and of their batches. The tags of users are below.
GRADIENTS, COMPONENTS, BATCHES = range(3)

# By communicator and number: gradients that came before the one that was waited for.
_early: weakref.WeakKeyDictionary[CommunicatorBase, dict[int, list[tuple[list[Any], Failure]]]] = (
    weakref.WeakKeyDictionary()
)


def reserved_tag(use: int) -> int:
    """Return the tag of messages that are no user's. Local.

    Args:
        use: GRADIENTS, COMPONENTS or BATCHES.
    """
    from mpi4py import MPI

    # The limit is an attribute of this communicator; Open MPI's parts of it have none.
    return int(MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or 0) - use


def new_number() -> int:
    """Return a number that no other message of this process has."""
    return next(_numbers)


def check_peer(comm: CommunicatorBase, rank: Any, tag: Any) -> tuple[int, int]:
    """Return another rank and a tag as ints. Local.

    Raises:
        ValueError: If ``rank`` is this rank or none, or the tag is out of range.
        TypeError: If they are no integers.
    """
    rank, tag = operator.index(rank), operator.index(tag)
    if rank == comm.rank:
        raise ValueError(f"rank is {rank}, which is this rank itself; expected another one")
    if not 0 <= rank < comm.size:
        raise ValueError(f"rank is {rank}, expected 0 to {comm.size - 1}")
    highest = reserved_tag(BATCHES) - 1
    if not 0 <= tag <= highest:
        raise ValueError(f"tag is {tag}, expected 0 to {highest}")
    return rank, tag


def post(
    comm: CommunicatorBase,
    make: Callable[[], Any],
    dest: int,
    tag: int,
    number: int | None = None,
) -> None:
    """Start sending an array or a tuple of arrays to rank ``dest``. Local.

    Args:
        comm: Communicator.
        make: Function that returns the object to send, or raises what is wrong with it, which ``dest``
            then raises as well.
        dest: Receiving rank.
        tag: Message tag.
        number: Number of the gradient that comes back, or None for no gradient.

    Raises:
        Exception: The error of ``make``.
    """
    message: Any
    message, error = messages.pack(comm.rank, lambda: _copied(make()))
    if error is None:
        message = message._replace(number=number)
    _start(comm, message, dest, tag)
    if error is not None:
        raise error


@point_to_point
def take(comm: CommunicatorBase, source: int, tag: int) -> tuple[Any, int | None]:
    """Receive what rank ``source`` posted. Waits for it.

    Returns:
        A writable array or a tuple of them, and the number of the gradient or None.

    Raises:
        Exception: The error because of which the sender could not send it.
    """
    received, number = messages.receive(comm.mpi_comm, source, tag)
    if isinstance(received, tuple):
        received = tuple(np.require(each, requirements="W") for each in received)
    else:
        received = np.require(received, requirements="W")
    return received, number


def post_gradient(
    comm: CommunicatorBase,
    gradients: Sequence[Any],
    dest: int,
    number: int,
    error: BaseException | None = None,
) -> None:
    """Start sending the gradients of a message back to rank ``dest``. Local.

    Args:
        comm: Communicator.
        gradients: Arrays.
        dest: Rank that the message came from.
        number: The number of the message.
        error: Why there is no gradient; ``dest`` then raises it.
    """
    answer = (number, [np.array(each) for each in gradients], describe_error(error))
    post_obj(comm, answer, dest, reserved_tag(GRADIENTS))


def post_obj(comm: CommunicatorBase, obj: Any, dest: int, tag: int) -> None:
    """Start sending an object that can be pickled to rank ``dest``, for ``recv_obj``. Local."""
    message, _ = messages.pack(comm.rank, lambda: obj)
    _start(comm, message, dest, tag)


def take_gradient(comm: CommunicatorBase, source: int, number: int) -> list[Any]:
    """Receive the gradients of the message with this number from rank ``source``. Waits for it.

    Raises:
        Exception: The error that ``source`` has instead of a gradient.
    """
    early = _early.setdefault(comm, {})
    while number not in early:
        got, gradients, failure = comm.recv_obj(source, tag=reserved_tag(GRADIENTS))
        early.setdefault(got, []).append((gradients, failure))  # several if backward runs twice
    gradients, failure = early[number].pop(0)
    if not early[number]:
        del early[number]
    raise_first({source: failure}, None)
    return gradients


def make_room() -> None:
    """Wait until not too much is on its way from this rank."""
    _forget_received()
    while sum(each.n_bytes for each in _posted) > ROOM:
        _posted[0].request.wait()
        _forget_received()


def _start(comm: CommunicatorBase, message: Any, dest: int, tag: int) -> None:
    _forget_received()
    request = messages.post(comm.mpi_comm, message, dest, tag, limit=SMALL)
    n_bytes = getattr(message, "nbytes", 0)
    _posted.append(_Posted(request, n_bytes, f"rank {comm.rank} to rank {dest}"))


def _forget_received() -> None:
    """Release the memory of messages that have arrived."""
    _posted[:] = [each for each in _posted if not each.request.test()[0]]


def _copied(data: Any) -> Any:
    """Return copies: the rank goes on and may write to its arrays (the optimizer does)."""
    if isinstance(data, tuple):
        return tuple(np.array(each) for each in data)
    return np.array(data)


def _finish() -> None:
    """Wait at the end of the process for messages to be received: their memory is about to go."""
    if not _posted:
        return
    from mpi4py import MPI

    if MPI.Is_finalized():
        return
    deadline = time.monotonic() + _PATIENCE
    _forget_received()
    while _posted and time.monotonic() < deadline:
        time.sleep(0.001)
        _forget_received()
    for each in _posted:
        sys.stderr.write(f"chainer_dist: a message from {each.description} was never received\n")


atexit.register(_finish)
