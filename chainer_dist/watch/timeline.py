"""Timelines: the time that each rank spends in each operation, as a trace file and as a table."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chainer_dist._files import replacing
from chainer_dist.collectives import operation
from chainer_dist.collectives.failures import together
from chainer_dist.collectives.operation import CATEGORIES, Observer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from chainer_dist.collectives.operation import Operation
    from chainer_dist.communicators import CommunicatorBase

MAX_EVENTS = 100_000

_ROUNDS = 16  # of messages to and fro, of which the fastest one gives the difference of clocks
_MOST_RANKS = 16  # that a table has lines for
_OTHER = "other"  # time outside of operations: data, evaluation, and code of the script


class _Event(NamedTuple):
    """An operation that is over; times by this rank's clock, in seconds."""

    name: str
    category: str
    begun: float
    end: float
    thread: int
    number: int


class _Track:
    """The seconds that a thread has spent in each category."""

    def __init__(self) -> None:
        self.within: dict[int, float] = {}  # by depth: seconds of the operations that are over
        self.seconds = dict.fromkeys(CATEGORIES, 0.0)

    def add(self, category: str, depth: int, seconds: float) -> None:
        """Count an operation, less those within it."""
        self.seconds[category] += seconds - self.within.pop(depth + 1, 0.0)
        self.within[depth] = self.within.get(depth, 0.0) + seconds


class _Recorder(Observer):
    """Keeps the operations of all threads of this rank."""

    def __init__(self, max_events: int) -> None:
        self.started = time.perf_counter()
        self.events: list[_Event] = []
        self.dropped = 0
        self.tracks: dict[int, _Track] = {}
        self._max_events = max_events

    def left(self, operation: Operation, end: float) -> None:
        """See :meth:`Observer.left`."""
        thread, kind = threading.get_ident(), operation.kind
        begun = max(operation.begun, self.started)
        if thread not in self.tracks:
            self.tracks[thread] = _Track()
        self.tracks[thread].add(kind.category, operation.depth, end - begun)
        if len(self.events) < self._max_events:
            name = operation.describe()
            event = _Event(name, kind.category, begun, end, thread, operation.number)
            self.events.append(event)
        else:
            self.dropped += 1


class Part(NamedTuple):
    """The timeline of one rank; moments are by rank 0's clock, and all times in seconds."""

    host: str
    started: float
    seconds: dict[str, float]
    background: dict[str, float]
    events: list[_Event]
    dropped: int
    threads: dict[int, str]

    @property
    def duration(self) -> float:
        """Seconds of the whole by this rank's own clock; the sum of all categories."""
        return sum(self.seconds.values())


