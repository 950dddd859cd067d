"""The cores of this machine, and which of them a rank may use.

Each MPI binds ranks to cores in its own way, by default, on request or not at all, and two jobs on one
machine may be given the same cores. Here the ranks of a machine divide all cores that they may use, in
one way under every MPI.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

TOPOLOGY = Path("/sys/devices/system/cpu")


def physical_cores(topology: Path = TOPOLOGY) -> list[list[int]]:
    """Return the cores that this process may use. Local.

    Args:
        topology: Folder in which Linux describes the processors. A processor without a description
            counts as a core.

    Returns:
        For each core the numbers of its hardware threads; cores that share a socket are neighbours.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
    else:
        allowed = list(range(os.cpu_count() or 1))
    cores: dict[tuple[int, int], list[int]] = {}
    for cpu in allowed:
        folder = topology / f"cpu{cpu}" / "topology"
        try:
            package = int(folder.joinpath("physical_package_id").read_text(encoding="ascii"))
            siblings = folder.joinpath("thread_siblings_list").read_text(encoding="ascii")
            core = int(re.split("[,-]", siblings)[0])  # the first of "0,8" or "0-1" stands for it
        except (OSError, ValueError):
            package, core = -1, cpu
        cores.setdefault((package, core), []).append(cpu)
    return [cores[key] for key in sorted(cores)]


def divide(cores: list[list[int]], n_ranks: int) -> list[list[int]]:
    """Divide cores among the ranks of a machine. Local.

    Args:
        cores: Result of :func:`physical_cores`.
        n_ranks: Number of ranks on the machine, at least 1.

    Returns:
        For each rank the hardware threads it may use. Ranks get neighbouring cores, no two the same
        ones, numbers that differ by one at most, and together all of them, so that a second job is
        not crowded on a few. With more ranks than cores each may use everything.
    """
    everything = [cpu for core in cores for cpu in core]
    if n_ranks > len(cores):
        return [everything] * n_ranks
    bounds = [len(cores) * rank // n_ranks for rank in range(n_ranks + 1)]
    return [
        [cpu for core in cores[begin:end] for cpu in core] for begin, end in zip(bounds, bounds[1:])
    ]


def n_cores() -> int:
    """Return how many cores this process may use, less if a container limits its time. Local."""
    from chainer_dist import _threads  # imports a library, which the launcher seldom needs

    quota = _threads.quota()
    n = len(physical_cores())
    return n if quota is None else max(1, min(n, int(quota)))
