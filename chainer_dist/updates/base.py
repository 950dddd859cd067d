"""The base class of all ways to change parameters.

A new way is a class derived from :class:`Update` in a file of its own, and an entry of
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
    """The objects that an update uses as long as it exists.

    Attributes:
        comm: The communicator over whose ranks gradients are averaged.
        optimizer: The optimizer that the multi-node optimizer wraps.
        options: Options that the user chose.
        randomness: State of the random numbers that hooks and update rules draw.
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
    """Gradients of one dtype, and the arguments of a :class:`shared_memory.exchange.Exchange` that averages them.

    Attributes:
        indices: Indexes of their parameters, in the order of the exchange.
        layout: Layout of the blocks in which they are exchanged.
        dtype: Dtype in which they are summed.
        deliver: Function that takes the sum of this rank's slice of a block.
        targets: Arrays that take the slices of the other ranks, or None.
        unwanted: Indexes of parameters whose means are not used.
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
        is_for_all: Whether all parameters are in them. Otherwise they are valid only for losses that
            depend on the same parameters as the loss of the last backward.
    """

    exchanges: list[GradientExchange]
    is_for_all: bool


class Update(abc.ABC):
    """A way to change the parameters of one optimizer by gradients. Creating one is local.

    Args:
        context: The objects that it uses.

    Attributes:
        context: The objects that it uses.
        name: Name of the class in :data:`~chainer_dist.updates.UPDATES`.
        keeps_equal: Whether parameters and state are the same on all ranks after each update.
        updates_late: Number of updates by which the use of gradients is delayed.
        news: Line that rank 0 logs when the class is chosen; an empty string for none.
        exchanges: Whether ranks communicate in the next update; the same on every rank. If they do not,
            the update is applied without :meth:`prepare`, as far as parameters are known.
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
        """Return the reason why parameters cannot be updated in this way, in words, or None. Local."""
        del context, parameters
        return None

    def settings(self) -> Lines:
        """Return names and values of its options that must be the same on every rank. Local."""
        return []

    def prepare(
        self, parameters: ParameterSet, agree_on_order: Callable[[], list[int]] | None
    ) -> None:
        """Prepare the update of parameters; needed again after :meth:`release`. Collective.

        Args:
            parameters: The parameters, of equal structure on every rank.
            agree_on_order: Collective function that returns the numbers of all parameters in the order in
                which their gradients become final; None if nothing is exchanged during backward.
        """
        del parameters, agree_on_order

    def early(self) -> EarlyExchanges | None:
        """Return the gradients that may be averaged during backward, or None without an order. Local."""
        return None

    def fits(self, parameters: ParameterSet) -> bool:
        """Return whether the preparation is still valid for the parameters, their rules and states. Local."""
        del parameters
        return True

    @abc.abstractmethod
    def apply(self, gradients: Gradients) -> None:
        """Update the parameters. Collective if :attr:`exchanges`, otherwise local."""

    def discard(self) -> None:  # noqa: B027 - most updates have nothing to do here
        """Discard gradients that were not used yet, as all parameters are about to change. Local."""

    def consolidate(self) -> None:  # noqa: B027 - most updates have nothing to do here
        """Give every rank all of the state until the next update. Collective."""

    def copied_states(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which every rule has a state that a serializer may keep. Local."""
        return contextlib.nullcontext()

    def release(self) -> None:  # noqa: B027 - most updates have nothing to do here
        """Replace shared arrays by arrays of this rank's own. Local."""
