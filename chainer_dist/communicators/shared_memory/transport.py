"""The transport of blocks between the ranks of a communicator: slots on a node, messages between nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from chainer_dist.communicators.shared_memory import between_nodes
from chainer_dist.communicators.shared_memory.comparison import Comparison
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
    """The slots of a node, and the peers on the other nodes. Creating one is collective.

    Args:
        comm: The communicator.
        patient: Whether to sleep rather than spin while waiting, so that a computing thread can have
            the core and Python's lock.

    Attributes:
        place: Place of this rank.
        tuning: Size of blocks, and number of sums under way at a time; the same on every rank. Exchanges
            during backward, which are advanced seldom, have as many sums under way as there is room for.
        untuned: Initial value of ``tuning``, with which small models are cut into smaller blocks.
        comparison: Way to compare numbers without messages; None across nodes, and on a single rank.
        most: Largest ``tuning`` for which there is room.
    """

    def __init__(self, comm: ArrayCommunicator, *, patient: bool = False) -> None:
        from mpi4py import MPI

        node = comm.node_comm
        nodes = comm.inter_size
        # Nodes may have different numbers of ranks. Blocks have as many slices as the smallest node has ranks.
        reducers = cast("int", comm.mpi_comm.allreduce(node.size, MPI.MIN))
        self.place = Place(node.rank, node.size, comm.inter_rank, nodes, reducers)
        self._comm, self._patient = comm, patient
        # If each rank has a node of its own, blocks of a single array can be sent without a copy.
        self._is_alone = comm.size == nodes
        self._peers: between_nodes.Peers | None = None
        if nodes > 1:
            color = node.rank if node.rank < reducers else MPI.UNDEFINED
            peers = cast("MPI.Intracomm", comm.mpi_comm.Split(color, comm.inter_rank))
            if peers != MPI.COMM_NULL:
                self._peers = between_nodes.Peers(peers)
        self._slots = Slots(comm)
        self.comparison = Comparison(comm, patient=patient) if nodes == 1 < comm.size else None
        in_flight = sums_in_flight(node.size) if nodes > 1 else 0
        self.most = Tuning(self._slots.block_bytes, in_flight)
        # In a direct sum all messages of a block are under way at once, so more blocks would only wait.
        few = in_flight if nodes > between_nodes.MOST_NODES else min(in_flight, _DIRECT_IN_FLIGHT)
        self.tuning = self.untuned = Tuning(self._slots.block_bytes, few)

    @property
    def scratch(self) -> Array:
        """Memory that has the sum of a slice while it is delivered, as bytes."""
        return self._slots.scratch

    def layout(
        self,
        sizes: Sequence[int],
        dtype: np.dtype[Any],
        *,
        seldom: bool = False,
        across: bool = False,
    ) -> Layout:
        """Return the layout of concatenated arrays, cut into blocks. Local.

        Args:
            sizes: Number of elements of each array.
            dtype: Dtype in which they are reduced.
            seldom: Whether exchanges are advanced seldom, so that larger blocks are better.
            across: Whether each rank of the communicator has a slice of its own, rather than each
                rank of a node.
        """
        nbytes = self.tuning.block_bytes
        if self.tuning == self.untuned and self.untuned.in_flight:
            # Blocks of a small model are smaller, so that several can be under way at a time.
            fewest = _SMALL_BLOCK_BYTES * (2 if seldom else 1)
            nbytes = min(nbytes, max(fewest, sum(sizes) * dtype.itemsize // _FEWEST_BLOCKS))
        slices = self.place.reducers * (self.place.nodes if across else 1)
        blocks = partition(tuple(sizes), nbytes // dtype.itemsize, slices, whole=self._is_alone)
        return Layout(blocks, across and self.place.nodes > 1, self.place)

    def run(self, exchange: Exchange) -> None:
        """Reduce arrays, work on the local slice of each block, and share the result. Collective.

        Args:
            exchange: Description of the exchange.

        Raises:
            BaseException: On every rank, an error of one rank, after the last block.
            RuntimeError: If an earlier exchange has not ended.
        """
        self.begin(exchange).finish()

    def begin(self, exchange: Exchange) -> Pipeline:
        """Begin an exchange, for which :meth:`run` would wait. Local.

        All ranks of the communicator must begin it, and finish it before the next one.

        Args:
            exchange: Description of the exchange.

        Returns:
            The pipeline of the exchange, to be advanced now and then, and finished.

        Raises:
            RuntimeError: If an earlier exchange has not ended.
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
        """Free memory and communicator. Collective."""
        from mpi4py import MPI

        self._slots.free()
        if self.comparison is not None:
            self.comparison.free()
        if self._peers is not None and not MPI.Is_finalized():
            self._peers.mpi_comm.Free()
