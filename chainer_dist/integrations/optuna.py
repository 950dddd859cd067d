"""Hyperparameter search by Optuna in which all ranks train each trial together.

Optuna had this for ChainerMN, and has removed it. Here rank 0 alone has the study and its storage, so that any storage
will do, in memory too; the other ranks learn from it what is suggested, and whether a trial is to be pruned::

    import optuna
    from chainer_dist.integrations.optuna import ChainerMNStudy

    def objective(trial, comm):
        rate = trial.suggest_float("rate", 1e-5, 1e-1, log=True)
        ...                                          # train with comm, as ever
        return accuracy

    comm = chainer_dist.create_communicator()
    study = optuna.create_study(direction="maximize") if comm.rank == 0 else None
    ChainerMNStudy(study, comm).optimize(objective, n_trials=20)
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import chainer
import optuna

from chainer_dist.collectives.agreement import shared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["ChainerMNStudy", "ChainerMNTrial", "PruningExtension"]


class ChainerMNStudy:
    """A study whose trials are run by all ranks together, as ``optuna.integration.ChainerMNStudy`` was.

    Every other attribute, such as ``best_trial``, is that of rank 0's study, and is there on rank 0 only.

    Args:
        study: A study of Optuna on rank 0; ignored on the other ranks, where it may be None.
        comm: The communicator that the ranks train with.

    Raises:
        TypeError: On every rank, if rank 0 has no study.
    """

    def __init__(self, study: optuna.Study | None, comm: CommunicatorBase) -> None:
        self.comm = comm
        self.delegate = study if comm.rank == 0 else None
        kind = comm.bcast_obj(None if isinstance(study, optuna.Study) else type(study).__name__)
        if kind is not None:
            raise TypeError(f"rank 0 must have a study of optuna.create_study, got {kind}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self.delegate is None:
            raise AttributeError(
                f"{name}: rank 0 alone has the study, this is rank {self.comm.rank}"
            )
        return getattr(self.delegate, name)

    def optimize(
        self,
        func: Callable[[ChainerMNTrial, CommunicatorBase], float | Sequence[float]],
        n_trials: int | None = None,
        timeout: float | None = None,
        catch: type[Exception] | Iterable[type[Exception]] = (),
        **options: Any,
    ) -> None:
        """Run trials. Collective.

        Args:
            func: The objective, called on every rank with the trial and the communicator. What it returns on
                rank 0 counts. If it raises :class:`optuna.TrialPruned`, or an error that is caught, it must
                do so on all ranks.
            n_trials: Number of trials, on rank 0; None for no limit.
            timeout: Seconds after which no new trial begins, by the clock of rank 0; None for no limit.
            catch: Errors that fail a trial and not the study, the same on every rank.
            options: Other arguments of Optuna's ``Study.optimize``, on rank 0, but for ``n_jobs``.

        Raises:
            ValueError: On every rank, for ``n_jobs``: all ranks work on one trial at a time.
        """
        if options.get("n_jobs", 1) != 1:
            raise ValueError("n_jobs: all ranks work on one trial at a time")
        if self.delegate is not None:
            self._optimize(func, n_trials, timeout, catch=catch, **options)
            return
        caught: tuple[type[BaseException], ...]
        caught = (catch,) if isinstance(catch, type) else tuple(catch)
        while self.comm.bcast_obj(None):
            # Rank 0 raises the same, and Optuna takes note of it.
            with contextlib.suppress(optuna.TrialPruned, *caught):
                func(ChainerMNTrial(None, self.comm), self.comm)

    def _optimize(self, func: Callable[..., Any], *args: Any, **options: Any) -> None:
        """Run trials on rank 0, and let the other ranks know of each, and of the end."""
        raised: list[BaseException] = []

        def run(trial: optuna.Trial) -> Any:
            self.comm.bcast_obj(True)  # noqa: FBT003 - there is another trial
            try:
                return func(ChainerMNTrial(trial, self.comm), self.comm)
            except BaseException as error:
                raised[:] = [error]
                raise

        assert self.delegate is not None  # noqa: S101 - for the type checker
        try:
            self.delegate.optimize(run, *args, **options)
        except BaseException as error:
            if (
                error not in raised[-1:]
            ):  # the other ranks raise what the objective raises, and are gone
                self.comm.bcast_obj(False)  # noqa: FBT003 - there is no other trial
            raise
        self.comm.bcast_obj(False)  # noqa: FBT003 - the same


class ChainerMNTrial:
    """A trial that is the same on every rank. All methods and attributes are collective.

    ``suggest_*``, ``params``, ``number`` and whatever else ``optuna.Trial`` has are asked for on rank 0, and
    every rank gets the answer, or the error.

    Args:
        trial: The trial of Optuna on rank 0, None elsewhere.
        comm: The communicator.
    """

    def __init__(self, trial: optuna.Trial | None, comm: CommunicatorBase) -> None:
        self._delegate = trial
        self._comm = comm

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if callable(getattr(optuna.Trial, name, None)):
            return lambda *args, **kwargs: self._ask(
                lambda trial: getattr(trial, name)(*args, **kwargs)
            )
        return self._ask(lambda trial: getattr(trial, name))

    def report(self, value: float, step: int) -> None:
        """Report an intermediate value: that of rank 0. Collective."""
        self._ask(lambda trial: trial.report(value, step))

    def should_prune(self) -> bool:
        """Return whether the trial is to be pruned, the same on every rank. Collective."""
        return bool(self._ask(lambda trial: trial.should_prune()))

    def _ask(self, call: Callable[[optuna.Trial], Any]) -> Any:
        """Return on every rank the result of a call on rank 0, or raise its error."""
        trial: Any = self._delegate  # None on other ranks than 0, which do not call
        return shared(self._comm, 0, lambda: call(trial))


class PruningExtension(chainer.training.Extension):  # type: ignore[misc]  # Chainer has no types
    """Reports an observation to a trial, and ends the training on all ranks if that is to be pruned. Collective.

    As ``optuna.integration.ChainerPruningExtension`` was.

    Args:
        trial: What the objective was called with.
        observation_key: Such as ``"validation/main/loss"``; rank 0's value counts.
        trigger: When to report, the same on every rank, such as ``(1, "epoch")``.

    Raises:
        optuna.TrialPruned: On every rank, out of ``trainer.run``.
    """

    def __init__(self, trial: ChainerMNTrial, observation_key: str, trigger: Any) -> None:
        self._trial = trial
        self._key = observation_key
        self.trigger = chainer.training.get_trigger(trigger)

    def __call__(self, trainer: Any) -> None:
        """Report, and raise if the trial is to be pruned."""
        value = trainer.observation.get(self._key, float("nan"))
        step = getattr(trainer.updater, getattr(self.trigger, "unit", "iteration"))
        self._trial.report(float(getattr(value, "array", value)), step)
        if self._trial.should_prune():
            raise optuna.TrialPruned(f"pruned at {self._key} of step {step}")
