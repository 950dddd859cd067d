"""Each rank's fair share of the cores, for the threads of BLAS and OpenMP.

Every process that loads NumPy starts as many BLAS threads as it has cores. Several ranks on a machine
then take the cores from one another, and wait for threads that are not running: steps of small models
take several times as long (``scripts/benchmarks/bench_threads.py`` measures it).
"""

from __future__ import annotations

import os
from collections import Counter
from fractions import Fraction
from pathlib import Path
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
    that are loaded later and for child processes. A later call with other ranks may lower the
    limit but does not raise it, because the ranks of the first call still have their threads.

    Args:
        node_comm: The ranks of this node.

    Returns:
        The number of threads, at least 1, or None if nothing was done.
    """
    chosen = any(os.environ.get(name) not in (None, _set_by_us.get(name)) for name in VARIABLES)
    everyone = node_comm.allgather((cores(), chosen))
    if node_comm.size == 1 or any(theirs for _, theirs in everyone):
        return None
    threads = fair_share([theirs for theirs, _ in everyone], node_comm.rank, quota())
    threads = min([threads, *map(int, _set_by_us.values())])
    threadpoolctl.threadpool_limits(threads)
    _set_by_us.update(dict.fromkeys(VARIABLES, str(threads)))
    os.environ.update(_set_by_us)
    return threads


def fair_share(affinities: Sequence[Collection[int]], rank: int, quota: float | None = None) -> int:
    """Return how many threads a rank may have. Local.

    A core on which n ranks may run counts one n-th for each of them, so that the ranks together
    never have more threads than cores, unless there are more ranks than cores.

    Args:
        affinities: For each rank of the node, the cores that it may run on.
        rank: The rank within the node whose share is returned.
        quota: The processor time that all these ranks together may use, in cores; None is all.

    Returns:
        The whole cores in its share, at least 1.
    """
    sharers = Counter(core for cores in affinities for core in cores)
    share = sum(Fraction(1, sharers[core]) for core in affinities[rank])
    if quota is not None:
        share = min(share, Fraction(quota) / len(affinities))
    return max(1, int(share))


def cores() -> list[int]:
    """Return the numbers of the cores that this process may use. Local."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def quota(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float | None:
    """Return the limit of processor time that a container or a batch system set, in cores; None for none. Local.

    It is looked for in the group of this process and in the root, which is a container's own.
    """
    lines = own.read_text(encoding="utf-8").splitlines() if own.exists() else []
    path = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    files = [
        *((groups / part / "cpu.max",) for part in {"", path}),  # version 2: "quota period"
        (groups / "cpu/cpu.cfs_quota_us", groups / "cpu/cpu.cfs_period_us"),  # version 1
    ]
    limits = []
    for group in files:
        if all(file.exists() for file in group):
            most, period = " ".join(file.read_text(encoding="utf-8") for file in group).split()
            if most not in ("max", "-1"):
                limits.append(int(most) / int(period))
    return min(limits, default=None)
