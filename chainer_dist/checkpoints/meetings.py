"""Steps in which the ranks find out together what only some of them know, such as a signal to one of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from chainer_dist.checkpoints.preemption import Signals
from chainer_dist.collectives.extremes import extremes
from chainer_dist.collectives.failures import together
from chainer_dist.collectives.operation import WAITING, Kind

if TYPE_CHECKING:
    from chainer_dist.checkpoints.history import History
    from chainer_dist.communicators import CommunicatorBase

__all__ = ["Meetings", "Rounds"]

_ROUND = Kind("round of checkpoints", WAITING)

_SECONDS = 0.5  # between two rounds
_MOST_STEPS = 100  # between two rounds


class Rounds:
    """Exchanges a few numbers between the ranks, in steps that all ranks know beforehand.

    There is one exchange about every half second, by the time that the slowest rank takes for a step, and
    at least one every 100 steps, so that it takes little time.

    Args:
        comm: The communicator whose ranks exchange.
    """

    def __init__(self, comm: CommunicatorBase) -> None:
        self._comm = comm
        self._interval = 1
        self._steps = 0
        self._started = time.perf_counter()

    def step(self, *numbers: int) -> list[int] | None:
        """Count a step. Collective in some steps, the same on every rank.

        Args:
            numbers: Numbers of this rank, as many on every rank.

        Returns:
            The maximum of each number over the ranks, or None in a step without an exchange.
        """
        self._steps += 1
        if self._steps < self._interval:
            return None
        now = time.perf_counter()
        microseconds = int((now - self._started) / self._steps * 1e6)
        largest, _ = extremes(self._comm, _ROUND, *numbers, microseconds)
        *answers, slowest = largest
        self._interval = min(max(1, int(_SECONDS * 1e6) // max(1, slowest)), _MOST_STEPS)
        self._steps = 0
        self._started = now
        return answers


class Meetings:
    """Lets the ranks find out whether one has got a signal to end, whether all have written, and what rank 0 wants.

    Args:
        comm: Communicator whose ranks save.
        history: Checkpoints of the run, to complete when all ranks have written their files.
        heeds_signals: Whether signals are heeded.

    Attributes:
        preempted: Whether a rank has got a signal to end; the same on every rank.
    """

    def __init__(self, comm: CommunicatorBase, history: History, *, heeds_signals: bool) -> None:
        self.preempted = False
        self._comm = comm
        self._history = history
        self._heeds_signals = heeds_signals
        self._listens = False
        self._signals = Signals()
        self._rounds = Rounds(comm)

    def listen(self) -> None:
        """Begin to heed signals, if that is asked for and not so yet. Collective at first.

        Raises:
            RuntimeError: On every rank, in another thread than the main one.
        """
        if not self._heeds_signals or self._listens:
            return
        with together(self._comm):
            self._signals.listen()
        self._listens = True

    def stop(self) -> None:
        """Heed no signals any more. Local."""
        self._signals.stop()
        self._listens = False

    def meet(self, wanted: bool) -> tuple[bool, bool]:
        """Count a step, and in some steps find out what the other ranks know. Collective.

        Args:
            wanted: Whether this rank wants to save.

        Returns:
            Whether rank 0 wants to save, and whether a rank has got a signal to end; the same on every rank.

        Raises:
            OSError: On every rank, if a checkpoint cannot be written, and that is to raise.
        """
        answers = self._rounds.step(
            self._signals.received,
            int(self._history.is_writing),
            int(wanted and self._comm.rank == 0),
        )
        if answers is None:
            return False, self.preempted
        signal, still_writing, agreed = answers
        self.preempted = self.preempted or bool(signal)
        if not still_writing:
            self._history.complete()
        return bool(agreed), self.preempted
