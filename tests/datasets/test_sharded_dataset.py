"""Files shared out among the ranks, against NumPy and the ranks' parts put together."""

from __future__ import annotations

import itertools
import os
import pickle
import sys
from pathlib import Path

import chainer
import numpy as np
import pytest
from chainer import datasets, iterators
from chainer.training.extensions import Evaluator
from hypothesis import given, settings
from hypothesis import strategies as st

from chainer_dist import DataSizeError, RankMismatchError, create_multi_node_evaluator
from chainer_dist.datasets import FilesDataset, open_arrays, shard_array, shard_files
from chainer_dist.datasets.scattered import own_samples

ROW_BYTES = 1 << 16


@pytest.fixture
def folder(comm, tmp_path):
    """Return a folder that all ranks share."""
    return comm.bcast_obj(tmp_path)


@pytest.fixture
def write(comm, folder):
    """Return a function by which rank 0 writes a file, and all ranks get its path."""

    def write(name, *args, by=np.save, **kwargs):
        if comm.rank == 0:
            by(folder / name, *args, **kwargs)
        comm.mpi_comm.Barrier()
        return folder / name

    return write


def read_lines(path):
    """Return the samples of a text file."""
    return Path(path).read_text(encoding="utf-8").split()


class Journal:
    """Opens text files; knows which, and which were read."""

    def __init__(self):
        self.opened = []
        self.read = []

    def __call__(self, path):
        """Open a file."""
        self.opened.append(path)
        return Lines(self, path)


class Lines:
    """The samples of a text file, for a journal."""

    def __init__(self, journal, path):
        self.journal, self.path = journal, path
        self.lines = read_lines(path)

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, index):
        assert type(index) is int
        self.journal.read.append(self.path)
        return self.lines[index]


def texts(write, counts):
    """Write text files of so many samples; return their paths and all samples."""
    samples = [[f"{number}-{i}" for i in range(count)] for number, count in enumerate(counts)]
    paths = [
        write(f"{number}.txt", " ".join(words), by=Path.write_text)
        for number, words in enumerate(samples)
    ]
    return paths, samples


