"""Datasets of just some samples of a dataset: what is sent to a rank.

:func:`take` knows Chainer's datasets by class. None of its implementations loads a sample, so
lazy datasets stay lazy.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
from chainer import datasets
from chainer.dataset import DatasetMixin

from chainer_dist import _chainer
from chainer_dist.datasets.pickled_parts import Common


class Selection(DatasetMixin):  # type: ignore[misc]  # Chainer has no types
    """Some samples of a dataset of unknown kind, which is kept in full.

    Args:
        common: The dataset, wrapped so that it travels and is stored once a node.
        indices: int64 array of shape ``(n,)``: the samples in their order.
    """

    def __init__(self, common: Common, indices: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        self.common = common
        self.indices = indices

    @property
    def dataset(self) -> Any:
        """The whole dataset."""
        return self.common.value

    def __len__(self) -> int:
        return len(self.indices)

    def get_example(self, i: int) -> Any:
        """Return sample ``i``, loaded by the dataset at this moment."""
        return self.dataset[int(self.indices[i])]


@functools.singledispatch
def take(dataset: Any, indices: Any) -> Any:
    """Return a dataset of the samples at ``indices``, loading none of them. Local.

    ``scatter_dataset`` calls this on the root, once for each rank. Arrays, lists, tuples, ranges
    and Chainer's Tuple-, Dict-, Sub-, Transform-, Concatenated- and image file datasets are cut
    down to the samples asked for. For any other class (also for a subclass of these that has its
    own ``__getitem__``, ``__len__`` or ``get_example``) the result holds the *whole* dataset and
    the indices: right, and as lazy as the dataset is, but all of it is sent to every node, once.
    If that is too much, teach ``take`` the class::

        @chainer_dist.datasets.take.register(MyDataset)
        def _(dataset, indices):
            return MyDataset([dataset.paths[i] for i in indices])

    Args:
        dataset: Dataset with ``__getitem__`` and ``__len__``.
        indices: Integers in ``[0, len(dataset))``, shape ``(n,)``, in any order. An int64 array
            when ``scatter_dataset`` calls.

    Returns:
        A dataset of length ``n``, whose sample ``k`` is ``dataset[indices[k]]``. An interval of an
        array is a view of it; other samples are copied, and always contiguous in memory.

    Raises:
        IndexError: If an index is out of range.
        TypeError: If the indices are not integers.
    """
    return Selection(Common(dataset), _checked(indices, dataset))


@take.register(Selection)
def _(dataset: Selection, indices: Any) -> Any:
    return Selection(dataset.common, dataset.indices[_checked(indices, dataset)])


@take.register(np.ndarray)
def _(dataset: Any, indices: Any) -> Any:
    indices = _checked(indices, dataset)
    if isinstance(dataset, np.memmap):
        dataset = np.asarray(dataset)  # what is taken is an ordinary array in memory
    interval = _interval(indices)
    part = dataset[indices] if interval is None else dataset[interval]
    return np.ascontiguousarray(part) if type(part) is np.ndarray else part


@take.register(list)
@take.register(tuple)
@take.register(range)
def _(dataset: Any, indices: Any) -> Any:
    indices = _checked(indices, dataset)
    if not inherits_indexing(dataset, list, tuple, range):
        return Selection(Common(dataset), indices)
    interval = _interval(indices)
    if interval is None:
        return [dataset[i] for i in indices.tolist()]
    part = dataset[interval]
    return list(part) if isinstance(dataset, tuple) else part


@take.register(datasets.TupleDataset)
def _(dataset: datasets.TupleDataset, indices: Any) -> Any:
    indices = _checked(indices, dataset)
    if not inherits_indexing(dataset, datasets.TupleDataset):
        return Selection(Common(dataset), indices)
    columns = tuple(take(column, indices) for column in _chainer.datasets_within(dataset))
    return _copied(dataset, _datasets=columns, _length=len(indices))


@take.register(datasets.DictDataset)
def _(dataset: datasets.DictDataset, indices: Any) -> Any:
    indices = _checked(indices, dataset)
    if not inherits_indexing(dataset, datasets.DictDataset):
        return Selection(Common(dataset), indices)
    columns = {
        key: take(column, indices) for key, column in _chainer.datasets_within(dataset).items()
    }
    return _copied(dataset, _datasets=columns, _length=len(indices))


@take.register(datasets.SubDataset)
def _(dataset: datasets.SubDataset, indices: Any) -> Any:
    indices = _checked(indices, dataset)
    if not inherits_indexing(dataset, datasets.SubDataset):
        return Selection(Common(dataset), indices)
    return take_through(dataset, indices)


def take_through(dataset: datasets.SubDataset, indices: Any) -> Any:
    """Take samples of a SubDataset out of the dataset below it. Local."""
    found = _chainer.selected(dataset)
    below = _checked(indices, dataset) + found.start
    if found.order is not None:
        below = np.asarray(found.order, dtype=np.int64)[below]
    # SubDataset leaves a negative entry of its order to the dataset below, where it counts from
    # the end.
    return take(found.dataset, np.where(below < 0, below + len(found.dataset), below))


@take.register(datasets.TransformDataset)
def _(dataset: datasets.TransformDataset, indices: Any) -> Any:
    indices = _checked(indices, dataset)
    if not inherits_indexing(dataset, datasets.TransformDataset):
        return Selection(Common(dataset), indices)
    return _copied(dataset, _dataset=take(_chainer.dataset_below(dataset), indices))


@take.register(datasets.ConcatenatedDataset)
def _(dataset: datasets.ConcatenatedDataset, indices: Any) -> Any:
    indices = _checked(indices, dataset)
    if not inherits_indexing(dataset, datasets.ConcatenatedDataset):
        return Selection(Common(dataset), indices)
    ends = np.cumsum([len(each) for each in _chainer.datasets_within(dataset)], dtype=np.int64)
    owner = np.searchsorted(ends, indices, side="right")
    parts, sources = [], []
    for number, each in enumerate(_chainer.datasets_within(dataset)):
        (source,) = np.nonzero(owner == number)
        if len(source):
            parts.append(take(each, indices[source] - (ends[number] - len(each))))
            sources.append(source)
    part = datasets.ConcatenatedDataset(*parts)
    order = np.concatenate(sources) if sources else np.arange(0)
    if _interval(order) is not None:
        return part
    return datasets.SubDataset(part, 0, len(part), np.argsort(order))


@take.register(datasets.ImageDataset)
def _(dataset: datasets.ImageDataset, indices: Any) -> Any:
    return _take_attribute(dataset, indices, datasets.ImageDataset, "_paths")


@take.register(datasets.ZippedImageDataset)
def _(dataset: datasets.ZippedImageDataset, indices: Any) -> Any:
    return _take_attribute(dataset, indices, datasets.ZippedImageDataset, "_paths")


@take.register(datasets.LabeledImageDataset)
def _(dataset: datasets.LabeledImageDataset, indices: Any) -> Any:
    return _take_attribute(dataset, indices, datasets.LabeledImageDataset, "_pairs")


@take.register(datasets.LabeledZippedImageDataset)
def _(dataset: datasets.LabeledZippedImageDataset, indices: Any) -> Any:
    part = _take_attribute(dataset, indices, datasets.LabeledZippedImageDataset, "_pairs")
    if not isinstance(part, Selection):
        # The archive looks names up, and needs no list of them.
        archive = copy.copy(dataset._zipfile)  # noqa: SLF001 - Chainer's
        archive._paths = [path for path, _ in part._pairs]  # noqa: SLF001 - Chainer's
        part._zipfile = archive  # noqa: SLF001 - Chainer's
    return part


def _take_attribute(dataset: Any, indices: Any, cls: type, name: str) -> Any:
    """Copy a dataset that reads files, with only the files asked for in its list of them."""
    indices = _checked(indices, dataset)
    if not inherits_indexing(dataset, cls):
        return Selection(Common(dataset), indices)
    return _copied(dataset, **{name: take(getattr(dataset, name), indices)})


def _copied(dataset: Any, **attributes: Any) -> Any:
    """Return a copy, of the same class, with some attributes replaced."""
    part = copy.copy(dataset)
    vars(part).update(attributes)
    return part


def inherits_indexing(dataset: Any, *classes: type) -> bool:
    """Return whether samples are found as one of ``classes`` finds them, or in a way of its own."""
    own = type(dataset)
    return any(
        all(
            getattr(own, name, None) is getattr(cls, name, None)
            for name in ("__getitem__", "__len__", "get_example")
        )
        for cls in classes
    )


def _checked(indices: Any, dataset: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    array = np.asarray(indices)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            f"indices are integers of shape (n,), got {array.dtype} of shape {array.shape}"
        )
    size = len(dataset)
    outside = (array < 0) | (array >= size)
    if outside.any():
        raise IndexError(f"index {array[outside][0]} is not in a dataset of {size} samples")
    return array.astype(np.int64, copy=False)


def _interval(indices: np.ndarray[Any, np.dtype[np.int64]]) -> slice | None:
    """Return the slice that stands for ``indices``, or None if they are no ascending interval."""
    if len(indices) == 0:
        return slice(0, 0)
    first = int(indices[0])
    if indices[-1] - first != len(indices) - 1 or (np.diff(indices) != 1).any():
        return None
    return slice(first, first + len(indices))
