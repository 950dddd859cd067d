"""What becomes of the extensions of a trainer: reports are of all ranks, and rank 0 writes them."""

from __future__ import annotations

import io
import types
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer.training import extension, extensions
from chainer.training.extensions import _snapshot

from chainer_dist import _chainer
from chainer_dist._files import read_regular
from chainer_dist._proxy import Proxy
from chainer_dist.collectives.calls import is_communicator
from chainer_dist.collectives.failures import together
from chainer_dist.extensions.observation_aggregator import as_variable, mean_of_all, plain_value
from chainer_dist.serialization.target import consolidate, load_npz
from chainer_dist.training import samples
from chainer_dist.training.triggers import agreed, is_known

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["prepare_extensions"]

_AFTER_WRITERS = extension.PRIORITY_EDITOR + 0.5

_REPORTS = (
    extensions.LogReport,
    extensions.PlotReport,
    extensions.PrintReport,
    extensions.VariableStatisticsPlot,
    extensions.ProgressBar,
    extensions.DumpGraph,
)
# Attributes, without underscores around them, of what writes somewhere.
_PLACES = frozenset(
    {
        *("directory", "dirname", "folder", "log_dir", "logdir", "out", "out_dir", "path"),
        *("file", "file_name", "filename", "log_name", "stream", "summary_writer", "writer"),
    }
)
# What a function that writes calls, or where it finds the trainer's folder.
_WRITES = frozenset(
    {
        *("add_figure", "add_histogram", "add_image", "add_scalar", "add_scalars", "write_image"),
        *("log_artifact", "log_figure", "log_image", "log_metric", "log_metrics"),
        *("imsave", "imwrite", "save", "save_hdf5", "save_npz", "savefig", "savetxt"),
        *("savez", "savez_compressed", "dump", "to_csv"),
        *("makedirs", "mkdir", "open", "out", "write", "write_bytes", "write_text"),
    }
)

_COLLECTIVE = frozenset(
    {
        *("allgather", "allreduce", "alltoall", "bcast", "gather", "scatter"),
        *("allgather_obj", "allreduce_obj", "bcast_obj", "gather_obj", "scatter_obj"),
        *("Barrier", "barrier", "mpi_comm"),
    }
)


