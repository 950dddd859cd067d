"""Batches of one rank's iterator on all ranks, against that iterator in one process."""

from __future__ import annotations

import itertools
import multiprocessing

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import iterators
from chainer.serializers import DictionarySerializer, NpzDeserializer
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import RankMismatchError, create_multi_node_optimizer
from chainer_dist.iterators import create_multi_node_iterator

ATTRIBUTES = ["epoch", "current_position", "is_new_epoch", "epoch_detail", "previous_epoch_detail"]

ITERATORS = {
    "serial": iterators.SerialIterator,
    "threads": lambda *args, **options: iterators.MultithreadIterator(
        *args, n_threads=2, **options
    ),
}

SAMPLES = {
    "float labels": [(np.float32(i), 0.7 * i) for i in range(5)],
    "dicts": [{"x": np.full(i, i), "name": f"sample {i}"} for i in range(4)],
    "triples": [(i, np.arange(3, dtype=np.uint8), None) for i in range(6)],
    "strings": ["a", "", "\N{SNOWMAN}"],
    "complex": list(np.arange(6).reshape(3, 2) * 1j),
    "big": [np.full((600, 1000), i, dtype=np.float16) for i in range(2)],
}


def position(iterator):
    """Return all that is public of an iterator's position."""
    return {name: getattr(iterator, name) for name in ATTRIBUTES}


def same(one, other):
    """Tell whether two batches have the same types, dtypes and bits."""
    if isinstance(one, np.ndarray):
        same_bits = one.tobytes() == other.tobytes()
        return one.dtype == other.dtype and one.shape == other.shape and same_bits
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def restored(saved, iterator):
    """Load a dictionary that ``save`` made into an iterator."""
    NpzDeserializer({key: np.asarray(value) for key, value in saved.items()}).load(iterator)
    return iterator


def save(iterator):
    """Return what an iterator saves."""
    serializer = DictionarySerializer()
    serializer.save(iterator)
    return {key: np.array(value) for key, value in serializer.target.items()}


@pytest.mark.parametrize("kind", SAMPLES)
def test_any_batch_arrives_to_the_bit(comm, kind):
    """Samples of any kind are on all ranks what they are on the master, whichever rank that is."""
    master = comm.size - 1
    plain = iterators.SerialIterator(SAMPLES[kind], 2, repeat=False, shuffle=False)
    mine = plain if comm.rank == master else None
    iterator = create_multi_node_iterator(mine, comm, rank_master=master)
    expected = list(iterators.SerialIterator(SAMPLES[kind], 2, repeat=False, shuffle=False))
    assert same(list(iterator), expected)
    with pytest.raises(StopIteration):
        iterator.next()


def test_the_size_of_batches_may_grow(comm):
    """It is that of the master's iterator, on which it is set."""
    mine = iterators.SerialIterator(range(9), 2, shuffle=False) if comm.rank == 0 else None
    iterator = create_multi_node_iterator(mine, comm)
    assert next(iterator) == [0, 1]
    iterator.batch_size = 3
    assert iterator.batch_size == 3
    assert next(iterator) == [2, 3, 4]
    assert iterator.batch_size == 3


def test_another_dataset(comm):
    """What is set is set on the master's iterator, and is no attribute of the others."""
    mine = iterators.SerialIterator(range(4), 2, shuffle=False) if comm.rank == 0 else None
    iterator = create_multi_node_iterator(mine, comm)
    assert next(iterator) == [0, 1]
    iterator.dataset = range(10, 14)
    assert next(iterator) == [12, 13]
    assert hasattr(iterator, "dataset") == (comm.rank == 0)


