"""How the ranks of a communicator exchange blocks: by slots on a node, by messages between nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from chainer_dist.communicators.shared_memory import between_nodes
from chainer_dist.communicators.shared_memory.layout import Layout, Place, Tuning, partition
from chainer_dist.communicators.shared_memory.pipeline import Pipeline
from chainer_dist.communicators.shared_memory.slots import Slots, sums_in_flight

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from mpi4py import MPI

    from chainer_dist._typing import Array
    from chainer_dist.collectives.arrays import ArrayCommunicator
    from chainer_dist.communicators.shared_memory.exchange import Exchange

_DIRECT_IN_FLIGHT = 4
_FEWEST_BLOCKS = 32
_SMALL_BLOCK_BYTES = 256 << 10


class Transport:
    """Slots of a node, and peers on the other nodes. Creating one is collective.

    Args:
        comm: The communicator.
        patient: Whether to sleep rather than spin while waiting, so that a thread that computes
            has the core and Python's lock.

    Attributes:
        tuning: How large blocks are, and how many are under way at a time; the same on every rank. In
            exchanges that are advanced seldom, as many are as there is room for.
        untuned: The value of ``tuning`` unless it is changed; small models are then cut into smaller blocks.
        most: The largest ``tuning`` that there is room for.
    """

    def __init__(self, comm: ArrayCommunicator, *, patient: bool = False) -> None:
        from mpi4py import MPI

        node = comm.node_comm
        nodes = comm.inter_size
        # Nodes may have different numbers of ranks; so many slices as the smallest has.
        reducers = cast("int", comm.mpi_comm.allreduce(node.size, MPI.MIN))
        self.place = Place(node.rank, node.size, comm.inter_rank, nodes, reducers)
        self._comm, self._patient = comm, patient
        # Each rank on a node of its own: what is of one array is exchanged from where it is.
        self._is_alone = comm.size == nodes
        self._peers: between_nodes.Peers | None = None
        if nodes > 1:
            color = node.rank if node.rank < reducers else MPI.UNDEFINED
            peers = cast("MPI.Intracomm", comm.mpi_comm.Split(color, comm.inter_rank))
            if peers != MPI.COMM_NULL:
                self._peers = between_nodes.Peers(peers)
        self._slots = Slots(comm)
        in_flight = sums_in_flight(node.size) if nodes > 1 else 0
        self.most = Tuning(self._slots.block_bytes, in_flight)
        # More messages only wait for one another, where the messages of a block are all under way at once.
        few = in_flight if nodes > between_nodes.MOST_NODES else min(in_flight, _DIRECT_IN_FLIGHT)
        self.tuning = self.untuned = Tuning(self._slots.block_bytes, few)

    @property
    def scratch(self) -> Array:
        """Where the sum of a slice is while it is delivered, as bytes."""
        return self._slots.scratch

    def layout(
        self,
        sizes: Sequence[int],
        dtype: np.dtype[Any],
        *,
        seldom: bool = False,
        across: bool = False,
    ) -> Layout:
        """Cut arrays of so many elements, one behind the other, into blocks. Local.

        Args:
            sizes: Number of elements of each array.
            dtype: The dtype in which they are reduced.
            seldom: Whether exchanges are advanced seldom: then as much as possible is to be under way.
            across: Whether each rank of the communicator has a slice of its own, rather than each
                rank of a node.
        """
        nbytes = self.tuning.block_bytes
        if self.tuning == self.untuned and self.untuned.in_flight:
            # Of a small model, too, several blocks are on their way at a time.
            fewest = _SMALL_BLOCK_BYTES * (2 if seldom else 1)
            nbytes = min(nbytes, max(fewest, sum(sizes) * dtype.itemsize // _FEWEST_BLOCKS))
        slices = self.place.reducers * (self.place.nodes if across else 1)
        blocks = partition(tuple(sizes), nbytes // dtype.itemsize, slices, whole=self._is_alone)
        return Layout(blocks, across and self.place.nodes > 1, self.place)

    def run(self, exchange: Exchange) -> None:
        """Reduce arrays, work on the local slice of each block, and share the result. Collective.

        Args:
            exchange: The exchange: its layout, sources and targets.

        Raises:
            BaseException: On every rank, what went wrong on one, after the last block.
            RuntimeError: If an earlier exchange has not come to its end.
        """
        self.begin(exchange).finish()

    def begin(self, exchange: Exchange) -> Pipeline:
        """Begin what :meth:`run` does. Local.

        All ranks of the communicator must begin it, and finish it before the next one.

        Args:
            exchange: The exchange: its layout, sources and targets.

        Returns:
            Its blocks on their way, to be advanced at times, and finished.

        Raises:
            RuntimeError: If an earlier exchange has not come to its end.
        """
        tuning = self.tuning if exchange.is_ready is None else self.most
        return Pipeline(
            self._comm,
            self._slots,
            self._peers,
            exchange,
            in_flight=tuning.in_flight,
            patient=self._patient,
        )

    def free(self) -> None:
        """Give the memory back. Collective."""
        self._slots.free()
        if self._peers is not None:
            self._peers.mpi_comm.Free()
