"""The checkpoints of one run, as all its ranks know them: the newest one, and the one that is being written."""

from __future__ import annotations

import concurrent.futures
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainer_dist import _environment
from chainer_dist._files import replacing
from chainer_dist.checkpoints.archive import Archive
from chainer_dist.collectives.failures import rebuild_error

if TYPE_CHECKING:
    from chainer_dist.checkpoints.archive import Pending
    from chainer_dist.checkpoints.attributes import Attributes
    from chainer_dist.checkpoints.state import State
    from chainer_dist.communicators import CommunicatorBase

__all__ = ["History"]


class History:
    """Writes the checkpoints of a run, and goes on from the newest one. What it raises it raises on every rank.

    Args:
        comm: Communicator whose ranks save.
        directory: Directory that they share.
        keep: Number of checkpoints to keep.
        asynchronous: Whether a checkpoint is written while training goes on.
        on_error: ``"raise"`` or ``"warn"``, for a checkpoint that cannot be written.
        allow_pickle: Whether arrays of objects may be written and read.

    Attributes:
        newest: Iteration of the newest complete checkpoint; None if there is none, or none was looked for.
    """

    def __init__(
        self,
        comm: CommunicatorBase,
        directory: Path,
        *,
        keep: int,
        asynchronous: bool,
        on_error: str,
        allow_pickle: bool,
    ) -> None:
        self.newest: int | None = None
        self._comm = comm
        self._directory = directory
        self._asynchronous = asynchronous
        self._on_error = on_error
        self._archive = Archive(comm, directory, keep, allow_pickle=allow_pickle)
        self._is_known = False  # whether all ranks know which checkpoints the directory has
        self._pending: Pending | None = None

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing its files of a checkpoint."""
        return self._pending is not None and not self._pending.written.done()

    def refuse_other_runs(self) -> None:
        """Raise an error if the directory has checkpoints that are not this run's. Collective.

        Raises:
            RuntimeError: If there are checkpoints, and :meth:`resume` was not called.
        """
        if self._is_known:
            return
        names = self._names()
        if names:
            raise RuntimeError(
                f"{self._directory} has checkpoints, up to {names[-1]}: call resume() before training, or "
                "give another directory"
            )
        self._is_known = True

    def begin(self, iteration: int, state: State) -> None:
        """Begin to write a checkpoint, and complete it unless it is an asynchronous one. Collective.

        Args:
            iteration: Number of updates that were made, the same on every rank.
            state: State of this rank.

        Raises:
            RuntimeError: See :meth:`refuse_other_runs`.
            ValueError: If there is a checkpoint of a later iteration.
            OSError: If it cannot be written, and ``on_error`` is ``"raise"``.
        """
        self.refuse_other_runs()
        if self.newest is not None and iteration < self.newest:
            raise ValueError(
                f"iteration is {iteration}, and {self._directory} has a checkpoint of iteration "
                f"{self.newest}: use another directory to start anew"
            )
        try:
            self._pending = self._archive.begin(iteration, state)
        except OSError as caught:
            self._fail(f"the checkpoint of iteration {iteration}", caught)
        if not self._asynchronous:
            self.complete()

    def complete(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and let it count. Collective.

        Raises:
            OSError: If it cannot be written, and ``on_error`` is ``"raise"``.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            self._archive.complete(pending)
        except Exception as caught:  # noqa: BLE001 - file systems may raise anything
            self._fail(f"the checkpoint of iteration {pending.iteration}", caught)
        else:
            self._take_note(pending.iteration)

    def wait(self) -> None:
        """Wait until this rank has written its files, without the other ranks. Local."""
        if self._pending is not None:
            concurrent.futures.wait([self._pending.written])

    def resume(self, target: Any, attributes: Attributes) -> int:
        """Load the newest checkpoint that is whole, if there is one. Collective.

        Args:
            target: Object to load into.
            attributes: Attributes that the target's objects were made with.

        Returns:
            Its iteration; 0 if there is none, and nothing was changed.

        Raises:
            RuntimeError: If all checkpoints are damaged, or one does not fit to the target.
            OSError: If the directory cannot be read; or cannot be written to, and ``on_error`` is ``"raise"``.
        """
        names = self._names()
        self._is_known = True
        for name in reversed(names):
            manifest = self._archive.check(name)
            if manifest is not None:
                self._archive.load(name, manifest, target, attributes)
                # The job before may have ended before it could report that.
                self._take_note(manifest.iteration)
                return manifest.iteration
        if names:
            raise RuntimeError(
                f"no checkpoint in {self._directory} can be read, of {len(names)}; remove them to start "
                "anew"
            )
        return 0

    def _names(self) -> list[str]:
        """Return the names of all checkpoints, when it is sure that all ranks see them. Collective."""
        names = self._archive.names()
        if not names:
            try:
                self._archive.check_shared()
            except OSError as caught:
                self._fail("checkpoints", caught)
        return names

    def _take_note(self, iteration: int) -> None:
        """Take note of the newest complete checkpoint, and report it to the launcher. Local."""
        self.newest = iteration
        if self._comm.rank == 0:
            _report_progress(iteration)

    def _fail(self, subject: str, error: Exception) -> None:
        """Raise or warn of an error that all ranks have. Local."""
        newest = "none" if self.newest is None else f"that of iteration {self.newest}"
        message = f"{error}; {subject} cannot be written to {self._directory}; newest complete one: {newest}"
        if self._on_error == "raise":
            raise rebuild_error(type(error), message) from error
        if self._comm.rank == 0:
            warnings.warn(message, stacklevel=5)


def _report_progress(iteration: int) -> None:
    """Write an iteration into the file that the launcher of the job reads, if there is one. Local."""
    file = os.environ.get(_environment.PROGRESS)
    if file:
        try:
            with replacing(Path(file)) as progress:
                progress.write(str(iteration))
        except OSError as error:
            warnings.warn(f"{_environment.PROGRESS} cannot be written: {error}", stacklevel=5)
