"""Standard input for rank 0: read when it is wanted, a piece at a time.

``mpiexec`` could pass it on. But MPICH's ends the job when the script reads more slowly than input
arrives, and Open MPI's does not finish three megabytes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from chainer_dist.launcher import wire

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

__all__ = ["Input"]


class Input:
    """Standard input of this process, for one job after another.

    A piece that was read for a job that has ended is given to the next one. In the background of a
    terminal, where reading would stop this process, there is none.
    """

    def __init__(self) -> None:
        signal.signal(signal.SIGTTIN, signal.SIG_IGN)
        self._lock = threading.Lock()
        self._piece: bytes | None = None  # read, and not yet given to anybody
        self._reading = False
        self._give: Callable[[bytes], object] | None = None

    def ask(self, loop: asyncio.AbstractEventLoop, give: Callable[[bytes], None]) -> None:
        """Have ``give`` called in the loop, once, with the next piece, b"" at the end. Local."""
        with self._lock:
            self._give = lambda piece: loop.call_soon_threadsafe(give, piece)
            if not self._reading and self._piece is None:
                self._reading = True
                # A thread that may wait for ever, and must not keep this process from ending; nor take
                # signals while the launcher wants none, between two attempts.
                before = signal.pthread_sigmask(signal.SIG_BLOCK, wire.FORWARDED)
                threading.Thread(target=self._read, daemon=True).start()
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._hand_over()

    def _read(self) -> None:
        try:
            piece = b"" if sys.stdin is None else os.read(0, wire.CHUNK)
        except OSError:
            piece = b""
        with self._lock:
            self._piece, self._reading = piece, False
        self._hand_over()

    def _hand_over(self) -> None:
        with self._lock:
            give, piece = self._give, self._piece
            if give is None or piece is None:
                return
            self._give = self._piece = None
            try:
                give(piece)
            except RuntimeError:  # that job is over
                self._piece = piece
