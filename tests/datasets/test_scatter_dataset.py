"""Scattering datasets, against ChainerMN's own scatter_dataset."""

from __future__ import annotations

import copy
import itertools
import pickle

import chainer
import chainermn
import numpy as np
import pytest
from chainer import datasets
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import RankMismatchError
from chainer_dist.datasets import (
    DataSizeError,
    create_empty_dataset,
    scatter_dataset,
    scatter_index,
    take,
)
from chainer_dist.datasets.scatter import get_epoch_trigger, get_n_iterations_for_one_epoch
from chainer_dist.datasets.scattered import own_samples
from dataset_kinds import KINDS, LazyDataset, assert_same_samples


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("force_equal_length", [False, True])
def test_samples_are_those_of_chainermn(comm, kind, shuffle, force_equal_length):
    """Every kind of dataset: the same samples in the same order, from any root."""
    for n, root in [(13, 0), (comm.size, comm.size - 1), (max(1, comm.size - 1), 0)]:
        dataset = KINDS[kind](n)
        options = {"root": root, "shuffle": shuffle, "seed": 5}
        options["force_equal_length"] = force_equal_length
        expected = chainermn.scatter_dataset(dataset, comm, **options)
        got = scatter_dataset(dataset if comm.rank == root else None, comm, **options)
        assert isinstance(got, datasets.SubDataset)
        assert_same_samples(got, [expected[i] for i in range(len(expected))])


@given(
    n=st.integers(1, 40),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    equal=st.booleans(),
    root=st.integers(0, 99),
)
def test_any_size_shuffle_and_root(comm, n, shuffle, seed, equal, root):
    """The same samples as ChainerMN's, and each sample counts as own on exactly one rank."""
    options = {"root": root % comm.size, "shuffle": shuffle, "seed": seed}
    options["force_equal_length"] = equal
    expected = chainermn.scatter_dataset(range(n), comm, **options)
    got = scatter_dataset(range(n), comm, **options)
    assert [*got] == [*expected]
    everyone = comm.allgather_obj((len(got), [*got][: got.n_own]))
    assert sorted(sample for _, own in everyone for sample in own) == [*range(n)]
    if equal:
        assert len({length for length, _ in everyone}) == 1
    else:
        assert got.n_own == len(got)


@given(n=st.integers(0, 50), equal=st.booleans(), root=st.integers(0, 99))
def test_scatter_index_is_that_of_chainermn(comm, n, equal, root):
    """The same intervals as ChainerMN's; root's number of samples counts."""
    root %= comm.size
    expected = chainermn.scatter_index(n, comm, root, force_equal_length=equal)
    mine = n if comm.rank == root else None
    assert scatter_index(mine, comm, root, force_equal_length=equal) == expected


def test_shuffling_without_a_seed_changes(comm):
    """Without a seed every call shuffles anew, consistently over the ranks."""
    first, second = (scatter_dataset(range(1000), comm, shuffle=True) for _ in range(2))
    assert [*first] != [*second]
    everything = [*itertools.chain(*comm.allgather_obj([*first][: first.n_own]))]
    assert sorted(everything) == [*range(1000)]


