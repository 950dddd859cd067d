"""What becomes of the triggers of a trainer: each fires on all ranks in the same iteration."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

from chainer.training import triggers

from chainer_dist._proxy import Proxy

if TYPE_CHECKING:
    import chainer

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["agreed", "is_known"]

# They fire by what is the same on all ranks; those by observations only once these are averaged.
_BY_OBSERVATIONS = (
    triggers.EarlyStoppingTrigger,
    triggers.BestValueTrigger,
    triggers.MaxValueTrigger,
    triggers.MinValueTrigger,
)
_ALIKE = (
    triggers.IntervalTrigger,
    triggers.ManualScheduleTrigger,
    triggers.OnceTrigger,
    *_BY_OBSERVATIONS,
)


def agreed(trigger: Any, comm: CommunicatorBase, *, before_averages: bool = False) -> Any:
    """Return a trigger that fires on all ranks when rank 0's does; itself, where it does so already. Local.

    Args:
        trigger: The trigger.
        comm: Communicator.
        before_averages: Whether it is asked before observations are averaged.
    """
    differs = before_averages and isinstance(trigger, _BY_OBSERVATIONS)
    return trigger if _fires_alike(trigger) and not differs else _RankZerosTrigger(trigger, comm)


def _fires_alike(trigger: Any) -> bool:
    if isinstance(trigger, _RankZerosTrigger):
        return True
    if type(trigger) in _ALIKE:
        inner = (vars(trigger).get(name) for name in ("_interval_trigger", "_max_trigger"))
        return all(each is None or _fires_alike(each) for each in inner)
    where = getattr(trigger, "__module__", None) or type(trigger).__module__
    # Functions and methods, of Chainer's extensions or of ours; by time, Chainer's class fires as it likes.
    return isinstance(trigger, (types.FunctionType, types.MethodType)) and is_known(where)


def is_known(module: str) -> bool:
    """Return whether a module is Chainer's or this package's, by its name. Local."""
    return module.partition(".")[0] in ("chainer", "chainermn", "chainer_dist")


class _RankZerosTrigger(Proxy, wraps="actual_trigger"):
    """Fires on all ranks when rank 0's trigger does; everything else is the wrapped trigger's own."""

    actual_trigger: Any
    _comm: CommunicatorBase

    def __init__(self, actual_trigger: Any, comm: CommunicatorBase) -> None:
        self.actual_trigger = actual_trigger
        self._comm = comm

    def __call__(self, trainer: chainer.training.Trainer) -> bool:
        due = bool(self.actual_trigger(trainer))
        return bool(self._comm.bcast_obj(due))
