"""Collectives that gradients flow through, any number of times.

The backward of each is made of the others: what was broadcast is summed on the root, what was
gathered is scattered, what was exchanged is exchanged again. So double backprop works, and the
gradients of gradients are those of all ranks together.

Before each call, in forward and in backward, the ranks compare what they are about to do (one
small allreduce). A rank that comes to another collective than its peers, because its loss does not
depend on the same ones, then raises an error on all ranks instead of mixing up the values.
"""

from __future__ import annotations

import operator
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import chainer
import chainer.functions as F
import numpy as np

from chainer_dist.collectives.agreement import agree, digest, raise_mismatch
from chainer_dist.collectives.failures import raise_together
from chainer_dist.functions._node import (
    CommunicationNode,
    checked_array,
    is_float,
    new_delegate,
    zeros,
)
from chainer_dist.functions.pseudo_connect import connect

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist.communicators import CommunicatorBase

# How many collectives each communicator has done, which is the same on all of its ranks.
_calls: weakref.WeakKeyDictionary[CommunicatorBase, int] = weakref.WeakKeyDictionary()


class _Collective(CommunicationNode):
    """A collective, of what this rank contributes and a delegate to what it gets and a delegate.

    The one delegate makes backward come here on every rank, also where the rank contributes
    nothing, or nothing that needs a gradient. The other is what backward can start from where the
    rank gets nothing; and the backward collective is connected to it, so that a second backward,
    too, makes every rank take part in everything.
    """

    name: ClassVar[str]
    _same_dtype: ClassVar[bool] = True  # whether every rank contributes, and alike

    def __init__(
        self, comm: CommunicatorBase, root: Any = 0, *, op: Any = "", within: str = ""
    ) -> None:
        self.comm, self.root, self.op = comm, root, op
        self._within = within
        self._outputs: list[tuple[tuple[int, ...], Any]] = []

    @property
    def label(self) -> str:
        return self.name

    def __call__(self, *inputs: Any) -> Any:
        """Communicate as an object of ChainerMN's class would. Collective.

        Args:
            inputs: Variables or arrays: what this rank contributes. On a rank that contributes nothing
                none, or a variable that backward goes on to.

        Returns:
            A variable, a tuple if there are several, or a delegate where this rank gets nothing.
        """
        contributes = self._same_dtype or self._is_root
        ys, delegate = (
            self.communicate(inputs) if contributes else self.communicate((), *inputs[:1])
        )
        return ys[0] if len(ys) == 1 else ys or delegate

    def communicate(self, xs: Any, delegate: Any = None) -> tuple[tuple[Any, ...], Any]:
        """Check the inputs together, and communicate. Collective.

        Args:
            xs: What this rank contributes: variables or arrays.
            delegate: Variable that backward goes on to; a new one if None.

        Returns:
            What this rank gets, and a delegate.
        """
        call = _calls.get(self.comm, 0) + 1
        _calls[self.comm] = call
        self._call = f"{self.name} (call {call}{self._within})"
        error, dtype = None, None
        try:
            dtype = self._check(xs)
        except (TypeError, ValueError) as caught:
            error = caught
        lines = [
            ("the collective", self._call),
            ("root", str(self.root)),
            ("op", repr(self.op)),
            ("backprop", "on" if chainer.config.enable_backprop else "off"),
            ("the dtype", str(dtype) if self._same_dtype else "any"),
        ]
        description: Any = lines if error is None else ["failed", self.comm.rank]
        if not all(agree(self.comm, digest(description))):
            raise_together(self.comm, error)
            raise_mismatch(self.comm, lines)
        if error is not None:
            raise error
        *ys, delegate = self.apply((*xs, new_delegate() if delegate is None else delegate))
        return tuple(ys), delegate

    def forward(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        ys = self._communicate(inputs[:-1])
        self._outputs = [(y.shape, y.dtype) for y in ys]
        self.retain_outputs((len(ys),))
        return (*ys, np.empty(0, dtype=np.float32))

    def backward(self, indexes: tuple[int, ...], grads: tuple[Any, ...]) -> tuple[Any, ...]:
        gys = tuple(
            zeros(shape, dtype) if gy is None else gy
            for gy, (shape, dtype) in zip(grads, self._outputs)
        )
        before = (*self.get_retained_outputs(), *(each for each in grads[-1:] if each is not None))
        (before,) = connect(before, (new_delegate(),))
        gxs, after = self._gradients(gys, before, f", backward of {self._call}")
        delegate = self.inputs[-1]
        (delegate_grad,) = connect((after,), (zeros(delegate.shape, delegate.dtype),))
        gxs = (*gxs, delegate_grad)
        return tuple(gxs[i] if is_float(self.inputs[i].dtype) else None for i in indexes)

    def _communicate(self, xs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arrays that this rank gets. Collective."""
        raise NotImplementedError

    def _gradients(
        self, gys: tuple[Any, ...], delegate: Any, within: str
    ) -> tuple[tuple[Any, ...], Any]:
        """Return the gradients of what this rank contributed, and a delegate. Collective."""
        raise NotImplementedError

    def _check(self, xs: Any) -> Any:
        """Return the one dtype of ``xs``, None if there are none, or raise what is wrong."""
        if not 0 <= operator.index(self.root) < self.comm.size:
            raise ValueError(f"root is {self.root!r}, expected 0 to {self.comm.size - 1}")
        dtypes = [checked_array(x, self.name).dtype for x in xs]
        if len(set(dtypes)) > 1:
            raise TypeError(
                f"{self.name} takes arrays of one dtype, got {', '.join(map(str, dtypes))}"
            )
        return dtypes[0] if dtypes else None

    @property
    def _is_root(self) -> bool:
        return bool(self.comm.rank == self.root)


class _Bcast(_Collective):
    """From one rank to all; see :func:`bcast`."""

    name = "bcast"
    _same_dtype = False

    def _communicate(self, xs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.comm.bcast(xs[0] if self._is_root else None, self.root),)

    def _gradients(
        self, gys: tuple[Any, ...], delegate: Any, within: str
    ) -> tuple[tuple[Any, ...], Any]:
        return _SumToRoot(self.comm, self.root, within=within).communicate(gys, delegate)


class _SumToRoot(_Collective):
    name = "sum to root"

    def _communicate(self, xs: tuple[Any, ...]) -> tuple[Any, ...]:
        total = self.comm.allreduce(xs[0])
        return (total,) if self._is_root else ()

    def _gradients(
        self, gys: tuple[Any, ...], delegate: Any, within: str
    ) -> tuple[tuple[Any, ...], Any]:
        return _Bcast(self.comm, self.root, within=within).communicate(gys, delegate)


class _Gather(_Collective):
    """From all ranks to one; see :func:`gather`."""

    name = "gather"

    def _communicate(self, xs: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.comm.gather(xs[0], self.root) or ()

    def _gradients(
        self, gys: tuple[Any, ...], delegate: Any, within: str
    ) -> tuple[tuple[Any, ...], Any]:
        return _Scatter(self.comm, self.root, within=within).communicate(gys, delegate)


class _Scatter(_Collective):
    """A part for each rank, from one; see :func:`scatter`."""

    name = "scatter"
    _same_dtype = False

    def _communicate(self, xs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.comm.scatter(xs if self._is_root else None, self.root),)

    def _gradients(
        self, gys: tuple[Any, ...], delegate: Any, within: str
    ) -> tuple[tuple[Any, ...], Any]:
        return _Gather(self.comm, self.root, within=within).communicate(gys, delegate)

    def _check(self, xs: Any) -> Any:
        return super()._check(_one_a_rank(xs, self.comm.size, self.name) if self._is_root else ())


class _AllGather(_Collective):
    """From each rank to all; see :func:`allgather`."""

    name = "allgather"

    def _communicate(self, xs: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.comm.allgather(xs[0])

    def _gradients(
        self, gys: tuple[Any, ...], delegate: Any, within: str
    ) -> tuple[tuple[Any, ...], Any]:
        parts, after = _AllToAll(self.comm, within=within).communicate(gys, delegate)
        return (_sum(parts),), after


class _AllToAll(_Collective):
    """From each rank to each; see :func:`alltoall`."""

    name = "alltoall"

    def _communicate(self, xs: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.comm.alltoall(xs)

    def _gradients(
        self, gys: tuple[Any, ...], delegate: Any, within: str
    ) -> tuple[tuple[Any, ...], Any]:
        return _AllToAll(self.comm, within=within).communicate(gys, delegate)

    def _check(self, xs: Any) -> Any:
        return super()._check(_one_a_rank(xs, self.comm.size, self.name))


class _AllReduce(_Collective):
    name = "allreduce"

    def _communicate(self, xs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.comm.allreduce(xs[0], self.op),)

    def _gradients(
        self, gys: tuple[Any, ...], delegate: Any, within: str
    ) -> tuple[tuple[Any, ...], Any]:
        return _AllReduce(self.comm, op=self.op, within=within).communicate(gys, delegate)

    def _check(self, xs: Any) -> Any:
        if self.op not in ("sum", "mean"):
            raise ValueError(f"op is {self.op!r}, expected 'sum' or 'mean', which have a gradient")
        return super()._check(xs)


def _one_a_rank(xs: Any, size: int, name: str) -> Any:
    if not isinstance(xs, (tuple, list)):
        raise TypeError(f"{name} takes a list of {size} arrays, got {type(xs).__name__}")
    if len(xs) != size:
        raise ValueError(f"{name} takes {size} arrays, one a rank, got {len(xs)}")
    return xs


def _sum(xs: Sequence[Any]) -> Any:
    """Add variables in the order of rank; float16 in float32, rounded once."""
    dtype = xs[0].dtype
    if dtype != np.float16:
        return F.add(*xs)
    return F.cast(F.add(*(F.cast(x, np.float32) for x in xs)), dtype)


def allgather(comm: CommunicatorBase, x: Any) -> tuple[Any, ...]:
    """Gather a variable from every rank on every rank. Collective, in backward as well.

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
    ys, _ = _AllGather(comm).communicate((x,))
    return ys


def allreduce(comm: CommunicatorBase, x: Any, op: str = "sum") -> Any:
    """Add the variables of all ranks, or take their mean. Collective, in backward as well.

    ChainerMN has no such function.

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
    (y,), _ = _AllReduce(comm, op=op).communicate((x,))
    return y


def alltoall(comm: CommunicatorBase, xs: Sequence[Any]) -> tuple[Any, ...]:
    """Send the i-th variable to rank i, and receive one from each. Collective, in backward as well.

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
    ys, _ = _AllToAll(comm).communicate(xs)
    return ys


def bcast(comm: CommunicatorBase, x: Any, root: int = 0, *, delegate_variable: Any = None) -> Any:
    """Broadcast a variable from rank ``root``. Collective, in backward as well.

    In backward the gradients of all ranks are summed on root. All ranks take part in that, whether
    root's ``x`` needs a gradient or not (with ChainerMN's ``bcast`` root then stays away).

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
    (y,), _ = _Bcast(comm, root).communicate((x,) if comm.rank == root else (), delegate_variable)
    return y


def gather(comm: CommunicatorBase, x: Any, root: int = 0) -> Any:
    """Gather a variable from every rank on rank ``root``. Collective, in backward as well.

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
    ys, delegate = _Gather(comm, root).communicate((x,))
    return ys if comm.rank == root else delegate


def scatter(
    comm: CommunicatorBase, xs: Any, root: int = 0, *, delegate_variable: Any = None
) -> Any:
    """Give each rank one of the variables that rank ``root`` has. Collective, in backward as well.

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
    (y,), _ = _Scatter(comm, root).communicate(mine, delegate_variable)
    return y


def _delegate_in(x: Any) -> Any:
    """Return what a rank other than root passed, if backward can go on to it, otherwise None."""
    return x if isinstance(x, chainer.Variable) and x.requires_grad and is_float(x.dtype) else None


def _rows(xs: Any) -> Any:
    """Return the rows of a variable or array as a tuple, anything else as it is."""
    if not isinstance(xs, (chainer.Variable, np.ndarray)) or xs.ndim == 0 or len(xs) == 0:
        return xs
    return (
        tuple(F.separate(xs, axis=0))
        if isinstance(xs, chainer.Variable)
        else tuple(map(np.asarray, xs))
    )