@pytest.mark.parametrize("kind", ["large rows", "list", "tuples", "permuted", "concatenated"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_get_their_own_part_only(comm, kind, shuffle):
    """A rank's dataset holds its own samples and no others."""
    n = 200 * comm.size
    part = scatter_dataset(KINDS[kind](n), comm, shuffle=shuffle, seed=1)
    whole = len(pickle.dumps(KINDS[kind](n)))
    if comm.size > 1:  # a single rank keeps the dataset as it is
        order = 8 * len(part)  # a shuffled part of several datasets has one of int64
        assert len(pickle.dumps(part)) < whole / comm.size + order + 1500


def test_arrays_are_writable_and_private(comm):
    """A rank may change its samples in place; no other rank's dataset changes by that."""
    dataset = np.zeros((8 * comm.size, 1000))
    shared = LazyDataset(4 * comm.size)
    before = shared.table.copy()
    part = scatter_dataset(dataset, comm)
    lazy = scatter_dataset(shared, comm)
    comm.mpi_comm.Barrier()
    for i in range(len(part)):
        part[i][:] = comm.rank + 1
    if comm.rank > 0:
        lazy._dataset.table[:] = -comm.rank
    comm.mpi_comm.Barrier()
    assert all((part[i] == comm.rank + 1).all() for i in range(len(part)))
    if comm.rank > 0:
        assert (lazy._dataset.table == -comm.rank).all()
    if comm.size > 1:
        assert (dataset == 0).all()
        np.testing.assert_array_equal(shared.table, before)


class Rows(datasets.TupleDataset):
    """A dataset of Chainer's kind that has something of its own."""

    def __init__(self, rows, title):
        super().__init__(rows, rows)
        self.title = title


class Columns(datasets.DictDataset):
    """Likewise."""

    title = "columns"


@pytest.mark.parametrize("shuffle", [False, True])
def test_scripts_find_their_dataset_in_their_part(comm, shuffle):
    """``_dataset`` is the dataset where it is of a class of a script's own, and else one like it."""
    lazy = LazyDataset(3 * comm.size)
    part = scatter_dataset(lazy, comm, shuffle=shuffle, seed=1)
    assert part._dataset is lazy if comm.rank == 0 else type(part._dataset) is LazyDataset
    assert len(part._dataset) == 3 * comm.size
    again = scatter_dataset(part, comm.split(comm.rank, 0), shuffle=shuffle, seed=1)
    theirs = chainermn.scatter_dataset(
        lazy if comm.rank == 0 else None,
        chainermn.create_communicator("naive", comm.mpi_comm),
        shuffle=shuffle,
        seed=1,
    )
    assert list(part) == list(theirs)
    assert sorted(again) == sorted(theirs)
    for dataset in (Rows(range(2 * comm.size), "rows"), Columns(x=range(2 * comm.size))):
        below = scatter_dataset(dataset, comm)._dataset
        assert type(below) is type(dataset)
        assert below.title == dataset.title
        assert len(below) == 2
        assert below[0] == dataset[2 * comm.rank]
    changed = datasets.TransformDataset(lazy, str)
    assert scatter_dataset(changed, comm, shuffle=shuffle)._dataset._transform is str


def test_read_only_arrays_stay_read_only(comm):
    """An array that could not be written on the root cannot be written elsewhere."""
    array = np.zeros((4 * comm.size, 2000))
    array.flags.writeable = False
    part = scatter_dataset(array, comm)
    with pytest.raises(ValueError, match="read-only"):
        part[0][0] = 1


def test_lazy_datasets_stay_lazy(comm):
    """Scattering loads nothing; each rank loads what it reads, when it reads it."""
    dataset = LazyDataset(6 * comm.size)
    part = scatter_dataset(datasets.TransformDataset(dataset, str), comm, shuffle=True, seed=0)
    assert dataset.loads == 0
    assert part[0].startswith("(")
    below = part._dataset._dataset
    assert (dataset if comm.size == 1 else below.common.value).loads == 1


@pytest.mark.parametrize("shuffle", [False, True])
def test_datasets_are_asked_for_ints(comm, shuffle):
    """Some datasets take no NumPy integer for an index, which is what iterators pass."""
    dataset = LazyDataset(6 * comm.size)
    part = scatter_dataset(dataset, comm, shuffle=shuffle, seed=0)
    for index in (np.intp(1), np.int32(-1), 2):
        part[index]
    assert part._dataset.index_types == {int}
    with pytest.raises(IndexError):
        part[len(part)]
    with pytest.raises(IndexError):
        part[-len(part) - 1]


def test_datasets_of_files_stay_lazy(comm, tmp_path_factory):
    """Each rank of a dataset of image files gets its file names, and reads the files itself."""
    Image = pytest.importorskip("PIL.Image")
    root = comm.bcast_obj(str(tmp_path_factory.mktemp("images")) if comm.rank == 0 else None)
    n = 3 * comm.size
    pairs = [(f"{root}/{i}.png", i) for i in range(n)]
    part = scatter_dataset(datasets.LabeledImageDataset(pairs), comm)
    assert len(part) == 3
    if comm.rank == 0:
        for path, i in pairs:
            Image.fromarray(np.full((2, 2), i, dtype=np.uint8)).save(path)
    comm.mpi_comm.Barrier()
    for i in range(3):
        image, label = part[i]
        assert label == 3 * comm.rank + i
        assert (image == label).all()


def test_parts_can_be_copied_pickled_and_scattered_again(comm):
    """What a rank gets is a dataset like any other, which knows its duplicates."""
    part = scatter_dataset([*range(2 * comm.size + 1)], comm)
    for again in (copy.copy(part), copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert [*again] == [*part]
        assert again.n_own == part.n_own
    rescattered = scatter_dataset(part, comm, root=comm.size - 1, force_equal_length=False)
    everything = [*itertools.chain(*comm.allgather_obj([*rescattered]))]
    assert everything == comm.bcast_obj([*part], root=comm.size - 1)


def test_iterators_and_converters_take_parts(comm):
    """An iterator over a rank's part and Chainer's converter give one epoch's arrays."""
    n = 4 * comm.size
    dataset = datasets.TupleDataset(np.arange(3.0 * n).reshape(n, 3), np.arange(n))
    part = scatter_dataset(dataset, comm)
    iterator = chainer.iterators.SerialIterator(part, 3, repeat=False, shuffle=False)
    batches = [chainer.dataset.concat_examples(batch) for batch in iterator]
    x, t = (np.concatenate(arrays) for arrays in zip(*batches))
    np.testing.assert_array_equal(t, np.arange(4) + 4 * comm.rank)
    np.testing.assert_array_equal(x, dataset._datasets[0][t])


def test_duplicates_are_known_through_other_datasets(comm):
    """Chainer's datasets around a rank's part tell which samples are another rank's."""
    part = scatter_dataset(range(2 * comm.size + 1), comm)
    mine = [True] * part.n_own + [False] * (len(part) - part.n_own)

    def known(dataset):
        mask = own_samples(dataset)
        return [True] * len(dataset) if mask is None else mask.tolist()

    assert known(part) == mine
    assert known(datasets.TransformDataset(part, str)) == mine
    assert known(datasets.TupleDataset(range(len(part)), part)) == mine
    assert known(datasets.DictDataset(x=part, y=part)) == mine
    assert known(datasets.ConcatenatedDataset([1, 2], part)) == [True, True, *mine]
    backwards = datasets.SubDataset(part, 0, 2, np.arange(len(part))[::-1])
    assert known(backwards) == mine[::-1][:2]


@pytest.mark.parametrize("empty", [[], np.zeros((0, 3)), datasets.TupleDataset([], [])])
@pytest.mark.parametrize("force_equal_length", [True, False])
def test_an_empty_dataset_is_nothing_for_each_rank(comm, empty, force_equal_length):
    """All ranks get an empty part of an empty dataset, as with ChainerMN."""
    for shuffle in (False, True):
        part = scatter_dataset(
            empty if comm.rank == 0 else None,
            comm,
            shuffle=shuffle,
            force_equal_length=force_equal_length,
        )
        assert len(part) == 0
        assert part[:] == []


def test_no_dataset_to_scatter_raises_everywhere(comm):
    """No dataset on the root raises the same error on every rank."""
    root = comm.size - 1
    with pytest.raises(DataSizeError, match=r"dataset .*None") as caught:
        scatter_dataset(None if comm.rank == root else [1, 2], comm, root=root)
    assert len(set(comm.allgather_obj(str(caught.value)))) == 1
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("scatter", [scatter_dataset, scatter_index])
def test_a_root_that_is_no_rank_raises_everywhere(comm, scatter):
    """A root outside the communicator, on one rank alone too, raises on every rank."""
    data = [1, 2] if scatter is scatter_dataset else 2
    for root in (comm.size, -1, "0", 0.0):
        with pytest.raises(ValueError, match=f"rank 0: root is .*0 to {comm.size - 1}"):
            scatter(data, comm, root=root)
    last = comm.size - 1
    with pytest.raises(ValueError, match=f"rank {last}: root is {comm.size}"):
        scatter(data, comm, root=comm.size if comm.rank == last else 0)


@pytest.mark.parametrize("scatter", [scatter_dataset, scatter_index])
def test_different_roots_raise_everywhere(comm, scatter):
    """Ranks that name different roots all raise, instead of waiting for each other."""
    if comm.size == 1:
        pytest.skip("needs two ranks to differ")
    data = [1, 2] if scatter is scatter_dataset else 2
    with pytest.raises(RankMismatchError, match="rank 1: root is 1, expected 0 as on rank 0"):
        scatter(data, comm, root=min(comm.rank, 1))


@pytest.mark.parametrize(("n", "error"), [(-1, ValueError), (2.5, TypeError), (None, TypeError)])
def test_a_bad_number_of_samples_raises_everywhere(comm, n, error):
    """Root's mistake in scatter_index is every rank's error."""
    with pytest.raises(error):
        scatter_index(n if comm.rank == 0 else 3, comm)


def test_an_unpicklable_dataset_raises_everywhere(comm):
    """A lambda cannot be sent: every rank gets the error, which says so, and none waits."""
    if comm.size == 1:
        pytest.skip("a single rank pickles nothing")
    dataset = datasets.TransformDataset([1, 2, 3, 4, 5], lambda x: x)
    for root in range(comm.size):
        with pytest.raises(pickle.PicklingError, match=f"rank {root}: .*lambda"):
            scatter_dataset(dataset, comm, root=root)


class Uncuttable(list):
    """A dataset that `take` fails on, below."""


class Miscut(list):
    """A dataset of which `take` gives one sample too many, below."""


class Fragile:
    """A sample that can be pickled, but not unpickled on some ranks."""

    here = True

    def __reduce__(self):
        return Fragile._restore, ()

    @staticmethod
    def _restore():
        if Fragile.here:
            return Fragile()
        raise ArithmeticError("cannot be restored")


@take.register(Uncuttable)
def _(dataset, indices):
    raise ZeroDivisionError(f"cut of {dataset} at {indices} failed")


@take.register(Miscut)
def _(dataset, indices):
    return dataset[: len(indices) + 1]


def test_a_failing_cut_raises_everywhere(comm):
    """What `take` raises on the root is raised on every rank; so is a part of a wrong size."""
    if comm.size == 1:
        pytest.skip("a single rank takes nothing")
    with pytest.raises(ZeroDivisionError, match=r"cut of .* failed"):
        scatter_dataset(Uncuttable([1, 2, 3, 4]), comm)
    with pytest.raises(ValueError, match="Miscut gave"):
        scatter_dataset(Miscut(range(2 * comm.size)), comm)


def test_a_part_that_cannot_be_read_raises_everywhere(comm):
    """An error while unpickling on the last rank only is raised on every rank."""
    if comm.size == 1:
        pytest.skip("a single rank unpickles nothing")
    Fragile.here = comm.rank != comm.size - 1
    try:
        with pytest.raises(ArithmeticError, match=f"rank {comm.size - 1}: cannot be restored"):
            scatter_dataset([Fragile() for _ in range(comm.size)], comm)
    finally:
        Fragile.here = True


def test_create_empty_dataset():
    """An empty dataset has as many samples as the other, each an empty tuple, as in ChainerMN."""
    assert create_empty_dataset(range(3)) == chainermn.datasets.create_empty_dataset(range(3))


def test_deprecated_helpers_are_those_of_chainermn(comm):
    """The helpers that ChainerMN deprecated give the same numbers, of rank 0."""
    part = [0] * (10 + comm.rank)
    with pytest.warns(DeprecationWarning, match="standard epoch triggers"):
        assert get_n_iterations_for_one_epoch(part, 3, comm) == 4
    with pytest.warns(DeprecationWarning, match="standard epoch triggers"):
        assert get_epoch_trigger(5, part, 3, comm) == (20, "iteration")
