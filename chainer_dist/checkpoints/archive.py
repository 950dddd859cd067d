"""The directory of a run's checkpoints, as all ranks see it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

from chainer_dist._files import open_regular
from chainer_dist.checkpoints import generations
from chainer_dist.checkpoints.generations import COMMON_FILE, File, Manifest, rank_file
from chainer_dist.checkpoints.state import restore
from chainer_dist.collectives.agreement import shared
from chainer_dist.collectives.failures import describe_error, raise_first, together
from chainer_dist.serialization.npz import ArrayFile, PickleRefusedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chainer_dist.checkpoints.attributes import Attributes
    from chainer_dist.checkpoints.state import State
    from chainer_dist.communicators import CommunicatorBase

__all__ = ["Archive", "Pending"]

# The time until a rank must see files that another has written: network file systems remember for a while
# that a file was not there.
_SECONDS_TO_SEE = 10.0


class Pending(NamedTuple):
    """A generation that is being written."""

    iteration: int
    path: Path
    written: concurrent.futures.Future[dict[str, File]]  # this rank's files


class Archive:
    """Writes and reads the generations of all ranks. What it raises it raises on every rank.

    Args:
        comm: Communicator whose ranks save.
        directory: Directory that they share.
        keep: Number of generations to keep.
        allow_pickle: Whether arrays of objects may be written and read.
    """

    def __init__(
        self, comm: CommunicatorBase, directory: Path, keep: int, *, allow_pickle: bool = False
    ) -> None:
        self.directory = directory
        self._comm = comm
        self._keep = keep
        self._allow_pickle = allow_pickle
        # Names of what is to be removed, on rank 0. Not what a later job may be writing.
        self._damaged: set[str] = set()
        self._leftovers: list[str] = []
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None

    # Writing

    def begin(self, iteration: int, state: State) -> Pending:
        """Begin to write a generation, in another thread. Collective.

        Args:
            iteration: Number of updates that were made, the same on every rank.
            state: State of this rank; not changed before it is written.

        Raises:
            OSError: If there can be no new directory.
        """
        path = self._ask_rank_0(lambda: generations.begin(self.directory, iteration))
        files = {rank_file(self._comm.rank): state.own}
        if self._comm.rank == 0:
            files[COMMON_FILE] = state.common
        if self._thread is None:
            self._thread = concurrent.futures.ThreadPoolExecutor(1, "chainer_dist checkpoint")
        written = self._thread.submit(
            lambda: {
                name: generations.write_file(path / name, values, allow_pickle=self._allow_pickle)
                for name, values in files.items()
            }
        )
        return Pending(iteration, path, written)

    def complete(self, pending: Pending) -> None:
        """Wait until a generation is written, and let it count, or remove it. Collective.

        Raises:
            OSError: If it could not be written.
        """
        # One exchange carries the files of each rank, or its error.
        error: BaseException | None = None
        files: dict[str, File] = {}
        try:
            files = pending.written.result()
        except BaseException as caught:  # noqa: BLE001 - file systems may raise anything
            error = caught
        everyone = self._comm.allgather_obj((describe_error(error), files))
        try:
            raise_first({rank: failure for rank, (failure, _) in enumerate(everyone)}, error)
            for _, theirs in everyone:
                files.update(theirs)
            manifest = Manifest(pending.iteration, self._comm.size, files)
            self._ask_rank_0(lambda: generations.commit(pending.path, manifest))
        except BaseException:
            self._tidy(lambda: generations.remove(pending.path))
            raise
        self._tidy(self._remove_old)

    def _remove_old(self) -> None:
        """Remove what is not to be kept. Local, on rank 0."""
        names = generations.complete(self.directory)
        whole = [name for name in names if name not in self._damaged]
        while self._leftovers:
            generations.remove(self.directory / self._leftovers.pop())
        while self._damaged:
            generations.remove(self.directory / self._damaged.pop())
        for name in whole[: -self._keep]:
            generations.remove(self.directory / name)

    def _tidy(self, act: Callable[[], Any]) -> None:
        """Call a function on rank 0, with a warning if that fails. Local."""
        if self._comm.rank == 0:
            try:
                act()
            except OSError as error:
                warnings.warn(f"could not tidy up among checkpoints: {error}", stacklevel=4)

    # Reading

    def names(self) -> list[str]:
        """Return the names of all generations, oldest first. Collective.

        Raises:
            RuntimeError: If not all ranks see the same.
            OSError: If the directory cannot be read.
        """
        end = time.monotonic() + _SECONDS_TO_SEE
        while True:
            names: list[str] = []
            with together(self._comm):
                if self.directory.is_dir():
                    names = generations.complete(self.directory)
                    self._leftovers = generations.unfinished(self.directory)
            everyone = self._comm.allgather_obj((names, time.monotonic() > end))
            differ = [rank for rank, (theirs, _) in enumerate(everyone) if theirs != everyone[0][0]]
            if not differ:
                return names
            if any(too_late for _, too_late in everyone):
                raise self._not_shared(differ[0])
            time.sleep(0.2)

    def check_shared(self) -> None:
        """Make sure that what rank 0 writes all ranks see. Collective.

        Raises:
            RuntimeError: If some do not.
            OSError: If rank 0 cannot write.
        """
        with contextlib.ExitStack() as stack:
            token: Path = self._ask_rank_0(
                lambda: stack.enter_context(generations.token_in(self.directory))
            )
            sees = self._comm.allgather_obj(_wait_for(self.directory / token.name))
        if not all(sees):
            raise self._not_shared(sees.index(False))

    def check(self, name: str) -> Manifest | None:
        """Read all of a generation; return None, with a warning, if it is damaged. Collective."""
        comm, path = self._comm, self.directory / name
        manifest: Manifest | None = None
        error: Exception | None = None
        try:
            manifest = self._ask_rank_0(lambda: generations.read_manifest(path))
            if manifest.ranks == comm.size:
                mine = [rank_file(comm.rank), *([COMMON_FILE] if comm.rank == 0 else [])]
            else:
                mine = sorted(manifest.files)[comm.rank :: comm.size]
            generations.check_files(path, manifest, mine)
        except Exception as caught:  # noqa: BLE001 - file systems may raise anything
            error = caught  # not raised, but in a warning with the errors of all ranks
        failures = [each for each in comm.allgather_obj(describe_error(error)) if each is not None]
        if not failures:
            return manifest
        self._damaged.add(name)
        if comm.rank == 0:
            reasons = "; ".join(dict.fromkeys(text for _, text in failures))
            warnings.warn(
                f"the checkpoint {path} is damaged ({reasons}) and left out", stacklevel=4
            )
        return None

    def load(self, name: str, manifest: Manifest, target: Any, attributes: Attributes) -> None:
        """Load a generation that is whole. Collective.

        Raises:
            RuntimeError: If it does not fit to the target, or needs pickle, and that is not allowed.
        """
        comm, path = self._comm, self.directory / name
        new_place = None if manifest.ranks == comm.size else (comm.rank, comm.size)
        ranks = [comm.rank] if new_place is None else range(manifest.ranks)
        with together(comm):
            try:
                with contextlib.ExitStack() as stack:
                    common, *own = [
                        ArrayFile(
                            stack.enter_context(open_regular(path / file)),
                            allow_pickle=self._allow_pickle,
                            compressed=False,
                        )
                        for file in (COMMON_FILE, *map(rank_file, ranks))
                    ]
                    notes = restore(target, common, own, attributes, new_place)
            except PickleRefusedError as error:
                raise RuntimeError(f"the checkpoint {path} is not loaded: {error}") from error
            except Exception as error:
                text = f"it has no {error}" if isinstance(error, KeyError) else str(error)
                raise RuntimeError(f"the checkpoint {path} does not fit: {text}") from error
        everyone = comm.allgather_obj(notes)
        if comm.rank == 0:
            for note in dict.fromkeys(note for theirs in everyone for note in theirs):
                warnings.warn(f"the checkpoint {path}: {note}", stacklevel=4)
        if new_place is not None and comm.rank == 0:
            warnings.warn(
                f"the checkpoint {path} was saved by {manifest.ranks} ranks, and there are "
                f"{comm.size}: iterators over a part of the data begin the epoch again, and random "
                "states are new",
                stacklevel=4,
            )

    def _not_shared(self, rank: int) -> RuntimeError:
        return RuntimeError(
            f"rank {rank} does not see in {self.directory} what rank 0 sees there: all ranks need "
            "one directory, on a file system that their machines share"
        )

    def _ask_rank_0(self, act: Callable[[], Any]) -> Any:
        """Return the result of a function on rank 0, or raise its error. Collective."""
        return shared(self._comm, 0, act)


def _wait_for(path: Path) -> bool:
    """Return whether a file is there, or soon is. Local."""
    end = time.monotonic() + _SECONDS_TO_SEE
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
