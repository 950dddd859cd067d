"""Each rank's fair share of the cores, for the threads of BLAS and OpenMP.

Every process that loads NumPy starts as many BLAS threads as the machine has cores. With several
ranks on a machine they take the cores from one another, and matrix products become many times
slower.
"""

from __future__ import annotations

import os
from collections import Counter
from fractions import Fraction
from typing import TYPE_CHECKING

import threadpoolctl

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from mpi4py import MPI

# What users set to decide themselves.
VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)

_set_by_us: dict[str, str] = {}


def limit_threads(node_comm: MPI.Intracomm) -> int | None:
    """Limit this rank's BLAS and OpenMP threads to its share of its cores. Collective.

    Does nothing where any of :data:`VARIABLES` is set on any rank of the node, or where the node
    has one rank. Otherwise loaded libraries are limited, and the variables are set for libraries
    that are loaded later and for child processes.

    Args:
        node_comm: The ranks of this node.

    Returns:
        The number of threads, at least 1, or None if nothing was done.
    """
    chosen = any(os.environ.get(name) != _set_by_us.get(name) for name in VARIABLES)
    everyone = node_comm.allgather((_cores(), chosen))
    if node_comm.size == 1 or any(theirs for _, theirs in everyone):
        return None
    threads = fair_share([cores for cores, _ in everyone], node_comm.rank)
    threadpoolctl.threadpool_limits(threads)
    _set_by_us.update(dict.fromkeys(VARIABLES, str(threads)))
    os.environ.update(_set_by_us)
    return threads


def fair_share(affinities: Sequence[Collection[int]], rank: int) -> int:
    """Return how many threads a rank may have. Local.

    A core on which n ranks may run counts one n-th for each of them, so that the ranks together
    never have more threads than cores, unless there are more ranks than cores.

    Args:
        affinities: For each rank of the node, the cores that it may run on.
        rank: Whose share to return.

    Returns:
        The whole cores in its share, at least 1.
    """
    sharers = Counter(core for cores in affinities for core in cores)
    return max(1, int(sum(Fraction(1, sharers[core]) for core in affinities[rank])))


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
