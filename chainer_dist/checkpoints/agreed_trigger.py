"""A trigger that fires on all ranks in the same iteration, also where their own triggers do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chainer.training import triggers

from chainer_dist._proxy import Proxy
from chainer_dist.collectives.agreement import agree, digest
from chainer_dist.serialization.target import RANK_FREE_ITERATORS
from chainer_dist.updaters import MultiNodeUpdater

if TYPE_CHECKING:
    from collections.abc import Callable

    import chainer

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["AgreedTrigger"]


class AgreedTrigger(Proxy, wraps="actual_trigger"):
    """Wraps a trigger, and changes nothing but when it fires. Creating it is collective.

    Where the triggers of all ranks are known to fire together, it fires as they do. Triggers by time, or by
    epochs of different lengths, may not: then it fires soon after rank 0's.

    Args:
        actual_trigger: The trigger to wrap.
        comm: The communicator whose ranks fire together.
        updater: The updater of the trainer.
        meet: Collective function that is called in each iteration with whether the trigger of this rank has
            fired. It returns, the same on every rank, whether rank 0's has, and whether to fire in any case.
    """

    actual_trigger: Any
    _meet: Callable[[bool], tuple[bool, bool]]
    _wanted: bool
    _exact: bool

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
        """Return whether to fire, the same on every rank. Collective in some iterations."""
        due = bool(self.actual_trigger(trainer))
        self._wanted = self._wanted or (due and not self._exact)
        agreed, always = self._meet(self._wanted)
        if agreed:
            self._wanted = False
        return (due and self._exact) or agreed or always


def _describe(trigger: Any, updater: Any) -> str | None:
    """Return when a trigger fires, in words; None if ranks with the same words may fire at different times. Local."""
    if type(trigger) not in (triggers.IntervalTrigger, triggers.ManualScheduleTrigger):
        return None
    times = vars(trigger).get("period", vars(trigger).get("points"))
    if trigger.unit == "iteration":
        return f"{times} {trigger.unit}"
    iterator: Any = getattr(updater, "_iterators", {}).get("main")
    if isinstance(updater, MultiNodeUpdater) or isinstance(iterator, RANK_FREE_ITERATORS):
        return f"{times} {trigger.unit}"
    try:
        epoch = f"{len(iterator.dataset)} in {iterator.batch_size} at {updater.epoch_detail}"
    except (AttributeError, TypeError):  # an iterator of another kind
        return None
    return f"{times} epochs of {epoch}"