class timeline(contextlib.AbstractContextManager["timeline"]):  # noqa: N801 - used like a function
    """Records what all ranks do within a ``with`` block, and writes it at its end. Collective.

    The file is Chrome's trace-event JSON, which https://ui.perfetto.dev shows: a process for each
    rank, the main thread and others as its threads, and in them forward, backward, packing and
    unpacking, waiting for other ranks, exchange and update of every step, and whatever else a
    communicator is asked for. Clocks of nodes are compared at the beginning and at the end, by messages
    to and fro, and times are rank 0's. A table of where the time goes is written to rank 0's standard
    error: in percent, each moment counted once, under the innermost operation, and what is in none
    under "other".

    Forward and backward are seen where ``optimizer.update`` is given the loss function, as a Trainer
    does. Waiting is what a rank waits before gradients can be exchanged, and for blocks of other
    ranks in shared memory if that takes longer than about a millisecond; waits within other
    collectives, and shorter ones, count as exchange.

    ``CHAINER_DIST_TIMELINE=trace.json`` in the environment records a whole job, from the first
    communicator that spans it to its end.

    For example, for twenty steps::

        with chainer_dist.watch.timeline("trace.json", comm):
            for _ in range(20):
                optimizer.update(model, x, t)

    Args:
        path: Path of the file; rank 0's counts, and rank 0 writes. The file is replaced when all is
            written. None on rank 0 writes neither a file nor the table.
        comm: The communicator whose ranks record.
        max_events: Number of operations that each rank keeps for the trace, the first ones. The table
            counts all. An operation takes about 200 bytes of memory and 150 of the file.

    Attributes:
        seconds: After the end, this rank's seconds in the main thread by category, with "other"; their
            sum is ``duration``.
        duration: The seconds from beginning to end on this rank.

    Raises:
        OSError: On every rank, at the beginning if there is no such folder, or a folder of the file's name;
            at the end if the file cannot be written.
    """

    def __init__(
        self, path: str | Path | None, comm: CommunicatorBase, *, max_events: int = MAX_EVENTS
    ) -> None:
        self._path = None if path is None else Path(path)
        self._outer = comm
        self._max_events = max_events
        self.seconds: dict[str, float] = {}
        self.duration = 0.0

    def __enter__(self) -> Self:
        with together(self._outer):
            if self._outer.rank == 0 and self._path:
                if not self._path.parent.is_dir():
                    raise FileNotFoundError(
                        f"there is no folder {self._path.parent} for the timeline"
                    )
                if self._path.is_dir():
                    raise IsADirectoryError(f"{self._path} is a folder, and no file for a timeline")
        comm = self._outer.split(0, self._outer.rank)
        assert comm is not None  # noqa: S101 - no rank is left out
        self._comm = comm
        self._clocks = [_compare_clocks(comm)]
        self._recorder = _Recorder(self._max_events)
        operation.observers.append(self._recorder)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        recorder, ended = self._recorder, time.perf_counter()
        operation.observers.remove(recorder)
        main = threading.main_thread().ident or 0
        own = recorder.tracks.pop(main, _Track())
        self.duration = ended - recorder.started
        self.seconds = {**own.seconds, _OTHER: self.duration - own.within.get(0, 0.0)}
        if error is not None:  # perhaps on this rank alone, so it must not wait for others
            _say(f"chainer_dist: no timeline is written, as rank {self._comm.rank} has failed\n")
            return
        self._clocks.append(_compare_clocks(self._comm))
        background = dict.fromkeys(CATEGORIES, 0.0)
        for track in recorder.tracks.values():
            for category, seconds in track.seconds.items():
                background[category] += seconds
        names = {each.ident or 0: each.name for each in threading.enumerate()}
        part = Part(
            host=_host(),
            started=self._on_rank_0(recorder.started),
            seconds=self.seconds,
            background=background,
            events=[
                each._replace(begun=self._on_rank_0(each.begun), end=self._on_rank_0(each.end))
                for each in recorder.events
            ],
            dropped=recorder.dropped,
            threads={main: "main", **{key: names[key] for key in recorder.tracks if key in names}},
        )
        self._write(part)
        self._comm.finalize()

    def _on_rank_0(self, moment: float) -> float:
        """Return what rank 0's clock shows at a moment of this rank's."""
        (first, offset), (last, later) = self._clocks
        drift = (later - offset) / (last - first) if last > first else 0.0
        return moment + offset + drift * (moment - first)

    def _write(self, part: Part) -> None:
        parts = self._comm.gather_obj(part)
        with together(self._comm):
            if parts is not None and self._path is not None:
                try:
                    with replacing(self._path) as file:
                        file.writelines(_trace(parts))
                except OSError as error:
                    raise OSError(f"the timeline cannot be written: {error}") from error
                _say(table(parts, self._path))


def start_at_exit(path: str, comm: CommunicatorBase) -> None:
    """Record a timeline from now to the end of the process. Collective."""
    recording = timeline(path, comm)
    recording.__enter__()
    pid = os.getpid()

    def finish() -> None:
        from mpi4py import MPI

        if os.getpid() == pid and not MPI.Is_finalized():
            # Without a traceback that says so: the interpreter ends after an uncaught exception.
            failed = getattr(sys, "last_value", None)
            recording.__exit__(type(failed) if failed else None, failed, None)

    atexit.register(finish)


