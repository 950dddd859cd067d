"""TCP connections between processes of a job, which strangers can neither use nor hold up.

Any user of a host, and often of its network, can connect to a port. So both sides prove that they know a
secret of the job before they say anything else, and neither sends it:

======================  ============================================  ========
who listens             a challenge, drawn at random                  32 bytes
who connects            one of its own, and the proof for both        64 bytes
who listens             its own proof for both                        32 bytes
======================  ============================================  ========

A proof is an HMAC of both challenges and of the side that gives it: it is of no use in another connection,
and a process that answers in the place of a rank learns nothing from it. This keeps out processes that can connect.
It does not protect against reading or changing messages: the network between the hosts of a job is trusted, as it is
by MPI.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import selectors
import socket
import time

__all__ = [
    "LOOPBACK",
    "Reception",
    "Stranger",
    "introduce",
    "is_loopback",
    "own_address",
    "reach",
    "receive",
]

LOOPBACK = "127.0.0.1"

_CHALLENGE_BYTES = 32
_PROOF_BYTES = 32  # of SHA-256
_HELLO_BYTES = _CHALLENGE_BYTES + _PROOF_BYTES
_CONNECTS, _LISTENS = b"who connects", b"who listens"
_SECONDS_TO_GET_FILES = 0.05
_SECONDS_TO_CONNECT = 10
_SECONDS_TO_BE_ADMITTED = 60  # by a process that may have to admit many at once
_SECONDS_TO_COME_AGAIN = 0.05


class Stranger(OSError):  # noqa: N818 - not every one is an error
    """The other end of a connection does not know the secret."""


class Reception:
    """Listens, and admits connections that prove to know a secret. Local.

    Any other connection costs an open file and 64 bytes at most, for ``seconds`` at most. Where there is no room,
    some connections that have proven nothing yet are closed at random. A rank whose connection is closed
    connects again, and is admitted long before strangers can have taken all the room again.

    Args:
        secret: The secret that both ends know.
        most: Largest number of connections that are not admitted yet.
        seconds: Time in which a connection must have been admitted.
        n_bytes: Number of bytes that are received after the proof, before a connection is admitted.
    """

    def __init__(self, secret: bytes, *, most: int, seconds: float, n_bytes: int = 0) -> None:
        self.most = most
        self._secret = secret
        self._seconds = seconds
        self._n_bytes = n_bytes
        self._servers: list[socket.socket] = []
        self._guests: dict[socket.socket, _Guest] = {}
        self._selector = selectors.DefaultSelector()

    def listen(self, address: str, backlog: int) -> int:
        """Listen at an address of this host, and return the port.

        Raises:
            OSError: If this host has no such address.
        """
        if not address:  # that would be all of them
            raise OSError("there is no address to listen at")
        family, *_, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        server = socket.create_server(where[:2], family=family, backlog=backlog)
        server.setblocking(False)  # noqa: FBT003 - positional only
        self._servers.append(server)
        self._selector.register(server, selectors.EVENT_READ)
        port: int = server.getsockname()[1]
        return port

    def fileno(self) -> int:
        """Return what is readable, for a selector, when there is something to do for :meth:`admit`."""
        return self._selector.fileno()

    def admit(self) -> list[tuple[socket.socket, bytes]]:
        """Return the connections that are admitted now, and what was received; waits for nothing.

        They are non-blocking, and the caller's to close.
        """
        admitted = []
        ready = {key.fileobj for key, _ in self._selector.select(0)}
        # Guests first, so that many who come at once wait outside.
        for guest in [guest for each, guest in self._guests.items() if each in ready]:
            if self._hear(guest):
                self._selector.unregister(guest.connection)
                del self._guests[guest.connection]
                admitted.append((guest.connection, bytes(guest.received)))
        for server in self._servers:
            if server in ready:
                self._accept(server)
        now = time.monotonic()
        for guest in [each for each in self._guests.values() if each.deadline <= now]:
            self._turn_away(guest)
        return admitted

    def close(self) -> None:
        """Listen no more. Leaves what a process that was forked from this one has of it alone."""
        for each in (*self._servers, *self._guests):
            each.close()
        self._servers.clear()
        self._guests.clear()
        self._selector.close()

    def _accept(self, server: socket.socket) -> None:
        try:
            connection, _ = server.accept()
        except (BlockingIOError, ConnectionError):  # it has gone again
            return
        except OSError:  # this process has no files left
            self._make_room()
            time.sleep(_SECONDS_TO_GET_FILES)
            return
        if len(self._guests) >= self.most:
            self._make_room()
        connection.setblocking(False)  # noqa: FBT003 - positional only
        guest = _Guest(connection, time.monotonic() + self._seconds)
        self._guests[connection] = guest
        self._selector.register(connection, selectors.EVENT_READ)
        try:
            connection.send(guest.challenge)
        except OSError:
            self._turn_away(guest)

    def _make_room(self) -> None:
        guests = [*self._guests.values()]
        strangers = [each for each in guests if not each.has_proven] or guests
        if strangers:
            self._turn_away(secrets.choice(strangers))

    def _turn_away(self, guest: _Guest) -> None:
        self._selector.unregister(guest.connection)
        del self._guests[guest.connection]
        guest.connection.close()

    def _hear(self, guest: _Guest) -> bool:
        """Receive what a guest says; return whether that is all."""
        missing = (self._n_bytes if guest.has_proven else _HELLO_BYTES) - len(guest.received)
        try:
            part = guest.connection.recv(missing)
            guest.received += part
            if len(part) == missing:
                if guest.has_proven:
                    return True
                if self._check(guest):
                    return self._n_bytes == 0
            elif part:
                return False
        except BlockingIOError:
            return False
        except OSError:
            pass
        self._turn_away(guest)
        return False

    def _check(self, guest: _Guest) -> bool:
        """Return whether a guest knows the secret, which is then proven to it."""
        hello = bytes(guest.received)
        own, proof = hello[:_CHALLENGE_BYTES], hello[_CHALLENGE_BYTES:]
        expected = _proof(self._secret, _CONNECTS, guest.challenge, own)
        if not hmac.compare_digest(proof, expected):
            return False
        guest.connection.send(_proof(self._secret, _LISTENS, guest.challenge, own))
        guest.has_proven = True
        guest.received.clear()
        return True


class _Guest:
    """A connection that is not admitted yet."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self.connection = connection
        self.deadline = deadline
        self.challenge = secrets.token_bytes(_CHALLENGE_BYTES)
        self.received = bytearray()
        self.has_proven = False


