"""Descriptions of the components of a model, which ranks exchange, and whether these fit together.

Only the ranks whose components are connected compare, without a collective, so that ranks without a
component need not call the model. Each sends its components to its peers and to the peers of its peers, and
waits for theirs: one message each way between any two of them, as long as connections are named on both sides.

A rank that names another one by which it is not named is a stranger to that one. Its message may come at any
time. So a rank looks for messages of strangers in every call, sends them its own components, and fails; until
then strangers wait.
"""

from __future__ import annotations

import collections
import itertools
import weakref
from collections import Counter, deque
from typing import TYPE_CHECKING, NamedTuple, Optional

from chainer_dist.collectives.operation import point_to_point
from chainer_dist.errors import RankMismatchError
from chainer_dist.functions import gradient_messages

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["Comparison", "Component", "Ranks", "Table", "find_problem"]

# Ranks that a component receives from or sends to; None for the model's input or output.
Ranks = Optional[tuple[int, ...]]


class Component(NamedTuple):
    """One link of a rank, and the ranks that it is connected to."""

    rank_in: Ranks
    rank_out: Ranks


class Table(NamedTuple):
    """The components of a model that are on one rank."""

    n_micro_batches: int
    components: tuple[Component, ...]

    @property
    def named(self) -> set[int]:
        """The ranks that components here receive from or send to."""
        return {
            rank
            for each in self.components
            for rank in (*(each.rank_in or ()), *(each.rank_out or ()))
        }


# Tables by rank.
Tables = dict[int, Table]


class _Call(NamedTuple):
    """Which call of which model a rank is in, both counted from the first one."""

    model: int
    number: int


class _Board:
    """The tables that came to this rank by a communicator, and the models that it has made for it.

    Attributes:
        numbers: Numbers of models, in the order in which they are made on this rank.
        tables: Functions by the number of a model, which return its present table, or None if the model is gone.
        arrived: Tables that no model has used yet, by their rank, each with the call in which it was sent.
    """

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.tables: dict[int, Callable[[], Table | None]] = {}
        self.arrived: dict[int, deque[tuple[_Call, Table]]] = collections.defaultdict(deque)


_boards: weakref.WeakKeyDictionary[CommunicatorBase, _Board] = weakref.WeakKeyDictionary()


def register(comm: CommunicatorBase, table: Callable[[], Table | None]) -> int:
    """Return how many models this rank has made before for a communicator. Local.

    Args:
        comm: Communicator.
        table: Returns the new model's table as it is then, or None once the model is gone.
    """
    board = _boards.setdefault(comm, _Board())
    number = next(board.numbers)
    board.tables[number] = table
    return number


class Comparison:
    """The tables of all ranks whose components are connected with components of this rank.

    Waits until it has them all.

    Args:
        comm: Communicator.
        model: The number of the model.
        call: The number of the call.
        own: The table of this rank.

    Attributes:
        tables: The table of this rank and of connected ranks, by rank.
        fits: Whether the tables fit together.
    """

    def __init__(self, comm: CommunicatorBase, model: int, call: int, own: Table) -> None:
        self._comm = comm
        self._call = _Call(model, call)
        self._told = {comm.rank}
        self._strangers: Tables = {}
        self.tables: Tables = {comm.rank: own}
        arrived = _boards[comm].arrived
        while True:
            named = {rank for table in self.tables.values() for rank in table.named}
            self._tell(named)
            missing = named - self.tables.keys()
            found = {rank for rank in missing if arrived[rank]}
            self.tables.update({rank: arrived[rank].popleft()[1] for rank in found})
            if not missing:
                break
            if not found:
                receive_components(comm, min(missing))
                self._tell(self._callers())
        self.fits = find_problem(self.tables, {}) is None

    def strangers(self, call: int) -> Tables:
        """Return the tables of strangers to ranks of this model, and send them this rank's table. Local.

        Args:
            call: The number of the call that this rank is in.
        """
        self._call = self._call._replace(number=call)
        tag = gradient_messages.reserved_tag(gradient_messages.COMPONENTS)
        while self._comm.mpi_comm.iprobe(tag=tag):
            receive_components(self._comm)
        callers = self._callers()
        self._tell(callers)
        arrived = _boards[self._comm].arrived
        self._strangers.update({rank: arrived[rank].popleft()[1] for rank in callers})
        return self._strangers

    def _callers(self) -> set[int]:
        """Return ranks that are in this call or an earlier one, and are not known to be connected.

        Those that another model here is connected with may speak of that one.
        """
        board = _boards[self._comm]
        others = [table() for number, table in board.tables.items() if number != self._call.model]
        elsewhere = {rank for table in others if table for rank in table.named}
        return {
            rank
            for rank, tables in board.arrived.items()
            if rank not in {*self.tables, *elsewhere}
            and tables
            and tables[0][0].model == self._call.model
            and tables[0][0].number <= self._call.number
        }

    def _tell(self, ranks: set[int]) -> None:
        """Send this rank's table to other ranks, to each of them once."""
        tag = gradient_messages.reserved_tag(gradient_messages.COMPONENTS)
        for rank in sorted(ranks - self._told):
            self._told.add(rank)
            gradient_messages.post_obj(
                self._comm, (self._call, self.tables[self._comm.rank]), rank, tag
            )


