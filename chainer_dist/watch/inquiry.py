"""Ranks asking one another what they do, while MPI is of no use because they wait in it.

Each watched rank listens on a TCP port; a thread sleeps there until somebody asks, which costs nothing.
Who asks needs no help of the asked rank's main thread, and learns from a silence as well: whether the
process is stopped, has ended, or runs native code that does not let Python's lock go. Who does not belong to
the job is told nothing, and holds nothing up: see :mod:`chainer_dist._connections`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import selectors
import signal
import socket
import struct
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from chainer_dist import _environment
from chainer_dist._connections import (
    LOOPBACK,
    Reception,
    Stranger,
    introduce,
    is_loopback,
    own_address,
    receive,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_IDENTITY_BYTES = 32  # of a communicator, as text
_REQUEST_BYTES = _IDENTITY_BYTES + 1
_LENGTH = struct.Struct("!I")  # of an answer, before it
_MOST_BYTES = 1 << 20  # of an answer
_MOST_DIGITS = 400  # of a number in it: no float has more
_MOST_GUESTS = 128  # connections of whom nothing is known yet
_BACKLOG = 1024
_SECONDS_TO_ASK = 5.0  # for somebody to prove to be a rank and to say what it wants to know
_SECONDS_TO_ANSWER = 1.0
_ATTEMPTS = 3  # of who was turned away, as may happen where strangers connect
_TURNED_AWAY = (ConnectionResetError, BrokenPipeError)
_SIOCGIFADDR = 0x8915
# Letters for states of processes, as in /proc/PID/stat.
_STOPPED, _ENDED = ("T", "t"), ("Z", "X")
_UNABLE = (*_STOPPED, *_ENDED)


class Address(NamedTuple):
    """Where a rank listens, and which process it is.

    Attributes:
        node: Ranks of one communicator with equal numbers are on one node.
        job_rank: The rank in ``MPI.COMM_WORLD``.
        pid: Of its process.
        started: When that process started, in the kernel's words, and in which namespace of process
            numbers, to tell it from others of its number; empty if that cannot be told.
        host: Its node's name.
        port: On its node.
        open_address: Where it is reached from other nodes; empty where it is not.
        open_port: The same.
        secret: What who asks has to know, and this rank proves to know.
        signal: Makes its process print its Python stacks without Python's help; 0 if there is none.
    """

    node: int
    job_rank: int
    pid: int
    started: str
    host: str
    port: int
    open_address: str
    open_port: int
    secret: bytes
    signal: int

    def describe(self) -> str:
        """Return process and node in words."""
        return f"pid {self.pid} on {self.host}"


class Listener:
    """Answers what this rank does, to ranks of its job.

    Args:
        answer: Given the identity of a communicator, and whether stacks are wanted, returns what
            JSON can hold.
    """

    def __init__(self, answer: Callable[[str, bool], dict[str, Any]]) -> None:
        self._answer = answer
        self.secret = secrets.token_bytes(32)
        self._reception = Reception(
            self.secret, most=_MOST_GUESTS, seconds=_SECONDS_TO_ASK, n_bytes=_REQUEST_BYTES
        )
        self._wake, self._woken = socket.socketpair()
        self._woken.settimeout(0)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._selector.register(self._reception, selectors.EVENT_READ)
        self.port = self._reception.listen(LOOPBACK, _BACKLOG)
        self.open_address, self.open_port = "", 0

    def open(self, others: Sequence[str]) -> None:
        """Listen for other nodes as well.

        Args:
            others: Addresses and name of one of them, see :func:`own_hosts`.

        Raises:
            OSError: If it is not known at which address.
        """
        if self.open_port:
            return
        address = _address_towards(others)
        on_this_host = address == LOOPBACK
        self.open_port = self.port if on_this_host else self._reception.listen(address, _BACKLOG)
        self.open_address = address

    def wake(self) -> None:
        """Let :meth:`serve` return early, in another thread."""
        self._wake.send(b".")

    def serve(self, seconds: float) -> None:
        """Answer for so long, and no longer, whoever asks."""
        deadline = time.perf_counter() + seconds
        left = seconds
        while left > 0:
            ready = [key.fileobj for key, _ in self._selector.select(left)]
            for connection, request in self._reception.admit():
                self._answer_one(connection, request)
            if self._woken in ready:
                self._woken.recv(_BACKLOG)
                return
            left = deadline - time.perf_counter()

    def _answer_one(self, connection: socket.socket, request: bytes) -> None:
        with connection:
            try:
                identity, full = request[:-1].decode(errors="replace"), request.endswith(b"!")
                reply = json.dumps(self._answer(identity, full)).encode()
                connection.settimeout(_SECONDS_TO_ANSWER)
                connection.sendall(_LENGTH.pack(len(reply)) + reply)
            except OSError:  # who asked has gone
                pass
            except Exception:  # noqa: BLE001 - one answer that fails is no reason to be deaf
                traceback.print_exc()

    def close(self) -> None:
        """Stop listening: who asks from now on is refused."""
        self._reception.close()
        for each in (self._wake, self._woken):
            each.close()
        self._selector.close()


class Silence(NamedTuple):
    """What is known of a rank that did not answer.

    Attributes:
        text: In words.
        tells: Whether that says something of the rank. If not, it may be where it should be.
    """

    text: str
    tells: bool = True


def ask(
    address: Address, identity: str, seconds: float, *, near: bool, full: bool
) -> dict[str, Any] | Silence:
    """Ask a rank what it does. Local, from any thread; waits for at most a few times ``seconds``.

    Args:
        address: Of the rank.
        identity: Of the communicator that the question is about.
        seconds: How long to wait for the rank's attention, and again for its answer.
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
        return Silence("cannot be asked from other nodes", tells=False)
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
        (length,) = _LENGTH.unpack(receive(connection, _LENGTH.size, deadline))
        if length > _MOST_BYTES:
            raise ValueError(f"it has {length} bytes")
        reply = json.loads(receive(connection, length, deadline), parse_int=_integer)
    if not isinstance(reply, dict):
        raise ValueError("it is no dictionary")  # noqa: TRY004 - as for all that is wrong with it
    return reply


