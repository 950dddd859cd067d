"""Datasets for ranks whose model takes no input from data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sized


def create_empty_dataset(dataset: Sized) -> list[tuple[Any, ...]]:
    """Return a dataset of the same length whose samples are all ``()``. Local.

    For models that are split over ranks: those that get their input from another rank by
    ``recv`` still need an iterator that counts iterations and epochs. The same as ChainerMN's
    ``create_empty_dataset``.

    For example, where only rank 0 reads samples::

        train = train if comm.rank == 0 else chainer_dist.create_empty_dataset(train)
        iterator = chainer.iterators.SerialIterator(train, 100)

    Args:
        dataset: Anything with a length.

    Returns:
        A list of empty tuples.
    """
    return [()] * len(dataset)