def prepare_extensions(
    trainer: chainer.training.Trainer,
    comm: CommunicatorBase,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Let a trainer report means over all ranks, and let rank 0 write. Collective, once, before it runs.

    Args:
        trainer: The trainer, whose extensions are changed in place.
        comm: Communicator.
        before: Called on every rank before a snapshot is taken.

    Raises:
        RankMismatchError: On every rank, if the trainers have other extensions.
    """
    entries = _chainer.extension_entries(trainer)
    order = sorted(entries, key=lambda name: entries[name].priority, reverse=True)
    samples.compare(
        comm,
        [("the extensions of the trainer", str(order))],
        "extend the trainers of all ranks alike: rank 0 alone writes in any case",
    )
    for name, entry in entries.items():
        is_early = entry.priority > _AFTER_WRITERS
        entry.trigger = agreed(entry.trigger, comm, before_averages=is_early)
        own = entry.extension
        if isinstance(own, _snapshot._Snapshot):  # noqa: SLF001 - Chainer's
            entry.extension = _Snapshot(own, comm, before)
        elif isinstance(own, extensions.DumpGraph):
            entry.priority = extension.PRIORITY_WRITER  # averages have no graph
        elif isinstance(own, extensions.LogReport) and not _has_own_call(own, extensions.LogReport):
            own._trigger = agreed(own._trigger, comm)  # noqa: SLF001 - Chainer's
        with together(comm):
            silent = comm.rank != 0 and _writes(own)
        if not silent:
            continue
        if isinstance(own, extensions.LogReport) and not _has_own_call(own, extensions.LogReport):
            own._log_name = None  # noqa: SLF001 - Chainer's; its log is kept, and can be read
        elif not isinstance(entry.extension, _Snapshot):
            entry.extension = _Silent(own, name)
    trainer.stop_trigger = agreed(trainer.stop_trigger, comm)
    if comm.size > 1:
        _add_averages(trainer, comm)


class _Silent(Proxy, wraps="actual_extension"):
    """An extension that another rank calls; its attributes are there as on that rank."""

    actual_extension: Any
    name: str

    def __init__(self, actual_extension: Any, name: str) -> None:
        self.actual_extension = actual_extension
        self.name = name

    def __call__(self, trainer: chainer.training.Trainer) -> None:
        pass

    def initialize(self, trainer: chainer.training.Trainer) -> None:
        pass

    def on_error(self, trainer: chainer.training.Trainer, exc: Any, tb: Any) -> None:
        pass

    def finalize(self) -> None:
        pass


class _Snapshot(Proxy, wraps="actual_extension"):
    """A snapshot that rank 0 saves, and that all ranks load; its names are as in one process."""

    actual_extension: Any
    _comm: CommunicatorBase
    _before: Callable[[], None]

    def __init__(
        self, actual_extension: Any, comm: CommunicatorBase, before: Callable[[], None]
    ) -> None:
        self.actual_extension = actual_extension
        self._comm = comm
        self._before = before

    def initialize(self, trainer: chainer.training.Trainer) -> None:
        comm, snapshot = self._comm, self.actual_extension
        target = trainer if snapshot._target is None else snapshot._target  # noqa: SLF001 - Chainer's
        data = None
        with together(comm):
            if comm.rank == 0:
                autoload, snapshot.autoload = snapshot.autoload, False
                try:
                    snapshot.initialize(trainer)  # it prepares n_retains
                finally:
                    snapshot.autoload = autoload
                if autoload and Path(trainer.out).is_dir():
                    name = _snapshot._find_latest_snapshot(snapshot.filename, trainer.out)  # noqa: SLF001 - Chainer's
                    data = None if name is None else read_regular(Path(trainer.out) / name)
        data = comm.bcast_obj(data)
        if data is not None:
            with together(comm):
                load_npz(io.BytesIO(data), target, restart_epoch=False)

    def __call__(self, trainer: chainer.training.Trainer) -> None:
        self._before()
        consolidate(trainer)
        with together(self._comm):
            if self._comm.rank == 0:
                self.actual_extension(trainer)

    def on_error(self, trainer: chainer.training.Trainer, exc: Any, tb: Any) -> None:
        if self._comm.rank == 0:
            self.actual_extension.on_error(trainer, exc, tb)

    def finalize(self) -> None:
        # Where nothing is written, too: a writer with a queue has a thread or process from the beginning.
        self.actual_extension.finalize()


class _Average(extension.Extension):  # type: ignore[misc]  # Chainer has no types
    """Replaces all observations by their means over the ranks. Collective."""

    trigger = 1, "iteration"
    priority = _AFTER_WRITERS

    def __init__(self, comm: CommunicatorBase, before: _Average | None = None) -> None:
        self._comm = comm
        self._before = before  # what it has averaged is left alone
        self.averaged: dict[str, Any] = {}

    def __call__(self, trainer: chainer.training.Trainer) -> None:
        observation = trainer.observation
        done = {} if self._before is None else self._before.averaged
        own = {}
        for name, value in observation.items():
            if name not in done or done[name] is not value:
                dtype = value.dtype if isinstance(value, chainer.Variable) else None
                own[name] = plain_value(value), dtype
        everyone = self._comm.allgather_obj(own)
        self.averaged = {}
        for name in dict.fromkeys(name for each in everyone for name in each):
            values = [each[name][0] for each in everyone if name in each]
            if not _can_be_averaged(values):
                continue
            mean = mean_of_all([values])
            if isinstance(values[0], tuple):
                if mean is None:  # of no weight; a NaN would make what it is added to one
                    mean = mean_of_all([[value for value, _ in values]])
                mean = mean, sum(weight for _, weight in values)
            dtypes = [each[name][1] for each in everyone if name in each]
            if dtypes[0] is not None:
                mean = as_variable(mean, dtypes[0])
            observation[name] = self.averaged[name] = mean


def _can_be_averaged(values: list[Any]) -> bool:
    """Return whether all ranks' values are numbers, arrays of one shape, or such with a weight. Local."""
    parts = [value if isinstance(value, tuple) else (value,) for value in values]
    lengths = {(isinstance(value, tuple), len(part)) for value, part in zip(values, parts)}
    if lengths not in ({(False, 1)}, {(True, 2)}):
        return False
    if not all(_is_number(part) for each in parts for part in each):
        return False
    return len({np.shape(each[0]) for each in parts}) == 1


def _is_number(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biufc"
    return isinstance(value, (bool, int, float, complex, np.number, np.bool_))


def _add_averages(trainer: chainer.training.Trainer, comm: CommunicatorBase) -> None:
    """Let observations be averaged when they have been made, and again what is reported later. Local."""
    first = _Average(comm)
    trainer.extend(first, name="chainer_dist.average")
    entries = _chainer.extension_entries(trainer)
    order = sorted(entries, key=lambda name: entries[name].priority, reverse=True)
    # What rank 0 alone calls counts on every rank, or some would average and others not.
    own = {name: _unwrapped(entry.extension) for name, entry in entries.items()}
    reports = [name for name in order if isinstance(own[name], _REPORTS[:2])]
    late = order[
        order.index("chainer_dist.average") + 1 : order.index(reports[0]) if reports else 0
    ]
    if all(is_known(type(own[name]).__module__) for name in late):
        return
    priority = entries[reports[0]].priority
    trainer.extend(_Average(comm, first), name="chainer_dist.average_late", priority=priority)
    moved = entries.pop("chainer_dist.average_late")
    items = [*entries.items()]
    items.insert([*entries].index(reports[0]), ("chainer_dist.average_late", moved))
    trainer._extensions = OrderedDict(items)  # noqa: SLF001 - Chainer's


def _unwrapped(own: Any) -> Any:
    return own.actual_extension if isinstance(own, (_Silent, _Snapshot)) else own


def _writes(own: Any) -> bool:
    """Return whether an extension writes, so that only one rank calls it. Local."""
    said = getattr(own, "on_rank_zero", None)
    if said is not None:
        return bool(said)
    if isinstance(own, _REPORTS):
        return True
    module = own.__module__ if isinstance(own, types.FunctionType) else type(own).__module__
    if is_known(module):
        return False
    attributes = getattr(own, "__dict__", {})
    called = {*_names_in(own)}
    if called & _COLLECTIVE or any(map(is_communicator, attributes.values())):
        return False  # it knows of the other ranks
    names = {name.strip("_") for name in attributes}
    return bool(names & _PLACES) or bool(called & _WRITES)


def _names_in(own: Any) -> Iterator[str]:
    """Yield the names of what the code of an extension calls or looks at."""
    call = own if isinstance(own, (types.FunctionType, types.MethodType)) else type(own).__call__
    codes = [getattr(call, "__code__", None)]
    for code in codes:
        if code is not None:
            yield from code.co_names
            codes += [each for each in code.co_consts if isinstance(each, types.CodeType)]


def _has_own_call(own: Any, kind: Any) -> bool:
    return type(own).__call__ is not kind.__call__