@given(
    n=st.integers(1, 20),
    batch_size=st.integers(1, 25),
    repeat=st.booleans(),
    kind=st.sampled_from([*ITERATORS]),
)
def test_positions_are_exact(comm, n, batch_size, repeat, kind):
    """Epoch, position and its fractions are those of the plain iterator after each batch."""

    def make():
        return ITERATORS[kind](list(range(n)), batch_size, repeat=repeat, shuffle=False)

    plain = make()
    iterator = create_multi_node_iterator(make(), comm)
    assert iterator.batch_size == batch_size
    assert iterator.repeat == repeat
    for _ in range(2):
        for _ in range(7):
            assert position(iterator) == position(plain)
            batch = next(plain, None)
            assert next(iterator, None) == batch
        plain.reset()
        iterator.reset()
    iterator.finalize()
    iterator.finalize()


def test_positions_beyond_single_precision(comm):
    """A position that float32 does not have arrives (ChainerMN sends it as float32)."""

    class Far(chainer.dataset.Iterator):
        epoch, is_new_epoch, current_position = 2**24 + 1, False, 2**24 + 1

        def __next__(self):
            return [1]

    iterator = create_multi_node_iterator(Far(), comm)
    assert next(iterator) == [1]
    assert iterator.epoch == iterator.current_position == 16777217


def test_worker_processes_on_the_master_only(comm):
    """A MultiprocessIterator prefetches on the master; its batches are on all ranks."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    plain = None
    try:
        if comm.rank == 0:
            plain = iterators.MultiprocessIterator(
                np.arange(5.0), 2, shuffle=True, n_processes=1, shared_mem=100
            )
        iterator = create_multi_node_iterator(plain, comm)
        batches = [next(iterator) for _ in range(5)]
        assert sorted(itertools.chain(*batches)) == sorted([*range(5)] * 2)
        assert comm.allgather_obj(batches) == [batches] * comm.size
        assert position(iterator) == comm.bcast_obj(position(iterator))
        iterator.finalize()
    finally:
        multiprocessing.set_start_method(before, force=True)


class Pipeline(chainer.dataset.Iterator):
    """An iterator of another make, as DaliIterator is: no dataset, no state, no list."""

    epoch = 0
    current_position = 0
    epoch_size = 6
    is_new_epoch = False

    @property
    def epoch_detail(self):
        """Return the epoch and a fraction."""
        return self.epoch + self.current_position / self.epoch_size

    def __next__(self):
        self.current_position += 2
        return {"position": self.current_position}

    def serialize(self, serializer):
        """Save the position, and something of one's own."""
        serializer("own", 1)
        for name in ("current_position", "epoch", "is_new_epoch"):
            setattr(self, name, serializer(name, getattr(self, name)))


def test_iterators_of_another_make(comm):
    """What an iterator has is on all ranks; what it has not is missing on all ranks."""
    iterator = create_multi_node_iterator(Pipeline() if comm.rank == 0 else None, comm)
    assert next(iterator) == {"position": 2}
    assert iterator.epoch_detail == 2 / 6
    for name in ("previous_epoch_detail", "batch_size"):
        with pytest.raises(AttributeError, match=name):
            getattr(iterator, name)
    saved = comm.bcast_obj(save(iterator))
    other = restored(saved, create_multi_node_iterator(Pipeline(), comm))
    assert other.epoch_detail == 2 / 6
    with pytest.raises(AttributeError, match="reset"):
        iterator.reset()


def test_an_error_of_the_dataset_is_raised_on_all(comm):
    """A sample that cannot be loaded on the master, or sent, raises on every rank; then it goes on."""

    class Dataset(chainer.dataset.DatasetMixin):
        def __len__(self):
            return 6

        def get_example(self, i):
            if i == 2:
                raise ArithmeticError("sample 2 is broken")
            return (lambda: None) if i == 4 else i

    iterator = create_multi_node_iterator(
        iterators.SerialIterator(Dataset(), 2, shuffle=False), comm
    )
    assert next(iterator) == [0, 1]
    with pytest.raises(ArithmeticError, match="sample 2 is broken"):
        next(iterator)
    with pytest.raises(Exception, match="lambda"):
        next(iterator)
    if comm.size > 1:
        assert next(iterator) == [0, 1]


