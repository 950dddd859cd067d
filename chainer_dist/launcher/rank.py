"""A rank's monitor: starts the user's script, watches it and reports to the launcher. Runs on every host.

Three processes stand for a rank. ``mpiexec`` starts the first, which only waits. The second, the
monitor, is its child in a session of its own, so that it survives when ``mpiexec`` kills the rank: it has
to see how the script ended, and that nothing is left of it. The third is the script, as
``python script.py`` starts it, bound to its share of the host's cores.

The monitor ends the script, and all processes that the script started, when the launcher says so,
when the connection to the launcher breaks, and when the first process dies. If the monitor is killed the
system kills the script, and the first process kills the processes that the script has started. When the script has
failed, and the scripts of all ranks have ended, it removes the shared memory that no process uses any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from chainer_dist import _environment, _threads
from chainer_dist._connections import LOOPBACK, reach
from chainer_dist.launcher import cores, leftovers, mpi, output, processes, wire
from chainer_dist.launcher.monitor import SECONDS_TO_LEAVE, Monitor, exit_status

if TYPE_CHECKING:
    from collections.abc import Sequence

SECONDS_APART = 10.0  # that ranks of a host may start from one another


def main(arguments: Sequence[str]) -> int:
    """Run ``python`` with the arguments as this rank. Local.

    Without a launcher, that is under an ``mpiexec`` called by hand, this process becomes the script.

    Returns:
        The script's exit status; 128 plus the number of the signal if it was killed.
    """
    command = [sys.executable, *arguments]
    where = os.environ.pop(_environment.LAUNCHER, None)
    place = mpi.rank_of(os.environ)
    if place is None:
        return _refuse("mpiexec did not start this process as a rank")
    rank, _, local_rank, local_size = place
    cpus = share_of_host(local_rank, local_size)
    os.environ.setdefault("PYTHONUNBUFFERED", "1")  # output arrives when it is printed
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # a crash says in which line it was
    if where is None:
        if cpus is not None:
            os.sched_setaffinity(0, cpus)
        os.execv(command[0], command)  # noqa: S606 - this Python
    try:
        launcher = connect(where, rank)
    except OSError as error:
        return _refuse(f"rank {rank} on {socket.gethostname()}: {error}")
    own = launcher.getsockname()[0]
    if own != LOOPBACK:
        os.environ.setdefault(_environment.ADDRESS, own)
    return exit_status(_run_monitored(command, cpus, launcher, has_input=rank == 0))


def _run_monitored(
    command: Sequence[str], cpus: Sequence[int] | None, launcher: socket.socket, *, has_input: bool
) -> int:
    """Run the script under a monitor, wait for that one and return how it ended."""
    signal.pthread_sigmask(signal.SIG_BLOCK, wire.FORWARDED)
    for number in os.environ.pop(_environment.IGNORED, "").split(","):
        if number.isdigit():
            signal.signal(int(number), signal.SIG_IGN)  # so does the script, then
    processes.adopt_orphans()
    started = time.time()
    folder = Path(tempfile.mkdtemp(prefix="chainer-dist-"))
    progress = Path(os.environ.setdefault(_environment.PROGRESS, str(folder / "progress")))
    cause = folder / "cause"
    os.environ[_environment.CAUSE] = str(cause)
    notes = folder / "notes"
    if _environment.CALL not in os.environ:  # functions may have nothing to do with one another
        os.environ[_environment.NOTES] = str(notes)
    ours, its = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        os.setsid()
        processes.adopt_orphans()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, wire.FORWARDED)
        status = 1
        monitor = Monitor(launcher, its, progress, cause, notes, has_input=has_input)
        try:
            try:
                status = monitor.run(command, cpus)
            except BaseException:
                monitor.kill()
                raise
            finally:
                _clean_up_after(status, started, folder)
        except BaseException:  # noqa: BLE001 - this process must not return
            traceback.print_exc()
        finally:
            os._exit(status)
    its.close()
    launcher.close()
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if ended < 0:  # the monitor was killed, and no other process ends the script
        with contextlib.suppress(ValueError, ProcessLookupError):
            script = int(ours.recv(wire.CHUNK))
            os.killpg(script, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)  # before mpiexec kills this process as well
        processes.kill_descendants(SECONDS_TO_LEAVE)
        _clean_up_after(ended, started, folder)
    return ended


def share_of_host(local_rank: int, local_size: int) -> list[int] | None:
    """Return the hardware threads of a rank, and limit the threads of its libraries to them. Local.

    The limit is what :func:`chainer_dist.create_communicator` would set, in force from the start and
    by the same variables: nothing is done where one of them is set, or for a rank alone on its host.

    Returns:
        The hardware threads to bind it to; None not to bind it.
    """
    parts = cores.divide(cores.physical_cores(), local_size)
    if local_size > 1 and not any(name in os.environ for name in _threads.VARIABLES):
        threads = _threads.fair_share(parts, local_rank, _threads.quota())
        os.environ.update(dict.fromkeys(_threads.VARIABLES, str(threads)))
    bind = os.environ.get(_environment.PIN, "1") != "0" and hasattr(os, "sched_setaffinity")
    return parts[local_rank] if bind else None


def connect(where: str, rank: int) -> socket.socket:
    """Return a connection to the launcher, which then knows that this rank is there. Local.

    Args:
        where: Secret and addresses that :class:`~chainer_dist.launcher.job.Job` puts into the environment.
        rank: This rank.

    Raises:
        OSError: If none of the addresses answers, or none of those that do is the launcher.
    """
    try:
        launcher = reach(where)
    except OSError as error:
        raise OSError(
            f"the launcher cannot be reached ({error}); "
            "tell `chainer-dist run --address` how this host can reach it"
        ) from None
    wire.notice_lost_host(launcher)
    hello = {"rank": rank, "host": socket.gethostname()}
    launcher.sendall(wire.message(wire.HELLO, json.dumps(hello).encode()))
    return launcher


def _clean_up_after(status: int, started: float, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if status:
        leftovers.remove_shared_memory(started - SECONDS_APART)


def _refuse(reason: str) -> int:
    output.say(reason)
    return 1
