"""Items and their results, in chunks that travel, and what stands in the place of an item that has failed."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any, NamedTuple

from chainer_dist.collectives import messages
from chainer_dist.collectives.frames import raising_line
from chainer_dist.errors import FailedItem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["ITEM_ERRORS", "Block", "Chunk", "attempt", "failed_item", "pack_items", "unpack_items"]


# What an item may raise without ending the job. (After sys.exit on one rank the others would wait.)
ITEM_ERRORS = (Exception, SystemExit)


class Chunk(NamedTuple):
    """Some items that follow one another.

    Attributes:
        first: Index of the first, over the whole input.
        items: The items, some of which may be :class:`~chainer_dist.errors.FailedItem` already.
    """

    first: int
    items: Sequence[Any]


class Block(NamedTuple):
    """The results of a chunk.

    Attributes:
        first: Index of its first item, over the whole input.
        values: A result or a :class:`~chainer_dist.errors.FailedItem` for each item, in their order.
        failed: Those items that have none.
    """

    first: int
    values: Sequence[Any]
    failed: list[FailedItem]


def attempt(comm: CommunicatorBase, index: int, function: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a function for an item, or a failure if it raises an error. Local."""
    try:
        return function(*args)
    except ITEM_ERRORS as error:
        return failed_item(comm, index, error)


def failed_item(comm: CommunicatorBase, index: int, error: BaseException) -> FailedItem:
    """Return the failure of an item whose error was caught on this rank. Local."""
    text = "".join(traceback.format_exception_only(type(error), error)).strip()
    return FailedItem(index, comm.rank, f"{text} (at {raising_line(error)})")


def pack_items(
    comm: CommunicatorBase, first: int, values: Sequence[Any]
) -> tuple[Any, list[FailedItem]]:
    """Pickle items or results for another rank. Local.

    Returns:
        What can be sent, and those that could not be pickled and are replaced in it.
    """
    message, error = messages.pack(comm.rank, lambda: values)
    if error is None:
        return message, []
    kept, failed = [], []
    for index, value in enumerate(values, start=first):
        _, error = messages.pack(comm.rank, lambda value=value: value)  # type: ignore[misc]
        if error is not None:
            if not isinstance(error, ITEM_ERRORS):
                raise error
            failed.append(failed_item(comm, index, error))
        kept.append(value if error is None else failed[-1])
    return messages.pack(comm.rank, lambda: kept)[0], failed


def unpack_items(
    comm: CommunicatorBase, first: int, length: int, message: Any
) -> tuple[Any, list[FailedItem]]:
    """Return what was packed; if it cannot be unpickled, a failure for each item. Local."""
    try:
        return messages.unpack(message), []
    except ITEM_ERRORS as error:
        failed = [failed_item(comm, first + i, error) for i in range(length)]
        return failed, failed
