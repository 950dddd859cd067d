"""Several nodes. MPICH can take the ranks of one machine for those of two, shared memory included."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import mpi_job

# It starts a job of its own.
pytestmark = pytest.mark.mpi_skip

CODE = """
import chainer, chainer_dist, numpy as np
from chainer_dist.communicators import names
from mpi4py import MPI
nodes = 2 if MPI.get_vendor()[0] == "MPICH" else 1
for name in names():
    if name == "dummy":
        continue
    if name == "single_node" and nodes > 1:
        try:
            chainer_dist.create_communicator(name)
        except ValueError as error:
            assert "these are on 2" in str(error)
        else:
            raise AssertionError("single_node on two nodes")
        continue
    with chainer_dist.create_communicator(name) as comm:
        rank, size = comm.rank, comm.size
        assert comm.inter_size == nodes, comm
        assert comm.inter_rank == rank % nodes, comm
        assert (comm.intra_rank, comm.node_comm.size) == (rank // nodes, comm.intra_size), comm
        arrays = [np.full(n, rank + n, np.float32) for n in (1, 1000, 700_000)]
        comm.mean_arrays(arrays)
        for array in arrays:
            assert (array == array.size + (size - 1) / 2).all(), comm
        data = chainer.datasets.TupleDataset(np.arange(90_000.).reshape(-1, 9), np.arange(10_000))
        part = chainer_dist.scatter_dataset(data if rank == 1 else None, comm, root=1)
        first = 10_000 * rank // size
        assert [int(label) for _, label in part] == list(range(first, first + len(part)))
        assert all((x == np.arange(9) + 9 * label).all() for x, label in part)
print("fine", end=" ")
"""


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_two_nodes(ranks):
    """Averaging and scattering between nodes, with as many ranks on each and with more on one."""
    env = mpi_job.environment(MPIR_CVAR_NUM_CLIQUES="2")
    job = mpi_job.run([sys.executable, "-c", CODE], ranks, timeout=60, env=env)
    assert job.status == 0, job.output
    assert job.output.count("fine") == ranks


FAILURE = """
import chainer_dist, numpy as np, test_exchange_failures as cases
with chainer_dist.create_communicator("shared_memory") as comm:
    for failing in (0, 1):
        cases.fail_in_the_second_exchange(comm, failing)
    print("fine")
"""


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_an_error_on_one_of_two_nodes(ranks):
    """It is raised on the ranks of both."""
    path = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = mpi_job.environment(MPIR_CVAR_NUM_CLIQUES="2", PYTHONPATH=path)
    job = mpi_job.run([sys.executable, "-c", FAILURE], ranks, timeout=60, env=env)
    assert job.status == 0, job.output
    assert job.output.count("fine") == ranks
