"""Where a rank listens, which process it is, and in which state that is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from chainer_dist.watch.listener import Listener


# Letters for states of processes, as in /proc/PID/stat.
STOPPED, ENDED = ("T", "t"), ("Z", "X")


class Address(NamedTuple):
    """Where a rank listens, and which process it is.

    Attributes:
        node: Ranks of one communicator with equal numbers are on one node.
        job_rank: The rank in ``MPI.COMM_WORLD``.
        pid: Number of its process.
        started: Time at which that process started, in the kernel's words, and the namespace of process
            numbers, which distinguish it from other processes of its number; empty if not known.
        host: Name of its node.
        port: Port on its node.
        open_address: Address at which other nodes reach it; empty if they do not.
        open_port: Port at that address; 0 if they do not.
        secret: Bytes that a rank that asks must know, and that this rank proves to know.
        signal: Number of the signal on which the process prints its Python stacks; 0 if there is none.
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
        signal=number if found is not None else 0,  # only to a process that is known for sure
    )


def _namespace() -> str:
    """Return the namespace of the process numbers that are seen here; empty if it is not known."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, str] | None:
    """Return state and start time of a process, None if they are not known."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]