def together(comm, part):
    """Return the own samples of all ranks."""
    mask = own_samples(part)
    own = [part[i] for i in range(len(part)) if mask is None or mask[i]]
    return list(itertools.chain(*comm.allgather_obj(own)))


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("n", [1, 3, 14])
@pytest.mark.parametrize("dtype", [np.float16, np.int64, np.complex64])
def test_an_array_is_cut_into_rows(comm, write, equal, n, dtype):
    """Side by side the ranks' parts are the array; equal lengths overlap by a row at most."""
    array = np.arange(6 * n).reshape(n, 2, 3).astype(dtype)
    path = write("x.npy", array)
    part = shard_array(path, comm, force_equal_length=equal)
    rows = together(comm, part)
    np.testing.assert_array_equal(np.array(rows), array)
    assert rows[0].dtype == dtype
    lengths = comm.allgather_obj(len(part))
    if equal:
        assert set(lengths) == {-(-n // comm.size)}
    else:
        assert sum(lengths) == n
        assert max(lengths) - min(lengths) <= 1


def test_rows_are_new_and_writable(comm, write):
    """Changing a sample changes neither the file nor the next reading, here or elsewhere."""
    part = shard_array(write("x.npy", np.zeros((2 * comm.size, 3))), comm)
    part[0][...] = 1
    assert not part[0].any()
    assert type(part[0]) is np.ndarray
    assert [*map(len, (part[0:2], part[[1, 0]], part[np.array([1])]))] == [2, 2, 1]
    np.testing.assert_array_equal(part[-1], np.zeros(3))
    with pytest.raises(IndexError):
        part[2]
    assert not np.load(part._dataset.paths[0]).any()


def resident_bytes():
    """Return how much memory this process has."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_has_no_more_in_memory_than_its_part(comm, folder):
    """Opening a file takes no memory; reading a part takes that of the part."""
    n, path = 1024, folder / "large.npy"
    if comm.rank == 0:
        array = np.lib.format.open_memmap(path, "w+", np.int64, (n, ROW_BYTES // 8))
        array[:, 0] = range(n)
        del array
    comm.mpi_comm.Barrier()
    before = resident_bytes()
    part = shard_array(path, comm, force_equal_length=False)
    assert resident_bytes() - before < 4 << 20
    total = sum(int(row.sum()) for row in part)
    begin = comm.rank * n // comm.size
    assert abs(total - sum(range(begin, begin + len(part)))) <= 2 * n
    size = len(part) * ROW_BYTES
    assert size * 0.9 < resident_bytes() - before < size + (4 << 20)
    assert comm.allreduce_obj(total) == n * (n - 1) // 2


def test_columns_side_by_side(comm, write):
    """Arrays of equal length give a TupleDataset, which is evaluated exactly."""
    n = 5 * comm.size + 1
    x = shard_array(write("x.npy", np.arange(2.0 * n).reshape(n, 2)), comm)
    t = shard_array(write("t.npy", np.arange(n)), comm)
    part = datasets.TupleDataset(x, t)
    for row, label in part:
        assert (row == [2 * label, 2 * label + 1]).all()

    def report(_, t):
        chainer.report({"mean": t.mean()})

    iterator = iterators.SerialIterator(part, 3, repeat=False)
    evaluator = Evaluator(iterator, chainer.Link(), eval_func=report)
    evaluator = create_multi_node_evaluator(evaluator, comm)
    assert evaluator()["mean"] == pytest.approx((n - 1) / 2, rel=1e-12)


@settings(max_examples=12)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=8), equal=st.booleans())
def test_files_are_given_away_as_a_whole(comm, write, counts, equal):
    """Every file is read by exactly one rank, every sample is there once, loads are balanced."""
    paths, samples = texts(write, counts)
    journal = Journal()
    n_filled = sum(count > 0 for count in counts)
    if n_filled == 0 or (equal and n_filled < comm.size):
        with pytest.raises(DataSizeError):
            shard_files(paths, comm, journal, force_equal_length=equal)
        return
    part = shard_files(paths, comm, journal, force_equal_length=equal)
    assert sum(comm.allgather_obj(len(journal.opened))) == len(paths)
    read = together(comm, part)
    assert sorted(read) == sorted(itertools.chain(*samples))
    readers = comm.allgather_obj(set(journal.read))
    assert sum(map(len, readers)) == len(set.union(*readers)) == n_filled
    mask = own_samples(part)
    n_own = comm.allgather_obj(len(part) if mask is None else int(mask.sum()))
    # No rank has more than the mean and a file, and none could give one away to have less.
    assert max(n_own) <= sum(counts) / comm.size + max(counts)
    for source, files in enumerate(readers):
        for path in files:
            count = len(read_lines(path))
            assert min(n_own) + count >= n_own[source]
    assert [*part] == [*part]
    if equal:
        assert set(comm.allgather_obj(len(part))) == {max(n_own)}
        assert set(part) == set(part[: n_own[comm.rank]])
    else:
        assert len(part) == n_own[comm.rank]


def test_equal_files_are_shared_equally(comm, write):
    """Files of one size, some for each rank, need no repetition."""
    paths, _ = texts(write, [4] * (3 * comm.size))
    part = shard_files(paths, comm, read_lines)
    assert len(part) == 12
    assert own_samples(part) is None
    numbers = [int(sample.split("-")[0]) for sample in part]
    assert numbers == sorted(numbers)  # in the order of the list


def test_a_rank_without_files_has_an_empty_dataset(comm, write):
    """With fewer files than ranks the last ones have nothing, if that is allowed."""
    paths, samples = texts(write, [3])
    part = shard_files(paths, comm, read_lines, force_equal_length=False)
    assert [*part] == (samples[0] if comm.rank == 0 else [])
    assert len(part) == (3 if comm.rank == 0 else 0)
    if comm.size > 1:
        with pytest.raises(DataSizeError, match="rank 1 gets none of the 1 files"):
            shard_files(paths, comm, read_lines)
    with pytest.raises(DataSizeError, match="no samples in 0 files"):
        shard_files([], comm)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_files_have_dicts(comm, write, save):
    """The arrays of a file go side by side, under their names."""
    paths = []
    for number in range(comm.size + 1):
        x = np.full((4, 2), number, np.float32)
        paths.append(write(f"{number}.npz", by=save, x=x, t=np.arange(4) + number))
    part = shard_files(paths, comm, force_equal_length=False)
    rows = together(comm, part)
    assert sorted(int(row["t"]) - int(row["x"][0]) for row in rows) == sorted(
        [*range(4)] * (comm.size + 1)
    )
    assert all(row["x"].dtype == np.float32 and row["x"].shape == (2,) for row in rows)
    row = part[0]
    row["x"][...] = -1
    assert (part[0]["x"] >= 0).all()


def test_few_files_are_open_at_a_time(comm, write):
    """What was not used for longest is closed, what was used lately is not opened again."""
    paths, samples = texts(write, [2] * 5)
    journal = Journal()
    dataset = FilesDataset(paths, journal, max_open=np.int64(2))
    assert journal.opened == [*map(str, paths)]
    assert [*dataset] == [*itertools.chain(*samples)]
    assert journal.opened[5:] == [*map(str, paths)]
    for i in (9, 7, 8, 6):
        assert dataset[i] == samples[i // 2][i % 2]
    assert len(journal.opened) == 10
    assert dataset[0] == "0-0"
    assert dataset[-1] == "4-1"
    assert journal.opened[10:] == [str(paths[0]), str(paths[4])]
    assert comm.size == comm.mpi_comm.size


def test_given_lengths_save_opening_files(write):
    """Who knows the lengths needs no file until a sample is wanted."""
    paths, samples = texts(write, [2, 3])
    journal = Journal()
    dataset = FilesDataset(paths, journal, lengths=[2, 3])
    assert len(dataset) == 5
    assert not journal.opened
    assert dataset[4] == samples[1][2]
    with pytest.raises(IndexError):
        dataset[5]
    with pytest.raises(ValueError, match="there are 1 lengths for 2 files"):
        FilesDataset(paths, journal, lengths=[2])
    with pytest.raises(ValueError, match="max_open is 0"):
        FilesDataset(paths, journal, max_open=0)


def test_parts_pickle_as_names(comm, write):
    """What travels to data-loader processes are names of files, not what is in them."""
    path = write("x.npy", np.arange(40_000.0 * comm.size).reshape(-1, 10))
    part = shard_array(path, comm)
    part[0]
    data = pickle.dumps(part)
    assert len(data) < 1500
    copy = pickle.loads(data)
    assert len(copy) == len(part)
    np.testing.assert_array_equal(copy[7], part[7])


def truncated(path):
    """Write an array and cut the end of its file off."""
    np.save(path, np.zeros((100, 100)))
    with path.open("rb+") as file:
        file.truncate(5000)


def truncated_zip(path):
    """Write an archive and cut the end of its file off."""
    np.savez(path, x=np.zeros((100, 100)))
    with path.open("rb+") as file:
        file.truncate(5000)


BROKEN = {
    "missing": lambda _: None,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("1 2 3"),
    "truncated": truncated,
    "0-dimensional": lambda path: np.save(path, np.array(1.0)),
    "objects": lambda path: np.save(path, np.array([None])),
    "truncated archive": truncated_zip,
    "uneven columns": lambda path: np.savez(path, x=np.zeros(3), t=np.zeros(4)),
    "0-dimensional column": lambda path: np.savez(path, x=np.array(1.0)),
    "no rows": lambda path: np.save(path, np.zeros((0, 3))),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_cannot_be_read_is_named_on_every_rank(comm, write, kind):
    """Whichever rank meets it, all raise the same, and can go on."""
    good = write("good.npy", np.zeros((5 * comm.size, 2)))
    suffix = "npz" if "archive" in kind or "column" in kind else "npy"
    bad = write(f"bad.{suffix}", by=BROKEN[kind])
    if kind != "no rows":
        match = f"(rank {comm.size - 1}: )?.*bad.{suffix} cannot be opened as a dataset: "
        with pytest.raises(Exception, match=match) as caught:
            shard_files([good] * (comm.size - 1) + [bad], comm)
        assert len(set(comm.allgather_obj(str(caught.value)))) == 1
    error = DataSizeError if kind == "no rows" else (OSError, ValueError, TypeError, EOFError)
    if suffix == "npy":
        with pytest.raises(error, match=r"bad\.npy"):
            shard_array(bad, comm)
    assert len(shard_array(good, comm)) == 5


def test_a_file_that_one_rank_lacks(comm, tmp_path, monkeypatch):
    """A rank that cannot see the file is named by all."""
    path = tmp_path / "x.npy"
    if comm.rank < comm.size - 1:
        np.save(path, np.zeros(3))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"x\.npy cannot be opened") as caught:
        shard_array("x.npy", comm)
    if comm.size > 1:
        assert str(caught.value).startswith(f"rank {comm.size - 1}: ")


def test_ranks_that_differ(comm, write, tmp_path, monkeypatch):
    """Other lists, options or arrays on one rank are told by all."""
    if comm.size == 1:
        pytest.skip("one rank agrees with itself")
    last = comm.size - 1
    odd = comm.rank == last
    paths = [write(f"{i}.npy", np.zeros(4)) for i in range(comm.size)]
    match = rf"rank {last}: paths\[1\] is '.*/0.npy', expected '.*/1.npy' as on rank 0"
    with pytest.raises(RankMismatchError, match=match):
        shard_files([paths[0], paths[0 if odd else 1]], comm)
    with pytest.raises(RankMismatchError, match=f"rank {last}: the number of paths is 1"):
        shard_files(paths[: 1 if odd else 2], comm)
    with pytest.raises(RankMismatchError, match=f"rank {last}: force_equal_length is False"):
        shard_files(paths, comm, force_equal_length=not odd)
    with pytest.raises(RankMismatchError, match=f"rank {last}: path is '.*/1.npy'"):
        shard_array(paths[odd], comm)
    with pytest.raises(RankMismatchError, match=f"rank {last}: path is '/nowhere'"):
        shard_array("/nowhere" if odd else paths[0], comm)
    with pytest.raises(RankMismatchError, match=f"rank {last}: force_equal_length is False"):
        shard_array(paths[0], comm, force_equal_length=not odd)
    monkeypatch.chdir(tmp_path)
    np.save("own.npy", np.zeros(4 + odd))
    with pytest.raises(RankMismatchError, match=f"rank {last}: the array is 5 rows, expected 4"):
        shard_array("own.npy", comm)


def test_arguments_of_the_wrong_kind(comm):
    """A single path where a list belongs, or no path at all, is an error everywhere."""
    with pytest.raises(TypeError, match=r"paths is a list of paths, got the single 'x\.npy'"):
        shard_files("x.npy" if comm.rank == comm.size - 1 else ["x.npy"], comm)
    with pytest.raises(TypeError, match="PathLike"):
        shard_files([3], comm)
    with pytest.raises(TypeError, match="PathLike"):
        shard_array(3, comm)
    with pytest.raises(ValueError, match="max_open is 0"):
        shard_files(["x.npy"], comm, max_open=0)
    with pytest.raises(TypeError, match="float"):
        shard_files(["x.npy"], comm, max_open=2.5 if comm.rank == comm.size - 1 else 2)


def test_names_that_are_not_ascii(write):
    """NumPy has another header for them, which says how many rows there are as well."""
    rows = np.zeros(2, np.dtype([("\u00e4", "f4")]))
    path = write("names.npz", by=np.savez, a=rows, b=np.arange(2))
    assert len(open_arrays(path)) == 2
    assert open_arrays(path)[1]["b"] == 1
