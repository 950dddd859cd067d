"""What all ways to change parameters have in common.

A new way is a class derived from :class:`Update` in a file of its own, and a line in
:data:`~chainer_dist.updates.UPDATES`.
"""

from __future__ import annotations

import abc
import contextlib
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    import chainer
    import numpy as np

    from chainer_dist._typing import Array
    from chainer_dist.communicators import CommunicatorBase
    from chainer_dist.communicators.shared_memory.exchange import Deliver
    from chainer_dist.communicators.shared_memory.layout import Layout
    from chainer_dist.parameters import ParameterSet
    from chainer_dist.updates.comparison import Lines
    from chainer_dist.updates.options import Options
    from chainer_dist.updates.randomness import Randomness

__all__ = ["Context", "EarlyExchanges", "GradientExchange", "Gradients", "Update"]


class Context(NamedTuple):
    """The objects with which an update works as long as it exists.

    Attributes:
        comm: The communicator over whose ranks gradients are averaged.
        optimizer: The optimizer that the multi-node optimizer wraps.
        options: The user's choice.
        randomness: State of random numbers that hooks and update rules draw.
    """

    comm: CommunicatorBase
    optimizer: chainer.Optimizer
    options: Options
    randomness: Randomness


class Gradients(NamedTuple):
    """The gradients of an update, and how they compare between ranks.

    Attributes:
        parameters: The parameters, of equal structure on every rank, with this rank's gradients.
        are_matched: Whether the same parameters have a gradient on every rank; True if ranks did not
            compare.
        zero_fill: Whether a gradient that is None counts as zero.
        are_averaged: Whether the gradients were averaged during backward, by :meth:`Update.early`.
    """

    parameters: ParameterSet
    are_matched: bool
    zero_fill: bool
    are_averaged: bool


class GradientExchange(NamedTuple):
    """Gradients of one dtype, and the arguments of an :class:`shared_memory.exchange.Exchange` that averages them.

    Attributes:
        indices: Numbers of their parameters, in the order of the exchange.
        layout: Layout of the blocks that they are exchanged in.
        dtype: Type in which they are summed.
        deliver: Function that takes the sum of this rank's slice of a block.
        targets: Arrays that take the slices of the other ranks; None for none.
        unwanted: Numbers of parameters whose means are not used.
    """

    indices: list[int]
    layout: Layout
    dtype: np.dtype[Any]
    deliver: Deliver
    targets: list[Array] | None
    unwanted: frozenset[int] = frozenset()


class EarlyExchanges(NamedTuple):
    """Gradients that may be averaged while backward still computes others.

    Attributes:
        exchanges: The exchanges, one a dtype; the same on every rank.
        is_for_all: Whether all parameters are in them. Otherwise they are for losses that come from the
            same parameters as that of the last backward.
    """

    exchanges: list[GradientExchange]
    is_for_all: bool


class Update(abc.ABC):
    """A way to change the parameters of one optimizer by gradients. Creating one is local.

    Args:
        context: The objects with which it works.

    Attributes:
        context: The objects with which it works.
        name: Its name in :data:`~chainer_dist.updates.UPDATES`.
        keeps_equal: Whether parameters and state are the same on all ranks after each update.
        updates_late: Number of updates after which gradients are used.
        news: Line that rank 0 logs when it is chosen; an empty string for none.
        exchanges: Whether ranks communicate in the next update; the same on every rank. An update that
            does not always do so is applied without :meth:`prepare`, where parameters are known.
        is_spread: Whether each rank has only a share of the state of the update rules.
    """

    name: ClassVar[str]
    keeps_equal: ClassVar[bool] = True
    updates_late: ClassVar[int] = 0
    news: ClassVar[str] = ""

    def __init__(self, context: Context) -> None:
        self.context = context

    @property
    def exchanges(self) -> bool:
        """See the attributes of this class."""
        return True

    @property
    def is_spread(self) -> bool:
        """See the attributes of this class."""
        return False

    @classmethod
    def obstacle(cls, context: Context, parameters: ParameterSet) -> str | None:
        """Say why parameters cannot be updated in this way, or return None. Local."""
        del context, parameters
        return None

    def settings(self) -> Lines:
        """Return names and values of its options that must be the same on every rank. Local."""
        return []

    def prepare(
        self, parameters: ParameterSet, agree_on_order: Callable[[], list[int]] | None
    ) -> None:
        """Get ready to update parameters. Collective; again after :meth:`release`.

        Args:
            parameters: The parameters, of equal structure on every rank.
            agree_on_order: Collective function that returns the numbers of all parameters in the order in
                which their gradients become final; None if nothing is exchanged during backward.
        """
        del parameters, agree_on_order

    def early(self) -> EarlyExchanges | None:
        """Return the gradients that may be averaged during backward, once it is prepared with an order. Local."""
        return None

    def fits(self, parameters: ParameterSet) -> bool:
        """Return whether it is still prepared for these parameters, their rules and states. Local."""
        del parameters
        return True

    @abc.abstractmethod
    def apply(self, gradients: Gradients) -> None:
        """Update the parameters. Collective if :attr:`exchanges`, otherwise local."""

    def discard(self) -> None:  # noqa: B027 - most updates have nothing to do here
        """Forget gradients that were not used yet, as all parameters become others. Local."""

    def consolidate(self) -> None:  # noqa: B027 - most updates have nothing to do here
        """Let every rank have all of the state until the next update. Collective."""

    def copied_states(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which every rule has a state that a serializer may keep. Local."""
        return contextlib.nullcontext()

    def release(self) -> None:  # noqa: B027 - most updates have nothing to do here
        """Give each rank arrays of its own in the place of shared ones. Local."""
