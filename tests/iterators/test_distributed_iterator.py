"""One order for all ranks, against one process that has the batches of all of them."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
from collections import Counter

import chainer
import numpy as np
import pytest
from chainer import iterators, serializers, training
from hypothesis import given, settings
from hypothesis import strategies as st

from chainer_dist import RankMismatchError, create_communicator, create_multi_node_optimizer
from chainer_dist.datasets import FilesDataset
from chainer_dist.iterators.distributed_iterator import DistributedIterator, _OwnOrder


@pytest.fixture(scope="module")
def groups():
    """Return communicators over the first 1, 2, ... ranks, None where a rank is none of them."""
    from mpi4py import MPI

    world = create_communicator("naive")
    made = [
        world.split(0 if world.rank < size else MPI.UNDEFINED, world.rank)
        for size in range(1, world.size + 1)
    ]
    yield made
    for each in made:
        if each is not None:
            each.finalize()
    world.finalize()


@pytest.fixture
def alone():
    """Return a communicator of this rank alone."""
    from mpi4py import MPI

    with create_communicator("naive", MPI.COMM_SELF) as communicator:
        yield communicator


def take(iterator, n_batches):
    """Return the samples of some batches, batch by batch."""
    return [next(iterator) for _ in range(n_batches)]


def epochs_of(samples, n):
    """Check that every n samples in turn are all of them once; return how many epochs that is."""
    for begin in range(0, len(samples) - n + 1, n):
        assert sorted(samples[begin : begin + n]) == list(range(n))
    rest = Counter(samples[len(samples) // n * n :])
    assert set(rest.values()) <= {1}
    return len(samples) // n


def save(iterator):
    """Return what a snapshot has of an iterator."""
    saved = serializers.DictionarySerializer()
    iterator.serialize(saved)
    return saved.target


def load(iterator, saved):
    """Load what :func:`save` returned."""
    iterator.serialize(serializers.NpzDeserializer(saved))


@settings(max_examples=15)
@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 7),
    shuffle=st.booleans(),
    seed=st.sampled_from([0, 1, 2**32 - 1]),
    n_batches=st.integers(1, 12),
)
def test_ranks_together_have_the_batches_of_one_process(
    comm, alone, n, batch_size, shuffle, seed, n_batches
):
    """Side by side, the ranks' batches are one process's; every epoch has every sample once."""
    options = {"shuffle": shuffle, "seed": seed}
    mine = DistributedIterator(range(n), batch_size, comm, **options)
    whole = DistributedIterator(range(n), batch_size * comm.size, alone, **options)
    seen = []
    for _ in range(n_batches):
        together = list(itertools.chain(*comm.allgather_obj(next(mine))))
        assert together == next(whole)
        seen += together
        assert mine.epoch == whole.epoch == len(seen) // n
        for name in ("current_position", "epoch_detail", "previous_epoch_detail", "is_new_epoch"):
            assert getattr(mine, name) == getattr(whole, name)
    epochs_of(seen, n)


def test_epochs_are_counted_as_by_chainers_iterator(alone):
    """On one rank all attributes are those of a SerialIterator, batch by batch."""
    for n, batch_size in [(10, 3), (6, 3), (2, 5), (1, 1)]:
        ours = DistributedIterator(range(n), batch_size, alone, shuffle=False)
        theirs = iterators.SerialIterator(range(n), batch_size, shuffle=False)
        for _ in range(12):
            for name in ("epoch", "current_position", "is_new_epoch", "repeat", "batch_size"):
                assert getattr(ours, name) == getattr(theirs, name)
            for name in ("epoch_detail", "previous_epoch_detail"):
                assert getattr(ours, name) == pytest.approx(getattr(theirs, name))
            assert next(ours) == next(theirs)


@pytest.mark.parametrize("kind", [iterators.SerialIterator, iterators.MultithreadIterator])
def test_the_size_of_batches_may_grow(comm, kind):
    """Batches of one size go on where those of another have ended; Chainer's iterators may have read ahead."""
    ours = DistributedIterator(range(40), 1, comm, shuffle=False, make_iterator=kind)
    theirs = iterators.SerialIterator(range(40), comm.size, shuffle=False)
    for number, size in enumerate((1, 1, 3, 3, 2, 4)):
        if number == 2:
            with pytest.raises(ValueError, match="batch_size is 0"):
                ours.batch_size = 0
        if number > 1:
            ours.batch_size, theirs.batch_size = np.int64(size), size * comm.size
        assert [*itertools.chain(*comm.allgather_obj(next(ours)))] == next(theirs)
        assert (ours.epoch, ours.current_position) == (theirs.epoch, theirs.current_position)