@point_to_point
def receive_components(comm: CommunicatorBase, source: int | None = None) -> None:
    """Take the next table that comes, from any rank. Waits for it.

    Args:
        comm: Communicator.
        source: A rank that this one waits for, to be named in reports of a stall.
    """
    from mpi4py import MPI

    del source
    status = MPI.Status()
    tag = gradient_messages.reserved_tag(gradient_messages.COMPONENTS)
    message = comm.recv_obj(MPI.ANY_SOURCE, status, tag=tag)
    _boards[comm].arrived[status.Get_source()].append(message)


def find_problem(tables: Mapping[int, Table], strangers: Mapping[int, Table]) -> Exception | None:
    """Return what does not fit together, the same on every rank that knows the same tables. Local.

    Args:
        tables: The tables of connected ranks, by rank.
        strangers: See :meth:`Comparison.strangers`.
    """
    first = min(tables)
    for rank, (n, _) in sorted(tables.items()):
        if n != tables[first].n_micro_batches:
            return RankMismatchError(
                f"rank {rank}: n_micro_batches is {n}, expected {tables[first].n_micro_batches} as on rank {first}"
            )
    parts = {rank: table.components for rank, table in (*tables.items(), *strangers.items())}
    problem = _unmatched(parts)
    if strangers:
        problem = problem or (
            f"rank {min(strangers)}: its components are connected, by components of other ranks, with rank {first}, "
            "whose components are not connected with them"
        )
        problem += (
            f". If rank {min(strangers)} has called another model: make all models of a communicator before the "
            "first of them is called"
        )
    problem = problem or _circle(parts)
    return None if problem is None else ValueError(problem)


def _unmatched(parts: Mapping[int, Sequence[Component]]) -> str | None:
    """Say which component sends what none receives, or the other way round, if both ranks are known."""
    senders: dict[tuple[int, int], list[int]] = {}
    receivers: dict[tuple[int, int], list[int]] = {}
    for rank, components in parts.items():
        for i, component in enumerate(components):
            for target in component.rank_out or ():
                senders.setdefault((rank, target), []).append(i)
            for source in component.rank_in or ():
                receivers.setdefault((source, rank), []).append(i)
    for source, target in sorted({*senders, *receivers}):
        if not {source, target} <= parts.keys():
            continue
        sending = senders.get((source, target), [])
        receiving = receivers.get((source, target), [])
        if len(sending) > len(receiving):
            return (
                f"rank {source}: component {sending[len(receiving)]} sends to rank {target}, where "
                f"{_count(receiving)} with rank_in={source}, for {_count(sending)} here that send"
            )
        if len(sending) < len(receiving):
            return (
                f"rank {target}: component {receiving[len(sending)]} receives from rank {source}, "
                f"where {_count(sending)} with rank_out={target}, for {_count(receiving)} here "
                "that receive"
            )
    return None


def _count(components: Sequence[int]) -> str:
    n = len(components)
    return f"there {'is' if n == 1 else 'are'} {n or 'no'} component{'s' * (n != 1)}"


def _circle(parts: Mapping[int, Sequence[Component]]) -> str | None:
    """Go through the schedule of all ranks; say which ranks wait for each other if it does not end."""
    sent: Counter[tuple[int, int]] = Counter()
    done = dict.fromkeys(parts, 0)

    def waits_for(rank: int) -> int | None:
        needed: Counter[int] = Counter()
        for source in parts[rank][done[rank]].rank_in or ():
            needed[source] += 1
            if sent[source, rank] < needed[source]:
                return source
        return None

    waiting: dict[int, int] = {}
    moved = True
    while moved:
        moved = False
        waiting.clear()
        for rank, components in parts.items():
            while done[rank] < len(components):
                source = waits_for(rank)
                if source is not None:
                    waiting[rank] = source
                    break
                component = components[done[rank]]
                sent.subtract((source, rank) for source in component.rank_in or ())
                sent.update((rank, target) for target in component.rank_out or ())
                done[rank] += 1
                moved = True
    if not waiting:
        return None
    circle = [min(waiting)]
    while waiting[circle[-1]] not in circle:
        circle.append(waiting[circle[-1]])
    circle = circle[circle.index(waiting[circle[-1]]) :]
    return "components wait for one another: " + ", ".join(
        f"rank {rank}: component {done[rank]} waits for rank {waiting[rank]}" for rank in circle
    )
