"""The port on which a rank answers other ranks that ask what it does.

A thread sleeps there until there is a question, which costs nothing. Processes that do not belong to the job
get no answer, and hold nothing up: see :mod:`chainer_dist._connections`.
"""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import struct
import time
import traceback
from typing import TYPE_CHECKING, Any

from chainer_dist._connections import LOOPBACK, Reception
from chainer_dist.watch.hosts import address_towards

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


_IDENTITY_BYTES = 32  # of a communicator, as text
REQUEST_BYTES = _IDENTITY_BYTES + 1
LENGTH = struct.Struct("!I")  # of an answer, before it
_MOST_GUESTS = 128  # connections that have not proved yet to be of a rank
_BACKLOG = 1024
_SECONDS_TO_ASK = 5.0  # for a connection to prove that it is of a rank, and to send its question
_SECONDS_TO_ANSWER = 1.0


class Listener:
    """Answers what this rank does, to ranks of its job.

    Args:
        answer: Function of the identity of a communicator, and of whether stacks are wanted; it returns
            a dict that JSON can hold.
    """

    def __init__(self, answer: Callable[[str, bool], dict[str, Any]]) -> None:
        self._answer = answer
        self.secret = secrets.token_bytes(32)
        self._reception = Reception(
            self.secret, most=_MOST_GUESTS, seconds=_SECONDS_TO_ASK, n_bytes=REQUEST_BYTES
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
        address = address_towards(others)
        on_this_host = address == LOOPBACK
        self.open_port = self.port if on_this_host else self._reception.listen(address, _BACKLOG)
        self.open_address = address

    def wake(self) -> None:
        """Let :meth:`serve` return early, in another thread."""
        self._wake.send(b".")

    def serve(self, seconds: float) -> None:
        """Answer questions for so many seconds, and no longer."""
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
                connection.sendall(LENGTH.pack(len(reply)) + reply)
            except OSError:  # the rank that asked has gone
                pass
            except Exception:  # noqa: BLE001 - one answer that fails is no reason to be deaf
                traceback.print_exc()

    def close(self) -> None:
        """Stop listening: connections are refused from now on."""
        self._reception.close()
        for each in (self._wake, self._woken):
            each.close()
        self._selector.close()