@pytest.mark.parametrize("kind", [iterators.SerialIterator, iterators.MultithreadIterator])
def test_another_dataset(comm, kind):
    """Batches are of the dataset that was set last, in the same order; Chainer's iterators may have read ahead."""
    iterator = DistributedIterator(range(40), 2, comm, shuffle=False, make_iterator=kind)
    next(iterator)
    iterator.dataset = range(100, 140)
    assert iterator.dataset == range(100, 140)
    start = 100 + 2 * (comm.size + comm.rank)
    assert next(iterator) == [start, start + 1]
    with pytest.raises(
        ValueError, match="the dataset has 3 samples, and the one of this iterator has 40"
    ):
        iterator.dataset = range(3)


@given(data=st.data())
def test_a_resume_at_another_size_goes_on_with_what_is_left(comm, groups, data):
    """Whatever the sizes and batch sizes before and after, each epoch has each sample once."""
    n = data.draw(st.integers(1, 30))
    seed = data.draw(st.integers(0, 3))
    seen, saved = [], None
    for _ in range(3):
        group = groups[data.draw(st.integers(1, comm.size)) - 1]
        batch_size = data.draw(st.integers(1, 6))
        n_batches = data.draw(st.integers(0, 8))
        saver = data.draw(st.integers(0, comm.size - 1))
        part = None
        if group is not None:
            # The seed of a snapshot counts, not the one given on a resume.
            iterator = DistributedIterator(
                range(n), batch_size, group, seed=seed if saved is None else seed + 1
            )
            if saved is not None:
                load(iterator, saved)
            batches = take(iterator, n_batches)
            part = group.gather_obj(batches)
            assert iterator.epoch * n + iterator.current_position == (
                len(seen) + n_batches * batch_size * group.size
            )
            assert iterator.seed == seed
            saved = save(iterator)
        part = comm.bcast_obj(part)
        for batches in zip(*part):
            seen += itertools.chain(*batches)
        saved = comm.bcast_obj(saved, root=saver % len(part))
    epochs_of(seen, n)


