"""A trigger that fires on all ranks in the same iteration, whatever each rank's own does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chainer.training import triggers

from chainer_dist.collectives.agreement import agree, digest
from chainer_dist.serialization.target import RANK_FREE_ITERATORS
from chainer_dist.updaters import _MultiNodeUpdater

if TYPE_CHECKING:
    from collections.abc import Callable

    import chainer

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["AgreedTrigger"]


class AgreedTrigger:
    """Wraps a trigger; everything but when it fires is the wrapped trigger's own. Creating it is collective.

    Where it is known that the ranks' triggers fire together it fires as they do. By time, or by epochs
    of different lengths, they may not: then it fires soon after rank 0's.

    Args:
        actual_trigger: The trigger to wrap.
        comm: Of the ranks.
        updater: Of the trainer.
        meet: Called in each iteration, with whether this rank wants to fire, sooner or later. Returns,
            the same on every rank, whether rank 0 wants to, and whether to fire in any case.
    """

    def __init__(
        self,
        actual_trigger: Any,
        comm: CommunicatorBase,
        updater: Any,
        meet: Callable[[bool], tuple[bool, bool]],
    ) -> None:
        self.actual_trigger = actual_trigger
        self._meet = meet
        self._wanted = False
        times = _describe(actual_trigger, updater)
        known, same = agree(comm, int(times is not None), digest(times))
        self._exact = known and same and times is not None

    def __call__(self, trainer: chainer.training.Trainer) -> bool:
        """Tell whether to fire. Collective in some iterations; the same on every rank."""
        due = bool(self.actual_trigger(trainer))
        self._wanted = self._wanted or (due and not self._exact)
        agreed, always = self._meet(self._wanted)
        if agreed:
            self._wanted = False
        return (due and self._exact) or agreed or always

    def __getattr__(self, name: str) -> Any:
        if name == "actual_trigger":  # while being unpickled
            raise AttributeError(name)
        return getattr(self.actual_trigger, name)


def _describe(trigger: Any, updater: Any) -> str | None:
    """Say when a trigger fires, if it does on all ranks that say the same, or return None. Local."""
    if type(trigger) not in (triggers.IntervalTrigger, triggers.ManualScheduleTrigger):
        return None
    times = vars(trigger).get("period", vars(trigger).get("points"))
    if trigger.unit == "iteration":
        return f"{times} {trigger.unit}"
    iterator: Any = getattr(updater, "_iterators", {}).get("main")
    if isinstance(updater, _MultiNodeUpdater) or isinstance(iterator, RANK_FREE_ITERATORS):
        return f"{times} {trigger.unit}"
    try:
        epoch = f"{len(iterator.dataset)} in {iterator.batch_size} at {updater.epoch_detail}"
    except (AttributeError, TypeError):  # an iterator of another kind
        return None
    return f"{times} epochs of {epoch}"
