"""What becomes of the optimizers of a script: each is a multi-node optimizer.

The very objects that the script has are changed, as updaters and loops may hold them anywhere.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from chainer_dist.optimizers import create_multi_node_optimizer

if TYPE_CHECKING:
    from collections.abc import Callable

    import chainer

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["distribute_optimizer", "is_distributed"]


class _Served(NamedTuple):
    """What stands behind an optimizer of the script."""

    optimizer: Any  # the multi-node optimizer
    before: Callable[[], None]  # called before each update


_served: weakref.WeakKeyDictionary[Any, _Served] = weakref.WeakKeyDictionary()
_twins: weakref.WeakSet[Any] = weakref.WeakSet()


def is_distributed(optimizer: Any) -> bool:
    """Tell whether an optimizer is a multi-node optimizer, or has become or belongs to one. Local."""
    return hasattr(optimizer, "actual_optimizer") or optimizer in _served or optimizer in _twins


def distribute_optimizer(
    optimizer: Any, comm: CommunicatorBase, before: Callable[[], None] = lambda: None
) -> Any:
    """Make an optimizer update by the mean of all ranks' gradients, in place. Collective.

    Args:
        optimizer: Any that :func:`~chainer_dist.create_multi_node_optimizer` takes, or made by it.
        comm: Communicator.
        before: Called before each update that the script itself asks for.

    Returns:
        The multi-node optimizer.
    """
    if hasattr(optimizer, "actual_optimizer"):
        return optimizer
    if optimizer in _served:
        return _served[optimizer].optimizer
    # Of the same class with the same attributes, all that change, too: the state is in one place.
    own: Any = type(optimizer)
    twin = object.__new__(own)
    twin.__dict__ = optimizer.__dict__
    _twins.add(twin)
    served = create_multi_node_optimizer(twin, comm)
    _served[optimizer] = _Served(served, before)
    optimizer.__class__ = _derived(own)
    return served


@functools.cache
def _derived(own: type) -> type:
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    return type(own.__name__, (_PassesOn, own), names)


class _PassesOn:
    """What an optimizer of the script becomes."""

    def setup(self, link: chainer.Link) -> Any:
        served = _served.get(self)
        if served is None:  # a copy
            return super().setup(link)  # type: ignore[misc]
        served.optimizer.setup(link)
        return self

    def update(self, lossfun: Any = None, *args: Any, **kwds: Any) -> None:
        served = _served.get(self)
        if served is None:
            super().update(lossfun, *args, **kwds)  # type: ignore[misc]
            return
        served.before()
        served.optimizer.update(lossfun, *args, **kwds)

    def serialize(self, serializer: Any) -> None:
        served = _served.get(self)
        if served is None:
            super().serialize(serializer)  # type: ignore[misc]
            return
        served.optimizer.serialize(serializer)