def reach(where: str) -> socket.socket:
    """Return a connection to a process that listens with the same secret; where it has no room, connect again. Local.

    Args:
        where: The secret in hexadecimal, and addresses with ports, as in ``secret,address/port,address/port``.

    Raises:
        OSError: If none of the addresses answers, or none of those that do knows the secret.
    """
    secret, *places = where.split(",")
    errors = []
    for place in places:
        address, _, port = place.partition("/")
        try:
            connection = _admitted((address, int(port)), bytes.fromhex(secret))
        except OSError as error:
            errors.append(f"{address} port {port}: {error}")
            continue
        connection.settimeout(None)
        return connection
    raise OSError("; ".join(errors))


def _admitted(where: tuple[str, int], secret: bytes) -> socket.socket:
    """Return a connection on which both sides have proven to know a secret."""
    deadline = time.monotonic() + _SECONDS_TO_BE_ADMITTED
    while True:
        connection = socket.create_connection(where, _SECONDS_TO_CONNECT)
        try:
            introduce(connection, secret, deadline)
        except BaseException as error:
            connection.close()
            turned_away = isinstance(error, (ConnectionResetError, BrokenPipeError))
            if not turned_away or time.monotonic() > deadline:
                raise
            time.sleep(_SECONDS_TO_COME_AGAIN)
        else:
            return connection


def introduce(connection: socket.socket, secret: bytes, deadline: float) -> None:
    """Prove to the listening process that this one knows a secret, and check its proof. Local.

    Args:
        connection: New connection to the listening process.
        secret: The secret that both ends know.
        deadline: Time by ``time.monotonic``, in seconds, at which all of it must be done.

    Raises:
        Stranger: If the listening process does not know it.
        ConnectionResetError: If the listening process has no room, or takes this one for a stranger.
        OSError: If the connection breaks, or the time is over.
    """
    challenge = receive(connection, _CHALLENGE_BYTES, deadline)
    own = secrets.token_bytes(_CHALLENGE_BYTES)
    connection.sendall(own + _proof(secret, _CONNECTS, challenge, own))
    proof = receive(connection, _PROOF_BYTES, deadline)
    if not hmac.compare_digest(proof, _proof(secret, _LISTENS, challenge, own)):
        raise Stranger("another program answers, which does not belong to the job")


def receive(connection: socket.socket, n_bytes: int, deadline: float) -> bytes:
    """Return exactly so many bytes. Local.

    Args:
        connection: The connection to receive from; its timeout is changed.
        n_bytes: Number of bytes.
        deadline: Time by ``time.monotonic``, in seconds, at which all of it must be done.

    Raises:
        ConnectionResetError: If the other side closes before.
        OSError: If the connection breaks, or the time is over.
    """
    received = bytearray()
    while len(received) < n_bytes:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"{len(received)} of {n_bytes} bytes came in time")
        connection.settimeout(left)
        part = connection.recv(n_bytes - len(received))
        if not part:
            raise ConnectionResetError(f"closed after {len(received)} of {n_bytes} bytes")
        received += part
    return bytes(received)


def own_address(other: str) -> str:
    """Return this host's address on the way to another host, "" if there is no way. Sends nothing. Local.

    Args:
        other: Name or address.
    """
    with contextlib.suppress(OSError, UnicodeError):
        family, *_, where = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as way:
            way.connect(where)
            address: str = way.getsockname()[0]
            return address
    return ""


def is_loopback(address: str) -> bool:
    """Return whether this host alone can be reached by an address. Local."""
    return address.startswith("127.") or address == "::1"


def _proof(secret: bytes, side: bytes, challenge: bytes, own: bytes) -> bytes:
    return hmac.digest(secret, side + challenge + own, "sha256")
