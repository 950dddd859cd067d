"""The watchdog: reports ranks that wait for one another for too long, and the lines in which they wait.

It is one daemon thread in each process, which wakes up every few seconds. It calls no MPI, so it needs
no MPI with support of threads, and works while ranks wait in MPI.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from chainer_dist import _environment
from chainer_dist.collectives import operation
from chainer_dist.global_except_hook import SECONDS_TO_SPEAK, report_cause
from chainer_dist.watch import inquiry, report
from chainer_dist.watch.address import Address, describe_self
from chainer_dist.watch.listener import Listener

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist.collectives.operation import Operation
    from chainer_dist.communicators import CommunicatorBase
    from chainer_dist.watch.settings import Settings

_LONGEST_PERIOD = 5.0  # seconds between two looks
_LOOKS = 8  # in the time of the shortest limit
_LONGEST_SILENCE = 5.0  # seconds to wait for a rank's answer
_ASKERS = 32  # threads that ask, while a report is made


class Watchdog:
    """Watches the operations of this process.

    More than ten attributes: limits, the threads and signals that watch, and what they have reported.

    Args:
        settings: Settings with at least one limit.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        shortest = settings.limits[0]
        self._period = min(_LONGEST_PERIOD, shortest / _LOOKS)
        self._patience = min(_LONGEST_SILENCE, max(2.0, shortest / 4))
        self._comms: weakref.WeakValueDictionary[str, CommunicatorBase] = (
            weakref.WeakValueDictionary()
        )
        self._listener = Listener(self._answer)
        self._signal = _register_stack_signal()
        self._closing = False
        self._awake_since = 0.0  # by time.perf_counter: when this process last was not running
        self._due: dict[tuple[int, float], float] = {}  # by thread and begin: the age to act at
        self._reported: dict[tuple[int, float], tuple[str, str]] = {}
        self._reporter: threading.Thread | None = None
        self._thread = threading.Thread(target=self._run, name=report.OWN_THREADS, daemon=True)
        self._thread.start()
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.forget)

    def open(self, others: Sequence[str]) -> None:
        """Let ranks of other nodes ask as well. Local.

        Args:
            others: See :meth:`Listener.open`.

        Raises:
            OSError: If no address of this node is known at which they can ask.
        """
        self._listener.open(others)
        self._listener.wake()

    def address(self, comm: CommunicatorBase) -> Address:
        """Return the address at which the other ranks of a communicator can ask. Local."""
        from mpi4py import MPI

        host = MPI.Get_processor_name()
        return describe_self(
            self._listener, comm.inter_rank, MPI.COMM_WORLD.rank, host, self._signal
        )

    def add(self, comm: CommunicatorBase) -> None:
        """Watch a communicator, whose log knows its identity and its peers. Local."""
        self._comms[comm.operation_log.identity] = comm

    def close(self) -> None:
        """Stop watching; other ranks that ask learn that this one has left. Local."""
        if self._closing:
            return
        self._closing = True
        self._listener.wake()
        self._thread.join(1.0)
        self._listener.close()

    def forget(self) -> None:
        """Stop watching in a forked child, without an effect on its parent. Local."""
        self._closing = True
        self._listener.close()

    def _answer(self, identity: str, full: bool) -> dict[str, Any]:
        comm = self._comms.get(identity)
        if comm is not None and comm.is_finalized:
            comm = None
        found = report.answer(comm, full=full)
        found["acts"] = [self._settings.warn is not None, self._settings.abort is not None]
        return found

    def _run(self) -> None:
        while not self._closing:
            started = time.perf_counter()
            self._listener.serve(self._period)
            now = time.perf_counter()
            if now - started > 2 * self._period + 1.0:
                # This process was stopped, perhaps the whole job: that is no stall of another rank.
                self._awake_since = now
            if not self._closing:
                self._look(now)

    def _look(self, now: float) -> None:
        """Begin a report if an operation has lasted too long."""
        current = set()
        for thread, stack in operation.stacks().items():
            wait = report.find_wait(stack)
            if (
                wait is None
                or wait.comm is None
                or wait.comm.operation_log.identity not in self._comms
            ):
                continue
            key = thread, wait.begun
            current.add(key)
            age = now - max(wait.begun, self._awake_since)
            if age >= self._due.setdefault(key, self._settings.limits[0]) and not self._is_busy():
                self._due[key] = self._next_due(age)
                self._reporter = threading.Thread(
                    target=self._report,
                    args=(key, wait, age),
                    name=f"{report.OWN_THREADS}, report",
                    daemon=True,
                )
                self._reporter.start()
        for key in [each for each in self._due if each not in current]:
            del self._due[key]
            reported = self._reported.pop(key, None)
            if reported is not None:
                _say(f"chainer_dist: over after {_words(now - key[1])}: {reported[0]}\n")

    def _is_busy(self) -> bool:
        return self._reporter is not None and self._reporter.is_alive()

    def _next_due(self, age: float) -> float:
        warn, abort = self._settings.warn, self._settings.abort
        due = float("inf")
        if warn is not None:
            due = warn
            while due <= age:
                due *= 2
        return due if abort is None or age >= abort else min(due, abort)

    def _report(self, key: tuple[int, float], wait: Operation, age: float) -> None:
        """Ask the other ranks and write a report, unless a lower rank does."""
        comm: Any = wait.comm
        abort = self._settings.abort
        ends = abort is not None and age >= abort
        for rank in range(comm.operation_log.rank):
            lower = self._ask(comm, rank, full=False)
            if isinstance(lower, dict) and lower["waits"] and lower["acts"][int(ends)]:
                return
        # A rank that is only late, such as rank 0 that evaluates alone, needs few lines.
        full = ends or self._settings.stacks
        with ThreadPoolExecutor(_ASKERS, f"{report.OWN_THREADS}, asking") as askers:
            answers = list(
                askers.map(
                    lambda rank: self._ask(comm, rank, full=full),
                    range(len(comm.operation_log.peers)),
                )
            )
        still = report.find_wait(operation.stacks().get(key[0], []))
        if still is not wait:
            return
        head, body = reported = report.compose(wait, answers)
        text = f"chainer_dist: stalled for {_words(age)}: {head}\n"
        text += "  as reported before\n" if self._reported.get(key) == reported else body
        self._reported[key] = head, body
        if ends:
            stall = f"stalled for {abort:g} s ({_environment.STALL_ABORT}): {head}"
            text += f"chainer_dist: ending the job, {stall}\n"
            report_cause(status=1, stall=stall)
        _say(text)
        if ends:
            _abort()

    def _ask(self, comm: CommunicatorBase, rank: int, *, full: bool) -> Any:
        identity, peers = comm.operation_log.identity, comm.operation_log.peers
        if rank == comm.operation_log.rank:
            return self._answer(identity, full)
        if peers[rank] is None:
            return inquiry.Silence("is not watched", is_reason=False)
        near = peers[rank].node == comm.inter_rank
        return inquiry.ask(peers[rank], identity, self._patience, near=near, full=full)


def _words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"  # noqa: PLR2004 - two digits


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _abort() -> None:
    """End the job from a thread beside the main one, which waits."""
    from mpi4py import MPI

    time.sleep(SECONDS_TO_SPEAK)  # launchers may drop what they have not read
    leave = threading.Timer(2.0, os._exit, (1,))  # launchers end the others then, too
    leave.daemon = True
    leave.start()
    if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
        MPI.COMM_WORLD.Abort(1)
    os._exit(1)


def _register_stack_signal() -> int:
    """Let this process print its stacks on a signal, without Python's lock; return the signal or 0."""
    number = inquiry.stack_signal()
    if not number or signal.getsignal(number) != signal.SIG_DFL:
        return 0
    try:
        faulthandler.register(number, file=2, all_threads=True)
    except (OSError, RuntimeError, ValueError):  # there is no standard error
        return 0
    return number
