"""Errors that every rank raises together."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "FailedItem",
    "FailedItemsError",
    "FinalizedCommunicatorError",
    "NonFiniteGradientError",
    "RankMismatchError",
]


class RankMismatchError(ValueError):
    """Ranks that must agree passed different arguments to one operation.

    Raised on every rank of the communicator with the same text, which names the first rank that
    differs from rank 0 and what differs (the parameter, its shape or dtype, the option).
    """


class NonFiniteGradientError(ValueError):
    """A gradient has NaN or infinity on some rank before it is averaged, or after that.

    Raised in checked mode (``CHAINER_DIST_CHECKED=1``) on every rank with the same text, which names
    the lowest rank that has one, the parameter, and how many values are affected. An average would
    spread them to all ranks. In Chainer's debug mode (``chainer.set_debug``) averages are checked,
    which a sum that is too large makes infinite.
    """


class FinalizedCommunicatorError(RuntimeError):
    """A communicator was used after its ``finalize()``."""


@dataclasses.dataclass(frozen=True)
class FailedItem:
    """A failed item, which stands in the place of its result.

    Attributes:
        index: Index of the item, counted from 0 over the whole input.
        rank: Rank on which it failed.
        error: Class and text of the error, and the line of the script that raised it.
    """

    index: int
    rank: int
    error: str

    def __str__(self) -> str:
        return f"item {self.index} failed on rank {self.rank}: {self.error}"


class FailedItemsError(RuntimeError):
    """Some items of :func:`~chainer_dist.pmap` or :func:`~chainer_dist.predict` failed.

    Raised on every rank with the same text, after all other items were computed.

    For example, to compute the failed items again::

        try:
            results = list(chainer_dist.pmap(function, items, comm))
        except chainer_dist.FailedItemsError as error:
            again = [items[each.index] for each in error.failures]

    Attributes:
        failures: A :class:`FailedItem` for each, in the order of their indices, on every rank.
        results: All results in their places, with failures in theirs, on the ranks that were to get them,
            if results were collected; None elsewhere.
    """

    _SHOWN = 5

    def __init__(self, failures: Sequence[FailedItem], results: Any = None) -> None:
        self.failures = list(failures)
        self.results = results
        lines = [str(each) for each in self.failures[: self._SHOWN]]
        more = len(self.failures) - len(lines)
        if more:
            lines.append(f"and {more} more")
        super().__init__("\n  ".join([f"{len(self.failures)} of the items failed:", *lines]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.failures, self.results)
