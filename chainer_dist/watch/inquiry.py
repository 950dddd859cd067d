"""Ranks asking one another what they do, while MPI is of no use because they wait in it.

Each watched rank listens on a TCP port; a thread sleeps there until somebody asks, which costs nothing.
Who asks needs no help of the asked rank's main thread, and learns from a silence as well: whether the
process is stopped, has ended, or runs native code that does not let Python's lock go.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
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

if TYPE_CHECKING:
    from collections.abc import Callable

_HEX_BYTES = 32  # of a token, and of the identity of a communicator
_REQUEST_BYTES = 2 * _HEX_BYTES + 1
_BACKLOG = 1024
_SERVE_SECONDS = 1.0  # for somebody to say what it wants to know
_ATTEMPTS = 3  # of who did not manage to in that time, as on a node with more to do than cores
_SIOCGIFADDR = 0x8915
_LOOPBACK = "127.0.0.1"
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
        hosts: What others may reach it by, from other nodes.
        port: On its node.
        open_port: From other nodes; 0 while there are none.
        token: What a question begins with.
        signal: Makes its process print its Python stacks without Python's help; 0 if there is none.
    """

    node: int
    job_rank: int
    pid: int
    started: str
    host: str
    hosts: tuple[str, ...]
    port: int
    open_port: int
    token: str
    signal: int

    def describe(self) -> str:
        """Return process and node in words."""
        return f"pid {self.pid} on {self.host}"


class Listener:
    """Answers what this rank does.

    Args:
        answer: Given the identity of a communicator, and whether stacks are wanted, returns what
            JSON can hold.
    """

    def __init__(self, answer: Callable[[str, bool], dict[str, Any]]) -> None:
        self._answer = answer
        self.token = secrets.token_hex(_HEX_BYTES // 2)
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._woken.settimeout(0)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._sockets: list[socket.socket] = []
        self.port = self._listen(_LOOPBACK)
        self.open_port = 0

    def open(self) -> None:
        """Listen for other nodes as well."""
        if not self.open_port:
            self.open_port = self._listen("")

    def _listen(self, host: str) -> int:
        server = socket.create_server((host, 0), backlog=_BACKLOG)
        server.settimeout(0)
        self._sockets.append(server)
        self._selector.register(server, selectors.EVENT_READ)
        self.wake()
        port: int = server.getsockname()[1]
        return port

    def wake(self) -> None:
        """Let :meth:`serve` return early, in another thread."""
        self._wake.send(b".")

    def serve(self, seconds: float) -> None:
        """Answer for so long."""
        deadline = time.perf_counter() + seconds
        while True:
            ready = self._selector.select(max(0.0, deadline - time.perf_counter()))
            for key, _ in ready:
                if key.fileobj is self._woken:
                    self._woken.recv(_BACKLOG)
                    return
                try:
                    self._answer_one(key.fileobj)  # type: ignore[arg-type]  # it is a socket
                except OSError:  # who asked has gone
                    pass
                except Exception:  # noqa: BLE001 - one answer that fails is no reason to be deaf
                    traceback.print_exc()
            if not ready:
                return

    def _answer_one(self, server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.settimeout(_SERVE_SECONDS)
            request = _receive(connection, _REQUEST_BYTES)
            if len(request) < _REQUEST_BYTES or not request.isascii():
                return
            token = request[:_HEX_BYTES]
            if hmac.compare_digest(token, self.token.encode()):
                identity = request[_HEX_BYTES:-1].decode()
                reply = self._answer(identity, request.endswith(b"!"))
                connection.sendall(json.dumps(reply).encode())

    def close(self) -> None:
        """Stop listening: who asks from now on is refused."""
        for each in (*self._sockets, self._wake, self._woken):
            each.close()
        self._selector.close()


class Silence(NamedTuple):
    """What is known of a rank that did not answer."""

    text: str


def ask(
    address: Address, identity: str, seconds: float, *, near: bool, full: bool
) -> dict[str, Any] | Silence:
    """Ask a rank what it does. Local, from any thread; waits for at most a few times ``seconds``.

    Args:
        address: Of the rank.
        identity: Of the communicator that the question is about.
        seconds: How long to wait for an answer.
        near: Whether the rank is on this node.
        full: Whether its Python stacks are wanted.

    Returns:
        Its answer, or what is known instead.
    """
    state = process_state(address) if near else "?"
    if state in _UNABLE:
        return _silence(address, state)
    hosts = (_LOOPBACK,) if near else address.hosts
    port = address.port if near else address.open_port
    request = (address.token + identity + ("!" if full else "?")).encode()
    refused = False
    for host in hosts:  # until one is this rank's: of other interfaces there may be many
        reply = _exchange(host, port, request, seconds)
        if isinstance(reply, bytes) and reply:
            answer: dict[str, Any] = json.loads(reply)
            return answer
        refused = refused or isinstance(reply, ConnectionError)
    if refused:
        return Silence("listens no more: it has left the script, or ended")
    return _silence(address, process_state(address) if near else "?")


def _exchange(host: str, port: int, request: bytes, seconds: float) -> bytes | OSError:
    """Send a request, again where that took too long, and return the reply; or why there is none."""
    reply: bytes | OSError = b""
    for _ in range(_ATTEMPTS):
        reply = _try_to_exchange(host, port, request, seconds)
        if reply and not isinstance(reply, ConnectionResetError):
            break
    return reply


def _try_to_exchange(host: str, port: int, request: bytes, seconds: float) -> bytes | OSError:
    try:
        # While a process stands still, the kernel still accepts connections for it.
        with socket.create_connection((host, port), seconds) as connection:
            connection.settimeout(seconds)
            connection.sendall(request)
            return _receive(connection)
    except OSError as error:
        return error


def _silence(address: Address, state: str) -> Silence:
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
    if address.signal:
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


def own_address(listener: Listener, node: int, job_rank: int, host: str, number: int) -> Address:
    """Return where this rank listens. Local."""
    found = _stat(os.getpid())
    return Address(
        node=node,
        job_rank=job_rank,
        pid=os.getpid(),
        started="" if found is None else f"{found[1]} {_namespace()}",
        host=host,
        hosts=(*_own_hosts(), host) if listener.open_port else (),
        port=listener.port,
        open_port=listener.open_port,
        token=listener.token,
        signal=number if found is not None else 0,  # only who is known for sure is sent one
    )


def stack_signal() -> int:
    """Return the signal on which processes may print their stacks, 0 if there is none to spare."""
    found = getattr(signal, "SIGRTMAX", None)
    return 0 if found is None else int(found) - 5


def _own_hosts() -> list[str]:
    """Return the addresses of this node's network interfaces, as far as the system tells them."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                packed = struct.pack("256s", name.encode()[:15])
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, packed)
                found.append(socket.inet_ntoa(reply[20:24]))
    return [each for each in found if not each.startswith("127.")]


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


def _receive(connection: socket.socket, limit: int | None = None) -> bytes:
    """Return what comes until the other side closes, or so many bytes."""
    parts: list[bytes] = []
    missing = limit
    while missing is None or missing > 0:
        part = connection.recv(1 << 16 if missing is None else missing)
        if not part:
            break
        parts.append(part)
        missing = None if missing is None else missing - len(part)
    return b"".join(parts)
