"""A multi-node optimizer around an optimizer that is not Chainer's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer

from chainer_dist.collectives.agreement import agree
from chainer_dist.optimizers.proxy import OptimizerProxy
from chainer_dist.optimizers.step import Phase
from chainer_dist.parameters import ParameterSet

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["ForeignMultiNodeOptimizer", "is_foreign", "wrap_foreign"]

# What the update of a Chainer optimizer is made of.
_CHAINERS = ("_hookable", "_loss_scale", "_loss_scaling_is_dynamic", "t")


def is_foreign(optimizer: Any) -> bool:
    """Return whether an optimizer is neither Chainer's nor passes on what one has. Local."""
    if isinstance(optimizer, chainer.Optimizer):
        return False
    return not all(hasattr(optimizer, name) for name in _CHAINERS)


def wrap_foreign(
    optimizer: Any, communicator: CommunicatorBase, zero_fill: bool, options: dict[str, Any]
) -> Any:
    """Return a :class:`ForeignMultiNodeOptimizer`.

    Args:
        optimizer: Optimizer of another library.
        communicator: The communicator over whose ranks gradients are averaged.
        zero_fill: Whether a gradient that is None on this rank counts as zero.
        options: Values by name of the options that are for Chainer's optimizers only.

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


class ForeignMultiNodeOptimizer(OptimizerProxy):
    """Averages the gradients of a model over the ranks, then lets any optimizer update it.

    That one may belong to another library. It needs ``setup(link)``, the attribute ``target`` from then
    on, and ``update(lossfun, ...)``, which is called with None for the loss function and finds the
    averages in the gradients of the target, in the arrays in which they were before. All other
    attributes read and set are the wrapped optimizer's. As ChainerMN's optimizer, and for what is
    written for that; but no update is lost, as the target is made equal on all ranks before the first
    gradient, and layers that get their shape late draw the same values on every rank.
    """

    _phase: Phase

    def __init__(
        self, actual_optimizer: Any, communicator: CommunicatorBase, zero_fill: bool
    ) -> None:
        super().__init__(actual_optimizer, communicator, zero_fill)
        self._phase = Phase.NEW

    def setup(self, link: Any) -> Self:
        """Set the target, and make its parameters equal to rank 0's. Collective."""
        self.actual_optimizer.setup(link)
        self._make_equal(has_gradients=False)
        self._phase = Phase.NEW
        return self

    def update(self, lossfun: Callable[..., Any] | None = None, *args: Any, **kwds: Any) -> None:
        """Average the gradients over the ranks, then call the wrapped optimizer's ``update``. Collective.

        The first update, and every one before which parameters or their arrays were added or replaced on
        some rank, makes the parameters equal to rank 0's before ``lossfun`` is called. A layer that gets
        its shape in this very forward pass draws the same numbers from ``numpy.random`` on every rank.

        Args:
            lossfun: Returns the loss; None if the gradients are there already.
            args: Passed to ``lossfun``, and to the wrapped ``update``.
            kwds: Likewise.

        Raises:
            RankMismatchError: On every rank, naming the rank and the parameter, if ranks differ, or if a rank
                has computed gradients from parameters that differ from rank 0's.
        """
        self._check_set_up()
        has_gradients = lossfun is None
        if self._phase is Phase.NEW:
            self._make_equal(has_gradients=has_gradients)
            self._phase = Phase.BEGUN
        elif lossfun is not None:
            self._compare(has_gradients=False)
        target = self.target
        if lossfun is not None:
            loss = lossfun(*args, **kwds)
            if getattr(self, "_use_cleargrads", True):
                target.cleargrads()
            else:
                target.zerograds()
            loss.backward(loss_scale=getattr(self, "_loss_scale", None))
        self._compare(has_gradients=True)
        self.connected().multi_node_mean_grad(target, self.zero_fill)
        self.actual_optimizer.update(None, *args, **kwds)
        self._replicas.keep(ParameterSet(target))

    def _compare(self, *, has_gradients: bool) -> None:
        """Make parameters equal that were changed on some rank, other than on the others. Collective."""
        comm, parameters = self.connected(), ParameterSet(self.target)
        change, values = self._replicas.compare(parameters)
        same_change, same_structure, same_values = agree(comm, change, parameters.digest, values)
        _, differ = self._replicas.judge(
            comm,
            self.target,
            change,
            same_change=same_change,
            same_structure=same_structure,
            same_values=same_values,
        )
        if differ:
            self._make_equal(has_gradients=has_gradients)

    def _make_equal(self, *, has_gradients: bool) -> None:
        self._replicas.synchronize(self.connected(), self.target, has_gradients=has_gradients)
