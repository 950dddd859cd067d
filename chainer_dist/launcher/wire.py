"""Messages between the launcher and the monitors of the ranks, over one TCP connection each.

MPI's own forwarding of output is of no use for this: it tears lines of several ranks apart, and does
not report how a rank ended. A message is a letter for its kind, the length of its content as four
bytes, and the content. Before the first, both sides prove that they belong to the job: see
:mod:`chainer_dist._connections`.
"""

from __future__ import annotations

import signal
import socket
import struct

HEADER = struct.Struct("!cI")
CHUNK = 1 << 16  # bytes that are read at once
WINDOW = 1 << 18  # bytes of output that a monitor may send before the launcher wants more

# The launcher passes these on to the scripts. A terminal or a scheduler may send them to every process.
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

# To the launcher.
HELLO = b"H"  # JSON: rank, host
OUT = b"O"  # bytes of standard output
ERR = b"E"  # bytes of standard error
PROGRESS = b"P"  # an integer as text
NOTES = b"T"  # JSON: files that the script writes; alone: whether it has not begun to communicate
WANT = b"W"  # more of standard input
FAILED = b"F"  # JSON: status as in subprocess; cause: what the script has reported of its end
END = b"X"  # JSON: status; the last message

# To the monitor.
SIGNAL = b"S"  # a signal's number as text, for the script
KILL = b"K"  # end the script and all that it started, now
IN = b"I"  # bytes of standard input, none at its end
MORE = b"M"  # how many more bytes of output are wanted, as text
BYE = b"B"  # leave, with the script's status


def message(kind: bytes, content: bytes = b"") -> bytes:
    """Return a message as it is sent. Local."""
    return HEADER.pack(kind, len(content)) + content


def split(received: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return the whole messages in what was received, kind and content, and the rest. Local."""
    messages = []
    while len(received) >= HEADER.size:
        kind, length = HEADER.unpack_from(received)
        end = HEADER.size + length
        if len(received) < end:
            break
        messages.append((kind, received[HEADER.size : end]))
        received = received[end:]
    return messages, received


def notice_lost_host(connection: socket.socket) -> None:
    """Let a connection break within half a minute after the other host has gone. Local."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    times = {"KEEPIDLE": 15, "KEEPINTVL": 5, "KEEPCNT": 3, "USER_TIMEOUT": 30_000}
    for name, value in times.items():
        if hasattr(socket, f"TCP_{name}"):  # macOS has other names
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)
