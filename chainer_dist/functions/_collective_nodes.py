"""Collectives as Chainer's functions, each with its gradient.

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


class Collective(CommunicationNode):
    """A collective, of what this rank contributes and a delegate to what it gets and a delegate.

    The one delegate makes backward come here on every rank, also where the rank contributes
    nothing, or nothing that needs a gradient. The other is what backward can start from where the
    rank gets nothing; and the backward collective is connected to it, so that a second backward,
    too, calls every collective on every rank.
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
        """Name of the collective, for Chainer's graphs and hooks."""
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
            error = caught  # compared with the rest by one small allreduce, which together() would double
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
        """Communicate the arrays; the last input and output are delegates. Collective."""
        ys = self._communicate(inputs[:-1])
        self._outputs = [(y.shape, y.dtype) for y in ys]
        self.retain_outputs((len(ys),))
        return (*ys, np.empty(0, dtype=np.float32))

    def backward(self, indexes: tuple[int, ...], grads: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the gradients of the inputs, by the opposite collective. Collective."""
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


class Bcast(Collective):
    """From one rank to all; see :func:`bcast`."""

    name = "bcast"
    _same_dtype = False

    def _communicate(self, xs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.comm.bcast(xs[0] if self._is_root else None, self.root),)

    def _gradients(
        self, gys: tuple[Any, ...], delegate: Any, within: str
    ) -> tuple[tuple[Any, ...], Any]:
        return SumToRoot(self.comm, self.root, within=within).communicate(gys, delegate)


class SumToRoot(Collective):
    """Sums of all ranks on one; the gradient of :class:`Bcast`."""

    name = "sum to root"

    def _communicate(self, xs: tuple[Any, ...]) -> tuple[Any, ...]:
        total = self.comm.allreduce(xs[0])
        return (total,) if self._is_root else ()

    def _gradients(
        self, gys: tuple[Any, ...], delegate: Any, within: str
    ) -> tuple[tuple[Any, ...], Any]:
        return Bcast(self.comm, self.root, within=within).communicate(gys, delegate)


class Gather(Collective):
    """From all ranks to one; see :func:`gather`."""

    name = "gather"

    def _communicate(self, xs: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.comm.gather(xs[0], self.root) or ()

    def _gradients(
        self, gys: tuple[Any, ...], delegate: Any, within: str
    ) -> tuple[tuple[Any, ...], Any]:
        return Scatter(self.comm, self.root, within=within).communicate(gys, delegate)


class Scatter(Collective):
    """A part for each rank, from one; see :func:`scatter`."""

    name = "scatter"
    _same_dtype = False

    def _communicate(self, xs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.comm.scatter(xs if self._is_root else None, self.root),)

    def _gradients(
        self, gys: tuple[Any, ...], delegate: Any, within: str
    ) -> tuple[tuple[Any, ...], Any]:
        return Gather(self.comm, self.root, within=within).communicate(gys, delegate)

    def _check(self, xs: Any) -> Any:
        return super()._check(_one_a_rank(xs, self.comm.size, self.name) if self._is_root else ())


class AllGather(Collective):
    """From each rank to all; see :func:`allgather`."""

    name = "allgather"

    def _communicate(self, xs: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.comm.allgather(xs[0])

    def _gradients(
        self, gys: tuple[Any, ...], delegate: Any, within: str
    ) -> tuple[tuple[Any, ...], Any]:
        parts, after = AllToAll(self.comm, within=within).communicate(gys, delegate)
        return (_sum(parts),), after


class AllToAll(Collective):
    """From each rank to each; see :func:`alltoall`."""

    name = "alltoall"

    def _communicate(self, xs: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.comm.alltoall(xs)

    def _gradients(
        self, gys: tuple[Any, ...], delegate: Any, within: str
    ) -> tuple[tuple[Any, ...], Any]:
        return AllToAll(self.comm, within=within).communicate(gys, delegate)

    def _check(self, xs: Any) -> Any:
        return super()._check(_one_a_rank(xs, self.comm.size, self.name))


class AllReduce(Collective):
    """Sums or means of all ranks on all; see :func:`allreduce`."""

    name = "allreduce"

    def _communicate(self, xs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.comm.allreduce(xs[0], self.op),)

    def _gradients(
        self, gys: tuple[Any, ...], delegate: Any, within: str
    ) -> tuple[tuple[Any, ...], Any]:
        return AllReduce(self.comm, op=self.op, within=within).communicate(gys, delegate)

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
