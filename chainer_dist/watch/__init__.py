"""Watching a job: ranks that wait for ever, ranks that disagree, and the time that each operation takes.

There are three independent ways to watch every communicator. They watch its operations (see
:mod:`chainer_dist.collectives.operation`). Environment variables, which are read when a communicator is created,
turn them on and off.

Stalls
    An operation that lasts longer than ``CHAINER_DIST_STALL_WARN`` seconds (60; 0 for never) is
    reported on standard error, and again after twice that time and so on, by the lowest rank that
    waits: which ranks have come to it, which have not, what the missing ranks do, in which line, and all
    Python stacks. ``CHAINER_DIST_STALL_ABORT`` seconds (never) end the job after such a report. Ranks
    ask one another over TCP, on a node over its loopback; for other nodes a rank listens on the one address
    at which they can reach it, or on ``CHAINER_DIST_ADDRESS``. On by default.
Checked mode
    With ``CHAINER_DIST_CHECKED=1`` ranks compare each collective before they run it: its name, its
    number, root, and shape and dtype where these are the same on every rank. Where they differ every
    rank raises the same :class:`~chainer_dist.errors.RankMismatchError`. NaN and infinity in gradients
    are a :class:`~chainer_dist.errors.NonFiniteGradientError` before they are averaged, unless
    dynamic loss scaling deals with them. A communicator is checked if any of its ranks wants that.
    One small allreduce for each collective; messages between two ranks are not compared.
Timelines
    ``CHAINER_DIST_TIMELINE=trace.json``, or :class:`timeline`.
"""

from __future__ import annotations

import sys
import uuid
from typing import TYPE_CHECKING, NamedTuple

from chainer_dist.collectives import operation
from chainer_dist.collectives.failures import describe_error, raise_first
from chainer_dist.watch import checked_mode
from chainer_dist.watch.hosts import own_hosts
from chainer_dist.watch.settings import Settings, from_environment
from chainer_dist.watch.timeline import start_at_exit, timeline
from chainer_dist.watch.watchdog import Watchdog

if TYPE_CHECKING:
    from chainer_dist.collectives.failures import Failure
    from chainer_dist.communicators import CommunicatorBase
    from chainer_dist.watch.address import Address

__all__ = ["timeline"]


_NO_SETTINGS = Settings(None, None, checked=False, timeline=None)


class _Introduction(NamedTuple):
    """Message of each rank of a new communicator to the others."""

    failure: Failure
    settings: Settings
    address: Address | None
    deaf: str  # the reason why others cannot ask it, or an empty string
    identity: str


class _Watch:
    """The watched communicators of this process."""

    def __init__(self) -> None:
        self.watchdog: Watchdog | None = None
        self.has_timeline = False
        self._said = False

    def take_in(self, comm: CommunicatorBase) -> None:
        """Watch a new communicator. Collective over it.

        Raises:
            ValueError: On every rank, if a variable has a wrong value on one.
        """
        mine = self._introduction(comm, _neighbour(comm))
        everyone: list[_Introduction] = comm.mpi_comm.allgather(mine)
        raise_first(dict(enumerate(each.failure for each in everyone)), None)
        log = comm.operation_log
        log.identity = everyone[0].identity
        log.rank, log.peers = comm.rank, [each.address for each in everyone]
        if any(each.settings.checked for each in everyone):
            log.check = checked_mode.compare
        if self.watchdog is not None:
            self.watchdog.add(comm)
        if comm.rank == 0:
            self._say_who_is_deaf(everyone)
        path = everyone[0].settings.timeline
        if path is not None and not self.has_timeline and _spans_job(comm):
            self.has_timeline = True
            start_at_exit(path, comm)

    def _introduction(self, comm: CommunicatorBase, others: tuple[str, ...]) -> _Introduction:
        """Return this rank's message to the others. Local.

        Args:
            comm: The new communicator.
            others: Addresses of another node; empty if there is none.
        """
        settings, address, failure, deaf = _NO_SETTINGS, None, None, ""
        try:
            settings = from_environment()
            if comm.size > 1 and settings.limits:
                if self.watchdog is None:
                    self.watchdog = Watchdog(settings)
                try:
                    if others:
                        self.watchdog.open(others)
                finally:  # ranks of this node can ask all the same
                    address = self.watchdog.address(comm)
        except ValueError as error:
            failure = describe_error(error)
        except OSError as error:  # there are no sockets here, and training does not need them
            deaf = str(error)
        return _Introduction(failure, settings, address, deaf, uuid.uuid4().hex)

    def _say_who_is_deaf(self, everyone: list[_Introduction]) -> None:
        deaf = [f"rank {rank}: {each.deaf}" for rank, each in enumerate(everyone) if each.deaf]
        if deaf and not self._said:
            self._said = True
            sys.stderr.write(
                "chainer_dist: reports of stalls will lack ranks that others cannot ask: "
                f"{'; '.join(deaf)}\n"
            )


def _neighbour(comm: CommunicatorBase) -> tuple[str, ...]:
    """Return the addresses of another node of a communicator; none if there is no other. Collective."""
    if comm.inter_size == 1:
        return ()
    everyone = comm.mpi_comm.allgather((comm.inter_rank, own_hosts()))
    nodes: dict[int, tuple[str, ...]] = dict(reversed(everyone))
    return nodes[1 if comm.inter_rank == 0 else 0]


def _spans_job(comm: CommunicatorBase) -> bool:
    from mpi4py import MPI

    return bool(comm.size == MPI.COMM_WORLD.size)


operation.creation_hooks.append(_Watch().take_in)
