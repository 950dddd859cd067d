"""What becomes of the optimizers of a script: each is a multi-node optimizer.

The very objects that the script has are changed, as updaters and loops may hold them anywhere.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

from chainer_dist.optimizers import create_multi_node_optimizer

if TYPE_CHECKING:
    from collections.abc import Callable

    import chainer

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["distribute_optimizer", "distribute_when_it_updates", "is_distributed"]

# By the optimizer of the script: what stands behind it, or what says by which communicator it is to.
_served: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_waiting: weakref.WeakKeyDictionary[Any, Callable[[], CommunicatorBase]] = (
    weakref.WeakKeyDictionary()
)
_twins: weakref.WeakSet[Any] = weakref.WeakSet()


def is_distributed(optimizer: Any) -> bool:
    """Return whether an optimizer is a multi-node optimizer, or becomes one, or is part of one. Local."""
    if hasattr(optimizer, "actual_optimizer"):
        return True
    return any(optimizer in each for each in (_served, _waiting, _twins))


def distribute_optimizer(optimizer: Any, comm: CommunicatorBase) -> Any:
    """Make an optimizer update by the mean of all ranks' gradients, in place. Collective.

    Args:
        optimizer: Any that :func:`~chainer_dist.create_multi_node_optimizer` takes, or made by it.
        comm: Communicator.

    Returns:
        The multi-node optimizer.
    """
    if hasattr(optimizer, "actual_optimizer"):
        return optimizer
    if optimizer in _served:
        return _served[optimizer]
    _waiting.pop(optimizer, None)
    own: Any = getattr(type(optimizer), "_class_of_script", type(optimizer))
    # Of the same class with the same attributes, all that change, too: the state is in one place.
    twin = object.__new__(own)
    twin.__dict__ = optimizer.__dict__
    _twins.add(twin)
    served = create_multi_node_optimizer(twin, comm)
    _served[optimizer] = served
    optimizer.__class__ = _derived(own)
    return served


def distribute_when_it_updates(optimizer: Any, begin: Callable[[], CommunicatorBase]) -> None:
    """Make an optimizer one of all ranks when it is first asked to update. Local.

    Args:
        optimizer: Any that is set up, and no multi-node optimizer.
        begin: Called before that update; returns the communicator.
    """
    own: Any = type(optimizer)
    optimizer.__class__ = _derived(own)
    _waiting[optimizer] = begin


@functools.cache
def _derived(own: type) -> type:
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    return type(own.__name__, (_PassesOn, own), {**names, "_class_of_script": own})


class _PassesOn:
    """What an optimizer of the script becomes. A copy of it updates by itself."""

    def setup(self, link: chainer.Link) -> Any:
        served = _served.get(self)
        if served is None:
            return super().setup(link)  # type: ignore[misc]
        served.setup(link)
        return self

    def update(self, lossfun: Any = None, *args: Any, **kwds: Any) -> None:
        if self in _waiting:
            distribute_optimizer(self, _waiting[self]())
        served: Any = _served.get(self, super())
        served.update(lossfun, *args, **kwds)

    def serialize(self, serializer: Any) -> None:
        served: Any = _served.get(self, super())
        served.serialize(serializer)