def test_bad_arguments_raise_on_all(comm):
    """No iterator on the master, no such rank, or different ranks, are errors everywhere."""
    last = comm.size - 1
    with pytest.raises(TypeError, match="rank_master 0, got NoneType"):
        create_multi_node_iterator(None if comm.rank == 0 else iter([]), comm)
    with pytest.raises(ValueError, match=f"rank_master is {comm.size}, expected a rank"):
        create_multi_node_iterator(iter([]), comm, comm.size if comm.rank == last else 0)
    with pytest.raises(ValueError, match="rank_master is -1"):
        create_multi_node_iterator(iter([]), comm, -1 if comm.rank == last else 0)
    with pytest.raises(ValueError, match="rank_master is None, expected a rank"):
        create_multi_node_iterator(iter([]), comm, None if comm.rank == last else 0)
    if comm.size > 1:
        with pytest.raises(RankMismatchError, match=f"rank {last}: rank_master is {last}"):
            create_multi_node_iterator(iter([]), comm, last if comm.rank == last else 0)


@pytest.mark.parametrize("source", ["master", "another", "own", "plain", "partly"])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", ITERATORS)
def test_a_resume_goes_on_on_all_ranks(comm, kind, shuffle, source):
    """Any rank's snapshot, and one of a plain iterator, resumes; the ranks end up with the master."""

    def make(n=7):
        return ITERATORS[kind](list(range(n)), 2, shuffle=shuffle)

    np.random.seed(comm.rank)
    plain, iterator = make(), create_multi_node_iterator(make(), comm)
    for _ in range(2):
        next(plain)
        next(iterator)
    writer = {"master": 0, "another": comm.size - 1, "plain": 0, "partly": 0, "own": comm.rank}
    saved = comm.allgather_obj(save(plain if source == "plain" else iterator))[writer[source]]
    other = create_multi_node_iterator(make(), comm)
    if source != "partly" or comm.rank == 0:
        restored(saved, other)
        assert position(other) == position(iterator)
    batches = [next(other)]
    assert comm.allgather_obj(batches) == [batches] * comm.size
    assert position(other) == comm.bcast_obj(position(other))
    orders = {str(value) for key, value in save(other).items() if "order" in key and value.ndim}
    assert comm.allgather_obj(orders) == [orders] * comm.size
    assert batches == [comm.bcast_obj(next(plain)) if source == "plain" else next(iterator)]
    batches = [next(other) for _ in range(4)]
    assert comm.allgather_obj(batches) == [batches] * comm.size
    for each in (plain, iterator, other):
        each.finalize()


def test_training_equals_one_process(comm, tmp_path):
    """A Trainer on all ranks runs the master's batches, as one process alone would."""
    data = [(np.array([i, -i], np.float32), np.float32(i)) for i in range(6)]

    def train(iterator, optimizer, out):
        model = L.Classifier(L.Linear(2, 1, initialW=0.1), lossfun=lossfun)
        model.compute_accuracy = False
        updater = chainer.training.StandardUpdater(iterator, optimizer.setup(model))
        trainer = chainer.training.Trainer(updater, (2, "epoch"), out=str(out))
        trainer.run()
        return model.predictor.W.array, updater.epoch_detail

    def lossfun(y, t):
        return F.mean_squared_error(y[:, 0], t)

    serial = iterators.SerialIterator(data, 4, shuffle=False)
    expected = train(serial, chainer.optimizers.SGD(0.01), tmp_path / "alone")
    plain = iterators.SerialIterator(data, 4, shuffle=False) if comm.rank == 0 else None
    iterator = create_multi_node_iterator(plain, comm)
    optimizer = create_multi_node_optimizer(chainer.optimizers.SGD(0.01), comm)
    weights, epochs = train(iterator, optimizer, tmp_path / "together")
    np.testing.assert_allclose(weights, expected[0], rtol=1e-6)
    assert epochs == expected[1]
