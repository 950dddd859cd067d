"""Starting a job again after a failure: on the hosts that are left, for as long as it gets on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from chainer_dist.launcher import hostfiles, mpi
from chainer_dist.launcher.errors import LaunchError
from chainer_dist.launcher.output import say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainer_dist.launcher.hostfiles import Host
    from chainer_dist.launcher.job import Outcome
    from chainer_dist.launcher.mpi import Mpi

__all__ = ["GivenHosts", "Places", "reachable", "run"]

SECONDS_TO_ANSWER = 30
N_PROBES = 16  # at the same time
FAILURES_WITHOUT_PROGRESS = 2  # in a row, and the job is given up


def run(
    start: Callable[[int, int, Sequence[Host], float], Outcome],
    places: Places,
    *,
    max_restarts: int,
    seconds: float,
) -> Outcome:
    """Run a job, and again while it fails and gets on, or other hosts are to be used. Local.

    A job gets on if the number that its ranks report as their progress (the iteration of the newest
    checkpoint) is larger than before; after two failures in a row without that it is given up.

    Args:
        start: Runs the job once; called with the number of the attempt from 0, the number of ranks,
            the hosts, and the seconds left.
        places: Object that chooses the hosts, for the first attempt and for each later one.
        max_restarts: Largest number of restarts after a failure.
        seconds: Time limit of all attempts together.

    Returns:
        How the last attempt ended.
    """
    limit = time.monotonic() + seconds
    best: int | None = None
    without_progress = attempt = failures = 0
    n_ranks, hosts = places.first(limit)
    while True:
        outcome = start(attempt, n_ranks, hosts, limit - time.monotonic())
        attempt += 1
        if outcome.reason:
            say(outcome.reason)
        if outcome.final:
            return outcome
        if not (outcome.was_moved or places.have_changed(n_ranks, hosts)):
            failures += 1
            if max_restarts == 0:
                return outcome
            if failures > max_restarts:
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
        try:
            n_ranks, hosts = places.next(n_ranks, hosts, limit)
        except LaunchError as error:
            say(f"given up: {error}")
            return outcome
        counted = f" (restart {failures} of {max_restarts})" if failures else ""
        say(f"starting again on {n_ranks} ranks{counted}")


class Places(Protocol):
    """Decides where the ranks of a job run."""

    def first(self, limit: float) -> tuple[int, list[Host]]:
        """Return the number of ranks and the hosts to begin with, before a time by ``time.monotonic``."""

    def have_changed(self, n_ranks: int, hosts: Sequence[Host]) -> bool:
        """Return whether an attempt on these hosts may have failed because some of them are gone."""

    def next(self, n_ranks: int, hosts: Sequence[Host], limit: float) -> tuple[int, list[Host]]:
        """Return the same for the next attempt.

        Raises:
            LaunchError: If there are no hosts for one.
        """


class GivenHosts:
    """The hosts that the user names, as far as they can still be reached.

    Args:
        n_ranks: Number of ranks, fewer once the hosts that are left have fewer slots.
        hosts: Hosts of the ranks; none is this host.
        probe: Function that returns which of the hosts can still be reached.
    """

    def __init__(
        self, n_ranks: int, hosts: Sequence[Host], probe: Callable[[Sequence[Host]], list[Host]]
    ) -> None:
        self._given = n_ranks, [*hosts]
        self._probe = probe

    def first(self, _: float) -> tuple[int, list[Host]]:
        """Return what was given."""
        return self._given

    def have_changed(self, *_: object) -> bool:
        """Return False: a host that is gone is a failure."""
        return False

    def next(self, n_ranks: int, hosts: Sequence[Host], _: float) -> tuple[int, list[Host]]:
        """Return the hosts that are left, and how many ranks fit."""
        left = self._probe(hosts) if hosts else []
        if hosts and not left:
            raise LaunchError("no host can be reached any more")
        if len(left) < len(hosts):
            gone = [host.name for host in hosts if host not in left]
            n_ranks = min(n_ranks, hostfiles.n_slots(left))
            say(f"cannot be reached any more: {', '.join(gone)}")
        return n_ranks, left


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
