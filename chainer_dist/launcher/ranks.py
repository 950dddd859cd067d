"""A rank as the launcher knows it: the connection to its monitor, its output, and how it ended."""

from __future__ import annotations

import math
import signal
from typing import TYPE_CHECKING, Any

from chainer_dist.launcher import wire

if TYPE_CHECKING:
    import asyncio

    from chainer_dist.launcher.printing import Printer

__all__ = ["Rank", "name_of_signal"]

_HINTS = {
    "SIGBUS": " (most often as /dev/shm is full: give a container more by --shm-size)",
    "SIGKILL": " (by the system, if memory was short)",
    "SIGSEGV": " (a crash in compiled code)",
}


def name_of_signal(number: int) -> str:
    """Return the name of a signal. Local."""
    try:
        return signal.Signals(number).name
    except ValueError:  # of those for real time most have none
        return f"signal {number}"


class Rank:
    """The state of a rank in the launcher."""

    def __init__(
        self, number: int, host: str, writer: asyncio.StreamWriter, printer: Printer
    ) -> None:
        self.number = number
        self.host = host
        self.writer = writer
        self.printer = printer
        self.ended_at = math.inf
        self.status: int | None = None  # None if it is not known
        self.cause: dict[str, Any] = {}  # what the script has reported of its end
        self.alone = False  # whether it has ended without having begun to communicate
        self.unpaid = 0  # bytes of output that came, and no more was asked for

    def send(self, kind: bytes, content: bytes = b"") -> None:
        """Send a message to the monitor, if it is still there."""
        if not self.writer.is_closing():
            self.writer.write(wire.message(kind, content))

    def exit_status(self) -> int | None:
        """Return the status as a shell has it, None if it is not known."""
        status = self.cause.get("status", self.status)  # MPI_Abort itself ends with other ones
        return status if status is None or status >= 0 else 128 - status

    def why(self) -> str:
        """Return how the rank ended, in words."""
        who = f"rank {self.number} on {self.host}"
        if self.cause.get("stall"):
            return f"{who} ended the job: {self.cause['stall']}"
        if self.exit_status() is None:
            return f"the connection to {who} broke"
        if not self.cause and self.status is not None and self.status < 0:
            name = name_of_signal(-self.status)
            return f"{who} failed first: killed by {name}{_HINTS.get(name, '')}"
        status = f"exit status {self.exit_status()}"
        exception = self.cause.get("exception", "") if self.cause else self.printer.words.exception
        return f"{who} failed first: {f'{exception} ({status})' if exception else status}"
