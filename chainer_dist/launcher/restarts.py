"""Starting a job again after a failure: on the hosts that are left, for as long as it gets on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from chainer_dist.launcher import hostfiles, mpi
from chainer_dist.launcher.output import say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainer_dist.launcher.hostfiles import Host
    from chainer_dist.launcher.job import Outcome
    from chainer_dist.launcher.mpi import Mpi

__all__ = ["reachable", "run"]

SECONDS_TO_ANSWER = 30
N_PROBES = 16  # at the same time
FAILURES_WITHOUT_PROGRESS = 2  # in a row, and the job is given up


def run(
    start: Callable[[int, int, Sequence[Host], float], Outcome],
    n_ranks: int,
    hosts: Sequence[Host],
    *,
    max_restarts: int,
    seconds: float,
    probe: Callable[[Sequence[Host]], list[Host]],
) -> Outcome:
    """Run a job, and again while it fails and gets on. Local.

    A job gets on if the number that its ranks report as their progress (the iteration of the newest
    checkpoint) is larger than before; after two failures in a row without that it is given up.

    Args:
        start: Runs the job once; called with the number of the attempt from 0, the number of ranks,
            the hosts, and the seconds left.
        n_ranks: Number of ranks, fewer if the hosts that are left have fewer slots.
        hosts: Where they run; none is this host.
        max_restarts: How often to start again.
        seconds: Time limit of all attempts together.
        probe: Returns which of the hosts can still be reached.

    Returns:
        How the last attempt ended.
    """
    limit = time.monotonic() + seconds
    best: int | None = None
    without_progress = 0
    for attempt in range(max_restarts + 1):
        outcome = start(attempt, n_ranks, hosts, limit - time.monotonic())
        if outcome.reason:
            say(outcome.reason)
        if outcome.final or max_restarts == 0:
            return outcome
        if attempt == max_restarts:
            say(f"given up after {max_restarts} restart{'s' * (max_restarts > 1)}")
            return outcome
        progress = outcome.progress
        if progress is not None and (best is None or progress > best):
            best, without_progress = progress, 0
        else:
            without_progress += 1
        if without_progress == FAILURES_WITHOUT_PROGRESS:
            reached = (
                "no checkpoint was written" if best is None else f"it stays at iteration {best}"
            )
            say(f"given up: {without_progress} failures in a row without progress ({reached})")
            return outcome
        left = probe(hosts) if hosts else []
        if hosts and not left:
            say("given up: no host can be reached any more")
            return outcome
        if len(left) < len(hosts):
            gone = [host.name for host in hosts if host not in left]
            n_ranks = min(n_ranks, hostfiles.n_slots(left))
            say(f"cannot be reached any more: {', '.join(gone)}")
        hosts = left
        say(f"starting again on {n_ranks} ranks (restart {attempt + 1} of {max_restarts})")
    raise AssertionError("unreachable")


def reachable(found: Mpi, hosts: Sequence[Host]) -> list[Host]:
    """Return the hosts on which mpiexec can still start a Python. Local; half a minute at most.

    mpiexec itself is tried, because how it gets to other hosts, by ssh or by a scheduler, is its own.
    """

    def answers(host: Host) -> bool:
        if mpi.is_here(host.name):
            return True
        probe = subprocess.Popen(  # noqa: S603 - mpiexec
            [*mpi.command(found, 1, [host], []), sys.executable, "-I", "-S", "-c", ""],
            env={**os.environ, **mpi.environment(found, os.environ)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return probe.wait(SECONDS_TO_ANSWER) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(probe.pid, signal.SIGKILL)
            probe.wait()

    with ThreadPoolExecutor(N_PROBES) as pool:
        alive = pool.map(answers, hosts)
        return [host for host, is_alive in zip(hosts, alive) if is_alive]
