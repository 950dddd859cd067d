"""Ranks, nodes, configuration, splitting and lifetime of communicators."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest

from chainer_dist import create_communicator
from chainer_dist.communicators import names
from chainer_dist.errors import FinalizedCommunicatorError


@pytest.mark.parametrize("name", ["auto", *names()])
def test_ranks_and_nodes(name):
    """On one machine there is one node, which holds all ranks."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    with create_communicator(name, world) as comm:
        assert (comm.rank, comm.size) == (world.rank, world.size)
        assert (comm.intra_rank, comm.intra_size) == (world.rank, world.size)
        assert (comm.inter_rank, comm.inter_size) == (0, 1)
        assert comm.mpi_comm != world
        assert f"rank {world.rank} of {world.size}" in repr(comm)


def test_messages_do_not_meet_those_of_user_code(comm):
    """A receive from any source on the world does not see the communicator's messages."""
    from mpi4py import MPI

    if comm.size == 1:
        return
    if comm.rank == 0:
        comm.send_obj("ours", 1)
        MPI.COMM_WORLD.send("theirs", 1)
    if comm.rank == 1:
        assert MPI.COMM_WORLD.recv(source=MPI.ANY_SOURCE) == "theirs"
        assert comm.recv_obj(0) == "ours"


def test_split(any_comm):
    """Parts number their ranks by key, keep kind and configuration, and work."""
    any_comm.set_config("batched_copy", False)
    part = any_comm.split(any_comm.rank % 2, -any_comm.rank)
    members = [rank for rank in reversed(range(any_comm.size)) if rank % 2 == any_comm.rank % 2]
    assert type(part) is type(any_comm)
    assert part.get_config("batched_copy") is False
    assert part.allgather_obj(any_comm.rank) == members
    assert part.rank == members.index(any_comm.rank)
    x = np.array([float(any_comm.rank)])
    part.mean_arrays([x])
    assert x[0] == np.mean(members)
    part.finalize()


def test_split_leaves_out(comm):
    """A rank whose color is MPI.UNDEFINED gets no communicator."""
    from mpi4py import MPI

    part = comm.split(0 if comm.rank == 0 else MPI.UNDEFINED, 0)
    assert (part is None) == (comm.rank != 0)


@pytest.mark.parametrize(
    ("color", "key", "error", "text"),
    [
        (-1, 0, ValueError, "color is -1, expected 0 to 2147483647"),
        (1 << 31, 0, ValueError, "color is 2147483648"),
        ("red", 0, TypeError, "color is 'red', expected an integer"),
        (0, 0.5, TypeError, "key is 0.5, expected an integer"),
    ],
)
def test_split_by_what_is_no_number(any_comm, color, key, error, text):
    """A bad number of one rank is an error on all of them, and nobody waits."""
    bad = any_comm.rank == any_comm.size - 1
    with pytest.raises(error, match=text):
        any_comm.split(color if bad else 0, key if bad else 0)
    part = any_comm.split(np.int64(0), np.int64(any_comm.rank))
    assert part.size == any_comm.size
    part.finalize()


def test_config(comm):
    """Known names are set and read; unknown ones raise and name the known ones."""
    assert comm.get_config("batched_copy") is True
    comm.set_config("batched_copy", False)
    assert comm.get_config() == {"batched_copy": False}
    with pytest.raises(ValueError, match="unknown config 'nonsense'; known: batched_copy"):
        comm.set_config("nonsense", 1)
    with pytest.raises(KeyError):
        comm.get_config("nonsense")


def test_config_scope(comm):
    """Attributes set in the scope are configuration; those set outside are not."""
    comm.outside = 1
    with comm.config_scope():
        assert comm.within_config_scope
        comm.inside = 2
    assert not comm.within_config_scope
    assert comm.get_config("inside") == 2
    assert "outside" not in comm.get_config()
    comm.set_config("inside", 3)
    assert comm.inside == 3


def test_configuration_is_not_shared_between_communicators(comm):
    """ChainerMN kept one dict for all communicators of a process."""
    with create_communicator("naive") as other:
        other.set_config("batched_copy", False)
        assert comm.get_config("batched_copy") is True


def test_finalize():
    """After finalize every use says so, and a second finalize is harmless."""
    comm = create_communicator("flat")
    x = np.ones(4)
    comm.mean_arrays([x])
    comm.finalize()
    comm.finalize()
    assert "finalized" in repr(comm)
    with pytest.raises(FinalizedCommunicatorError, match="flat communicator was finalized"):
        comm.allreduce(x)


def test_context_manager_finalizes_unless_an_error_passes():
    """Freeing waits for all ranks, which a rank that leaves by an error must not do."""
    with create_communicator("naive") as comm:
        pass
    with pytest.raises(FinalizedCommunicatorError):
        _ = comm.size
    with pytest.raises(ZeroDivisionError), create_communicator("naive") as comm:
        raise ZeroDivisionError
    assert comm.size >= 1
    comm.finalize()


def test_many_communicators_come_and_go(comm):
    """Communicators give back what MPI has few of."""
    if comm.size > 2:
        pytest.skip("takes seconds, and is the same on any number of ranks")
    for _ in range(300):
        with create_communicator("naive") as one:
            one.split(0, one.rank).finalize()


def test_copies_are_the_communicator_itself(comm):
    """Deep copies of what holds a communicator go on using it; pickles cannot."""
    assert copy.copy(comm) is comm
    assert copy.deepcopy({"comm": comm})["comm"] is comm
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(comm)


@pytest.mark.parametrize("name", ["nonsense", "", "Naive"])
def test_unknown_name(name):
    """The error lists the names there are."""
    with pytest.raises(ValueError, match=r"unknown communicator.*auto, naive, flat"):
        create_communicator(name)


@pytest.mark.parametrize("name", ["pure_nccl", "non_cuda_aware"])
def test_names_of_gpu_communicators(name):
    """A ChainerMN script for GPUs is told what to use instead."""
    with pytest.raises(ValueError, match=r"needs GPUs.*'auto'"):
        create_communicator(name)


def test_allreduce_grad_dtype_is_refused_as_in_chainermn():
    """ChainerMN takes it with pure_nccl only."""
    with pytest.raises(ValueError, match="allreduce_grad_dtype"):
        create_communicator("naive", allreduce_grad_dtype=np.float16)


@pytest.mark.mpi_skip
def test_importing_the_package_does_not_start_mpi():
    """Data-loader workers import the package; MPI in them would confuse the launcher."""
    code = "import sys, chainer_dist; sys.exit('mpi4py.MPI' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
