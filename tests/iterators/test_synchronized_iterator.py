"""Iterators of all ranks in one order, against Chainer's iterators and each other."""

from __future__ import annotations

import itertools
import multiprocessing
import time

import chainer
import numpy as np
import pytest
from chainer import iterators
from chainer.serializers import DictionarySerializer, NpzDeserializer
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import RankMismatchError
from chainer_dist.iterators import create_synchronized_iterator

ITERATORS = {
    "serial": iterators.SerialIterator,
    "threads": lambda *args, **options: iterators.MultithreadIterator(
        *args, n_threads=2, **options
    ),
}


@pytest.fixture
def processes():
    """Return a maker of MultiprocessIterators whose workers are not forked."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    made = []

    def make(data, batch_size, **options):
        data = np.asarray(data, dtype=np.float64)
        options = {"n_processes": 1, "shared_mem": 100, "n_prefetch": 4, **options}
        made.append(iterators.MultiprocessIterator(data, batch_size, **options))
        return made[-1]

    yield make
    for iterator in made:
        iterator.finalize()
    multiprocessing.set_start_method(before, force=True)


def agreed(comm, value):
    """Return a value after making sure that it is the same on all ranks."""
    assert comm.allgather_obj(value) == [value] * comm.size
    return value


def save(iterator):
    """Return what an iterator saves."""
    serializer = DictionarySerializer()
    serializer.save(iterator)
    return {key: np.array(value) for key, value in serializer.target.items()}


def restored(saved, iterator):
    """Load a dictionary that ``save`` made into an iterator."""
    NpzDeserializer(saved).load(iterator)
    return iterator


@given(
    n=st.integers(1, 20),
    batch_size=st.integers(1, 25),
    repeat=st.booleans(),
    kind=st.sampled_from([*ITERATORS]),
    seed=st.integers(0, 9),
)
def test_all_ranks_shuffle_alike(comm, n, batch_size, repeat, kind, seed):
    """Each epoch is a new permutation, the same on all ranks, whatever their random states."""
    np.random.seed([seed, comm.rank])
    plain = ITERATORS[kind](list(range(n)), batch_size, repeat=repeat, shuffle=True)
    iterator = create_synchronized_iterator(plain, comm)
    n_batches = -(-4 * n // batch_size) if repeat else -(-n // batch_size)
    batches = [next(iterator) for _ in range(n_batches)]
    agreed(comm, (batches, iterator.epoch, iterator.epoch_detail, iterator.is_new_epoch))
    seen = [*itertools.chain(*batches)]
    for start in range(0, len(seen) - n + 1, n):
        assert sorted(seen[start : start + n]) == [*range(n)]
    if not repeat:
        with pytest.raises(StopIteration):
            iterator.next()
        iterator.reset()
        assert sorted(itertools.chain(*agreed(comm, list(iterator)))) == [*range(n)]
    iterator.finalize()


def test_epochs_and_resets_differ(comm):
    """Orders are new in each epoch and after each reset; ranks' own random states are left alone."""
    np.random.seed(comm.rank)
    data = list(range(50))
    iterator = create_synchronized_iterator(iterators.SerialIterator(data, 50), comm)
    before = np.random.get_state()[1].tobytes()
    orders = []
    for _ in range(3):
        orders += [next(iterator), next(iterator)]
        iterator.reset()
    assert len({tuple(order) for order in agreed(comm, orders)}) == 6
    assert before == np.random.get_state()[1].tobytes()
    np.random.seed(0)
    again = [create_synchronized_iterator(iterators.SerialIterator(data, 50), comm) for _ in "12"]
    np.random.seed(0)
    once = create_synchronized_iterator(iterators.SerialIterator(data, 50), comm)
    assert next(once) == next(again[0]) != next(again[1])


@pytest.mark.parametrize("kind", ITERATORS)
def test_unshuffled_stays_unshuffled(comm, kind):
    """With shuffle=False the order is the dataset's (ChainerMN shuffles it)."""
    plain = ITERATORS[kind](list(range(5)), 2, shuffle=False)
    iterator = create_synchronized_iterator(plain, comm)
    assert [next(iterator) for _ in range(5)] == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]
    saved = save(iterator)
    assert next(restored(saved, create_synchronized_iterator(plain, comm))) == [0, 1]
    iterator.finalize()


def odd_first(order, position):
    """Return the odd indices in random order, then the even ones."""
    assert len(order) == 9
    assert 0 <= position < 9
    drawn = np.random.permutation(9)
    return np.concatenate([drawn[drawn % 2 == 1], drawn[drawn % 2 == 0]])


class Reversed:
    """A sampler with state, that returns a list."""

    def __call__(self, order, position):
        """Turn the order round."""
        assert position >= 0
        return [int(i) for i in order[::-1]]


class OwnGenerator(iterators.ShuffleOrderSampler):
    """A subclass with a generator of its own."""


