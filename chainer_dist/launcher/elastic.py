"""Hosts that come and go: a script lists the present ones, and the job goes on with as many ranks as fit.

The contract of the script is Horovod's: it is run again and again, and prints a line ``host:slots`` for each host
that may be used now.
"""

from __future__ import annotations

import signal
import subprocess
import time
from typing import TYPE_CHECKING

from chainer_dist.launcher import hostfiles, output, wire
from chainer_dist.launcher.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist.launcher.hostfiles import Host

__all__ = ["Discovery"]

SECONDS_TO_ANSWER = 60
SECONDS_BETWEEN = 1.0  # two runs of the script, while hosts are missing


class Discovery:
    """Asks a script for hosts, and decides how many ranks run on which of them.

    Args:
        script: Path of a program.
        min_ranks: Smallest number of ranks: the job waits until there is room for them.
        max_ranks: Largest number of ranks; None is as many as there are slots.
    """

    def __init__(self, script: str, min_ranks: int, max_ranks: int | None) -> None:
        self._script = script
        self._min_ranks = min_ranks
        self._max_ranks = max_ranks
        self._has_failed = False

    def ask(self) -> list[Host] | None:
        """Return the hosts that there are now; None if the script does not say. Local.

        That the script fails, or prints what cannot be read, is said once, until it answers again.
        """
        try:
            hosts = self._run()
        except LaunchError as error:
            if not self._has_failed:
                output.say(f"{error}; the job stays on the hosts that it has")
            self._has_failed = True
            return None
        self._has_failed = False
        return hosts

    def first(self, limit: float) -> tuple[int, list[Host]]:
        """Wait until there is room for enough ranks, and return how many there are to be, and where. Local."""
        return self._wait(limit)

    def next(self, _: int, __: Sequence[Host], limit: float) -> tuple[int, list[Host]]:
        """Return the same for the next attempt. Local."""
        return self._wait(limit)

    def have_changed(self, n_ranks: int, hosts: Sequence[Host]) -> bool:
        """Return whether other hosts are to be used than these. Local."""
        return bool(self.change(n_ranks, hosts))

    def _wait(self, deadline: float) -> tuple[int, list[Host]]:
        """See :meth:`first`.

        Raises:
            LaunchError: If there is no room in time, or the script does not answer.
        """
        waits = False
        while True:
            hosts = self.ask()
            if hosts is None and not waits:
                raise LaunchError("the job is not started without hosts")
            n_ranks, places = self.plan(hosts or [])
            if n_ranks >= self._min_ranks:
                return n_ranks, places
            if not waits:
                output.say(
                    f"waiting for hosts: there is room for {n_ranks} of {self._min_ranks} ranks"
                )
                waits = True
            if time.monotonic() + SECONDS_BETWEEN > deadline:
                raise LaunchError("the time limit is reached, and there are not enough hosts")
            _sleep()

    def plan(self, hosts: Sequence[Host]) -> tuple[int, list[Host]]:
        """Return the number of ranks, and the hosts that they need. Local."""
        n_ranks = hostfiles.n_slots(hosts)
        if self._max_ranks is not None:
            n_ranks = min(n_ranks, self._max_ranks)
        places: list[Host] = []
        for host in hosts:
            left = n_ranks - hostfiles.n_slots(places)
            if left > 0:
                places.append(host._replace(slots=min(host.slots, left)))
        return n_ranks, places

    def change(self, n_ranks: int, hosts: Sequence[Host]) -> str:
        """Return what has changed for a job that runs on these hosts, in words; "" if nothing has. Local.

        A job stays as it is if other hosts would do as well, and while there is room for too few ranks.
        """
        found = self.ask()
        if found is None:
            return ""
        slots = {host.name: host.slots for host in found}
        gone = [host.name for host in hosts if slots.get(host.name, 0) < host.slots]
        possible, _ = self.plan(found)
        if gone:
            return f"{', '.join(gone)} must be left"
        if possible > n_ranks:
            return f"there is room for {possible} ranks in place of {n_ranks}"
        return ""

    def _run(self) -> list[Host]:
        try:
            answer = subprocess.run(  # noqa: S603 - the user's own script
                [self._script],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=SECONDS_TO_ANSWER,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError) as error:
            raise LaunchError(f"{self._script} cannot be run: {error}") from None
        if answer.returncode:
            last = (answer.stderr.strip().splitlines() or [""])[-1]
            raise LaunchError(f"{self._script} failed with status {answer.returncode}: {last}")
        if not answer.stdout.strip():
            return []
        return hostfiles.parse_hostfile(answer.stdout, self._script)


def _sleep() -> None:
    """Sleep for a while, or until a signal comes: between two attempts they are blocked."""
    came = signal.sigtimedwait(wire.FORWARDED, SECONDS_BETWEEN)
    if came is not None:
        error = LaunchError(f"{signal.Signals(came.si_signo).name} came while there were no hosts")
        error.status = 128 + came.si_signo
        raise error
