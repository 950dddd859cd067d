"""Batches that are read at once, also through Chainer's datasets around what can be read so."""

from __future__ import annotations

import operator
from typing import Any

from chainer import datasets

from chainer_dist import _chainer
from chainer_dist.datasets.take import inherits_indexing

__all__ = ["read_batch", "reads_batches"]

_SELECTING = (datasets.SubDataset, datasets.ConcatenatedDataset)
_COMPOSING = (datasets.TransformDataset, datasets.TupleDataset, datasets.DictDataset)


def reads_batches(dataset: Any) -> bool:
    """Return whether a batch of a dataset, or of one that it takes samples from, can be read at once. Local.

    Args:
        dataset: Its attribute ``reads_batches`` decides, if it has one. Without it, one of Chainer's datasets
            around others, which has no indexing of its own, is looked through.
    """
    own = getattr(dataset, "reads_batches", None)
    return any(map(reads_batches, _within(dataset).values())) if own is None else bool(own)


def read_batch(dataset: Any, indices: list[int]) -> list[Any]:
    """Return ``[dataset[i] for i in indices]``, of which files are read at once. Local.

    Functions of a ``TransformDataset``, and datasets that cannot be read so, are called once for each sample,
    in the order of the samples.

    Args:
        dataset: Dataset of which :func:`reads_batches` is true.
        indices: Numbers of samples.

    Raises:
        Exception: What the first of these samples raises that cannot be made.
    """
    try:
        batch = _prepare(dataset, indices)
    except Exception:
        # The error of a sample names it, and an earlier sample may have another.
        for index in indices:
            dataset[index]
        raise
    return [batch[k] for k in range(len(indices))]


def _prepare(dataset: Any, indices: list[Any]) -> Any:
    """Return what has sample ``dataset[indices[k]]`` under each ``k``, with its files read."""
    if not reads_batches(dataset):
        return _Unread(dataset, indices)
    if getattr(dataset, "reads_batches", False):
        samples = dataset[[*map(operator.index, indices)]]  # those of an order may be NumPy's
        if len(samples) != len(indices):
            raise TypeError(
                f"{type(dataset).__qualname__} has reads_batches, and returned {len(samples)} for {len(indices)} "
                "indices: its __getitem__ must return a list with one sample for each"
            )
        return samples
    within = _within(dataset)
    if not isinstance(dataset, _SELECTING):
        return _over(dataset, {key: _prepare(each, indices) for key, each in within.items()})
    names = _over(dataset, {key: _Names(key, len(each)) for key, each in within.items()})
    wanted: dict[Any, list[Any]] = {key: [] for key in within}
    places = []
    for key, index in [names[i] for i in indices]:
        places.append((key, len(wanted[key])))
        wanted[key].append(index)
    return _Selected(
        {key: _prepare(within[key], found) for key, found in wanted.items() if found}, places
    )


def _within(dataset: Any) -> dict[Any, Any]:
    """Return the datasets that one of Chainer's takes samples from; none where it has a way of its own."""
    if not inherits_indexing(dataset, *_SELECTING, *_COMPOSING):
        return {}
    if isinstance(dataset, (datasets.SubDataset, datasets.TransformDataset)):
        return {0: _chainer.dataset_below(dataset)}
    within = _chainer.datasets_within(dataset)
    return within if isinstance(within, dict) else dict(enumerate(within))


def _over(dataset: Any, within: dict[Any, Any]) -> Any:
    """Return one of Chainer's datasets as it is, but with others in the place of those within."""
    kind = next(each for each in (*_SELECTING, *_COMPOSING) if isinstance(dataset, each))
    changed = object.__new__(kind)
    found = within if kind is datasets.DictDataset else tuple(within.values())
    vars(changed).update(vars(dataset), _dataset=within.get(0), _datasets=found)
    return changed


class _Unread:
    """Samples that are read when they are asked for."""

    def __init__(self, dataset: Any, indices: list[Any]) -> None:
        self._dataset = dataset
        self._indices = indices

    def __getitem__(self, k: int) -> Any:
        return self._dataset[self._indices[k]]


class _Names:
    """In the place of a dataset: its samples are its key and their indices."""

    def __init__(self, key: Any, length: int) -> None:
        self._key = key
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        return self._key, index


class _Selected:
    """Samples out of several batches, by their keys and their positions in these."""

    def __init__(self, batches: dict[Any, Any], places: list[tuple[Any, int]]) -> None:
        self._batches = batches
        self._places = places

    def __getitem__(self, k: int) -> Any:
        key, position = self._places[k]
        return self._batches[key][position]
