"""Making an ordinary trainer data-parallel in place, or only its reports."""

from __future__ import annotations

import random
import types
import weakref
from typing import TYPE_CHECKING, Any, Literal

import chainer
import numpy as np
from chainer.training import extensions, updaters

from chainer_dist.collectives.agreement import agree, digest
from chainer_dist.collectives.failures import together
from chainer_dist.communicators import CommunicatorBase, create_communicator
from chainer_dist.extensions import AllreducePersistent
from chainer_dist.training import samples
from chainer_dist.training.evaluators import distribute_evaluator
from chainer_dist.training.iterators import BATCHES, distribute_iterator
from chainer_dist.training.optimizers import distribute_optimizer
from chainer_dist.training.reports import prepare_extensions

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["distribute", "is_distributed", "on_rank_zero", "separate_random_numbers"]

_trainers: weakref.WeakSet[Any] = weakref.WeakSet()

# They spread one process's work over GPUs.
_UPDATERS_OF_DEVICES = (updaters.ParallelUpdater, updaters.MultiprocessParallelUpdater)


def distribute(
    trainer: chainer.training.Trainer,
    comm: CommunicatorBase | None = None,
    *,
    batch: Literal["rank", "global"] = "rank",
) -> chainer.training.Trainer:
    """Make an ordinary trainer data-parallel, in place. Collective.

    One line before ``trainer.run()``, and before a snapshot is loaded into the trainer::

        chainer_dist.distribute(trainer)
        trainer.run()

    - Each optimizer of the updater becomes one of :func:`~chainer_dist.create_multi_node_optimizer`.
    - Each training iterator serves this rank's part of every batch. Chainer's three iterators become a
      :class:`~chainer_dist.iterators.DistributedIterator`, shuffled if they were; an iterator of another class,
      or with an ``order_sampler`` of its own, draws alike on all ranks, which share out its batches
      (:class:`~chainer_dist.iterators.DividedIterator`). The data may be on every rank, or on rank 0 with an
      empty list on the others. Epochs count the whole data set; ``batch_size``, read or set, is that of a rank
      (where ranks share out batches, the updater's iterator has that of all). What serves a rank's part
      already, as after ``scatter_dataset``, stays as it is.
    - Each evaluator gives the score of the whole set on every rank, every sample counting once. Where batches
      do not stand alone (``evaluate`` overridden, an ``eval_hook``, an iterator of another class, a model
      with a ``reset_state``), every rank evaluates all of it. Running statistics, such as the ones of
      batch normalization, are averaged before an evaluation and before a snapshot.
    - Reports are as by :func:`on_rank_zero`.
    - Where ``numpy.random`` or ``random`` stands alike on all ranks when training begins, each rank but 0 gets
      numbers of its own, for dropout and augmentation.

    Script and updater may hold optimizers and iterators anywhere: the very objects are changed. Extensions may
    be added before and after this call.

    Args:
        trainer: Trainer with an updater that has Chainer's optimizers, and draws from iterators.
        comm: Communicator; None creates one over all ranks.
        batch: ``"rank"``: the batch size of the script is that of each rank, so that N ranks make N times as
            large a step, as a rule with an N times as large learning rate, warmed up (Goyal et al., 2017).
            ``"global"``: it is that of all ranks together, and each gets an N-th of it: the same training
            as in one process, with the same learning rate, but for what looks at a batch as a whole, as batch
            normalization. Batches of iterators of another class are always divided.

    Returns:
        ``trainer``.

    Raises:
        ValueError, TypeError: On every rank, if it cannot be done safely; the text says what to write.
        RankMismatchError: On every rank, if ranks have other data, options or extensions.
    """
    _check_calls(trainer, comm)
    comm = create_communicator() if comm is None else comm
    with together(comm):
        if trainer in _trainers:
            raise ValueError(
                "this trainer is distributed already: call distribute() or on_rank_zero() once"
            )
        if batch not in BATCHES:
            raise ValueError(f"batch is {batch!r}, expected 'rank' or 'global'")
        updater = trainer.updater
        iterators, optimizers = _iterators_of(updater), _optimizers_of(updater)
    lines = [
        ("batch", batch),
        ("the class of the updater", type(updater).__qualname__),
        ("the iterators of the updater", str([*iterators])),
        ("the optimizers of the updater", str([*optimizers])),
    ]
    samples.compare(comm, lines, "let all ranks make it alike")
    for name, optimizer in optimizers.items():
        updater._optimizers[name] = distribute_optimizer(optimizer, comm)  # noqa: SLF001 - Chainer's
    for name, iterator in iterators.items():
        iterators[name] = distribute_iterator(iterator, comm, batch, name)
    _prepare_when_run(trainer, comm, evaluators=True)
    return trainer