@pytest.mark.parametrize("kind", ITERATORS)
def test_samplers_keep_their_kind(comm, kind):
    """A sampler of one's own goes on drawing as it does, the same on all ranks."""
    np.random.seed(comm.rank)

    def batches(sampler):
        plain = ITERATORS[kind](list(range(9)), 9, order_sampler=sampler)
        iterator = create_synchronized_iterator(plain, comm)
        before = np.random.get_state()[1].tobytes()
        drawn = agreed(comm, [next(iterator) for _ in range(3)])
        assert np.random.get_state()[1].tobytes() == before
        iterator.finalize()
        return drawn

    for drawn in batches(odd_first):
        assert [i % 2 for i in drawn] == [1] * 4 + [0] * 5
        assert sorted(drawn) == [*range(9)]
    turned = [*range(9)]
    assert batches(Reversed()) == [turned[::-1], turned, turned[::-1]]
    expected = np.random.RandomState(3)
    # One that prefetches draws for its first order when it is made, and again when it is reset.
    expected.permutation(9)
    drawn = batches(OwnGenerator(np.random.RandomState(3)))
    assert drawn == [expected.permutation(9).tolist() for _ in range(3)]


def test_what_differs_between_ranks_raises_on_all(comm):
    """Other lengths, batch sizes, samplers or seeds on one rank are an error on every rank."""
    last = comm.size - 1
    serial = iterators.SerialIterator
    with pytest.raises(ValueError, match="needs an iterator with an order_sampler"):
        create_synchronized_iterator(
            chainer.dataset.Iterator() if comm.rank == last else serial([1], 1), comm
        )
    with pytest.raises(TypeError, match="len"):
        create_synchronized_iterator(serial(None, 1, shuffle=False), comm)
    if comm.size == 1:
        return
    differing = {
        "the length of the dataset is 5": lambda odd: serial([0] * (4 + odd), 2),
        "batch_size is 3": lambda odd: serial([0] * 4, 2 + odd),
        "repeat is False": lambda odd: serial([0] * 4, 2, repeat=not odd),
        "order_sampler is None": lambda odd: serial([0] * 4, 2, shuffle=not odd),
        "is its generator seeded alike": lambda odd: serial(
            [0] * 90, 2, order_sampler=OwnGenerator(np.random.RandomState(odd))
        ),
    }
    for text, make in differing.items():
        with pytest.raises(RankMismatchError, match=f"rank {last}: .*{text}"):
            create_synchronized_iterator(make(int(comm.rank == last)), comm)


@pytest.mark.parametrize("n_batches", [0, 2, 3, 4, 6])
@pytest.mark.parametrize("kind", ITERATORS)
def test_a_resume_is_exact(comm, kind, n_batches):
    """A resumed run sees the very samples that the run which was saved goes on to see."""

    def make():
        return create_synchronized_iterator(ITERATORS[kind](list(range(7)), 2), comm)

    iterator = make()
    iterator.reset()
    for _ in range(n_batches):
        next(iterator)
    saved = comm.bcast_obj(save(iterator))
    other = restored(saved, make())
    for each in ("epoch", "current_position", "epoch_detail", "previous_epoch_detail"):
        assert getattr(other, each) == getattr(iterator, each)
    for _ in range(2):
        batches = [next(iterator) for _ in range(12)]
        assert agreed(comm, [next(other) for _ in range(12)]) == batches
        iterator.reset()
        other.reset()
    iterator.finalize()
    other.finalize()


def test_snapshots_of_plain_iterators_load(comm):
    """What another iterator saved gives order and position; what follows is the same everywhere."""
    plain = iterators.SerialIterator(list(range(9)), 2)
    expected = next(plain), next(plain), next(plain)
    saved = comm.bcast_obj(save(plain))
    iterator = create_synchronized_iterator(iterators.SerialIterator(list(range(9)), 2), comm)
    restored(saved, iterator)
    assert next(iterator) == comm.bcast_obj(next(plain))
    assert len(expected) + 1 == iterator.current_position / 2
    agreed(comm, [next(iterator) for _ in range(20)])


def test_prefetching_processes_stay_in_order(comm, processes):
    """Worker processes that are ahead of their ranks by any distance change no order."""
    iterator = create_synchronized_iterator(processes(range(6), 2, shuffle=True), comm)
    batches = []
    for _ in range(12):
        time.sleep(0.002 * comm.rank)
        batches.append(next(iterator))
    for start in range(0, 12, 3):
        assert sorted(itertools.chain(*batches[start : start + 3])) == [*range(6)]
    agreed(comm, batches)
    saved = agreed(comm, {key: value.tolist() for key, value in save(iterator).items()})
    after = [next(iterator) for _ in range(7)]
    other = create_synchronized_iterator(processes(range(6), 2, shuffle=True), comm)
    restored({key: np.array(value) for key, value in saved.items()}, other)
    assert agreed(comm, [next(other) for _ in range(7)]) == after
    other.reset()
    agreed(comm, [next(other) for _ in range(4)])
    other.finalize()
    iterator.finalize()


def test_attributes_are_the_wrapped_iterators(comm):
    """What is set on the wrapper is set on the iterator; creating it twice changes nothing."""
    plain = iterators.SerialIterator(list(range(4)), 2)
    iterator = create_synchronized_iterator(plain, comm)
    iterator.batch_size = 3
    assert plain.batch_size == 3
    twice = create_synchronized_iterator(create_synchronized_iterator(plain, comm), comm)
    first = [next(twice) for _ in range(4)]
    assert [len(batch) for batch in agreed(comm, first)] == [3] * 4
    saved = save(twice)
    after = [next(twice) for _ in range(4)]
    assert [next(restored(saved, twice))] + [next(twice) for _ in range(3)] == after
    del iterator, twice
    next(plain)
