"""The checkpoint of all ranks: one call saves, one resumes, and training goes on meanwhile."""

from __future__ import annotations

import operator
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainer.training import extension

from chainer_dist._chainer import extension_entries
from chainer_dist._counts import checked_count
from chainer_dist.checkpoints.agreed_trigger import AgreedTrigger
from chainer_dist.checkpoints.arguments import describe_options
from chainer_dist.checkpoints.attributes import Attributes
from chainer_dist.checkpoints.history import History
from chainer_dist.checkpoints.meetings import Meetings
from chainer_dist.checkpoints.omissions import prepare
from chainer_dist.checkpoints.preemption import STATUS, Preempted
from chainer_dist.checkpoints.state import check_target, collect
from chainer_dist.checkpoints.workers import shield
from chainer_dist.collectives.agreement import check_same
from chainer_dist.collectives.calls import check_call
from chainer_dist.collectives.failures import together
from chainer_dist.serialization.target import consolidate

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from types import TracebackType

    import chainer
    from typing_extensions import Self

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["Checkpoint"]


class Checkpoint(extension.Extension):  # type: ignore[misc]  # Chainer has no types
    """Saves everything that a resume needs, of all ranks, and goes on from it. Creating it is collective.

    With a Trainer it is an extension::

        checkpoint = chainer_dist.Checkpoint(comm, "checkpoints")
        trainer.extend(checkpoint, trigger=(500, "iteration"))
        checkpoint.resume(trainer)  # after all extensions were added
        trainer.run()

    In a loop of your own it saves a dict of links, optimizers, iterators and whatever else has a
    ``serialize`` method::

        state = {"model": model, "optimizer": optimizer, "batches": iterator}
        with chainer_dist.Checkpoint(comm, "checkpoints") as checkpoint:
            iteration = checkpoint.resume(state)
            while iteration < 10_000:
                ...
                iteration += 1
                if iteration % 500 == 0:
                    checkpoint.save(state, iteration)
                if checkpoint.preempted:
                    checkpoint.leave(state, iteration)

    **What is saved.** What Chainer serializes, and besides the random states of every rank
    (of ``numpy.random``, ``random``, order samplers and the multi-node optimizer),
    dynamic loss scales, the float32 copies of ``use_fp32_update``, and gradients that are being
    accumulated. What :meth:`resume` has seen at first and training has changed is saved, too: hyperparameters, and
    which parameters are frozen; attributes of links, such as the hidden states of stateful recurrent ones, and of
    update rules; and those of extensions, triggers, iterators and updaters that do not serialize themselves. These are saved
    where they are plain: numbers, text, arrays, variables, random generators of NumPy and Python, and lists,
    tuples, sets and dicts of these, of up to 100,000 elements and 1,000 arrays. Parameters under multi-node optimizers, and the state of these, are the same
    on all ranks: rank 0 writes them, and with ``sharded_update="job"`` the state is gathered for that. Every
    rank writes what is its own, before the first update as at any other time.

    A run that was resumed on as many ranks is, to the bit, the one that was not interrupted, with these
    exceptions: with ``double_buffering`` the gradients under way are lost; iterators with workers need
    Chainer's own shuffling, or order samplers that do not draw from ``numpy.random``; of a state that still
    hangs on the graph of steps before, the values are saved and not the graph, so cut it
    (``unchain_backward``) before you save; attributes that are no plain values, values outside of what is
    saved, hooks that were added during training, and what was a link hook's own begin anew; and whatever goes by
    the clock, such as ``TimeTrigger``, has another clock.

    **What it was of.** A checkpoint is loaded into models of the same parameters (names, shapes, dtypes) and
    optimizers of the same class and hyperparameters, by name, or is refused. The values of hyperparameters are
    yours: where a new process begins with others than the one before began with, its own stay. Extensions may be
    added, left out or replaced, and so may compression: rank 0 warns of what begins anew or was left out.

    **On another number of ranks** model and optimizer are the same, and a
    :class:`~chainer_dist.iterators.DistributedIterator` goes on exactly. Iterators over scattered parts
    begin the epoch again, in a new order, and each rank's random state is a new one that the old ones
    determine. An attribute is kept if it was the same on all ranks. Models with different parts on
    different ranks are refused.

    **What is on disk.** A directory ``<iteration>-<time>`` for each checkpoint, with a manifest of the size
    and SHA-256 of each file. It gets that name when everything in it is on disk: whatever happens before
    leaves the older ones as they are. A damaged one is left out when resuming, with a warning. A checkpoint
    counts when all ranks know that it is complete: with ``asynchronous`` that is within about a second in a
    Trainer and where :attr:`preempted` is asked for, and otherwise when anything else is called.
    Then its iteration is written into the file that the environment variable ``CHAINER_DIST_PROGRESS``
    names, if it does. The files are of arrays and JSON, and are loaded without pickle, also where an earlier
    version has saved them; only plain files in the directory itself are opened.

    **When the job is to end.** On SIGTERM or SIGUSR1, to whichever rank, all ranks save within about a
    second, or a step if that takes longer, and leave with status 75 (``EX_TEMPFAIL``), finalizers
    included. A second signal changes nothing. Signals that the program has arranged something for, or
    that are ignored, are left alone.

    More than fifteen methods: those that a script calls, those that a Trainer calls, and what these share.

    Args:
        comm: Communicator.
        directory: Which all ranks share, for this run alone; made where missing.
        keep: How many checkpoints to keep, 1 or more. Older ones are removed once a newer one is complete.
        asynchronous: Whether a thread writes, while training goes on. Saving then takes the time and the
            memory of a copy of what is saved. It hides waiting for the disk; where no core is idle, not the
            time of checksums.
        on_error: What happens if a checkpoint cannot be written, as the disk is full: ``"raise"`` raises on
            every rank (an asynchronous one later, when the ranks find out), ``"warn"`` has rank 0 warn, and
            training go on. Either way the older ones stay.
        preemption: Whether signals are heeded.
        allow_pickle: Whether arrays of objects are saved and loaded. Loading them can run any code: only with
            checkpoints that you trust.

    Raises:
        ValueError, TypeError: On every rank, if an argument is none of these.
        RankMismatchError: On every rank, if they differ.
    """

    # As that of Chainer's snapshot: other extensions run before it, and their state of this iteration is saved.
    priority = -100
    trigger = (1, "epoch")

    def __init__(
        self,
        comm: CommunicatorBase,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        asynchronous: bool = True,
        on_error: str = "raise",
        preemption: bool = True,
        allow_pickle: bool = False,
    ) -> None:
        check_call("Checkpoint(comm, directory)", comm, directory)
        with together(comm):
            self.directory = Path(directory).absolute()
            lines = describe_options(keep, asynchronous, on_error, preemption, allow_pickle)
        check_same(comm, lines)
        self.comm = comm
        self.keep = operator.index(keep)
        self.asynchronous = bool(asynchronous)
        self.preemption = bool(preemption)
        self.allow_pickle = bool(allow_pickle)

        self._history = History(
            comm,
            self.directory,
            keep=self.keep,
            asynchronous=self.asynchronous,
            on_error=on_error,
            allow_pickle=self.allow_pickle,
        )
        self._attributes = Attributes()
        self._meetings = Meetings(comm, self._history, heeds_signals=self.preemption)
        self._outer_error: Any = None  # that was being handled when training began

    # Saving and resuming

    def save(self, target: Any, iteration: int) -> None:
        """Save something on all ranks. Collective.

        Args:
            target: A trainer, a dict, or anything that Chainer can serialize; of the same structure on every
                rank, as far as it is the same for all ranks.
            iteration: How many updates were made, the same on every rank, and not less than in the newest
                checkpoint.

        Raises:
            TypeError, ValueError: On every rank, if one is none of these, or there are arrays of objects
                and not ``allow_pickle``.
            RankMismatchError: On every rank, if ``iteration`` differs.
            RuntimeError: On every rank, if the directory has checkpoints and :meth:`resume` was not called.
            OSError: On every rank, if this checkpoint, or with ``asynchronous`` the one before, cannot
                be written, and ``on_error`` is ``"raise"``.
        """
        self._save(target, iteration)

    def _save(self, target: Any, iteration: Any, called: Sequence[str] = ()) -> None:
        """Do what :meth:`save` does; some extensions were called before training. Collective."""
        self._history.complete()
        number = self._agree_on(iteration)
        with together(self.comm):
            check_target(target)
        consolidate(target)
        with together(self.comm):
            state = collect(
                target,
                self.comm,
                self._attributes,
                copy=self.asynchronous,
                called=called,
                allow_pickle=self.allow_pickle,
            )
        self._history.begin(number, state)

    def resume(self, target: Any) -> int:
        """Go on from the newest checkpoint that is whole, if there is one. Collective.

        Call it when the target is complete, with all extensions of a trainer, and before the first update.

        Args:
            target: Of the same kind as what was saved; changed in place.

        Returns:
            The iteration that it was saved with; 0 if there is none, and nothing was changed.

        Raises:
            RuntimeError: On every rank, if there are checkpoints but all are damaged; if the ranks do not
                share the directory; or if a checkpoint does not fit to the target, or needs ``allow_pickle``.
            OSError: On every rank, if the directory cannot be read, or, unless ``on_error`` is
                ``"warn"``, written to.
        """
        self._history.complete()
        with together(self.comm):
            check_target(target)
            self._prepare(target)
        return self._history.resume(target, self._attributes)

    def close(self) -> None:
        """Complete what is being written, and heed no signals any more. Collective."""
        self._end(ended_well=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end(ended_well=error is None)

    # Preemption

    @property
    def preempted(self) -> bool:
        """Whether a rank was told to end. Collective, so ask in every step, on every rank.

        Signals are heeded from the first time on. The answer is the same on every rank. With a Trainer
        there is no need to ask. Do not ask within :class:`~chainer_dist.Join`, which some ranks leave
        before others.

        Raises:
            RuntimeError: On every rank, if one does not ask in its main thread.
            OSError: On every rank, if a checkpoint cannot be written, and ``on_error`` is ``"raise"``.
        """
        self._meetings.listen()
        self._meetings.meet(wanted=False)
        return self._meetings.preempted

    def leave(self, target: Any, iteration: int) -> None:
        """Save, wait until that is complete, and leave with status 75. Collective.

        Args:
            target: As for :meth:`save`.
            iteration: As for :meth:`save`; nothing is saved if that is the newest checkpoint's.

        Raises:
            Preempted: On every rank: a ``SystemExit``.
            Exception: What :meth:`save` raises.
        """
        number = self._agree_on(iteration)
        self._history.complete()
        if self._history.newest != number:
            self.save(target, number)
            self._history.complete()
        if self.comm.rank == 0:
            sys.stderr.write(
                f"chainer_dist: preempted in iteration {number}; the newest complete checkpoint is of "
                f"iteration {self._history.newest}; leaving with status {STATUS}.\n"
            )
            sys.stderr.flush()
        raise Preempted(STATUS)

    # As an extension

    def initialize(self, trainer: chainer.training.Trainer) -> None:
        """Begin to heed signals. Collective; a Trainer calls it.

        Raises:
            RuntimeError: On every rank, if there are checkpoints and :meth:`resume` was not called.
        """
        self._history.refuse_other_runs()
        with together(self.comm):
            self._prepare(trainer, is_late=True)
        self._meetings.listen()
        entry = extension_entries(trainer)[self.name]
        entry.trigger = AgreedTrigger(
            entry.trigger, self.comm, trainer.updater, self._meetings.meet
        )
        self._outer_error = sys.exc_info()[1]

    def __call__(self, trainer: chainer.training.Trainer) -> None:
        """Save the trainer, and leave if a rank was told to end. Collective."""
        iteration = trainer.updater.iteration
        if self._meetings.preempted:
            self.leave(trainer, iteration)
        self._save(trainer, iteration, self._called_before_training(trainer))

    def _called_before_training(self, trainer: chainer.training.Trainer) -> list[str]:
        """Return the names of the extensions that were, if that is what happens just now. Local."""
        if not trainer.is_before_training:
            return []
        entries = extension_entries(trainer)
        order = sorted(entries, key=lambda name: entries[name].priority, reverse=True)
        upto = order.index(self.name) + 1
        return [name for name in order[:upto] if entries[name].call_before_training]

    def finalize(self) -> None:
        """Complete what is being written, unless an exception is on its way. Collective."""
        self._end(ended_well=sys.exc_info()[1] is self._outer_error)

    def _agree_on(self, iteration: Any) -> int:
        """Return an iteration that is the same valid one on every rank. Collective."""
        with together(self.comm):
            number = checked_count("iteration", iteration, 0)
        check_same(self.comm, [("iteration", str(number))])
        return number

    def _prepare(self, target: Any, *, is_late: bool = False) -> None:
        """Let iterators with workers be saved exactly, and bear signals, and see what is there. Local."""
        prepare(target)
        self._attributes.look(target, is_late=is_late)
        if self.preemption:
            shield(target)

    def _end(self, *, ended_well: bool) -> None:
        """Heed no signals any more. Collective if all ranks are here: then complete what is written."""
        self._meetings.stop()
        if ended_well:
            self._history.complete()
        else:
            self._history.wait()
