"""Signals that announce the end of a job, how all ranks agree to leave, and the status with which they leave.

Batch systems send SIGTERM, or a signal that the user chose (``sbatch --signal=USR1@120``), some
time before they kill a job. They do not define which ranks get the signal, or in which step.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

__all__ = ["SIGNALS", "STATUS", "Preempted", "Signals"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Preempted(SystemExit):
    """Every rank leaves, with status 75, because one got a signal; all is saved.

    A ``SystemExit``, so that Chainer's Trainer finalizes everything on its way out.
    """

    # In the place of the attribute that global_except_hook watches: this is no failure, and no rank
    # must be ended in the middle of its finalizers.
    code = STATUS


class Signals:
    """Catches the signals that announce the end of a job.

    Attributes:
        received: Number of the last signal that came, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Catch signals from now on, unless the program has handlers for them. Local.

        Raises:
            RuntimeError: If this is not the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "signals can be caught in the main thread only; train there, or give "
                "preemption=False"
            )
        for number in SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                self._before[number] = signal.signal(number, self._note)
        if self not in _listening:
            _listening.append(self)

    def stop(self) -> None:
        """Restore the handlers from before :meth:`listen`. Local."""
        if threading.current_thread() is threading.main_thread():
            while self._before:
                signal.signal(*self._before.popitem())
        if self in _listening:
            _listening.remove(self)

    def _note(self, number: int, frame: Any) -> None:
        del frame
        self.received = number


_listening: list[Signals] = []
_forking = threading.local()


def _before_fork() -> None:
    # A signal to a child that does not run yet waits for it.
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _after_fork_in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _after_fork_in_child() -> None:
    # A signal must end a child, such as a worker of a data loader.
    for signals in [*_listening]:
        signals.stop()
    _after_fork_in_parent()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
