"""Collectives that gradients flow through, any number of times.

The backward of each is made of the others: what was broadcast is summed on the root, what was
gathered is scattered, what was exchanged is exchanged again. So double backprop works, and the
gradients of gradients count all ranks. Ranks that come to different collectives,
in forward or in backward, all raise an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import chainer.functions as F
import numpy as np

from chainer_dist.functions._collective_nodes import (
    AllGather,
    AllReduce,
    AllToAll,
    Bcast,
    Gather,
    Scatter,
)
from chainer_dist.functions._node import is_float

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist.communicators import CommunicatorBase


def allgather(comm: CommunicatorBase, x: Any) -> tuple[Any, ...]:
    """Gather a variable from every rank on every rank. Collective, in backward as well.

    For example, for a loss over the outputs of all ranks::

        ys = chainer_dist.functions.allgather(comm, y)
        loss = F.sum(F.concat(ys, axis=0) ** 2)

    Args:
        comm: Communicator.
        x: This rank's variable or array. Shapes may differ between ranks, the dtype may not.

    Returns:
        A tuple of ``size`` variables in the order of rank, also on a single rank (ChainerMN's
        ``allgather`` then returns the variable alone). The gradient of ``x`` is the sum of what
        all ranks have for their copy of it; ranks may use any of the variables, at least one.

    Raises:
        RankMismatchError: On every rank, if the ranks' dtypes or operations differ.
        TypeError: On every rank, if any rank passes something else.
    """
    ys, _ = AllGather(comm).communicate((x,))
    return ys


def allreduce(comm: CommunicatorBase, x: Any, op: str = "sum") -> Any:
    """Add the variables of all ranks, or take their mean. Collective, in backward as well.

    ChainerMN has no such function.

    For example, for a mean over the batches of all ranks within the model::

        mean = chainer_dist.functions.allreduce(comm, F.mean(x, axis=0), "mean")

    Args:
        comm: Communicator.
        x: This rank's variable or array, of the same shape and dtype on every rank.
        op: ``sum`` or ``mean``, the same on every rank.

    Returns:
        A variable of the shape and dtype of ``x``, the same bits on every rank; the mean of
        integers is float64. float16 is computed in float32 and rounded once. The gradient of
        ``x`` is the sum, or the mean, of all ranks' gradients of the result.

    Raises:
        RankMismatchError: On every rank, if the ranks' shapes, dtypes or operations differ.
        TypeError, ValueError: On every rank, if any rank passes something else.
    """
    (y,), _ = AllReduce(comm, op=op).communicate((x,))
    return y


def alltoall(comm: CommunicatorBase, xs: Sequence[Any]) -> tuple[Any, ...]:
    """Send the i-th variable to rank i, and receive one from each. Collective, in backward as well.

    For example, to bring the i-th part of all ranks' outputs to rank i::

        parts = chainer_dist.functions.alltoall(comm, F.split_axis(y, comm.size, axis=0))
        mine = F.concat(parts, axis=0)

    Args:
        comm: Communicator.
        xs: ``size`` variables or arrays of any shapes, and of one dtype on all ranks.

    Returns:
        A tuple of ``size`` variables: the one that rank 0 had for this rank, and so on (ChainerMN's
        ``alltoall`` on a single rank returns the variable alone). Ranks may use any of them, at
        least one.

    Raises:
        RankMismatchError: On every rank, if the ranks' dtypes or operations differ.
        TypeError, ValueError: On every rank, if any rank passes something else.
    """
    ys, _ = AllToAll(comm).communicate(xs)
    return ys


def bcast(comm: CommunicatorBase, x: Any, root: int = 0, *, delegate_variable: Any = None) -> Any:
    """Broadcast a variable from rank ``root``. Collective, in backward as well.

    In backward the gradients of all ranks are summed on root. All ranks call that, whether
    root's ``x`` needs a gradient or not (with ChainerMN's ``bcast`` root then stays away).

    For example, for an output of one rank that all ranks go on from::

        h = chainer_dist.functions.bcast(comm, first(x) if comm.rank == 0 else None)
        F.sum(second(h)).backward()

    Args:
        comm: Communicator.
        x: The variable or array on root, of any shape and dtype. Elsewhere not sent, and taken for
            the ``delegate_variable`` if it is a variable.
        root: Sending rank, the same on every rank.
        delegate_variable: Variable that backward goes on to from here; it gets zeros as its
            gradient. For double backprop a rank other than root needs one: what
            :func:`chainer.grad` returns for it belongs to the loss of the second backward.

    Returns:
        A variable equal to root's ``x`` on every rank, which every rank has to use.

    Raises:
        RankMismatchError: On every rank, if the ranks' roots or operations differ.
        TypeError, ValueError: On every rank, if ``x`` is something else on root, or ``root`` is no
            rank.
    """
    if comm.rank != root and delegate_variable is None:
        delegate_variable = _delegate_in(x)
    (y,), _ = Bcast(comm, root).communicate((x,) if comm.rank == root else (), delegate_variable)
    return y


def gather(comm: CommunicatorBase, x: Any, root: int = 0) -> Any:
    """Gather a variable from every rank on rank ``root``. Collective, in backward as well.

    For example, for a loss on rank 0 over the outputs of all ranks::

        ys = chainer_dist.functions.gather(comm, y)
        loss = F.sum(F.concat(ys, axis=0) ** 2) if comm.rank == 0 else ys
        loss.backward()

    Args:
        comm: Communicator.
        x: This rank's variable or array. Shapes may differ between ranks, the dtype may not.
        root: Receiving rank, the same on every rank.

    Returns:
        On root a tuple of ``size`` variables in the order of rank, also on a single rank, of which
        root may use any, at least one. Elsewhere a delegate: an empty variable, from which the
        rank has to run backward (see :func:`pseudo_connect`). The same as ChainerMN's ``gather``.

    Raises:
        RankMismatchError: On every rank, if the ranks' roots, dtypes or operations differ.
        TypeError, ValueError: On every rank, if any rank passes something else, or ``root`` is no
            rank.
    """
    ys, delegate = Gather(comm, root).communicate((x,))
    return ys if comm.rank == root else delegate


def scatter(
    comm: CommunicatorBase, xs: Any, root: int = 0, *, delegate_variable: Any = None
) -> Any:
    """Give each rank one of the variables that rank ``root`` has. Collective, in backward as well.

    For example, to share out an output of rank 0::

        parts = F.split_axis(first(x), comm.size, axis=0) if comm.rank == 0 else None
        part = chainer_dist.functions.scatter(comm, parts)
        F.sum(second(part)).backward()

    Args:
        comm: Communicator.
        xs: On root a list or tuple of ``size`` variables or arrays of any shapes and one dtype, or
            one of shape ``(size, ...)`` whose rows are given away. Elsewhere as in :func:`bcast`.
        root: Sending rank, the same on every rank.
        delegate_variable: As in :func:`bcast`.

    Returns:
        A variable equal to root's ``xs[rank]``, which every rank has to use.

    Raises:
        RankMismatchError: On every rank, if the ranks' roots or operations differ.
        TypeError, ValueError: On every rank, if ``xs`` is something else on root, or ``root`` is no
            rank.
    """
    if comm.rank != root and delegate_variable is None:
        delegate_variable = _delegate_in(xs)
    mine = _rows(xs) if comm.rank == root else ()
    (y,), _ = Scatter(comm, root).communicate(mine, delegate_variable)
    return y


def _delegate_in(x: Any) -> Any:
    """Return what a rank other than root passed, if backward can go on to it, otherwise None."""
    is_there = isinstance(x, chainer.Variable) and x.array is not None and x.requires_grad
    return x if is_there and is_float(x.dtype) else None


def _rows(xs: Any) -> Any:
    """Return the rows of a variable or array as a tuple, anything else as it is."""
    array = xs.array if isinstance(xs, chainer.Variable) else xs
    if not isinstance(array, np.ndarray) or array.ndim == 0 or len(array) == 0:
        return xs
    return (
        tuple(F.separate(xs, axis=0))
        if isinstance(xs, chainer.Variable)
        else tuple(map(np.asarray, xs))
    )
