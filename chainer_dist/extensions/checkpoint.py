"""Checkpoints of all ranks, of which the newest complete ones are kept."""

from __future__ import annotations

import io
import os
import secrets
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from chainer.serializers import npz
from chainer.training import extension

from chainer_dist._counts import checked_count
from chainer_dist._files import read_regular
from chainer_dist.collectives.agreement import check_same
from chainer_dist.collectives.failures import together
from chainer_dist.extensions._rank_files import (
    ORIGIN,
    FoundFile,
    Generation,
    RankFile,
    generations_of,
    origin_of,
    visible_files,
)
from chainer_dist.serialization.npz import check_npz, write_npz
from chainer_dist.serialization.target import consolidate, load_npz

if TYPE_CHECKING:
    from collections.abc import Sequence

    import chainer

    from chainer_dist.communicators import CommunicatorBase
    from chainer_dist.extensions._rank_files import Origin


def create_multi_node_checkpointer(
    name: str,
    comm: CommunicatorBase,
    cp_interval: int = 5,
    gc_interval: int = 5,
    path: str | os.PathLike[str] | None = None,
    *,
    allow_pickle: bool = False,
) -> _MultiNodeCheckpointer:
    """Make an extension that saves the trainers of all ranks, each to its own file. Local.

    ::

        checkpointer = create_multi_node_checkpointer("run-1", comm)
        trainer.extend(checkpointer, trigger=(100, "iteration"))
        checkpointer.maybe_load(trainer)  # after all extensions were added
        trainer.run()

    Deprecated in ChainerMN, and here, in favour of :func:`~chainer_dist.extensions.multi_node_snapshot`, which writes fewer
    files. Files are named ``name.rank.iteration``, and files of ChainerMN can be loaded.

    When training has ended well, a Trainer has the files removed, as ChainerMN does. If it ends by
    any exception, an interrupt included, nothing is removed.

    Args:
        name: Of the run; part of the file names, so it has no slash. May have dots.
        comm: Communicator.
        cp_interval: How many checkpoints to keep at least.
        gc_interval: Older ones are removed after every ``gc_interval`` checkpoints, so up to
            ``cp_interval + gc_interval - 1`` are there.
        path: Directory, made where missing; None is the trainer's ``out``. Ranks on different
            machines may have different ones behind the same name.
        allow_pickle: Whether objects are saved, and loaded, that need pickle. Loading them can run any code:
            only with files that you trust. Nothing that Chainer serializes needs it.

    Returns:
        The extension, for the trainers of all ranks.

    Raises:
        ValueError, TypeError: If an argument is none of these.
    """
    warnings.warn(
        "create_multi_node_checkpointer is deprecated; use multi_node_snapshot",
        DeprecationWarning,
        stacklevel=2,
    )
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}, expected a string")
    if not name or set(name) & {"/", os.sep, os.altsep, "\0"}:
        raise ValueError(
            f"name is {name!r}, expected the beginning of a file name, without slashes"
        )
    cp_interval = checked_count("cp_interval", cp_interval, 1)
    gc_interval = checked_count("gc_interval", gc_interval, 1)
    return _MultiNodeCheckpointer(
        name, comm, cp_interval, gc_interval, path, allow_pickle=allow_pickle
    )


