"""ChainerMN's helpers around mpi4py's communicators, as far as they are of use without GPUs."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = [
    "INT_MAX",
    "chunked_bcast_obj",
    "init_inter_mpi_comm",
    "init_intra_mpi_comm",
    "init_ranks",
]

INT_MAX = 2147483647


def init_ranks(mpi_comm: MPI.Intracomm) -> tuple[int, int, int, int, int]:
    """Return the numbers of this process within its node and of its node. Collective.

    Returns:
        Its rank, its number among the ranks of its node, how many those are, the number of its node,
        and how many nodes there are. Nodes are numbered in the order of their lowest ranks.
    """
    from mpi4py import MPI

    node = mpi_comm.Split_type(MPI.COMM_TYPE_SHARED, key=mpi_comm.rank)
    try:
        intra_rank, intra_size = node.rank, node.size
        leader = node.bcast(mpi_comm.rank)
    finally:
        node.Free()
    leaders = sorted(set(mpi_comm.allgather(leader)))
    return mpi_comm.rank, intra_rank, intra_size, leaders.index(leader), len(leaders)


def init_intra_mpi_comm(mpi_comm: MPI.Intracomm, intra_rank: int, inter_rank: int) -> MPI.Intracomm:
    """Return a new communicator of the ranks of this node. Collective."""
    return cast("MPI.Intracomm", mpi_comm.Split(inter_rank, intra_rank))


def init_inter_mpi_comm(mpi_comm: MPI.Intracomm, intra_rank: int, inter_rank: int) -> MPI.Intracomm:
    """Return a new communicator of the ranks that have this number on their nodes. Collective."""
    return cast("MPI.Intracomm", mpi_comm.Split(intra_rank, inter_rank))


def chunked_bcast_obj(
    obj: Any, mpi_comm: MPI.Intracomm, max_buf_len: int = 256 * 1024 * 1024, root: int = 0
) -> Any:
    """Broadcast an object in messages of limited size. Collective.

    Args:
        obj: Any picklable object on root; None elsewhere.
        mpi_comm: mpi4py communicator.
        max_buf_len: Bytes of a message, from 1 to ``INT_MAX - 1``.
        root: Sending rank, the same on every rank.

    Returns:
        The object itself on root, a copy elsewhere.

    Raises:
        AssertionError: If ``max_buf_len`` is out of range, as with ChainerMN.
        Exception: On every rank, if root's object cannot be pickled.
    """
    if not 0 < max_buf_len < INT_MAX:
        raise AssertionError(f"max_buf_len is {max_buf_len}, expected 1 to {INT_MAX - 1}")
    pickled = b""
    error: BaseException | None = None
    if mpi_comm.rank == root:
        try:
            pickled = pickle.dumps(obj, protocol=pickle.HIGHEST_PROTOCOL)
        except BaseException as caught:  # noqa: BLE001 - reduce methods may raise anything
            error = caught
    size, max_buf_len, text = mpi_comm.bcast((len(pickled), max_buf_len, str(error)), root=root)
    if error is not None:
        raise error
    if size == 0:
        raise pickle.PicklingError(f"rank {root}: {text}")
    buffer = np.empty(size, dtype=np.uint8)
    if mpi_comm.rank == root:
        buffer = np.frombuffer(pickled, dtype=np.uint8)
    for begin in range(0, size, max_buf_len):
        mpi_comm.Bcast(buffer[begin : begin + max_buf_len], root=root)
    return obj if mpi_comm.rank == root else pickle.loads(buffer.data)
