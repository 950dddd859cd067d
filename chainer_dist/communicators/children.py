"""Child processes of a rank, such as the workers of data loaders: none of them can communicate.

What multiprocessing starts by ``spawn`` or ``forkserver`` imports the script first. If that has no
``if __name__ == "__main__"``, the child calls ``create_communicator``, where MPI would wait for ever
for the other ranks, and the rank for the child. So the call raises in the child. As perhaps no code of the rank waits
for the end of the child, the rank is sent a signal, on which it raises as well. A forked child has a copy of the
rank's MPI, which it must not use.

The script may also import ``mpi4py.MPI`` at its top, which starts MPI: in a child over the connections between its
rank and mpiexec. So mpi4py is set not to start MPI in children of ranks, and programs that they start inherit that.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.process
import multiprocessing.util
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainer_dist.collectives.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["listen", "refuse"]

_ADVICE = (
    "A process that is started by 'spawn' or 'forkserver' imports the script first: put what the script does, as "
    "opposed to what it defines, under\n\n"
    '    if __name__ == "__main__":\n'
)
# The only signal without another use; some systems do not have it.
_SIGNAL = int(signal.SIGRTMAX) - 6 if hasattr(signal, "SIGRTMAX") else 0

# Variables by which mpi4py decides whether its import starts MPI, and some that mpiexec sets for ranks.
_START = "MPI4PY_RC_INITIALIZE"
_OF_MPIEXEC = frozenset({"PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"})

_starting = threading.Lock()
_rank: list[int] = []  # in a forked child: which rank it was forked from


def refuse() -> None:
    """Raise if this process is a child of a rank, or another child that multiprocessing started. Local.

    Raises:
        RuntimeError: Says what to do. The rank raises, too, if this child is still importing the script.
    """
    process: Any = multiprocessing.process.current_process()
    who = f"create_communicator was called in the process {process.name!r}"
    if _rank:
        raise RuntimeError(f"{who}, which was forked from rank {_rank[0]}; {_FORKED}")
    if getattr(process, "_inheriting", False):  # as multiprocessing itself finds out
        _tell_rank()
        raise RuntimeError(
            f"{who}, which multiprocessing has started and which is no rank. {_ADVICE}"
        )
    if multiprocessing.process.parent_process() is not None:
        raise RuntimeError(
            f"{who}, which multiprocessing has started: only what mpiexec has started is a rank. Communicate "
            f"there, and hand its children what they need. {_ADVICE}"
        )


_FORKED = (
    "a child has no part in its rank's communication. Communicate before, or in the rank, and hand the child what it "
    "needs"
)


def listen() -> None:
    """Let errors of children that are importing the script be raised in this rank from now on. Local."""
    if (
        _SIGNAL
        and threading.current_thread() is threading.main_thread()  # others cannot arrange that
        and signal.getsignal(_SIGNAL) == signal.SIG_DFL
    ):
        signal.signal(_SIGNAL, _hear)


def _hear(number: int, frame: Any) -> None:
    del frame
    signal.signal(number, signal.SIG_IGN)  # one is enough, and this rank has to end now
    raise RuntimeError(
        "a process that this one has started with multiprocessing came to create_communicator while it imported the "
        f"script. {_ADVICE}"
    )


def _tell_rank() -> None:
    """Send the signal to the nearest ancestor that is waiting for it."""
    pid = os.getppid()
    with contextlib.suppress(OSError, ValueError):
        while pid > 1 and _SIGNAL:
            lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
            status = dict(line.split(":", 1) for line in lines if ":" in line)
            if int(status["SigCgt"], 16) >> (_SIGNAL - 1) & 1:
                os.kill(pid, _SIGNAL)
                return
            pid = int(status["PPid"])


def _start_without_mpi(start: Callable[..., int]) -> Callable[..., int]:
    """Let processes that a rank starts import mpi4py without starting MPI.

    Args:
        start: Function by which multiprocessing starts all but forked processes.
    """

    @functools.wraps(start)
    def start_without_mpi(*args: Any) -> int:
        mpi = sys.modules.get("mpi4py.MPI")
        with _starting:
            if mpi is None or _START in os.environ or not _OF_MPIEXEC & os.environ.keys():
                return start(*args)
            os.environ[_START] = "0"
            try:
                return start(*args)
            finally:
                del os.environ[_START]

    return start_without_mpi


def _after_fork_in_child() -> None:
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized():
        return
    _rank[:] = [mpi.COMM_WORLD.rank]
    enter = Operation.__enter__

    def enter_if_alone(self: Operation) -> Operation:
        if self.comm is not None:
            raise RuntimeError(
                f"{self.kind.name} was called in a process that was forked from rank {_rank[0]}; {_FORKED}"
            )
        return enter(self)

    Operation.__enter__ = enter_if_alone  # type: ignore[method-assign, assignment]  # no cost in ranks


os.register_at_fork(after_in_child=_after_fork_in_child)
if hasattr(multiprocessing.util, "spawnv_passfds"):  # not on Windows
    multiprocessing.util.spawnv_passfds = _start_without_mpi(multiprocessing.util.spawnv_passfds)
