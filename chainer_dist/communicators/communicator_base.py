"""The interface of every communicator."""

from __future__ import annotations

import abc
import warnings
from typing import TYPE_CHECKING, Any

from chainer_dist.communicators.arrays import Array, ArrayCommunicator
from chainer_dist.communicators.operation import collective

if TYPE_CHECKING:
    from collections.abc import Sequence

    import chainer
    from typing_extensions import Self


class CommunicatorBase(ArrayCommunicator, abc.ABC):
    """A communicator: arrays, objects, and the gradients and parameters of models.

    A new kind of communicator is a subclass in a file of its own that says in :meth:`mean_arrays`
    how the mean of many arrays is found, and one line in :mod:`chainer_dist.communicators`. What
    concerns a model lives in :mod:`chainer_dist.exchange`, once for all kinds.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "mean_arrays" in vars(cls):  # every kind has its own
            watched = collective("arrays")(cls.mean_arrays)
            cls.mean_arrays = watched  # type: ignore[method-assign]  # the same to its callers

    @abc.abstractmethod
    def mean_arrays(self, arrays: Sequence[Array]) -> None:
        """Replace each array by its mean over the ranks, in place. Collective.

        Args:
            arrays: Writable float arrays of any layout, the same number, shapes and dtypes in the
                same order on every rank (which the caller has made sure of). Two of them may be
                one and the same object. float16 is summed in float32.
        """

    def background(self) -> Self:
        """Return a communicator over the same ranks for a thread beside the main one. Collective."""
        twin = self.split(0, self.rank)
        assert twin is not None  # noqa: S101 - no rank is left out
        return twin

    def bcast_data(self, model: chainer.Link) -> None:
        """Make the parameters of all ranks equal to rank 0's. Collective.

        See :func:`chainer_dist.exchange.bcast_data`.
        """
        from chainer_dist import exchange

        exchange.bcast_data(self, model)

    def multi_node_mean_grad(self, model: chainer.Link, zero_fill: bool = False) -> None:
        """Replace every gradient by its mean over the ranks. Collective.

        See :func:`chainer_dist.exchange.mean_grad`.
        """
        from chainer_dist import exchange

        exchange.mean_grad(self, model, zero_fill=zero_fill)

    def broadcast_data(self, model: chainer.Link) -> None:
        """Call :meth:`bcast_data`. Deprecated since ChainerMN 1.3, as there."""
        warnings.warn(
            "broadcast_data() is deprecated; use bcast_data()", DeprecationWarning, stacklevel=2
        )
        self.bcast_data(model)

    def allreduce_grad(self, model: chainer.Link, zero_fill: bool = False) -> None:
        """Call :meth:`multi_node_mean_grad`. Deprecated since Chainer 7, as there."""
        warnings.warn(
            "allreduce_grad() is deprecated; use multi_node_mean_grad()",
            DeprecationWarning,
            stacklevel=2,
        )
        self.multi_node_mean_grad(model, zero_fill)
