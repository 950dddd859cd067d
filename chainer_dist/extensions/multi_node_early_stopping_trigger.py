"""Stopping all ranks together when a value stops improving."""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from chainer.training.triggers import EarlyStoppingTrigger

from chainer_dist.extensions.observation_aggregator import ObservationAggregator, plain_value

if TYPE_CHECKING:
    import chainer

    from chainer_dist.communicators import CommunicatorBase


class MultiNodeEarlyStoppingTrigger:
    """Fires when the mean of a value over all ranks has stopped improving. ChainerMN's trigger.

    Chainer's :class:`~chainer.training.triggers.EarlyStoppingTrigger` for the stop trigger of a
    Trainer on each rank. It watches the mean over all ranks of what they observed since the last
    check, and rank 0's decision, which includes ``max_trigger``, is that of all ranks: they stop
    in the same iteration.

    Every call is collective, and a Trainer calls it in every iteration.

    For example, for at most 100 epochs::

        stop = chainer_dist.extensions.MultiNodeEarlyStoppingTrigger(
            comm, monitor="validation/main/loss", patience=5, max_trigger=(100, "epoch")
        )
        trainer = chainer.training.Trainer(updater, stop)

    Args:
        comm: Communicator.
        check_trigger: When to compare with the best mean so far, such as ``(1, "epoch")``.
        monitor: Name of the observation, a scalar. Ranks may lack it.
        patience: How many checks in a row may pass without a better mean; 3 if not given.
        mode: ``max`` if larger is better, ``min`` if smaller is, or ``auto``: larger if
            ``accuracy`` is in the name.
        verbose: Whether rank 0 prints when it stops.
        max_trigger: When to stop in any case.
        suffix: The mean is observed under the name ``monitor + suffix`` on every rank.
        patients: Another name of ``patience``, for old scripts.

    Raises:
        TypeError: If both ``patience`` and ``patients`` are given.
    """

    def __init__(
        self,
        comm: CommunicatorBase,
        *,
        check_trigger: Any = (1, "epoch"),
        monitor: str = "main/loss",
        patience: int | None = None,
        mode: str = "auto",
        verbose: bool = False,
        max_trigger: Any = (100, "epoch"),
        suffix: str = "_aggregated",
        patients: int | None = None,
    ) -> None:
        self.comm = comm
        self.actual_trigger = EarlyStoppingTrigger(
            check_trigger=check_trigger,
            monitor=monitor + suffix,
            patience=patience,
            mode=mode,
            verbose=verbose and comm.rank == 0,
            max_trigger=max_trigger,
            patients=patients,
        )
        # Both call their trigger, which has a state.
        self.aggregator = ObservationAggregator(
            comm,
            monitor,
            aggregated_key=monitor + suffix,
            comm_trigger=copy.deepcopy(check_trigger),
        )
        self._last_seen: tuple[Any, int] | None = None  # trainer and its iteration

    def __call__(self, trainer: chainer.training.Trainer) -> bool:
        """Return whether to stop, the same on every rank. Collective."""
        self._last_seen = weakref.proxy(trainer), trainer.updater.iteration
        self.aggregator(trainer)
        stop: bool = self.comm.bcast_obj(self.actual_trigger(trainer))
        return stop

    def serialize(self, serializer: Any) -> None:
        """Save or load the best mean, the count of checks since, and pending values. Local."""
        actual = self.actual_trigger
        try:
            actual.best = serializer("best", actual.best)
            actual.count = serializer("count", actual.count)
        except KeyError:
            warnings.warn(
                "the snapshot has no state of an early stopping trigger; patience starts anew",
                UserWarning,
                stacklevel=2,
            )
            return
        for name in ("interval_trigger", "max_trigger"):
            trigger = getattr(actual, f"_{name}")
            if hasattr(trigger, "serialize"):
                trigger.serialize(serializer[name])
        self.aggregator.serialize(serializer["aggregator"], unseen=self._unseen())

    def _unseen(self) -> list[Any]:
        """Return what the trainer has observed since it last called this trigger.

        A Trainer takes snapshots after an update and before it asks whether to stop; resumed, it
        asks at once, when the observation is lost.
        """
        trainer, iteration = self._last_seen or (None, None)
        if trainer is None or trainer.updater.iteration == iteration:
            return []
        key = self.aggregator.original_key
        return [plain_value(trainer.observation[key])] if key in trainer.observation else []

    def _stop_condition(self) -> bool:
        stop: bool = self.actual_trigger._stop_condition()  # noqa: SLF001 - Chainer's
        return stop

    def _init_summary(self) -> None:
        self.actual_trigger._init_summary()  # noqa: SLF001 - Chainer's

    def get_training_length(self) -> tuple[float, str]:
        """Return ``max_trigger`` as a number and a unit, for progress bars. Local."""
        length: tuple[float, str] = self.actual_trigger.get_training_length()
        return length
