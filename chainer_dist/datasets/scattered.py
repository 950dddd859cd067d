"""The dataset that a rank gets: its part, and which samples of it are another rank's as well."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from chainer import datasets

from chainer_dist import _chainer
from chainer_dist.datasets.take import take, take_through

Mask = np.ndarray[Any, np.dtype[np.bool_]]


class ScatteredDataset(datasets.SubDataset):  # type: ignore[misc]  # Chainer has no types
    """One rank's part of a scattered dataset.

    Args:
        dataset: Dataset that holds the part.
        start: First position of the part in it.
        finish: Position after the last.
        order: Permutation of the dataset, or of a part of it, or None.
        n_own: How many leading samples are no other rank's; None stands for all.
    """

    def __init__(
        self, dataset: Any, start: int, finish: int, order: Any = None, n_own: int | None = None
    ) -> None:
        super().__init__(dataset, start, finish)
        self._order = order
        self._n_own = len(self) if n_own is None else n_own

    @property
    def n_own(self) -> int:
        """How many leading samples are no other rank's.

        What follows them duplicates other samples, of the next rank or of this one, so that all
        parts are equally long.
        """
        return self._n_own

    def get_example(self, i: int) -> Any:
        """Return sample ``i`` of the part; a negative one counts from the end."""
        index = range(self._start, self._finish)[i]
        if self._order is not None:
            index = self._order[index]
        # Some datasets do not take the NumPy integers of an iterator or an order for integers.
        return self._dataset[int(index)]


take.register(ScatteredDataset)(take_through)


@functools.singledispatch
def own_samples(dataset: Any) -> Mask | None:
    """Return which samples count for this rank, when every sample is to count once. Local.

    Args:
        dataset: A :class:`ScatteredDataset`, one of Chainer's datasets around some, or any other.

    Returns:
        bool array of shape ``(len(dataset),)``, False where the sample is a duplicate of another
        rank's. None where no duplicate is known.
    """
    del dataset
    return None


@own_samples.register(ScatteredDataset)
def _(dataset: ScatteredDataset) -> Mask | None:
    if dataset.n_own == len(dataset):
        return None
    return np.arange(len(dataset)) < dataset.n_own


@own_samples.register(datasets.TransformDataset)
def _(dataset: datasets.TransformDataset) -> Mask | None:
    return own_samples(_chainer.dataset_below(dataset))


@own_samples.register(datasets.SubDataset)
def _(dataset: datasets.SubDataset) -> Mask | None:
    found = _chainer.selected(dataset)
    mask = own_samples(found.dataset)
    if mask is None:
        return None
    if found.order is not None:
        mask = mask[np.asarray(found.order)]
    return mask[found.start : found.finish]


@own_samples.register(datasets.TupleDataset)
def _(dataset: datasets.TupleDataset) -> Mask | None:
    return _all_own(_chainer.datasets_within(dataset))


@own_samples.register(datasets.DictDataset)
def _(dataset: datasets.DictDataset) -> Mask | None:
    return _all_own(_chainer.datasets_within(dataset).values())


def _all_own(columns: Any) -> Mask | None:
    masks = [mask for mask in map(own_samples, columns) if mask is not None]
    return functools.reduce(np.logical_and, masks) if masks else None


@own_samples.register(datasets.ConcatenatedDataset)
def _(dataset: datasets.ConcatenatedDataset) -> Mask | None:
    masks = [own_samples(each) for each in _chainer.datasets_within(dataset)]
    if all(mask is None for mask in masks):
        return None
    filled: Mask = np.concatenate(
        [
            np.ones(len(each), dtype=bool) if mask is None else mask
            for each, mask in zip(_chainer.datasets_within(dataset), masks)
        ]
    )
    return filled


def hides_duplicates(dataset: Any) -> bool:
    """Tell whether a user's own dataset holds one with duplicates, that it may yield. Local."""
    held = getattr(dataset, "__dict__", {}).values()
    return own_samples(dataset) is None and any(own_samples(each) is not None for each in held)