def on_rank_zero(
    trainer: chainer.training.Trainer, comm: CommunicatorBase
) -> chainer.training.Trainer:
    """Let the reports of a trainer be of all ranks, and rank 0 write them. Local.

    For scripts that make their own optimizers and iterators multi-node. All ranks extend their trainers alike,
    before this call or after it, with no ``if comm.rank == 0``. When the trainer runs:

    - Every observation that is a number, or an array, is replaced by its mean over the ranks in each
      iteration, before LogReport and what else reads it: the loss in the log is that of all ranks.
    - LogReport writes on rank 0; its ``log`` is there on every rank. PrintReport, PlotReport,
      VariableStatisticsPlot, ProgressBar and DumpGraph are called on rank 0.
    - ``extensions.snapshot`` saves on rank 0, under its usual name, and with ``autoload`` all ranks load what
      rank 0 has found.
    - An extension of another class, or a function, is called on rank 0 if it has a ``writer``, a file name or the
      like among its attributes, or if its code opens or saves files, writes to TensorBoard or MLflow, or asks for
      ``trainer.out``; and otherwise on every rank, as one that changes a learning rate, or communicates itself.
      Its attribute ``on_rank_zero``, true or false, says it outright. What is called on rank 0 must not communicate.
    - Triggers fire on all ranks in the same iteration: triggers by time, of other classes, and by values that are
      not averaged yet, such as those of an evaluator, when rank 0's does. So does the stop trigger, so that
      ``trainer.run()`` ends on all ranks together.

    For example, with the same lines on every rank::

        trainer.extend(extensions.LogReport())
        trainer.extend(extensions.snapshot(), trigger=(1, "epoch"))
        chainer_dist.on_rank_zero(trainer, comm)
        trainer.run()

    Args:
        trainer: Any. Its ranks make the same iterations.
        comm: Communicator.

    Returns:
        ``trainer``.

    Raises:
        ValueError, TypeError: If it is no trainer, or was given to this or to :func:`distribute` before.
        RankMismatchError: Raised by ``trainer.run()`` on every rank, if the trainers have other extensions.
    """
    _check_calls(trainer, comm)
    if trainer in _trainers:
        raise ValueError(
            "this trainer is distributed already: call distribute() or on_rank_zero() once"
        )
    _prepare_when_run(trainer, comm, evaluators=False)
    return trainer


def is_distributed(trainer: chainer.training.Trainer) -> bool:
    """Return whether :func:`distribute` or :func:`on_rank_zero` has been called with a trainer. Local."""
    return trainer in _trainers


def separate_random_numbers(comm: CommunicatorBase) -> None:
    """Give ranks numbers of their own where all would draw the same. Collective; rank 0's stay as they are."""
    _, words, position, *_ = np.random.get_state()  # noqa: NPY002 - what Chainer draws from
    state = random.getstate()
    same_numpy, same_python = agree(
        comm, digest(samples.fingerprint([words, position])), digest(samples.fingerprint(state))
    )
    if comm.rank == 0:
        return
    if same_numpy:
        np.random.seed([*words[:4], position, comm.rank])  # noqa: NPY002
    if same_python:
        random.seed(f"{samples.fingerprint(state)} {comm.rank}")


def _prepare_when_run(
    trainer: chainer.training.Trainer, comm: CommunicatorBase, *, evaluators: bool
) -> None:
    """Let ``trainer.run`` begin with what concerns extensions: there may be more of them by then."""
    _trainers.add(trainer)
    run: Callable[..., None] = trainer.run

    def prepare_and_run(self: Any, *args: Any, **options: Any) -> None:
        del self.run  # the class's own, from now on
        if not evaluators:
            prepare_extensions(self, comm)
            run(*args, **options)
            return

        def average_persistents() -> None:
            for optimizer in self.updater.get_all_optimizers().values():
                AllreducePersistent(optimizer.target, comm)()

        for entry in self._extensions.values():
            if isinstance(entry.extension, extensions.Evaluator):
                distribute_evaluator(entry.extension, comm, average_persistents)
        prepare_extensions(self, comm, average_persistents)
        separate_random_numbers(comm)
        run(*args, **options)

    trainer.run = types.MethodType(prepare_and_run, trainer)


def _check_calls(trainer: Any, comm: Any) -> None:
    if not isinstance(trainer, chainer.training.Trainer):
        raise TypeError(f"trainer is {trainer!r}, expected a chainer.training.Trainer")
    if comm is not None and not isinstance(comm, CommunicatorBase):
        raise TypeError(f"comm is {comm!r}, expected a communicator of create_communicator()")


def _iterators_of(updater: Any) -> dict[str, Any]:
    """Return the dict in which an updater has its iterators, which may be changed. Local."""
    if isinstance(updater, _UPDATERS_OF_DEVICES):
        raise ValueError(  # noqa: TRY004 - it is an updater, and cannot be this one
            f"the updater is a {type(updater).__name__}, which spreads one process over devices: write "
            "chainer.training.updaters.StandardUpdater(iterator, optimizer) in its place"
        )
    found = getattr(updater, "_iterators", None)
    if isinstance(found, dict) and found:
        return found
    raise ValueError(
        f"the updater is a {type(updater).__qualname__}, which has no iterators of Chainer's and draws its batches "
        "itself, the same on every rank: derive it from chainer.training.updaters.StandardUpdater and draw from "
        "self.get_iterator('main'), or give each rank its part by chainer_dist.scatter_dataset(dataset, comm) and "
        "write chainer_dist.create_multi_node_optimizer(optimizer, comm) and "
        "chainer_dist.on_rank_zero(trainer, comm)"
    )


def _optimizers_of(updater: Any) -> dict[str, Any]:
    found = getattr(updater, "_optimizers", None)
    if isinstance(found, dict) and found:
        return dict(found)
    raise ValueError(
        f"the updater is a {type(updater).__qualname__}, which does not have its optimizers as Chainer's updaters do: "
        "derive it from chainer.training.updaters.StandardUpdater"
    )