def table(parts: Sequence[Part], path: Path) -> str:
    """Return a table of the time of each rank by category, in percent. Local."""
    names = (*CATEGORIES, _OTHER)
    shares = np.array(
        [[part.seconds[name] / max(part.duration, 1e-9) * 100 for name in names] for part in parts]
    )
    longest = max(part.duration for part in parts)
    lines = [
        f"chainer_dist: where the time goes, in percent of {longest:.3f} s ({path})",
        f"{'rank':>8}" + "".join(f"{name:>10}" for name in names),
    ]
    rows = [*enumerate(shares)] if len(parts) <= _MOST_RANKS else []
    extremes = [] if rows else [("least", shares.min(axis=0)), ("most", shares.max(axis=0))]
    for label, row in [*rows, *extremes, ("mean", shares.mean(axis=0))]:
        lines.append(f"{label:>8}" + "".join(f"{share:>10.1f}" for share in row))
    for name in CATEGORIES:
        seconds = float(np.mean([part.background[name] for part in parts]))
        if seconds:
            lines.append(f"  besides, in other threads, {name}: {seconds:.3f} s a rank")
    dropped = sum(part.dropped for part in parts)
    if dropped:
        lines.append(
            f"  the file lacks the last {dropped} operations: raise max_events to keep them"
        )
    return "\n".join(lines) + "\n"


def _trace(parts: Sequence[Part]) -> Iterator[str]:
    """Yield the text of the file, an event at a time."""
    origin = min(part.started for part in parts)
    head = {
        "seconds": [{**part.seconds} for part in parts],
        "duration": [part.duration for part in parts],
        "dropped": [part.dropped for part in parts],
    }
    yield f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(head)}, "traceEvents": [\n'
    separator = ""
    for rank, part in enumerate(parts):
        for event in _rank_events(rank, part, origin):
            yield separator + json.dumps(event)
            separator = ",\n"
    yield "\n]}\n"


def _rank_events(rank: int, part: Part, origin: float) -> Iterator[dict[str, Any]]:
    threads = {ident: number for number, ident in enumerate(part.threads)}
    yield _meta("process_name", rank, 0, name=f"rank {rank} ({part.host})")
    yield _meta("process_sort_index", rank, 0, sort_index=rank)
    for ident, number in threads.items():
        yield _meta("thread_name", rank, number, name=part.threads[ident])
    for each in sorted(part.events, key=lambda each: each.begun):
        yield {
            "ph": "X",
            "name": each.name,
            "cat": each.category,
            "pid": rank,
            "tid": threads.get(each.thread, len(threads)),
            "ts": round((each.begun - origin) * 1e6, 3),
            "dur": round((each.end - each.begun) * 1e6, 3),
            "args": {"operation": each.number} if each.number else {},
        }


def _meta(kind: str, rank: int, thread: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": thread, "args": args}


def _compare_clocks(comm: CommunicatorBase) -> tuple[float, float]:
    """Return a moment of this rank's clock, and the difference of rank 0's clock at it, in seconds. Collective.

    Processes of a node read the same clock, so only ranks on other nodes than rank 0's compare clocks.
    """
    mpi_comm, clock = comm.mpi_comm, np.empty(1)
    best, middle, offset = float("inf"), time.perf_counter(), 0.0
    nodes: list[int] = mpi_comm.allgather(comm.inter_rank)
    for rank in (each for each, node in enumerate(nodes) if node != nodes[0]):
        for _ in range(_ROUNDS):
            if mpi_comm.rank == 0:
                mpi_comm.Recv(clock, rank)
                clock[0] = time.perf_counter()
                mpi_comm.Send(clock, rank)
            elif mpi_comm.rank == rank:
                sent = time.perf_counter()
                mpi_comm.Send(clock, 0)
                mpi_comm.Recv(clock, 0)
                received = time.perf_counter()
                if received - sent < best:
                    best, middle = received - sent, (sent + received) / 2
                    offset = float(clock[0]) - middle
    mpi_comm.Barrier()
    return middle, offset


def _host() -> str:
    from mpi4py import MPI

    return MPI.Get_processor_name()


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
