"""Shares of the batches of an iterator of any kind, against these batches."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import chainer
import numpy as np
import pytest

from chainer_dist.iterators.divided import DividedIterator
from chainer_dist.training.samples import fingerprint


class Batches(chainer.dataset.Iterator):
    """Yields batches that a function makes of numbers of samples."""

    def __init__(self, make, batch_size, n_batches=3):
        self.make, self.batch_size, self.n_batches, self.iteration = make, batch_size, n_batches, 0

    def __next__(self):
        if self.iteration == self.n_batches:
            raise StopIteration
        self.iteration += 1
        return self.make(np.arange(self.batch_size) + 100 * self.iteration)


def divided(comm, make, batch_size, **options):
    """Return an iterator that is divided."""
    return DividedIterator(Batches(make, batch_size, **options), comm, fingerprint=fingerprint)


class Pair(NamedTuple):
    """Arrays of all samples."""

    x: Any
    t: Any


MAKERS = {
    "list": list,
    "tuple of samples": lambda n: tuple((each, -each) for each in n),
    "tuple of vectors": lambda n: tuple(each * np.ones(5) for each in n),
    "array": lambda n: n[:, None] * np.ones(3),
    "tuple of arrays": lambda n: (n, n[:, None] * np.ones(3)),
    "named tuple": lambda n: Pair(n[:, None] * np.ones(3), n),
    "one array": lambda n: (n,),
    "dict": lambda n: {"x": n[:, None] * np.ones(3), "t": n},
}


@pytest.mark.parametrize("kind", MAKERS)
def test_shares_are_the_batch(comm, kind):
    """Side by side, in the order of rank, the shares have all samples, as the batch has them."""
    n = 4 * comm.size
    iterator = divided(comm, MAKERS[kind], n)
    for expected in Batches(MAKERS[kind], n):
        shares = comm.allgather_obj(next(iterator))
        assert {type(each) for each in shares} == {type(expected)}
        if kind in ("list", "tuple of samples", "tuple of vectors"):
            together = [sample for share in shares for sample in share]
            np.testing.assert_array_equal(together, [*expected])
        elif isinstance(expected, np.ndarray):
            np.testing.assert_array_equal(np.concatenate(shares), expected)
        else:
            for key in expected if isinstance(expected, dict) else range(len(expected)):
                both = np.concatenate([share[key] for share in shares])
                np.testing.assert_array_equal(both, expected[key])
    with pytest.raises(StopIteration):
        next(iterator)


REFUSED = {
    "as many arrays as samples": lambda n: tuple(np.ones(len(n)) for _ in n),
    "neither": lambda n: (n[:-1], n[:-1]),
    "arrays of two lengths": lambda n: (n, n[:-1]),
    "something else": lambda n: (n, "text"),
    "dict of something else": lambda n: {"x": n, "t": "text"},
    "dict of two lengths": lambda n: {"x": n, "t": n[:-1]},
    "empty dict": lambda _: {},
    "empty tuple": lambda _: (),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_shared(comm, kind):
    """It is an error on every rank, which says what to make of it."""
    with pytest.raises(TypeError, match=r"share a batch of Batches, .*make it a list of samples"):
        next(divided(comm, REFUSED[kind], 4 * comm.size))


def test_arrays_of_a_shorter_batch(comm):
    """The last batch of an epoch may have fewer rows; then they must have one length, too."""
    size = comm.size

    def make(n):
        return (n, n) if n[0] == 100 else (n[:size], n[: size * (n[0] < 300) + 1])

    iterator = divided(comm, make, 4 * size)
    assert [len(each) for each in next(iterator)] == [4, 4]
    if size == 1:
        return
    with pytest.raises(TypeError, match="ranks cannot share a batch"):
        next(iterator)


@pytest.mark.parametrize("kind", MAKERS)
def test_fewer_samples_are_filled_up(comm, kind):
    """All ranks get equally many of a shorter batch, whose first ones are repeated."""
    for missing in range(1, 4 * comm.size):
        iterator = divided(comm, MAKERS[kind], 4 * comm.size, n_batches=2)
        next(iterator)
        make = iterator.make
        iterator.make = lambda n, missing=missing, make=make: make(n[:-missing])
        share = next(iterator)
        of_arrays = kind in ("tuple of arrays", "named tuple", "one array", "dict")
        parts = [*(share.values() if kind == "dict" else share)] if of_arrays else [share]
        n = 4 * comm.size - missing
        each = -(-n // comm.size)
        assert {len(part) for part in parts} == {each}
        if kind == "list":
            everyone = [i for share in comm.allgather_obj(share) for i in share]
            assert everyone == [200 + i % n for i in range(each * comm.size)]


def test_batches_that_no_rank_can_share(comm):
    """Where the size of all batches is at fault, or there is none, every rank raises."""
    for n in {0, comm.size + 1} if comm.size > 1 else {0}:
        with pytest.raises(ValueError, match=f"of {n} samples .*make it a multiple of {comm.size}"):
            next(divided(comm, list, n))


def draw(n):
    """Return samples drawn at random, in both ways that there are."""
    return [(float(np.random.rand()), random.random()) for _ in n]


def test_random_numbers_are_those_of_rank_0(comm):
    """All ranks draw what rank 0 would have drawn alone, and the numbers of each rank stay its own."""
    np.random.seed(comm.rank)
    random.seed(comm.rank)
    iterator = divided(comm, draw, 2 * comm.size)
    shares = []
    for _ in range(2):
        shares.append(comm.allgather_obj(next(iterator)))
        np.random.rand(comm.rank)  # other numbers of the rank
    mine = np.random.rand(), random.random()

    np.random.seed(0)
    random.seed(0)
    for share in shares:
        assert [sample for each in share for sample in each] == draw(range(2 * comm.size))
    if comm.size > 1:  # a single rank goes on with these, as without the iterator
        np.random.seed(comm.rank)
        random.seed(comm.rank)
    np.random.rand(2 * comm.rank)
    assert mine == (np.random.rand(), random.random())


def test_an_error_leaves_the_numbers_alone(comm):
    """Where the iterator fails, each rank's own numbers are as they were."""
    if comm.size == 1:
        pytest.skip("a single rank draws from its own numbers, as without the iterator")

    def fail(_):
        np.random.rand()
        raise OSError("no such file")

    np.random.seed(3)
    with pytest.raises(OSError, match="no such file"):
        next(divided(comm, fail, comm.size))
    found = np.random.rand()
    np.random.seed(3)
    assert found == np.random.rand()
