"""The base of all ways of compressing: between which ranks they act, their error feedback, their state."""

from __future__ import annotations

import abc
import contextlib
import copy
import json
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import numpy as np

from chainer_dist.collectives import reduction

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import chainer
    from mpi4py import MPI

    from chainer_dist._typing import Array
    from chainer_dist.communicators import CommunicatorBase


# Squares of what is larger overflow in float32. Beside such a number ordinary ones are lost in rounding.
_TOO_LARGE = 2.0**64


class Nodes(NamedTuple):
    """One rank of each node, which exchanges for its node."""

    mpi_comm: MPI.Intracomm
    weights: list[float]  # of the nodes' means in the mean over all ranks

    @property
    def weight(self) -> float:
        """The weight of this node."""
        return self.weights[self.mpi_comm.rank]


class Compression(abc.ABC):
    """Averages gradients with fewer bytes.

    A new way is a subclass in a file of its own; one that is approximate is a
    :class:`NodeCompression`. One object serves one optimizer.

    Attributes:
        sent: Bytes that this rank gave MPI to send to other nodes in the last exchange.
        needs_all: Whether a parameter that has no gradient on any rank takes part with zeros, as
            arrays are kept that have a place for each number of all gradients.
    """

    needs_all: ClassVar[bool] = False

    def __init__(self) -> None:
        self.sent = 0
        self._comm: CommunicatorBase | None = None
        self._node: CommunicatorBase | None = None
        self._nodes: Nodes | None = None  # None on ranks that do not exchange for their node

    @abc.abstractmethod
    def mean(self, comm: CommunicatorBase, grads: dict[str, Array]) -> None:
        """Replace gradients by their means over the ranks, in place: the same bits everywhere. Collective.

        Args:
            comm: The communicator over whose ranks the means are taken; the same at every call.
            grads: Writable float arrays of any layout by parameter name, no two of which share memory.
                Order, shapes and dtypes are the same on every rank.
        """

    def belong(self) -> None:  # noqa: B027 - nothing is kept that two optimizers could mix up
        """Note that one more optimizer uses this object. Local.

        Raises:
            ValueError: If that cannot be, as gradients of several are not kept apart.
        """

    def forget(self) -> None:  # noqa: B027 - nothing is kept
        """Drop what is kept from one exchange to the next, as the model is another one. Local."""

    def use_loss_scale(self, scale: float) -> None:
        """Set the factor by which gradients of the next exchange are multiplied. Local.

        Args:
            scale: The loss scale, the same on every rank; 1 without loss scaling.
        """
        del scale  # nothing is kept that was multiplied by another one

    def serialize(self, serializer: chainer.AbstractSerializer, comm: CommunicatorBase) -> None:
        """Save or load what is kept from one exchange to the next. Local.

        Args:
            serializer: A serializer of Chainer's.
            comm: The communicator of the exchange. A rank loads only its own residual.
        """
        del serializer, comm  # nothing is kept

    def _connect(self, comm: CommunicatorBase) -> None:
        """Find the rank that exchanges for each node. Collective at first."""
        self._comm = comm
        self._node, self._nodes = comm.derived(
            "compression", lambda: _split_by_node(comm), _free_both
        )

    def __getstate__(self) -> dict[str, Any]:
        # The copy of an optimizer finds its communicators anew.
        return {**self.__dict__, "_comm": None, "_node": None, "_nodes": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Compression:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return twin


def _split_by_node(comm: CommunicatorBase) -> tuple[CommunicatorBase | None, Nodes | None]:
    """Return the ranks of this node, and one rank of each node if this rank is one. Collective."""
    from mpi4py import MPI

    node = comm.split(comm.inter_rank, comm.rank)
    is_first = comm.intra_rank == 0
    mpi_comm = cast(
        "MPI.Intracomm", comm.mpi_comm.Split(0 if is_first else MPI.UNDEFINED, comm.rank)
    )
    if not is_first:
        return node, None
    sizes = mpi_comm.allgather(comm.intra_size)
    return node, Nodes(mpi_comm, [size / comm.size for size in sizes])


def _free_both(made: tuple[CommunicatorBase | None, Nodes | None]) -> None:
    node, nodes = made
    if nodes is not None:
        nodes.mpi_comm.Free()
    if node is not None:
        node.finalize()


class NodeCompression(Compression):
    """Averages gradients with fewer bytes between nodes, approximately.

    Gradients are first averaged exactly on each node. Then one rank of each node exchanges what
    :meth:`mean_over_nodes` makes of them, and the others of the node get the result: the same bits
    on every rank. On a single node nothing is compressed.

    What is kept for the next exchange follows the loss scale. Where a mean comes out as NaN or
    infinite, everything is kept as it was before: the update is not made with dynamic loss scaling,
    and the model is lost without it. Of gradients beyond 2**64, finite as they may be, nothing is kept
    for the next ones, and what was kept before stays.
    """

    def __init__(self) -> None:
        super().__init__()
        self._residual = Residual()
        self._loss_scale = 1.0  # of what is kept
        self._belongs = False  # whether there is an optimizer that uses it

    @property
    def _kept(self) -> list[Kept]:
        """All that is kept from one exchange to the next."""
        return [self._residual]

    @abc.abstractmethod
    def mean_over_nodes(self, nodes: Nodes, grads: dict[str, Array]) -> None:
        """Replace arrays by their approximate weighted means over the nodes, in place. Collective.

        Args:
            nodes: The ranks that exchange, one for each node, and the weights of their nodes.
            grads: Writable float32 or float64 arrays of any layout by parameter name, in the same order
                on every rank.
        """

    def mean(self, comm: CommunicatorBase, grads: dict[str, Array]) -> None:
        """See :meth:`Compression.mean`."""
        self.sent = 0
        if comm.inter_size == 1:
            comm.mean_arrays(list(grads.values()))
            return
        if self._comm is not comm:
            self._connect(comm)
        wide = {
            name: np.ascontiguousarray(grad, reduction.wire_dtype(grad.dtype)).reshape(grad.shape)
            for name, grad in grads.items()
        }
        node = cast("CommunicatorBase", self._node)
        node.mean_arrays(list(wide.values()))
        with self._unless_it_overflows(grads):
            if self._nodes is not None:
                self.mean_over_nodes(self._nodes, wide)
            for name, grad in grads.items():
                for piece in reduction.pieces(wide[name]):
                    node.mpi_comm.Bcast(piece, root=0)
                if wide[name] is not grad:
                    np.copyto(grad, wide[name], casting="same_kind")

    @contextlib.contextmanager
    def _unless_it_overflows(self, grads: Mapping[str, Array]) -> Iterator[None]:
        """Keep what was kept before if gradients are not finite after this. Local."""
        before = [dict(each.arrays) for each in self._kept]
        yield
        if any(each.arrays for each in self._kept) and not are_finite(grads.values()):
            for each, arrays in zip(self._kept, before):
                each.arrays = arrays

    def belong(self) -> None:
        """See :meth:`Compression.belong`."""
        if self._belongs:
            raise ValueError(
                f"another optimizer has this {type(self).__name__}, which keeps what it leaves out of that one's "
                "gradients: make one for each optimizer"
            )
        self._belongs = True

    def forget(self) -> None:
        """See :meth:`Compression.forget`."""
        for each in self._kept:
            each.arrays = {}

    def use_loss_scale(self, scale: float) -> None:
        """See :meth:`Compression.use_loss_scale`."""
        if scale != self._loss_scale:
            for each in self._kept:
                each.multiply(scale / self._loss_scale)
            self._loss_scale = scale

    def serialize(self, serializer: chainer.AbstractSerializer, comm: CommunicatorBase) -> None:
        """See :meth:`Compression.serialize`."""
        self._residual.serialize(serializer["residual"], comm.rank)
        with contextlib.suppress(KeyError):  # saved without compression
            self._loss_scale = float(serializer("loss_scale", self._loss_scale))


class Kept:
    """Arrays by parameter name that a way of compressing keeps from one exchange to the next.

    Attributes:
        arrays: The arrays that are kept, by parameter name.
    """

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}

    def get(self, name: str, shape: tuple[int, ...]) -> Array | None:
        """Return what was kept, if it has this shape. Local."""
        array = self.arrays.get(name)
        return None if array is None or array.shape != shape else array

    def keep(self, name: str, array: Array) -> None:
        """Keep an array, which is not changed from now on. Local."""
        self.arrays[name] = array

    def multiply(self, factor: float) -> None:
        """Multiply all arrays. Local."""
        self.arrays = {
            name: array * array.dtype.type(factor) for name, array in self.arrays.items()
        }

    def serialize(self, serializer: chainer.AbstractSerializer, rank: int | None = None) -> None:
        """Save or load the arrays; arrays of one rank are loaded on that rank only. Local.

        Args:
            serializer: A serializer of Chainer's.
            rank: This rank, if the arrays are its own; None if they are the same on all ranks.
        """
        import chainer

        if not isinstance(serializer, chainer.Deserializer):
            names = json.dumps([*self.arrays]).encode()
            serializer("names", np.frombuffer(names, dtype=np.uint8))
            serializer("rank", -1 if rank is None else rank)
            for number, array in enumerate(self.arrays.values()):
                serializer(str(number), array)
            return
        self.arrays = {}
        with contextlib.suppress(KeyError):  # saved without compression
            names = json.loads(serializer("names", None).tobytes())
            if rank is None or int(serializer("rank", None)) in (-1, rank):
                loaded = [serializer(str(number), None) for number in range(len(names))]
                self.arrays = dict(zip(names, loaded))


