"""Batches that are read at once, against the same samples read one after another."""

from __future__ import annotations

import chainer
import numpy as np
import pytest
from chainer import datasets, iterators
from hypothesis import given
from hypothesis import strategies as st

import chainer_dist
from chainer_dist.datasets.batches import read_batch, reads_batches
from chainer_dist.iterators import DistributedIterator
from dataset_kinds import assert_same_sample
from stored_files import FORMATS, make_samples

N = 6  # samples of each leaf


class Calls:
    """What datasets and functions were asked for, in order; some of it raises."""

    def __init__(self, bad=()):
        self.made = []
        self.reads = []
        self.bad = bad

    def make(self, name, value):
        """Return a value that no other call gets, or raise."""
        self.made.append((name, value))
        if (name, value) in self.bad:
            raise ValueError(f"{name} of {value}")
        return name, value, len(self.made)


class Leaf:
    """A dataset of numbers, which raises for some."""

    def __init__(self, calls, name):
        self.calls = calls
        self.name = name

    def __len__(self):
        return N

    def read(self, i):
        """Return sample ``i`` as Python's sequences do."""
        value = range(N)[i]
        if (self.name, value) in self.calls.bad:
            raise KeyError(f"{self.name} at {value}")
        return self.name, value


class Single(Leaf):
    """It cannot be indexed by a list, and knows in which order it is asked."""

    def __getitem__(self, i):
        return self.calls.make(self.name, self.read(i)[1])


class Batched(Leaf):
    """It can be read by batches, with an error that names all samples."""

    reads_batches = True

    def __getitem__(self, i):
        self.calls.reads.append(i)
        if not isinstance(i, list):
            return self.read(i)
        assert {*map(type, i)} <= {int}
        try:
            return [self.read(each) for each in i]
        except KeyError:
            raise KeyError(f"{self.name} at one of {i}") from None


class Function:
    """A function of a TransformDataset."""

    def __init__(self, calls, name):
        self.calls = calls
        self.name = name

    def __call__(self, sample):
        """Return what tells apart the sample, and when it was called."""
        made = self.calls.make(self.name, hash(repr(sample)) % 5)
        return made, sample


class OwnExample(datasets.TransformDataset):
    """Its samples are made in a way of its own."""

    def get_example(self, i):
        """Return more than Chainer's class does."""
        return "own", super().get_example(i)


class OwnItems(datasets.TupleDataset):
    """Its samples are found in a way of its own."""

    def __getitem__(self, i):
        return "own", super().__getitem__(i)


class Derived(datasets.TransformDataset):
    """Its samples are found in Chainer's way."""

    def __init__(self, dataset, transform, more):
        super().__init__(dataset, transform)
        self.more = more


def part_of(draw, below):
    """Return a SubDataset of a drawn interval, in an order with repetitions and negative indices, or in none."""
    start = draw(st.integers(0, len(below) - 1))
    finish = draw(st.integers(start + 1, len(below)))
    index = st.integers(-len(below), len(below) - 1)
    order = st.none() | st.lists(index, min_size=len(below), max_size=len(below))
    order = draw(order)
    return datasets.SubDataset(
        below, start, finish, order if draw(st.booleans()) else order and np.array(order)
    )


@st.composite
def trees(draw, calls, depth=3):
    """Draw a dataset, by Chainer's classes around leaves of both kinds."""
    name = draw(st.sampled_from("abc"))
    kind = (
        draw(st.sampled_from(["leaf", "transform", "part", "both", "tuple", "dict"]))
        if depth
        else "leaf"
    )
    if kind == "leaf":
        return draw(st.sampled_from([Batched, Batched, Single]))(calls, name)
    below = draw(trees(calls, depth - 1))
    if kind == "transform":
        function = Function(calls, name)
        return draw(
            st.sampled_from(
                [
                    datasets.TransformDataset(below, function),
                    Derived(below, function, None),
                    OwnExample(below, function),
                ]
            )
        )
    if kind == "part":
        return part_of(draw, below)
    other = draw(trees(calls, depth - 1))
    if kind == "both":
        return datasets.ConcatenatedDataset(below, other)
    n = min(len(below), len(other))
    below, other = (datasets.SubDataset(each, 0, n) for each in (below, other))
    if kind == "dict":
        return datasets.DictDataset(x=below, y=other)
    return draw(st.sampled_from([datasets.TupleDataset, OwnItems]))(below, other)


def outcome_of(make, calls):
    """Return what a function returns or raises, and the calls until then."""
    calls.made.clear()
    try:
        result = make()
    except (KeyError, ValueError, IndexError) as error:
        result = type(error), str(error)
    return result, [*calls.made]


@pytest.mark.mpi_skip
@given(
    data=st.data(), bad=st.sets(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), max_size=2)
)
def test_values_errors_and_calls_are_those_of_single_reads(data, bad):
    """Through any of Chainer's datasets within others: each function is called once for a sample, in order."""
    calls = Calls(bad)
    dataset = data.draw(trees(calls))
    indices = data.draw(st.lists(st.integers(0, len(dataset) - 1), max_size=5))
    expected, in_order = outcome_of(lambda: [dataset[i] for i in indices], calls)
    got, made = outcome_of(lambda: read_batch(dataset, indices), calls)
    assert got == expected
    assert made == in_order


