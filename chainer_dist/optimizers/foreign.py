"""A multi-node optimizer around an optimizer that is not Chainer's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer

from chainer_dist import exchange
from chainer_dist.communicators.agreement import agree
from chainer_dist.optimizers.multi_node_optimizer import MultiNodeOptimizer
from chainer_dist.optimizers.replicas import Replicas

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["ForeignMultiNodeOptimizer", "is_foreign", "wrap_foreign"]

# What the update of a Chainer optimizer is made of.
_CHAINERS = ("_hookable", "_loss_scale", "_loss_scaling_is_dynamic", "t")


def is_foreign(optimizer: Any) -> bool:
    """Tell whether an optimizer is neither Chainer's nor passes on what one has. Local."""
    if isinstance(optimizer, chainer.Optimizer):
        return False
    return not all(hasattr(optimizer, name) for name in _CHAINERS)


def wrap_foreign(
    optimizer: Any, communicator: CommunicatorBase, zero_fill: bool, options: dict[str, Any]
) -> Any:
    """Return a :class:`ForeignMultiNodeOptimizer`.

    Args:
        optimizer: Not Chainer's.
        communicator: Over whose ranks gradients are averaged.
        zero_fill: Whether a gradient that is None on this rank counts as zero.
        options: By their names, those that are for Chainer's optimizers only.

    Raises:
        ValueError: If one of the options is wanted.
    """
    for name, is_wanted in options.items():
        if is_wanted:
            raise ValueError(
                f"{name} is for Chainer's optimizers, and {type(optimizer).__name__} is none; "
                "leave it out"
            )
    return ForeignMultiNodeOptimizer(optimizer, communicator, zero_fill)


class ForeignMultiNodeOptimizer:
    """Averages the gradients of a model over the ranks, then lets any optimizer update it.

    That one may belong to another library. It needs ``setup(link)``, the attribute ``target`` from then
    on, and ``update(lossfun, ...)``, which is called with None for the loss function and finds the
    averages in the gradients of the target, in the arrays in which they were before. All other
    attributes read and set are the wrapped optimizer's. As ChainerMN's optimizer, and for what is
    written for that; the target is made equal on all ranks at once, though, so that no update is lost.

    Args:
        actual_optimizer: The wrapped one.
        communicator: Over whose ranks gradients are averaged.
        zero_fill: Whether a gradient that is None on this rank counts as zero.

    Attributes:
        actual_optimizer: As given.
        communicator: As given.
        zero_fill: As given.
    """

    _OWN = frozenset({"actual_optimizer", "communicator", "zero_fill", "_replicas"})

    def __init__(
        self, actual_optimizer: Any, communicator: CommunicatorBase, zero_fill: bool
    ) -> None:
        self.actual_optimizer = actual_optimizer
        self.communicator = communicator
        self.zero_fill = zero_fill
        self._replicas = Replicas()

    target_params = MultiNodeOptimizer.target_params
    is_changed = MultiNodeOptimizer.is_changed

    def setup(self, link: Any) -> Self:
        """Set the target, and make its parameters equal to rank 0's. Collective."""
        self.actual_optimizer.setup(link)
        self._make_equal()
        self._replicas = (
            Replicas()
        )  # once more before the first update, as they may be changed until then
        return self

    def update(self, lossfun: Callable[..., Any] | None = None, *args: Any, **kwds: Any) -> None:
        """Average the gradients over the ranks, then call the wrapped optimizer's ``update``. Collective.

        Where parameters appeared on some rank, as those of layers that get their shape in this very
        forward pass, the gradients are of unequal parameters: then the parameters are made equal to
        rank 0's, and that is all, as with ChainerMN.

        Args:
            lossfun: Returns the loss; None if the gradients are there already.
            args: Passed to ``lossfun``, and to the wrapped ``update``.
            kwds: Likewise.

        Raises:
            RankMismatchError: On every rank, naming the rank and the parameter, if ranks differ.
        """
        if self._replicas.structure is None:
            self._make_equal()
        target = self.target
        if lossfun is not None:
            loss = lossfun(*args, **kwds)
            if getattr(self, "_use_cleargrads", True):
                target.cleargrads()
            else:
                target.zerograds()
            loss.backward(loss_scale=getattr(self, "_loss_scale", None))
        parameters = exchange.ParameterSet(target)
        is_changed = not self._replicas.has_structure_of(parameters)
        if not all(agree(self.communicator, parameters.digest, int(is_changed))) or is_changed:
            self._make_equal()
            return
        self.communicator.multi_node_mean_grad(target, self.zero_fill)
        self.actual_optimizer.update(None, *args, **kwds)

    def _make_equal(self) -> None:
        self.communicator.bcast_data(self.target)
        self._replicas.keep(exchange.ParameterSet(self.target))

    def __getattr__(self, name: str) -> Any:
        try:
            actual = self.__dict__["actual_optimizer"]
        except KeyError:  # while being copied or unpickled
            raise AttributeError(name) from None
        return getattr(actual, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            super().__setattr__(name, value)
        else:
            setattr(self.actual_optimizer, name, value)
