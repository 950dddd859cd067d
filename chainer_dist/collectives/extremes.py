"""Small comparisons of numbers, of which all operations that begin with one make use.

Ranks that have come to different places of a program meet in them. Messages of different sizes or kinds would make MPI
end the job, or write beyond the smaller one. Here all have one size, and say what they are for.
"""

from __future__ import annotations

import functools
import sys
import zlib
from typing import TYPE_CHECKING, NoReturn

from chainer_dist.collectives.frames import user_line
from chainer_dist.collectives.group import ROOM
from chainer_dist.collectives.operation import Kind, Operation, outermost
from chainer_dist.errors import RankMismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist.collectives.group import Group

__all__ = ["MOST_NUMBERS", "arrive", "extremes", "raise_elsewhere"]

MOST_NUMBERS = ROOM - 2


def extremes(comm: Group, kind: Kind, *numbers: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return the largest and the smallest of each number over the ranks. Collective: one small allreduce or less.

    Args:
        comm: The communicator whose ranks compare.
        kind: Purpose of the comparison, by whose name ranks find out whether they have come to the same one.
        numbers: Integers above ``-2**63``, at most :data:`MOST_NUMBERS`, as many on every rank.

    Raises:
        RankMismatchError: On every rank, naming operations and source lines, if ranks compare for different
            purposes, or different counts of numbers.
    """
    count = len(numbers)
    if count > MOST_NUMBERS:
        raise ValueError(f"there are {count} numbers, expected {MOST_NUMBERS} or fewer")
    with Operation(kind, comm):
        return (numbers, numbers) if comm.size == 1 else _compare(comm, kind, numbers)


def arrive(comm: Group) -> None:
    """Raise on every rank if ranks have come to different operations, where that takes no message. Collective.

    It is for operations that begin with a message of MPI whose size or kind is not that of a comparison.

    Args:
        comm: The communicator of the operation that this thread is in.

    Raises:
        RankMismatchError: See :func:`extremes`.
    """
    if comm.size > 1 and comm.compares_freely:
        _compare(comm, outermost(comm).kind, ())


def _compare(
    comm: Group, kind: Kind, numbers: tuple[int, ...]
) -> tuple[Sequence[int], Sequence[int]]:
    count = len(numbers)
    most, least = comm.extremes((_checksum(kind.name), count, *numbers))
    if most == least:  # as nearly always
        return numbers, numbers
    if most[0] != least[0] or most[1] != least[1]:
        outer = outermost(comm)
        text = outer.describe()
        if outer.kind is not kind:
            text += f" in its {kind.name}"
        if count:
            text += f" ({count} number{'s' * (count != 1)})"
        raise_elsewhere(comm, outer.number, text)
    return most[2:], least[2:]


def raise_elsewhere(comm: Group, number: int, text: str) -> NoReturn:
    """Raise the same error on every rank, as ranks have come to different operations. Collective.

    Args:
        comm: The communicator whose ranks have.
        number: Number of this rank's operation.
        text: Description of this rank's operation.

    Raises:
        RankMismatchError: Names the lowest rank that differs from rank 0, and both ranks' operations and source
            lines.
    """
    line = user_line(sys._getframe())  # noqa: SLF001 - Python's
    everyone = comm.mpi_comm.allgather((number, text, line))
    expected_number, expected, expected_line = everyone[0]
    rank = next(rank for rank, each in enumerate(everyone) if each[:2] != everyone[0][:2])
    its_number, its_text, its_line = everyone[rank]
    raise RankMismatchError(
        f"rank {rank}: operation {its_number} is {its_text}, at {its_line}; "
        f"expected {expected}, at {expected_line}, operation {expected_number} as on rank 0"
    )


@functools.lru_cache(maxsize=256)
def _checksum(text: str) -> int:
    return zlib.crc32(text.encode())