def _explain(error: Exception) -> Silence | None:
    """Say of an error what it says of the rank; None if the state of its process says more."""
    if isinstance(error, Stranger):
        return Silence(f"cannot be asked: {error}", tells=False)
    if isinstance(error, ConnectionRefusedError):
        return Silence("listens no more: it has left the script, or ended")
    if isinstance(error, _TURNED_AWAY):
        return Silence("cannot be asked: others keep it busy with connections", tells=False)
    if not isinstance(error, OSError):
        return Silence(f"gives an answer that cannot be read: {error}", tells=False)
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
    if state in _ENDED:
        return Silence("has ended: there is no such process any more")
    if state in _STOPPED:
        return Silence("does not answer: its process is stopped (by SIGSTOP, Ctrl-Z or a debugger)")
    text = "does not answer: it is in native code that holds Python's lock"
    if state == "D":
        text = "does not answer: it is in the kernel, waiting for a disk or a network file system"
    if full and address.signal:
        with contextlib.suppress(OSError):
            os.kill(address.pid, address.signal)
            text += "; its stacks follow on its standard error"
    return Silence(text)


def process_state(address: Address) -> str:
    """Return the kernel's letter for the state of a process of this node.

    X is that of one that has ended; a question mark that of one that cannot be seen from here.
    """
    if not _namespace() or not address.started.endswith(f" {_namespace()}"):
        return "?"
    found = _stat(address.pid)
    if found is None or f"{found[1]} {_namespace()}" != address.started:
        return "X"
    return found[0]


def describe_self(listener: Listener, node: int, job_rank: int, host: str, number: int) -> Address:
    """Return where this rank listens. Local."""
    found = _stat(os.getpid())
    return Address(
        node=node,
        job_rank=job_rank,
        pid=os.getpid(),
        started="" if found is None else f"{found[1]} {_namespace()}",
        host=host,
        port=listener.port,
        open_address=listener.open_address,
        open_port=listener.open_port,
        secret=listener.secret,
        signal=number if found is not None else 0,  # only who is known for sure is sent one
    )


def stack_signal() -> int:
    """Return the signal on which processes may print their stacks, 0 if there is none to spare."""
    found = getattr(signal, "SIGRTMAX", None)
    return 0 if found is None else int(found) - 5


def own_hosts() -> tuple[str, ...]:
    """Return addresses and name of this node, as far as the system tells them. Local."""
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                packed = struct.pack("256s", name.encode()[:15])
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, packed)
                found.append(socket.inet_ntoa(reply[20:24]))
    return (*(each for each in found if not is_loopback(each)), socket.gethostname())


def _address_towards(others: Sequence[str]) -> str:
    """Return the one address of this node that ranks of another node reach it at.

    Args:
        others: What :func:`own_hosts` returns there.

    Raises:
        OSError: If there is none.
    """
    given = os.environ.get(_environment.ADDRESS)
    if given:
        return given
    own = own_hosts()
    if {*others} <= {*own}:  # one machine that is said to be several
        return LOOPBACK
    for other in others:
        if other not in own:  # bridges of containers have the same address everywhere
            address = own_address(other)
            if address and not is_loopback(address):
                return address
    raise OSError(
        f"no address of this host is known that others reach it at; set {_environment.ADDRESS}"
    )


def _namespace() -> str:
    """Return which process numbers this process knows others by; empty if that cannot be told."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, str] | None:
    """Return state and start time of a process, None if that cannot be told."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]
