"""Ranks compare values, and agree on them.

All of it is collective, and an error is raised on every rank; see :mod:`chainer_dist.collectives.failures`.
"""

from __future__ import annotations

import hashlib
import operator
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from chainer_dist.collectives.extremes import extremes
from chainer_dist.collectives.failures import AGREE, describe_error, in_words, raise_first
from chainer_dist.errors import RankMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainer_dist.collectives.objects import ObjectCommunicator


Made = TypeVar("Made")

_MASK = (1 << 62) - 1  # a digest and its negative both fit int64


def digest(description: object) -> int:
    """Return a number in [0, 2**62) that is the same on every rank for an equal ``repr``.

    Python's own ``hash`` differs between processes. Local.
    """
    hashed = hashlib.blake2b(repr(description).encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "little") & _MASK


def agree(comm: ObjectCommunicator, *digests: int) -> tuple[bool, ...]:
    """Return for each digest whether all ranks passed the same. Collective: one small allreduce.

    Args:
        comm: The communicator whose ranks compare.
        digests: Numbers as :func:`digest` makes them, the same count on every rank.

    Returns:
        One bool a digest, the same on every rank.
    """
    most, least = extremes(comm, AGREE, *digests)
    return tuple(map(operator.eq, most, least))


def agreed_rank(comm: ObjectCommunicator, rank: object, name: str) -> int:
    """Return ``rank`` if it is the same valid rank on all ranks. Collective.

    Args:
        comm: The communicator of which it is a rank.
        rank: The argument that the user gave, of any type.
        name: Name of the parameter, for errors.

    Raises:
        ValueError: On every rank, if it is no rank of ``comm`` on some.
        RankMismatchError: On every rank, if ranks differ.
    """
    try:
        mine: int | str = operator.index(rank)  # type: ignore[arg-type]  # the error is caught
    except Exception:  # noqa: BLE001 - it may be any object
        mine = in_words(rank, repr)
    ranks = comm.allgather_obj(mine)
    for number, each in enumerate(ranks):
        if not isinstance(each, int) or not 0 <= each < comm.size:
            raise ValueError(
                f"rank {number}: {name} is {each}, expected a rank: 0 to {comm.size - 1}"
            )
        if each != ranks[0]:
            raise RankMismatchError(
                f"rank {number}: {name} is {each}, expected {ranks[0]} as on rank 0"
            )
    agreed: int = ranks[0]
    return agreed


def check_same(comm: ObjectCommunicator, lines: Sequence[tuple[str, str]]) -> None:
    """Raise on every rank if the descriptions of the ranks differ. Collective: one small allreduce.

    Args:
        comm: The communicator whose ranks compare.
        lines: Pairs of this rank; see :func:`raise_mismatch`.

    Raises:
        RankMismatchError: See :func:`raise_mismatch`.
    """
    if not all(agree(comm, digest(lines))):
        raise_mismatch(comm, lines)


def shared(comm: ObjectCommunicator, root: int, make: Callable[[], Made]) -> Made:
    """Return on every rank what a function returns on one, or raise on every rank what it raises there. Collective.

    Args:
        comm: The communicator whose ranks share the result.
        root: The rank on which the function is called, the same on every rank.
        make: The function; what it returns can be pickled.

    Returns:
        The result itself on ``root``, copies elsewhere.

    Raises:
        BaseException: What ``make`` raised, see :func:`~chainer_dist.collectives.failures.raise_first`.
    """
    error: BaseException | None = None
    result: Any = None
    if comm.rank == root:
        try:
            result = make()
        except BaseException as caught:  # noqa: BLE001 - it is raised on every rank
            error = caught
    failure, result = comm.bcast_obj((describe_error(error), result), root=root)
    raise_first({root: failure}, error)
    return cast("Made", result)


def raise_mismatch(comm: ObjectCommunicator, lines: Sequence[tuple[str, str]]) -> NoReturn:
    """Raise the same :class:`RankMismatchError` on every rank. Collective.

    Args:
        comm: The communicator whose ranks disagree.
        lines: This rank's ``(subject, description)`` pairs, for example
            ``("/l1/W", "(3, 4) float32")``. Subjects are unique within a rank.

    Raises:
        RankMismatchError: Names the lowest rank that differs from rank 0, and the first subject.
    """
    everyone = [dict(rows) for rows in comm.allgather_obj(list(lines))]
    expected = everyone[0]
    for rank, got in enumerate(everyone[1:], start=1):
        for subject in [*expected, *(name for name in got if name not in expected)]:
            if got.get(subject) == expected.get(subject):
                continue
            if subject not in got:
                text = f"rank {rank}: {subject} is missing, it is {expected[subject]} on rank 0"
            elif subject not in expected:
                text = f"rank {rank}: {subject} is {got[subject]}, rank 0 has no {subject}"
            else:
                text = (
                    f"rank {rank}: {subject} is {got[subject]}, "
                    f"expected {expected[subject]} as on rank 0"
                )
            raise RankMismatchError(text)
    raise RankMismatchError(
        f"ranks disagree, but describe their values in the same words: {everyone[0]}"
    )