@pytest.mark.mpi_skip
@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_read_at_once(tmp_path, name):
    """A batch through Chainer's datasets is one read of each file."""
    write, open_ = FORMATS[name]
    samples = make_samples(10)
    write(tmp_path / "a", samples[:6])
    write(tmp_path / "b", samples[6:])
    first, second = open_([tmp_path / "a"]), open_([tmp_path / "b"])
    both = datasets.ConcatenatedDataset(first, second)
    part = datasets.SubDataset(both, 1, 10, np.arange(10)[::-1])
    labelled = datasets.TupleDataset(part, list("abcdefghi"))
    dataset = datasets.TransformDataset(labelled, lambda sample: (*sample[0], sample[1]))
    indices = [5, 0, 8, 2, 5]
    expected = [(*samples[8 - i], "abcdefghi"[i]) for i in indices]
    wholes = [dataset[i] for i in indices]
    reads = []
    for opened in (first, second):
        own = opened._read
        opened._read = lambda wanted, own=own: reads.append(len(wanted)) or own(wanted)
    assert reads_batches(dataset)
    got = read_batch(dataset, indices)
    assert sorted(reads) == [2, 3]
    for one, other, whole in zip(got, expected, wholes):
        assert_same_sample(one, whole)
        np.testing.assert_array_equal(one[0], other[0])
        assert one[1:] == other[1:]
    got[0][0][...] = -1
    np.testing.assert_array_equal(got[4][0], expected[4][0])


@pytest.mark.mpi_skip
def test_which_datasets_are_read_by_batches():
    """Those that say so; and Chainer's own around one of these, unless they say otherwise."""
    calls = Calls()
    batched, single = Batched(calls, "a"), Single(calls, "b")

    def transformed(dataset, kind=datasets.TransformDataset):
        return kind(dataset, Function(calls, "c"))

    assert reads_batches(datasets.TupleDataset(single, transformed(batched)))
    assert reads_batches(datasets.DictDataset(x=single, y=batched))
    assert not reads_batches(datasets.TupleDataset(single, [1] * N))
    assert not reads_batches(transformed(batched, OwnExample))
    assert not reads_batches(transformed(transformed(batched, OwnExample)))
    assert not reads_batches(OwnItems(batched))
    refusing = transformed(batched)
    refusing.reads_batches = False
    assert not reads_batches(refusing)


@pytest.mark.mpi_skip
def test_other_numbers_of_samples_are_refused():
    """A dataset that takes its batch for a tuple of columns is told what to return."""

    class Columns(Batched):
        def __getitem__(self, i):
            return (i, i) if isinstance(i, list) else (i, i + 1)

    dataset = datasets.TransformDataset(Columns(Calls(), "a"), lambda sample: sample)
    with pytest.raises(TypeError, match="Columns has reads_batches, and returned 2 for 3 indices"):
        read_batch(dataset, [0, 1, 2])


def test_an_iterator_reads_through_them(comm):
    """In the order of a dataset that is read sample by sample."""
    calls = Calls()
    dataset = datasets.TransformDataset(Batched(calls, "a"), lambda sample: sample[1])
    batched = DistributedIterator(dataset, 2, comm, seed=1)
    plain = DistributedIterator(list(range(N)), 2, comm, seed=1)
    assert [next(batched) for _ in range(5)] == [next(plain) for _ in range(5)]
    assert [len(read) for read in calls.reads] == [2] * 5


@pytest.mark.parametrize("kind", [Batched, Single])
@pytest.mark.parametrize("loader", [iterators.SerialIterator, iterators.MultithreadIterator])
def test_an_iterator_stays_where_a_sample_raises(comm, kind, loader):
    """The next batch after an error is the one that could not be read."""
    calls = Calls()
    iterator = DistributedIterator(kind(calls, "a"), 2, comm, shuffle=False, make_iterator=loader)
    expected = [sample[:2] for sample in next(iterator)]
    iterator.reset()
    calls.bad = {("a", value) for value in range(N)}
    with pytest.raises(KeyError, match="'a at "):
        next(iterator)
    calls.bad = ()
    assert [sample[:2] for sample in next(iterator)] == expected
    iterator.finalize()


def test_a_trainer_reads_through_them(comm, tmp_path):
    """distribute() with a SerialIterator."""
    calls = Calls()
    dataset = datasets.TransformDataset(Batched(calls, "a"), lambda sample: np.float32([sample[1]]))
    model = chainer.Sequential(chainer.links.Linear(1, 1), chainer.functions.sum)
    optimizer = chainer.optimizers.SGD().setup(model)
    updater = chainer.training.StandardUpdater(iterators.SerialIterator(dataset, 3), optimizer)
    trainer = chainer.training.Trainer(updater, (4, "iteration"), out=tmp_path)
    chainer_dist.distribute(trainer, comm)
    calls.reads.clear()
    trainer.run()
    assert [len(read) for read in calls.reads] == [3] * 4