@given(
    n=st.integers(1, 200),
    batch_size=st.integers(1, 9),
    size=st.integers(1, 9),
    start=st.integers(0, 500),
    seed=st.none() | st.integers(0, 2**32 - 1),
)
def test_orders_of_many_ranks_fit_together(n, batch_size, size, start, seed):
    """For any number of ranks and any beginning, all ranks' indices are the one order of all."""

    def order(rank, size, batch_size, n_chunks):
        chunks = _OwnOrder(n, batch_size, rank, size, seed=seed, position=start)
        return np.concatenate([chunks(None, 0) for _ in range(n_chunks)]).reshape(-1, batch_size)

    ranks = [order(rank, size, batch_size, 2) for rank in range(size)]
    together = np.concatenate(ranks, axis=1).ravel()
    alone = order(0, 1, 1, 2 + len(together) // n).ravel()
    np.testing.assert_array_equal(together, alone[: len(together)])
    epochs_of(together[-start % n :].tolist(), n)


def test_shuffles_differ_between_epochs_and_seeds(comm):
    """Every epoch and every seed has an order of its own; a drawn seed is the same everywhere."""
    n = 60 * comm.size
    orders = []
    for seed in (0, 1, None):
        iterator = DistributedIterator(range(n), 60, comm, seed=seed)
        orders += [
            tuple(itertools.chain(*comm.allgather_obj(batch))) for batch in take(iterator, 2)
        ]
        assert len(set(comm.allgather_obj(iterator.seed))) == 1
    assert len(set(orders)) == len(orders)
    assert all(sorted(order) == list(range(n)) for order in orders)


def test_drawn_seeds_follow_numpys(comm):
    """As with Chainer's iterators, ``numpy.random.seed`` makes a run repeatable."""
    seeds = []
    for _ in range(2):
        np.random.seed(5 + comm.rank)
        seeds.append(DistributedIterator([1], 1, comm).seed)
    assert seeds[0] == seeds[1]
    assert DistributedIterator([1], 1, comm).seed != seeds[0]


def test_reset_starts_again(comm):
    """After reset() everything is as it was at first, with the same orders."""
    iterator = DistributedIterator(range(7), 2, comm)
    first = take(iterator, 5)
    iterator.reset()
    assert (iterator.epoch, iterator.current_position, iterator.is_new_epoch) == (0, 0, False)
    assert iterator.previous_epoch_detail is None
    assert take(iterator, 5) == first


def test_samples_are_those_of_the_dataset(comm):
    """Any dataset that takes Python's and NumPy's integers will do."""
    table = np.arange(12.0).reshape(6, 2)
    iterator = DistributedIterator(chainer.datasets.TupleDataset(table, range(6)), 3, comm)
    for row, number in next(iterator):
        np.testing.assert_array_equal(row, table[number])


def test_threads_prefetch_the_same(comm):
    """A MultithreadIterator loads the same batches, and a resume throws away what it prefetched."""
    threads = functools.partial(iterators.MultithreadIterator, n_threads=2)
    plain = DistributedIterator(range(23), 3, comm, seed=1)
    prefetching = DistributedIterator(range(23), 3, comm, seed=1, make_iterator=threads)
    assert take(prefetching, 10) == take(plain, 10)
    saved = save(prefetching)
    expected = take(plain, 10)
    assert take(prefetching, 10) == expected
    load(prefetching, saved)
    assert take(prefetching, 10) == expected
    prefetching.finalize()
    assert take(prefetching, 2) == take(plain, 2)
    prefetching.finalize()


class Batched:
    """A dataset that reads a list of indices at once, and counts what it reads."""

    reads_batches = True

    def __init__(self, n):
        self.reads = []
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        self.reads.append(index)
        return [10 * i for i in index] if isinstance(index, list) else 10 * index


def test_a_batch_is_read_at_once_where_the_dataset_can(comm):
    """In the same order and with the same resume; by threads it is read sample by sample."""
    dataset, one_by_one = Batched(7), [10 * i for i in range(7)]
    batched = DistributedIterator(dataset, 3, comm, seed=2)
    plain = DistributedIterator(one_by_one, 3, comm, seed=2)
    assert take(batched, 2) == take(plain, 2)
    saved = save(batched)
    assert saved == save(plain)
    expected = take(plain, 9)
    assert take(batched, 9) == expected
    assert [len(read) for read in dataset.reads] == [3] * 11
    assert {type(i) for read in dataset.reads for i in read} == {int}
    resumed = DistributedIterator(dataset, 3, comm, seed=5)
    load(resumed, saved)
    assert take(resumed, 9) == expected
    threads = DistributedIterator(
        dataset, 3, comm, seed=2, make_iterator=iterators.MultithreadIterator
    )
    load(threads, saved)
    assert take(threads, 9) == expected
    threads.finalize()


def test_worker_processes_load_files(comm, tmp_path):
    """A MultiprocessIterator's workers open files by themselves; snapshots know what was seen."""
    folder = comm.bcast_obj(tmp_path)
    paths = [folder / f"{number}.npz" for number in range(3)]
    if comm.rank == 0:
        for number, path in enumerate(paths):
            np.savez(path, x=np.arange(10 * number, 10 * number + 7))
    comm.mpi_comm.Barrier()
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        loader = functools.partial(
            iterators.MultiprocessIterator, n_processes=1, n_prefetch=2, shared_mem=1000
        )
        dataset = FilesDataset(paths, max_open=1)
        iterator = DistributedIterator(dataset, 2, comm, seed=3, make_iterator=loader)
        plain = DistributedIterator(dataset, 2, comm, seed=3)
        assert take(iterator, 8) == take(plain, 8)
        assert save(iterator) == save(plain)
        iterator.finalize()
    finally:
        multiprocessing.set_start_method(before, force=True)


class Recorder(chainer.Chain):
    """A model that remembers the samples it was given."""

    def __init__(self):
        super().__init__()
        self.seen = []
        with self.init_scope():
            self.w = chainer.Parameter(np.zeros((), np.float32))

    def __call__(self, x):
        """Return a loss."""
        self.seen += x.tolist()
        return chainer.functions.sum(self.w * x.astype(np.float32))


def test_a_trainer_resumes_in_the_middle_of_an_epoch(comm, groups, tmp_path):
    """Epoch triggers fire together; a trainer on one rank finishes what all ranks began."""
    folder = comm.bcast_obj(tmp_path)
    n, batch_size, n_steps = 13, 2, 2
    epochs = []

    def trainer_of(group, model, stop):
        optimizer = create_multi_node_optimizer(chainer.optimizers.SGD(), group).setup(model)
        iterator = DistributedIterator(list(range(n)), batch_size, group)
        updater = training.StandardUpdater(iterator, optimizer)
        trainer = training.Trainer(updater, stop, out=str(folder))
        record = training.make_extension((1, "epoch"))(lambda it: epochs.append(it.updater.epoch))
        trainer.extend(record, name="record")
        return trainer

    model = Recorder()
    trainer_of(comm, Recorder(), (1, "epoch")).run()
    assert comm.allgather_obj(epochs) == [[1]] * comm.size
    trainer = trainer_of(comm, model, (n_steps, "iteration"))
    trainer.run()
    saver = comm.size - 1
    if comm.rank == saver:
        serializers.save_npz(folder / "snapshot.npz", trainer)
    comm.mpi_comm.Barrier()
    everyone = comm.gather_obj(model.seen)
    if groups[0] is not None:
        seen = [*itertools.chain(*everyone)]
        model = Recorder()
        epochs.clear()
        trainer = trainer_of(groups[0], model, (5 + comm.size, "epoch"))
        serializers.load_npz(folder / "snapshot.npz", trainer)
        trainer.run()
        begun = n_steps * batch_size * comm.size
        assert epochs == list(range(begun // n + 1, 6 + comm.size))
        counts = Counter(seen + model.seen)
        # The last batch may begin one epoch more.
        assert set(counts) == set(range(n))
        assert set(counts.values()) <= {5 + comm.size, 6 + comm.size}
        assert sum(counts.values()) - n * (5 + comm.size) < batch_size


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dataset": range(9)}, "the length of the dataset is 9, expected 10 as on rank 0"),
        ({"batch_size": 3}, "batch_size is 3, expected 2 as on rank 0"),
        ({"shuffle": False}, "shuffle is False, expected True as on rank 0"),
        ({"seed": 4}, "seed is 4, expected None as on rank 0"),
    ],
)
def test_ranks_that_differ(comm, options, text):
    """What ranks must agree on is compared when the iterator is created."""
    if comm.size == 1:
        pytest.skip("one rank agrees with itself")
    last = comm.size - 1
    options = {"dataset": range(10), "batch_size": 2, **(options if comm.rank == last else {})}
    with pytest.raises(RankMismatchError, match=f"rank {last}: {text}"):
        DistributedIterator(comm=comm, **options)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"dataset": []}, ValueError, "the length of the dataset is 0, expected 1 or more"),
        ({"batch_size": 0}, ValueError, "batch_size is 0, expected 1 or more"),
        ({"batch_size": 2.0}, TypeError, r"batch_size is 2\.0, expected an integer"),
        ({"seed": -1}, ValueError, "seed is -1, expected 0 to 4294967295"),
        ({"seed": 1 << 32}, ValueError, "seed is 4294967296"),
        ({"dataset": None}, TypeError, "NoneType"),
    ],
)
def test_bad_arguments_of_one_rank(comm, options, error, text):
    """One rank's bad argument is raised by all, with its number."""
    last = comm.size - 1
    options = {"dataset": range(10), "batch_size": 2, **(options if comm.rank == last else {})}
    with pytest.raises(error, match=text) as caught:
        DistributedIterator(comm=comm, **options)
    if comm.size > 1:
        assert str(caught.value).startswith(f"rank {last}: ")


def test_snapshots_of_another_dataset_are_refused(comm):
    """A position among another number of samples means nothing."""
    saved = save(DistributedIterator(range(10), 2, comm))
    iterator = DistributedIterator(range(11), 2, comm)
    with pytest.raises(ValueError, match="dataset of 10 samples, and this one has 11"):
        load(iterator, saved)
    assert len(next(iterator)) == 2
