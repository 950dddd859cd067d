"""Chainer's snapshots on many ranks, one for each set of ranks that are in the same state."""

from __future__ import annotations

import contextlib
import io
import operator
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainer.training import extension
from chainer.training.extensions._snapshot import _find_snapshot_files

from chainer_dist._files import read_regular
from chainer_dist.collectives.agreement import check_same
from chainer_dist.collectives.calls import check_call
from chainer_dist.collectives.failures import describe_error, together
from chainer_dist.serialization.npz import ArrayFile, check_npz
from chainer_dist.serialization.target import consolidate, load_npz

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import chainer

    from chainer_dist.communicators import CommunicatorBase


def multi_node_snapshot(
    comm: CommunicatorBase,
    snapshot: Any,
    replica_sets: Iterable[int | Iterable[int]],
    *,
    allow_pickle: bool = False,
) -> _MultiNodeSnapshot:
    """Make a snapshot extension save and load the trainers of all ranks. Collective.

    Ranks in the same state need one file. Usually that is all ranks, or all but rank 0, whose
    trainer alone writes logs. Each such replica set has its lowest rank save and load for it::

        snapshot = extensions.snapshot(n_retains=2, autoload=True)
        trainer.extend(multi_node_snapshot(comm, snapshot, [0]), trigger=(1, "epoch"))

    saves two files, that of rank 0 and that of rank 1 for all others. The number of the rank is
    appended to the file name, as in ``snapshot_iter_100.1``.

    With ``autoload`` the newest snapshot that all sets have is loaded when training begins; each
    set's lowest rank needs to find its own files in its ``trainer.out``, and sends them to the
    others. A damaged file has all ranks go back to the one before, with a warning.

    The number of ranks may change. A set without files takes the files of the lowest rank that has
    some. What iterators over scattered data saved fits the new parts no more: they begin the
    present epoch again, in a new order. A :class:`~chainer_dist.iterators.DistributedIterator` and
    the iterators of ``create_multi_node_iterator`` and ``create_synchronized_iterator`` go on
    exactly.

    Options of the snapshot (``writer``, ``condition``, ``n_retains``, ``snapshot_on_error``,
    ``target``) work as in Chainer, and its trigger and priority are the default. If a file cannot
    be written, every rank raises. Only a writer in another thread or process fails unheard, as it
    does in Chainer. Let it be triggered in the same iteration on all ranks: by iterations, where
    their epochs are not equally long.

    Args:
        comm: Communicator.
        snapshot: Extension that :func:`chainer.training.extensions.snapshot` or ``snapshot_object``
            returned. Its ``filename`` is changed.
        replica_sets: The sets, each a rank or some ranks. Ranks in none of them are one more set.
            The same on every rank. For example, on 4 ranks: ``[]`` is ``{0, 1, 2, 3}``; ``[0]`` is
            ``{0}`` and ``{1, 2, 3}``; ``[[0, 1], [2, 3]]`` is just that.
        allow_pickle: Whether ``autoload`` loads objects that need pickle. That can run any code: allow it
            only for files from a source that you trust. Chainer's own objects do not need it.

    Returns:
        The extension, for the trainers of all ranks. The same as ChainerMN's.

    Raises:
        ValueError, TypeError: On every rank, if a rank is in two sets or does not exist, if
            ``snapshot`` is something else, or loads by itself but names its files by a function.
        RankMismatchError: On every rank, if sets or ``autoload`` differ.
        RuntimeError: On every rank, when training begins, if there are files to load from but
            none that all sets have and that is whole.
    """
    check_call("multi_node_snapshot(comm, snapshot, replica_sets)", comm, snapshot, replica_sets)
    return _MultiNodeSnapshot(comm, snapshot, replica_sets, allow_pickle=allow_pickle)


