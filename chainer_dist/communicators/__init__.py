"""Communicators: how ranks exchange arrays, objects, gradients and parameters.

Read :mod:`~chainer_dist.communicators.communicator_base` for the methods that all have; each kind
is one small file. Nothing here starts MPI before :func:`~chainer_dist.create_communicator` is called, so that
data-loader workers may import it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from chainer_dist import _allocator, _threads
from chainer_dist.communicators import children
from chainer_dist.communicators.communicator_base import CommunicatorBase

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["CommunicatorBase", "create_communicator", "names"]

# name: where its class is. A new kind is a new file and a new line here.
KINDS = {
    "naive": "chainer_dist.communicators.naive:NaiveCommunicator",
    "flat": "chainer_dist.communicators.flat:FlatCommunicator",
    "shared_memory": "chainer_dist.communicators.shared_memory.communicator:SharedMemoryCommunicator",
    "single_node": "chainer_dist.communicators.single_node:SingleNodeCommunicator",
    "hierarchical": "chainer_dist.communicators.hierarchical:HierarchicalCommunicator",
    "two_dimensional": "chainer_dist.communicators.two_dimensional:TwoDimensionalCommunicator",
    "dummy": "chainer_dist.communicators.dummy:DummyCommunicator",
}

_AUTO = "shared_memory"

_GPU_KINDS = ("pure_nccl", "non_cuda_aware")


def names() -> tuple[str, ...]:
    """Return the names that :func:`~chainer_dist.create_communicator` takes, besides ``auto``."""
    return tuple(KINDS)


def create_communicator(
    communicator_name: str = "auto",
    mpi_comm: MPI.Intracomm | None = None,
    allreduce_grad_dtype: Any = None,
    batched_copy: bool = True,
) -> CommunicatorBase:
    """Create a communicator. Collective over ``mpi_comm``.

    All ranks call it, with the same arguments::

        comm = chainer_dist.create_communicator()
        print(f"rank {comm.rank} of {comm.size}, on node {comm.inter_rank} of {comm.inter_size}")

    Args:
        communicator_name: ``auto`` takes the one that is fastest in general, ``shared_memory``.
            That one averages in memory which the ranks of a node share; ``single_node`` is the
            same and refuses a second node. ``naive`` makes one MPI call for each parameter.
            ``flat`` packs all gradients of a dtype into one buffer, and so do ``hierarchical``,
            in which one rank of each node exchanges with other nodes, and ``two_dimensional``, in
            which each rank of a node exchanges a slice. ``dummy`` exchanges nothing (for measurements).
        mpi_comm: mpi4py intracommunicator, by default ``MPI.COMM_WORLD``. It is duplicated.
        allreduce_grad_dtype: None. ChainerMN took a dtype with ``pure_nccl`` only.
        batched_copy: Accepted for ChainerMN scripts; packing is always batched.

    Returns:
        A communicator over the ranks of ``mpi_comm``. As a context manager it is finalized at the
        end of the block.

    Raises:
        ValueError: If the name is not known, ``allreduce_grad_dtype`` is given, or a
            ``single_node`` communicator is to span nodes.
        ImportError: If mpi4py finds no MPI library.
        RuntimeError: If this is a child process of a rank, such as a worker of a data loader. If the reason is
            that the script has no ``if __name__ == "__main__"``, the rank raises as well.
    """
    children.refuse()
    name = _AUTO if communicator_name == "auto" else communicator_name
    if name in _GPU_KINDS:
        raise ValueError(
            f"communicator {name!r} needs GPUs; chainer_dist trains on CPU cores: use 'auto'"
        )
    if name not in KINDS:
        raise ValueError(
            f"unknown communicator {communicator_name!r}; known: auto, {', '.join(KINDS)}"
        )
    if allreduce_grad_dtype is not None:
        raise ValueError("allreduce_grad_dtype is only available with ChainerMN's pure_nccl")
    if mpi_comm is None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise ImportError(
                f"{error}: no MPI library could be loaded; "
                "`pip install mpich` brings one, and `pip install --force-reinstall --no-deps "
                "--no-binary mpi4py mpi4py` compiles mpi4py for the system's"
            ) from error
        mpi_comm = MPI.COMM_WORLD
    module, _, cls = KINDS[name].partition(":")
    kind: type[CommunicatorBase] = getattr(importlib.import_module(module), cls)
    children.listen()
    communicator = kind(mpi_comm)
    communicator.set_config("batched_copy", batched_copy)
    _threads.limit_threads(communicator.node_comm)
    _allocator.keep_freed_memory()
    return communicator