class _MultiNodeCheckpointer(extension.Extension):  # type: ignore[misc]  # Chainer has no types
    """The extension; see :func:`create_multi_node_checkpointer`.

    More than ten attributes: half are its options, by ChainerMN's names, and half what it knows of its files.
    """

    # As that of Chainer's snapshot: other extensions run before it, and their state of this iteration is saved.
    priority = -100

    def __init__(
        self,
        name: str,
        comm: CommunicatorBase,
        cp_interval: int,
        gc_interval: int,
        path: str | os.PathLike[str] | None,
        *,
        allow_pickle: bool,
    ) -> None:
        self.name = name  # a Trainer sets it to that under which it knows the extension
        self._run = name
        self._found = name  # how the names of the files that are read begin
        self.comm = comm
        self.cp_interval = cp_interval
        self.gc_interval = gc_interval
        self.path = None if path is None else Path(path)
        self.allow_pickle = allow_pickle
        self._complete: list[int] = []  # iterations of complete checkpoints, the same on all ranks
        self._job: int | None = None
        self._n_saves = 0
        self._seconds: list[float] = []

    def __call__(self, trainer: chainer.training.Trainer) -> None:
        """Save the trainer. Collective: in the same iteration on all ranks."""
        if self.path is None:
            self.path = Path(trainer.out)
        self.save(trainer, trainer.updater.iteration)

    def save(self, target: Any, iteration: int) -> None:
        """Save anything that Chainer can serialize, on all ranks. Collective.

        Each rank's file is there as a whole or not at all, and on disk when this returns.

        Args:
            target: What to save of this rank: a trainer, or an updater, optimizer or link.
            iteration: Number of the checkpoint, the same on all ranks; not negative.

        Raises:
            ValueError: On every rank, if there is no ``path``, or ``iteration`` is negative.
            RankMismatchError: On every rank, if ``iteration`` differs.
            OSError: On every rank, if a file cannot be written.
        """
        started = time.perf_counter()
        if self._job is None:
            self._job = self.comm.bcast_obj(secrets.randbits(62))
        consolidate(target)
        with together(self.comm):
            file = self._new_file(iteration)
            values = npz.serialize(target)
            values[ORIGIN] = np.array([self.comm.size, self._job], dtype=np.int64)
            write_npz(file, values, allow_pickle=self.allow_pickle)
            self._seconds.append(time.perf_counter() - started)
        check_same(self.comm, [("iteration", str(iteration))])
        self._complete = [each for each in self._complete if each != iteration] + [iteration]
        self._n_saves += 1
        if self._n_saves % self.gc_interval == 0:
            self._complete = self._complete[-self.cp_interval :]
            self._remove(lambda each: each < min(self._complete))

    def maybe_load(
        self,
        trainer: Any,
        optimizer: chainer.Optimizer | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        """Load the newest complete checkpoint, if there is one. Collective; before training.

        Files that are damaged are left out with a warning, so that the complete checkpoint before
        them is loaded. A rank finds its file in its own directory.

        Where that cannot be, because another number of ranks saved it or files are missing, all
        ranks load the file of the lowest rank that is there, with a warning. Model and optimizer
        are the same on all ranks. Iterators over a part of the data begin the epoch again, in a
        new order, as the parts may be others now; a
        :class:`~chainer_dist.iterators.DistributedIterator` and the iterators of
        ``create_multi_node_iterator`` and ``create_synchronized_iterator`` go on exactly.

        Args:
            trainer: What to load into: the same kind of object that was saved.
            optimizer: Accepted for ChainerMN scripts. No update is lost either way.
            path: Directory to load from; None is that of the checkpointer, or the trainer's
                ``out``. If the checkpointer has none it will save there as well.

        Raises:
            RuntimeError: On every rank, if there are checkpoints but all are damaged.
            Exception: On every rank, if a checkpoint does not fit to what it is loaded into.
        """
        del optimizer
        with together(self.comm):
            folder = Path(path or self.path or trainer.out)
            visible = [visible_files(folder, name) for name in (self._run, self.name)]
        if self.path is None:
            self.path = folder
        by_run, by_extension = zip(*self.comm.allgather_obj(visible))
        # ChainerMN names files by the extension.
        self._found, everyone = (self._run, by_run) if any(by_run) else (self.name, by_extension)
        if not any(everyone):
            return

        files = self._look_into(folder, everyone)
        while files:
            newest = generations_of(files, self.comm.size)[-1]
            is_own = newest.is_complete and newest.n_ranks == self.comm.size
            is_own = is_own and all(rank == reader for rank, reader in newest.readers.items())
            needed = [*newest.readers] if is_own else [min(newest.readers)]
            damaged = self._check(folder, newest, needed)
            if not damaged:
                self._load(folder, trainer, newest, is_own=is_own)
                self._complete = [
                    each.iteration
                    for each in generations_of(files, self.comm.size)
                    if each.is_complete and each.iteration <= newest.iteration
                ]
                return
            files = {file: found for file, found in files.items() if file not in damaged}
        raise RuntimeError(
            f"no checkpoint of {self._found} in {folder} can be read; remove them to start anew"
        )

    def finalize(self) -> None:
        """Remove this rank's checkpoints, unless an exception is on its way. Local."""
        # A Trainer finalizes its extensions on the way out of an exception, too.
        if sys.exc_info()[0] is None and self._complete:
            self._remove(lambda each: each <= max(self._complete))
            self._complete = []

    def get_stats(self) -> str:
        """Return in words how long it took to write this rank's checkpoints, in seconds. Local."""
        seconds = self._seconds
        if not seconds:
            return "no checkpoint was saved"
        return (
            f"{len(seconds)} checkpoints saved in {sum(seconds):.3f} s: "
            f"{sum(seconds) / len(seconds):.3f} s each, "
            f"{min(seconds):.3f} s at least, {max(seconds):.3f} s at most"
        )

    def _new_file(self, iteration: int) -> Path:
        if self.path is None:
            raise ValueError("the checkpointer has no path; give one when you create it")
        iteration = checked_count("iteration", iteration, 0)
        self.path.mkdir(parents=True, exist_ok=True)
        return self.path / f"{self._run}.{self.comm.rank}.{iteration}"

    def _file(self, folder: Path, rank: int, iteration: int) -> Path:
        """Return where a file is that was found."""
        return folder / f"{self._found}.{rank}.{iteration}"

    def _remove(self, is_old: Any) -> None:
        """Remove old files of this rank, and of ranks that there are no more. Local."""
        if self.path is None:
            return
        for name in dict.fromkeys((self._run, self._found)):
            for rank, iteration in visible_files(self.path, name):
                if rank % self.comm.size == self.comm.rank and is_old(iteration):
                    try:
                        (self.path / f"{name}.{rank}.{iteration}").unlink(missing_ok=True)
                    except OSError as error:
                        warnings.warn(f"could not remove a checkpoint: {error}", stacklevel=2)

    def _look_into(
        self, folder: Path, everyone: Sequence[list[RankFile]]
    ) -> dict[RankFile, FoundFile]:
        """Return all files that can be opened on the ranks that see them. Collective."""
        comm = self.comm
        readers: dict[RankFile, int] = {}
        for reader, visible in enumerate(everyone):
            for file in visible:
                if file not in readers or file.rank == reader:
                    readers[file] = reader
        origins: dict[RankFile, Origin] = {}
        failures: dict[RankFile, str] = {}
        for file, reader in readers.items():
            if reader == comm.rank:
                try:
                    origins[file] = origin_of(self._file(folder, *file))
                except Exception as error:  # noqa: BLE001 - zipfile raises many kinds
                    failures[file] = str(error)
        found: dict[RankFile, FoundFile] = {}
        for reader, (opened, failed) in enumerate(comm.allgather_obj((origins, failures))):
            found.update({file: FoundFile(reader, origin) for file, origin in opened.items()})
            self._warn_of_damage(failed)
        return found

    def _check(self, folder: Path, generation: Generation, ranks: list[int]) -> set[RankFile]:
        """Read the files of some ranks; return those that are damaged. Collective."""
        failures: dict[RankFile, str] = {}
        for rank in ranks:
            if generation.readers[rank] == self.comm.rank:
                file = RankFile(rank, generation.iteration)
                try:
                    check_npz(self._file(folder, *file))
                except Exception as error:  # noqa: BLE001 - zipfile raises many kinds
                    failures[file] = str(error)
        damaged: set[RankFile] = set()
        for failed in self.comm.allgather_obj(failures):
            self._warn_of_damage(failed)
            damaged |= failed.keys()
        return damaged

    def _load(self, folder: Path, target: Any, generation: Generation, *, is_own: bool) -> None:
        """Load this rank's own file, or all ranks the lowest rank's. Collective."""
        comm = self.comm
        source: Any = self._file(folder, comm.rank, generation.iteration)
        if not is_own:
            lowest = min(generation.readers)
            reader = generation.readers[lowest]
            data = None
            with together(comm):
                if reader == comm.rank:
                    data = read_regular(self._file(folder, lowest, generation.iteration))
            source = io.BytesIO(comm.bcast_obj(data, root=reader))
            if comm.rank == 0:
                warnings.warn(
                    f"checkpoint {self._found} of iteration {generation.iteration} was saved by "
                    f"{generation.n_ranks} ranks, of which {len(generation.readers)} files are "
                    f"there; all ranks load that of rank {lowest}, and iterators over a part of "
                    "the data begin the epoch again",
                    UserWarning,
                    stacklevel=3,
                )
        with together(comm):
            load_npz(source, target, restart_epoch=not is_own, allow_pickle=self.allow_pickle)

    def _warn_of_damage(self, failures: dict[RankFile, str]) -> None:
        if self.comm.rank == 0:
            for file, text in failures.items():
                warnings.warn(
                    f"checkpoint {self._found}.{file.rank}.{file.iteration} is damaged ({text}) "
                    "and left out",
                    UserWarning,
                    stacklevel=4,
                )
