"""Ranks that ask one another what they do, while MPI is of no use because they wait in it.

Each watched rank listens on a TCP port (see :mod:`~chainer_dist.watch.listener`). A question needs no help of
the other rank's main thread. A silence says something as well: whether the process is stopped, has ended, or
runs native code that does not let Python's lock go.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from chainer_dist._connections import LOOPBACK, Stranger, introduce, receive
from chainer_dist.watch.address import ENDED, STOPPED, process_state
from chainer_dist.watch.listener import LENGTH

if TYPE_CHECKING:
    from chainer_dist.watch.address import Address

_MOST_BYTES = 1 << 20  # of an answer
_MOST_DIGITS = 400  # of a number in it: no float has more
_ATTEMPTS = 3  # where a question was turned away, as may happen while strangers connect
_TURNED_AWAY = (ConnectionResetError, BrokenPipeError)
_UNABLE = (*STOPPED, *ENDED)


class Silence(NamedTuple):
    """All that is known of a rank that did not answer.

    Attributes:
        text: Description in words.
        is_reason: Whether the silence is a sign that the rank has not come. If not, it may have come.
    """

    text: str
    is_reason: bool = True


def ask(
    address: Address, identity: str, seconds: float, *, near: bool, full: bool
) -> dict[str, Any] | Silence:
    """Ask a rank what it does. Local, from any thread; waits for at most a few times ``seconds``.

    Args:
        address: Address of the rank.
        identity: Identity of the communicator that the question is about.
        seconds: Seconds to wait for the rank's attention, and again for its answer.
        near: Whether the rank is on this node.
        full: Whether its Python stacks are wanted.

    Returns:
        Its answer, or what is known instead.
    """
    state = process_state(address) if near else "?"
    if state in _UNABLE:
        return _silence(address, state, full=full)
    where = (LOOPBACK, address.port) if near else (address.open_address, address.open_port)
    if not where[1]:
        return Silence("cannot be asked from other nodes", is_reason=False)
    request = identity.encode() + (b"!" if full else b"?")
    try:
        for _ in range(_ATTEMPTS - 1):
            with contextlib.suppress(*_TURNED_AWAY):
                return _exchange(where, address.secret, request, seconds)
        return _exchange(where, address.secret, request, seconds)
    except (OSError, ValueError, RecursionError) as error:
        state = process_state(address) if near else "?"
        return _explain(error) or _silence(address, state, full=full)


def _exchange(
    where: tuple[str, int], secret: bytes, request: bytes, seconds: float
) -> dict[str, Any]:
    """Send a request and return the answer.

    Raises:
        OSError: If none comes.
        ValueError: If it is none, or too large, or has numbers that are; RecursionError if it is too deep.
    """
    deadline = time.monotonic() + seconds
    # While a process stands still, the kernel still accepts connections for it.
    with socket.create_connection(where, seconds) as connection:
        introduce(connection, secret, deadline)
        connection.sendall(request)
        deadline = time.monotonic() + seconds
        (length,) = LENGTH.unpack(receive(connection, LENGTH.size, deadline))
        if length > _MOST_BYTES:
            raise ValueError(f"it has {length} bytes")
        reply = json.loads(receive(connection, length, deadline), parse_int=_integer)
    if not isinstance(reply, dict):
        raise ValueError("it is no dictionary")  # noqa: TRY004 - as for all that is wrong with it
    return reply


def _explain(error: Exception) -> Silence | None:
    """Say of an error what it says of the rank; None if the state of its process says more."""
    if isinstance(error, Stranger):
        return Silence(f"cannot be asked: {error}", is_reason=False)
    if isinstance(error, ConnectionRefusedError):
        return Silence("listens no more: it has left the script, or ended")
    if isinstance(error, _TURNED_AWAY):
        return Silence("cannot be asked: others keep it busy with connections", is_reason=False)
    if not isinstance(error, OSError):
        return Silence(f"gives an answer that cannot be read: {error}", is_reason=False)
    return None


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"it has a number of {len(digits)} digits")
    return int(digits)


def _silence(address: Address, state: str, *, full: bool) -> Silence:
    if state == "?":
        return Silence(
            "does not answer: it is stopped, or in native code that holds Python's lock, or its "
            "node or the network is down"
        )
    if state in ENDED:
        return Silence("has ended: there is no such process any more")
    if state in STOPPED:
        return Silence("does not answer: its process is stopped (by SIGSTOP, Ctrl-Z or a debugger)")
    text = "does not answer: it is in native code that holds Python's lock"
    if state == "D":
        text = "does not answer: it is in the kernel, waiting for a disk or a network file system"
    if full and address.signal:
        with contextlib.suppress(OSError):
            os.kill(address.pid, address.signal)
            text += "; its stacks follow on its standard error"
    return Silence(text)


def stack_signal() -> int:
    """Return the signal on which processes may print their stacks, 0 if there is none to spare."""
    found = getattr(signal, "SIGRTMAX", None)
    return 0 if found is None else int(found) - 5