class _MultiNodeSnapshot(extension.Extension):  # type: ignore[misc]  # Chainer has no types
    """The extension; see :func:`multi_node_snapshot`."""

    def __init__(
        self,
        comm: CommunicatorBase,
        snapshot: Any,
        replica_sets: Iterable[int | Iterable[int]],
        *,
        allow_pickle: bool,
    ) -> None:
        self.comm = comm
        self.allow_pickle = allow_pickle
        self.snapshot = snapshot
        with together(comm):
            _check_snapshot(snapshot)
            sets = _parse_replica_sets(replica_sets, comm.size)
        lines = [("replica_sets", str([*map(sorted, sets)])), ("autoload", str(snapshot.autoload))]
        check_same(comm, lines)

        (self.replica_set,) = (each for each in sets if comm.rank in each)
        self.master = min(self.replica_set)
        self.trigger = snapshot.trigger
        self.priority = snapshot.priority
        given = snapshot.filename
        snapshot.filename = (
            (lambda trainer: f"{given(trainer)}.{comm.rank}")
            if callable(given)
            else f"{given}.{comm.rank}"
        )

    @property
    def is_master(self) -> bool:
        """Whether this rank saves and loads for its set."""
        return self.master == self.comm.rank

    def initialize(self, trainer: chainer.training.Trainer) -> None:
        """Load what there is to load, with ``autoload``. Collective."""
        snapshot = self.snapshot
        generations: list[str] = []
        with together(self.comm):
            if self.is_master:
                autoload, snapshot.autoload = snapshot.autoload, False
                try:
                    snapshot.initialize(trainer)  # it prepares n_retains
                finally:
                    snapshot.autoload = autoload
                if autoload:
                    generations = self._generations(trainer.out)
        if snapshot.autoload:
            self._load(trainer, generations)

    def on_error(self, trainer: chainer.training.Trainer, exc: Any, tb: Any) -> None:
        """Let the snapshot save, with ``snapshot_on_error``. Local."""
        if self.is_master:
            self.snapshot.on_error(trainer, exc, tb)

    def __call__(self, trainer: chainer.training.Trainer) -> None:
        """Save on the lowest rank of each set. Collective: one small message, for errors."""
        consolidate(trainer)
        with together(self.comm):
            if self.is_master:
                self.snapshot(trainer)

    def finalize(self) -> None:
        """Wait for writers in other threads and processes. Local."""
        # Where nothing is written, too: a writer with a queue has a thread or process from the beginning.
        self.snapshot.finalize()

    def _generations(self, out: str) -> list[str]:
        """Return this rank's snapshots, oldest first, by their names without the rank. Local."""
        if not Path(out).is_dir():
            return []
        ending = f".{self.comm.rank}"
        files = _find_snapshot_files(self.snapshot.filename, out)
        return [name[: -len(ending)] for _, name in files]

    def serialize(self, serializer: Any) -> None:
        """Save the number of ranks. Local."""
        with contextlib.suppress(KeyError):  # ChainerMN does not save it
            serializer("ranks", self.comm.size)

    def _load(self, trainer: chainer.training.Trainer, generations: list[str]) -> None:
        """Load the newest generation that all ranks with any have. Collective."""
        comm = self.comm
        found = {rank: names for rank, names in enumerate(comm.allgather_obj(generations)) if names}
        if not found:
            return
        data = self._read_newest(trainer.out, found)
        source = self.master if self.master in found else min(found)
        part = comm.split(source, 0 if comm.rank == source else 1 + comm.rank)
        assert part is not None  # noqa: S101 - every rank has a color
        data = part.bcast_obj(data)
        part.finalize()
        # All together, or their epochs would end in different iterations.
        restart_epoch = any(
            comm.allgather_obj(source != self.master or self._saved_by_others(data))
        )
        target = trainer if self.snapshot._target is None else self.snapshot._target  # noqa: SLF001 - Chainer's
        with together(comm):
            load_npz(
                io.BytesIO(data),
                target,
                restart_epoch=restart_epoch,
                allow_pickle=self.allow_pickle,
            )

    def _saved_by_others(self, data: bytes) -> bool:
        """Return whether a snapshot is known to be of another number of ranks. Local."""
        arrays = ArrayFile(io.BytesIO(data))
        # The extension may have had another name.
        found = [key for key in arrays if re.fullmatch("(.*/)?extensions/[^/]+/ranks", key)]
        return any(int(arrays[key]) != self.comm.size for key in found)

    def _read_newest(self, out: str, found: dict[int, list[str]]) -> bytes | None:
        """Return this rank's file of the newest whole generation, None if it has none."""
        comm = self.comm
        common = [
            name for name in found[min(found)] if all(name in names for names in found.values())
        ]
        while common:
            name = common.pop()
            data: bytes | None = None
            error: Exception | None = None
            if comm.rank in found:
                try:
                    data = read_regular(Path(out) / f"{name}.{comm.rank}")
                    check_npz(io.BytesIO(data))
                except Exception as caught:  # noqa: BLE001 - zipfile raises many kinds
                    error = caught
            failures = comm.allgather_obj(describe_error(error))
            if not any(failures):
                return data
            if comm.rank == 0:
                _warn_of_damage(name, failures)
        raise RuntimeError(
            f"no snapshot can be loaded: ranks {', '.join(map(str, found))} have some, but not one "
            "that is whole on each of them; remove the files of ranks that are to start from "
            "another rank's, or all of them to start anew"
        )


def _warn_of_damage(name: str, failures: Sequence[Any]) -> None:
    for rank, failure in enumerate(failures):
        if failure is not None:
            warnings.warn(
                f"snapshot {name}.{rank} is damaged ({failure[1]}); an older one is loaded",
                UserWarning,
                stacklevel=2,
            )


def _check_snapshot(snapshot: Any) -> None:
    if not all(hasattr(snapshot, name) for name in ("filename", "autoload", "initialize")):
        raise TypeError(
            "multi_node_snapshot takes what chainer.training.extensions.snapshot() returns, got "
            f"{snapshot!r}"
        )
    if snapshot.autoload and callable(snapshot.filename):
        raise ValueError("autoload=True needs a filename that is a string, not a function")


def _parse_replica_sets(replica_sets: Any, size: int) -> list[set[int]]:
    """Return disjoint sets that have all ranks below ``size``."""
    sets: list[set[int]] = []
    left = set(range(size))
    for given in replica_sets:
        members = [given] if hasattr(given, "__index__") else given
        ranks = {operator.index(rank) for rank in members}
        for rank in ranks:
            if not 0 <= rank < size:
                raise ValueError(f"replica_sets has {rank}, expected ranks: 0 to {size - 1}")
            if rank not in left:
                raise ValueError(f"replica_sets has rank {rank} in two sets")
        left -= ranks
        sets.append(ranks)
    return [each for each in [*sets, left] if each]  # range(1, 1) is a set of one rank's job