class Residual(Kept):
    """What compression left out of a rank's gradients, to be added to the next (error feedback).

    Sums of what is exchanged then follow the sums of the gradients (Seide et al., Interspeech 2014;
    Karimireddy et al., arXiv 1901.09847). Each rank has its own.
    """

    def add_to(self, grads: Mapping[str, Array]) -> None:
        """Add it to gradients in place. Local."""
        for name, grad in grads.items():
            rest = self.get(name, grad.shape)
            if rest is not None:
                np.add(grad, rest, out=grad)


def are_finite(arrays: Iterable[Array]) -> bool:
    """Return whether all values of all arrays are finite. Local."""
    return all(np.isfinite(array).all() for array in arrays)


def are_too_large(array: Array) -> bool:
    """Return whether a gradient has NaN or a value beyond 2**64, and so is not kept for the next update. Local."""
    return bool(array.size) and not (array.min() > -_TOO_LARGE and array.max() < _TOO_LARGE)


def flatten(grads: Mapping[str, Array]) -> Array:
    """Return all gradients, one after the other, in one new float32 array. Local."""
    flat = np.concatenate([np.ravel(grad) for grad in grads.values()])
    with np.errstate(over="ignore"):  # the mean is infinite then
        return flat.astype(np.float32)


def unpack(values: Array, arrays: Iterable[Array]) -> None:
    """Copy values to arrays, one after the other. Local."""
    start = 0
    for array in arrays:
        array[...] = values[start : start + array.size].reshape(array.shape)
        start += array.size


def allreduce_mean(nodes: Nodes, arrays: list[Array]) -> int:
    """Replace arrays by their exact weighted means, in one message. Collective.

    Returns:
        Number of bytes that this rank sent.
    """
    groups: dict[Any, list[Array]] = {}
    for array in arrays:
        groups.setdefault(array.dtype, []).append(array)
    sent = 0
    for group in groups.values():
        packed = np.concatenate([array.reshape(-1) for array in group])
        packed *= nodes.weight
        reduction.sum_in_place(nodes.mpi_comm, packed)
        sent += packed.nbytes * 2 * (nodes.mpi_comm.size - 1) // nodes.mpi_comm.size
        unpack(packed, group)
    return sent
