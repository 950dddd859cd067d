"""Datasets of every kind, for the tests of what cuts and scatters them."""

from __future__ import annotations

import numpy as np
from chainer import datasets
from chainer.dataset import DatasetMixin


def double(sample):
    """Transform a sample, whatever it consists of."""
    if isinstance(sample, tuple):
        return tuple(map(double, sample))
    return sample * 2


class LazyDataset(DatasetMixin):
    """A dataset of unknown kind that knows how often, and by what index, it was asked."""

    def __init__(self, n):
        self.table = np.arange(3000.0 * n).reshape(n, 3000)
        self.loads = 0
        self.index_types = set()

    def __len__(self):
        return len(self.table)

    def get_example(self, i):
        """Load sample ``i``."""
        self.loads += 1
        self.index_types.add(type(i))
        return self.table[i].sum(), int(i)


class ReversedTuples(datasets.TupleDataset):
    """A subclass whose samples are not where TupleDataset has them."""

    def __getitem__(self, index):
        return super().__getitem__(len(self) - 1 - index)


class NamedList(list):
    """A list in all but name."""


class MirroredList(list):
    """A list with indexing of its own."""

    def __getitem__(self, index):
        return super().__getitem__(len(self) - 1 - index)


def _permuted_part(n):
    base = np.arange(7.0 * (n + 5)).reshape(n + 5, 7)
    return datasets.SubDataset(base, 2, n + 2, np.random.RandomState(n).permutation(n + 5))


def _memmap(n):
    return np.arange(4.0 * n).reshape(n, 4).view(np.memmap)


KINDS = {
    "matrix": lambda n: np.arange(3 * n, dtype=np.float32).reshape(n, 3),
    "large rows": lambda n: np.arange(2000 * n, dtype=np.int32).reshape(n, 20, 100),
    "labels": lambda n: np.arange(n) % 10,
    "Fortran order": lambda n: np.asfortranarray(np.arange(5.0 * n).reshape(n, 5)),
    "strided": lambda n: np.arange(12.0 * n).reshape(2 * n, 6)[::2, ::-2],
    "float16": lambda n: np.arange(n).astype(np.float16),
    "datetime64": lambda n: np.arange(n).astype("M8[s]"),
    "structured": lambda n: np.ones(n, dtype=[("x", "f4"), ("y", "i8", (2,))]),
    "objects": lambda n: np.array([str(i) for i in range(n)], dtype=object),
    "memmap": _memmap,
    "list": lambda n: [(np.full(2000, i), i) for i in range(n)],
    "tuple": lambda n: tuple(range(n)),
    "range": lambda n: range(5, 5 + n),
    "named list": lambda n: NamedList(range(n)),
    "mirrored list": lambda n: MirroredList(range(n)),
    "tuples": lambda n: datasets.TupleDataset(KINDS["large rows"](n), list(range(n))),
    "reversed tuples": lambda n: ReversedTuples(KINDS["matrix"](n), KINDS["labels"](n)),
    "dicts": lambda n: datasets.DictDataset(x=KINDS["matrix"](n), t=KINDS["labels"](n)),
    "interval": lambda n: datasets.SubDataset(list(range(n + 4)), 3, n + 3),
    "permuted": _permuted_part,
    "transformed": lambda n: datasets.TransformDataset(KINDS["tuples"](n), double),
    "concatenated": lambda n: datasets.ConcatenatedDataset(
        np.arange(n // 3), list(range(n // 2 - n // 3)), np.arange(n - n // 2) * 5
    ),
    "lazy": LazyDataset,
    "lazy among tuples": lambda n: datasets.TupleDataset(LazyDataset(n), KINDS["labels"](n)),
}


def assert_same_sample(got, expected):
    """Check that two samples are equal in structure, dtype, shape and values."""
    if isinstance(expected, (tuple, list)):
        assert type(got) is type(expected)
        assert len(got) == len(expected)
        for one, other in zip(got, expected):
            assert_same_sample(one, other)
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            assert_same_sample(got[key], expected[key])
    elif isinstance(expected, (np.ndarray, np.generic)):
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        np.testing.assert_array_equal(got, expected)
    else:
        assert type(got) is type(expected)
        assert got == expected


def assert_same_samples(got, expected):
    """Check that a dataset has exactly the samples of a list, by every way of indexing."""
    assert len(got) == len(expected)
    for i, sample in enumerate(expected):
        assert_same_sample(got[i], sample)
        assert_same_sample(got[i - len(expected)], sample)
        assert_same_sample(got[np.intp(i)], sample)
