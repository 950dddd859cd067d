"""Workers of data loaders that survive the signal by which the end of a job is announced.

mpiexec passes that signal on to all processes of a rank. The workers of a MultiprocessIterator would die
of it, and the rank would wait for a batch for ever, instead of coming to the step in which all ranks save.
A wrapper of the dataset changes the handlers in a worker, however that was started; a fork server imports
this module before it serves. Nothing here communicates.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.sharedctypes
import multiprocessing.util
import os
import signal
from typing import TYPE_CHECKING, Any

from chainer import iterators

from chainer_dist import _environment
from chainer_dist.checkpoints.preemption import SIGNALS
from chainer_dist.iterators import DistributedIterator
from chainer_dist.serialization.target import parts

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["shield"]


def shield(target: Any) -> None:
    """Let the workers of a target's iterators go on after a signal, if they have not begun. Local."""
    for _, part in parts(target):
        if isinstance(part, DistributedIterator) and not isinstance(part.make_iterator, _Shielding):
            part.make_iterator = _Shielding(part.make_iterator)
        _shield_iterator(getattr(part, "actual_iterator", part))


def _shield_iterator(iterator: Any) -> None:
    if not isinstance(iterator, iterators.MultiprocessIterator) or iterator._finalized:  # noqa: SLF001 - Chainer's
        return
    loop = iterator._prefetch_loop  # noqa: SLF001 - Chainer's
    if loop.thread is not None or isinstance(loop.dataset, _Dataset):
        return
    _start_helpers()
    loop.dataset = dataset = _Dataset(loop.dataset)
    terminate = loop.terminate

    def end_workers() -> None:
        dataset.let_go()
        terminate()

    loop.terminate = end_workers
    # Before multiprocessing ends what is left of the workers when the rank exits.
    multiprocessing.util.Finalize(None, dataset.let_go, exitpriority=100)


class _Shielding:
    """Makes iterators, and shields their workers."""

    def __init__(self, make_iterator: Callable[..., Any]) -> None:
        self._make_iterator = make_iterator

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        iterator = self._make_iterator(*args, **kwargs)
        _shield_iterator(iterator)
        return iterator


class _Dataset:
    """A dataset whose first sample in a worker arranges what signals do there."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._owner = os.getpid()
        self._arranged_in = self._owner
        self._ends = multiprocessing.sharedctypes.RawValue("b", 0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._arrange()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        if os.getpid() != self._arranged_in:  # forked
            self._arrange()
        return self._dataset[index]

    def _arrange(self) -> None:
        self._arranged_in = os.getpid()
        for number in SIGNALS:
            signal.signal(number, self._react)

    def let_go(self) -> None:
        """Let the workers be ended by SIGTERM, in the way of multiprocessing."""
        self._ends.value = 1

    def _react(self, number: int, frame: Any) -> None:
        del frame
        if number == signal.SIGTERM and (self._ends.value or not _is_there(self._owner)):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _start_helpers() -> None:
    """Start what workers are started with, so that it bears signals; or leave it running. Local."""
    method = multiprocessing.get_start_method(allow_none=True)
    if method in ("spawn", "forkserver"):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            multiprocessing.resource_tracker.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if method == "forkserver":
        server: Any = multiprocessing.forkserver._forkserver  # noqa: SLF001 - Python has no other way
        if __name__ not in server._preload_modules:  # noqa: SLF001 - Python has no other way
            server.set_forkserver_preload([*server._preload_modules, __name__])  # noqa: SLF001 - Python has no other way
        os.environ[_environment.FORKSERVER_OF] = str(os.getpid())
        try:
            server.ensure_running()
        finally:
            del os.environ[_environment.FORKSERVER_OF]


def _outlive_signals() -> None:
    """Let this fork server outlive the signals, but not what it forks. Local."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)

    def heed_them_again() -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    os.register_at_fork(after_in_child=heed_them_again)


if os.environ.pop(_environment.FORKSERVER_OF, None) == str(os.getppid()):
    _outlive_signals()
