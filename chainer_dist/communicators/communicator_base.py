"""The interface of every communicator."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, cast

import chainer
import numpy as np

from chainer_dist import exchange
from chainer_dist._counts import checked_count
from chainer_dist.collectives import operation
from chainer_dist.collectives.agreement import check_same
from chainer_dist.collectives.arrays import ArrayCommunicator
from chainer_dist.collectives.failures import together

if TYPE_CHECKING:
    from typing_extensions import Self

    from chainer_dist._typing import Array

_END = 1 << 31  # of the integers that MPI takes


class CommunicatorBase(ArrayCommunicator):
    """A communicator: arrays, objects, and the gradients and parameters of models.

    A new kind of communicator is a subclass in a file of its own that says in
    ``mean_arrays`` how the mean of many arrays is computed, and one line in :mod:`chainer_dist.communicators`. The
    exchange of models is in :mod:`chainer_dist.exchange`, once for all kinds.
    """

    @property
    def has_own_mean(self) -> bool:
        """Whether gradients are averaged by a ``multi_node_mean_grad`` that a program has written."""
        own = "multi_node_mean_grad" in vars(self)
        return own or type(self).multi_node_mean_grad is not CommunicatorBase.multi_node_mean_grad

    @property
    def batched_copy(self) -> bool:
        """The configuration value of this name, as with ChainerMN; packing is always batched."""
        return bool(self.get_config("batched_copy"))

    @batched_copy.setter
    def batched_copy(self, value: bool) -> None:
        self.set_config("batched_copy", value)

    @operation.collective()
    def split(self, color: int, key: int) -> Self | None:
        """Split the ranks into one communicator for each color. Collective.

        Args:
            color: Integer from 0 up; ranks of equal color get one communicator. ``MPI.UNDEFINED`` leaves this rank out.
            key: Integer by which the ranks are ordered in the new communicator; equal ones keep their order.

        Returns:
            A new communicator of the same kind and configuration, or None where left out.

        Raises:
            TypeError: On every rank, if a number of any rank is no integer.
            ValueError: On every rank, if a number of any rank is out of range.
        """
        from mpi4py import MPI

        with together(self):
            if color != MPI.UNDEFINED:
                color = checked_count("color", color, 0, _END)
            key = checked_count("key", key, -_END, _END)
        part = self.mpi_comm.Split(color, key)
        if part == MPI.COMM_NULL:
            return None
        if type(self).__init__ is CommunicatorBase.__init__:
            child = type(self).__new__(type(self))
            child._adopt(cast("MPI.Intracomm", part))  # noqa: SLF001 - of the same class
        else:  # a user's class may set more attributes; ChainerMN calls its constructor in this way
            child = type(self)(mpi_comm=cast("MPI.Intracomm", part))
            part.Free()
        child._configs.update(self._configs)  # noqa: SLF001 - of the same class
        return child

    def background(self) -> Self:
        """Return a communicator over the same ranks for a thread beside the main one. Collective."""
        twin = self.split(0, self.rank)
        assert twin is not None  # noqa: S101 - no rank is left out
        return twin

    def bcast_data(self, model: chainer.Link) -> None:
        """Make the parameters of all ranks equal to rank 0's. Collective.

        See :func:`chainer_dist.exchange.bcast_data`.
        """
        exchange.bcast_data(self, model)

    def multi_node_mean_grad(self, model: chainer.Link, zero_fill: bool = False) -> None:
        """Replace every gradient by its mean over the ranks. Collective.

        See :func:`chainer_dist.exchange.mean_grad`.
        """
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

    # What follows are private methods of ChainerMN's that programs call from links, extensions and
    # communicators of their own.

    def _multi_node_mean(self, sendbuf: Array | None, recvbuf: Array) -> None:
        """Write the mean of the ranks' ``sendbuf`` to ``recvbuf``; None stands for ``recvbuf``. Collective."""
        if chainer.is_debug():
            self._check_ready_to_allreduce(sendbuf, recvbuf)
        if sendbuf is not None:
            np.copyto(recvbuf, sendbuf)
        self.mean_arrays([recvbuf])
        if chainer.is_debug():
            self._ensure_all_finite(recvbuf)

    def _check_ready_to_allreduce(self, array_a: Array | None, array_b: Array) -> None:
        """Raise RankMismatchError on every rank if shapes or dtypes differ. Collective."""
        described = [
            (name, "None" if array is None else f"{array.shape} {array.dtype}")
            for name, array in (("what is sent", array_a), ("what is received", array_b))
        ]
        check_same(self, described)

    def _ensure_all_finite(self, array: Array) -> None:
        """Raise ValueError if an array has NaN or infinity. Local."""
        if not np.isfinite(array).all():
            raise ValueError("Parameters diverged after allreduce.")
