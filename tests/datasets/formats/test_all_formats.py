"""What datasets of all file formats promise, against the samples that the files were written from."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import multiprocessing
import os
import pickle
import shutil
import sys
from pathlib import Path

import chainer
import numpy as np
import pytest
from chainer import datasets, iterators, serializers, training
from hypothesis import given
from hypothesis import strategies as st

import chainer_dist
from chainer_dist import RankMismatchError
from chainer_dist.iterators import DistributedIterator
from dataset_kinds import assert_same_sample, assert_same_samples
from stored_files import FORMATS, make_samples

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(params=FORMATS)
def name(request):
    """Return the name of a format."""
    return request.param


@pytest.fixture
def folder(comm, tmp_path):
    """Return a folder that all ranks share."""
    return comm.bcast_obj(tmp_path)


@pytest.fixture
def make(comm, folder, name):
    """Return a function by which rank 0 writes samples, and each rank gets the dataset of them."""
    write, open_ = FORMATS[name]
    number = itertools.count()

    def make(samples, block=4, **options):
        path = folder / f"{next(number)}.{name}"
        if comm.rank == 0:
            write(path, samples, block)
        comm.mpi_comm.Barrier()
        return open_(path, **options)

    return make


def test_classes_of_ones_own(comm, make):
    """What they make of a sample is in batches as well, however these are read."""
    opened = make(make_samples(7))
    kind = type(opened)

    class ByExample(kind):
        def get_example(self, i):
            return "changed", super().get_example(i)

    class ByItem(kind):
        def __getitem__(self, index):
            assert isinstance(index, (int, np.integer))
            return "changed", super().__getitem__(index)

    for own in (ByExample, ByItem):
        dataset = copy.copy(opened)
        dataset.__class__ = own
        batch = next(DistributedIterator(dataset, 3, comm, seed=1))
        expected = next(DistributedIterator(opened, 3, comm, seed=1))
        assert [each[0] for each in batch] == ["changed"] * 3
        assert_same_samples([each[1] for each in batch], expected)
    dataset.__class__ = ByExample
    assert [each[0] for each in dataset[1:3]] == ["changed"] * 2
    assert [each[0] for each in dataset[[4, 2]]] == ["changed"] * 2


@pytest.mark.mpi_skip
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    block=st.integers(1, 7),
    max_open=st.integers(1, 3),
    data=st.data(),
)
def test_samples_are_those_written(tmp_path_factory, name, counts, block, max_open, data):
    """One file or several, every way of indexing, in any order and again and again."""
    write, open_ = FORMATS[name]
    folder = tmp_path_factory.mktemp("files")
    paths, samples = [], []
    for number, count in enumerate(counts):
        part = make_samples(count, len(samples))
        paths.append(folder / f"{number}.{name}")
        write(paths[-1], part, block)
        samples += part
    dataset = open_(paths, max_open=max_open)
    assert dataset.paths == [str(path) for path in paths]
    assert_same_samples(dataset, samples)
    n = len(samples)
    indices = data.draw(st.lists(st.integers(-n, n - 1), max_size=12), label="indices")
    cut = slice(
        *(data.draw(st.integers(-n, n)) for _ in range(2)), data.draw(st.sampled_from([1, -1, 2]))
    )
    expected = [samples[i] for i in indices]
    for got in (dataset[indices], dataset[np.array(indices, dtype=np.int32)]):
        assert type(got) is list
        assert_same_sample(got, expected)
    assert_same_sample(dataset[cut], samples[cut])


def test_samples_are_new_and_writable(make):
    """Changing a sample changes nothing else: not the file, no cache, no other sample of the batch."""
    samples = make_samples(9)
    dataset = make(samples)
    for batch in (dataset[[5, 3, 5, 4]], [dataset[5], dataset[3], dataset[5], dataset[4]]):
        batch[0][0][...] = -1
        assert type(batch[0][0]) is np.ndarray
        for got, i in zip(batch[1:], (3, 5, 4)):
            assert_same_sample(got, samples[i])
    assert_same_samples(dataset, samples)


@pytest.mark.parametrize(
    ("index", "error"),
    [
        (9, IndexError),
        (-10, IndexError),
        ([0, 9], IndexError),
        (1.5, TypeError),
        ([[1]], TypeError),
    ],
)
def test_bad_indices_are_refused(make, index, error):
    """What is no position among the samples."""
    dataset = make(make_samples(9))
    with pytest.raises(error):
        dataset[index]
    assert dataset[[]] == []


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("equal", [False, True])
def test_scattered_samples_are_those_of_a_list(comm, make, shuffle, equal):
    """scatter_dataset gives each rank what it would give of a list, bare and within Chainer's datasets."""
    samples = make_samples(13)
    options = {"shuffle": shuffle, "seed": 3, "force_equal_length": equal}
    dataset = make(samples)
    expected = [*chainer_dist.scatter_dataset(samples, comm, **options)]
    part = chainer_dist.scatter_dataset(dataset if comm.rank == 0 else None, comm, **options)
    assert_same_samples(part, expected)
    pairs = datasets.TupleDataset(dataset, range(13))
    part = chainer_dist.scatter_dataset(pairs, comm, **options)
    assert_same_sample([sample for sample, _ in part], expected)
    double = datasets.TransformDataset(dataset, _label)
    part = chainer_dist.scatter_dataset(double, comm, **options)
    assert [*part] == [t for _, t in expected]


def _label(sample):
    return sample[1]


def bytes_read():
    """Return how many bytes this process has read by system calls."""
    (line,) = [
        each for each in Path("/proc/self/io").read_text("ascii").split("\n") if "rchar" in each
    ]
    return int(line.split()[1])


def resident_bytes():
    """Return how much memory this process has."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@linux
def test_a_rank_reads_no_more_than_its_part(comm, make, name):
    """A part of the samples is a part of the file."""
    n, noise = 200 * comm.size, np.random.RandomState(0)
    x = noise.rand(n, 1000, 3).astype(np.float32)  # 2.4 MB for each rank, also when compressed
    dataset = make([*zip(x, np.arange(n, dtype=np.int32))])
    part = chainer_dist.scatter_dataset(dataset, comm)
    part[0]
    measure = resident_bytes if name == "lmdb" else bytes_read
    before = measure()
    for i in range(20):
        part[i]
    tenth = x[0].nbytes * 20
    least = -tenth if name == "lmdb" else 0.6 * tenth  # memory is counted by and by
    assert least < measure() - before < 2 * tenth


@linux
def test_files_are_opened_once_and_closed_on_release(make, name):
    """Making and reading keep one open file in a process; once the dataset is gone there is none."""
    dataset = make(make_samples(9))
    again = pickle.loads(pickle.dumps(dataset))
    (path,) = dataset.paths

    def n_open():
        entries = [*Path("/proc/self/fd").iterdir()]
        return sum(os.path.realpath(entry) == path for entry in entries)

    once = 0 if name == "zarr" else 1  # a folder, whose files are open while they are read
    assert n_open() == once
    for _ in range(3):
        dataset[1]
    assert n_open() == once
    dataset.close()
    assert n_open() == 0
    dataset[1]
    again[1]
    # LMDB allows one in a process, and HDF5 opens a file once.
    assert n_open() == (once if name in {"lmdb", "hdf5"} else 2 * once)
    del again
    gc.collect()
    assert n_open() == once
    del dataset
    gc.collect()
    assert n_open() == 0


def test_copies_are_pickled_as_paths(make):
    """A pickle has no samples, and may be made before and after reading."""
    samples = make_samples(300)
    dataset = make(samples)
    dataset[0]
    pickled = pickle.dumps(dataset)
    assert samples[7][0].tobytes() not in pickled
    for each in (pickle.loads(pickled), copy.copy(dataset), copy.deepcopy(dataset)):
        assert_same_sample(each[[7, 3]], [samples[7], samples[3]])
    assert_same_sample(dataset[7], samples[7])


@pytest.fixture
def all_formats(comm, folder):
    """Return one dataset of the files of all formats, 5 samples in each."""
    parts = []
    for number, (name, (write, open_)) in enumerate(FORMATS.items()):
        if comm.rank == 0:
            write(folder / name, make_samples(5, 5 * number))
        comm.mpi_comm.Barrier()
        parts.append(open_(folder / name))
    return datasets.ConcatenatedDataset(*parts)


@contextlib.contextmanager
def start_method(method):
    """Let worker processes be started in a certain way."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(method, force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.mark.mpi_skip
@pytest.mark.parametrize(("method", "n_processes"), [("fork", 2), ("spawn", 1)])
def test_worker_processes_open_files_by_themselves(all_formats, method, n_processes):
    """Forked with the files open, and spawned; beside them the first process goes on reading."""
    samples = make_samples(25)
    assert_same_sample([*all_formats], samples)
    with start_method(method):
        iterator = iterators.MultiprocessIterator(
            all_formats, 3, False, False, n_processes=n_processes, shared_mem=1000
        )
        got = []
        for batch in iterator:
            got += batch
            assert_same_sample([*all_formats], samples)
        iterator.finalize()
    assert_same_sample(got, samples)


@linux
@pytest.mark.mpi_skip
def test_a_forked_process_has_a_file_of_its_own(make):
    """It neither reads by the descriptor that it has inherited, nor takes it from the other process."""
    samples = make_samples(9)
    dataset = make(samples)
    dataset[0]
    receive, send = multiprocessing.Pipe(duplex=False)
    process = os.fork()
    if process == 0:
        try:
            send.send((dataset[5], dataset[[1, 0]]))
        finally:
            os._exit(0)
    os.waitpid(process, 0)
    assert receive.poll(0)
    got, pair = receive.recv()
    assert_same_sample(got, samples[5])
    assert_same_sample(pair, [samples[1], samples[0]])
    assert_same_samples(dataset, samples)


@pytest.mark.mpi_skip
def test_a_fork_while_threads_read(make):
    """Locks of the threads of the first process do not stop the other."""
    samples = make_samples(40)
    dataset = make(samples)
    iterator = iterators.MultithreadIterator(dataset, 8, repeat=True, shuffle=False, n_threads=3)
    for _ in range(12):
        next(iterator)
        process = os.fork()
        if process == 0:
            status = 1
            try:
                status = int(dataset[7][1] != 7)
            finally:
                os._exit(status)
        assert os.waitpid(process, 0)[1] == 0
    iterator.finalize()


def test_threads_read_together(make):
    """A MultithreadIterator gives the same batches."""
    samples = make_samples(40)
    iterator = iterators.MultithreadIterator(make(samples), 10, False, False, n_threads=4)
    for begin in range(0, 40, 10):
        assert_same_sample(next(iterator), samples[begin : begin + 10])
    iterator.finalize()


def save(iterator):
    """Return what a snapshot has of an iterator."""
    saved = serializers.DictionarySerializer()
    iterator.serialize(saved)
    return saved.target


def test_iterators_go_on_where_they_were(comm, make):
    """In the middle of an epoch, with the dataset made anew; every sample once an epoch, over all ranks."""
    samples = make_samples(7 * comm.size + 3)
    dataset = make(samples)
    iterator = DistributedIterator(dataset, 2, comm, seed=4)
    first = [next(iterator) for _ in range(2)]
    saved = save(iterator)
    expected = [next(iterator) for _ in range(6)]
    other = DistributedIterator(pickle.loads(pickle.dumps(dataset)), 2, comm, seed=9)
    other.serialize(serializers.NpzDeserializer(saved))
    assert_same_sample([next(other) for _ in range(6)], expected)
    labels = [int(t) for batch in first + expected for _, t in batch]
    order = [
        label
        for step in range(0, len(labels), 2)
        for each in comm.allgather_obj(labels[step : step + 2])
        for label in each
    ]
    assert sorted(order[: len(samples)]) == [*range(len(samples))]


class Recorder(chainer.Chain):
    """A model that remembers the labels it was given."""

    def __init__(self):
        super().__init__()
        self.seen = []
        with self.init_scope():
            self.w = chainer.Parameter(np.zeros((), np.float32))

    def __call__(self, x, t):
        """Return a loss."""
        self.seen += t.tolist()
        return chainer.functions.sum(self.w * x)


def test_a_training_resumes_from_a_checkpoint(comm, make, folder):
    """A trainer that was ended within an epoch goes on with the samples that it would have had."""
    dataset = make(make_samples(11 * comm.size))

    def train(n_iterations, out):
        model = Recorder()
        optimizer = chainer.optimizers.SGD(0.1)
        optimizer = chainer_dist.create_multi_node_optimizer(optimizer, comm).setup(model)
        part = chainer_dist.scatter_dataset(dataset, comm, shuffle=True, seed=1)
        iterator = iterators.SerialIterator(part, 3)
        updater = training.StandardUpdater(iterator, optimizer)
        trainer = training.Trainer(updater, (n_iterations, "iteration"), out=str(out))
        checkpoint = chainer_dist.Checkpoint(comm, out)
        trainer.extend(checkpoint, trigger=(5, "iteration"))
        checkpoint.resume(trainer)
        trainer.run()
        return model.seen

    np.random.seed(comm.rank)
    expected = train(12, folder / "whole")
    np.random.seed(comm.rank)
    before = train(5, folder / "parts")
    np.random.seed(99)
    assert before + train(12, folder / "parts") == expected


def test_worker_processes_of_ranks(comm, all_formats):
    """A DistributedIterator's workers, which a fork server starts, read the same batches."""
    with start_method("forkserver"):
        loader = functools.partial(
            iterators.MultiprocessIterator, n_processes=1, n_prefetch=2, shared_mem=1000
        )
        iterator = DistributedIterator(all_formats, 4, comm, seed=3, make_iterator=loader)
        plain = DistributedIterator(all_formats, 4, comm, seed=3)
        assert_same_sample([next(iterator) for _ in range(5)], [next(plain) for _ in range(5)])
        iterator.finalize()


# Mistakes.


def test_a_missing_file_is_named(folder, name):
    """With the machine that does not have it, and what to do."""
    path = folder / "nowhere"
    with pytest.raises(FileNotFoundError, match=r"nowhere.* is not there on .*all ranks"):
        FORMATS[name][1](path)


def test_what_is_no_file_is_refused(tmp_path, name):
    """A named pipe would be waited at for ever; a handle is of one process."""
    os.mkfifo(tmp_path / "pipe")
    open_ = FORMATS[name][1]
    with pytest.raises(OSError, match="pipe is not a regular file"):
        open_(tmp_path / "pipe")
    with (tmp_path / "empty").open("wb") as file, pytest.raises(TypeError, match="BufferedWriter"):
        open_([file])
    with pytest.raises(ValueError, match="empty list"):
        open_([])
    with pytest.raises(ValueError, match="max_open is 0"):
        open_(tmp_path / "empty", max_open=0)
    with pytest.raises(TypeError, match="float"):
        open_(tmp_path / "empty", max_open=1.5)


@pytest.mark.parametrize("content", [b"", b"no such format " * 100])
def test_a_file_of_another_format_is_named(tmp_path, name, content):
    """Whatever the library raises."""
    (tmp_path / "strange").write_bytes(content)
    with pytest.raises(Exception, match=r"strange cannot be opened by \w+Dataset: ."):
        FORMATS[name][1](tmp_path / "strange")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a function that returns the content of a file of 200 samples."""

    @functools.cache
    def content(name):
        path = tmp_path_factory.mktemp("whole") / name
        FORMATS[name][0](path, make_samples(200), 50)
        return path.read_bytes()

    return content


@pytest.mark.mpi_skip
@pytest.mark.parametrize("name", sorted({*FORMATS} - {"zarr"}))
@given(share=st.floats(0.05, 0.9))
def test_a_truncated_file_is_an_error(tmp_path_factory, name, whole, share):
    """At once, or when a sample is read; never other samples, and no signal."""
    path = tmp_path_factory.mktemp("truncated") / "data"
    path.write_bytes(whole(name)[: int(len(whole(name)) * share)])
    with pytest.raises(Exception, match=r"data"):
        FORMATS[name][1](path)[:]


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [
        ("hdf5", "h5py", "hdf5"),
        ("lmdb", "lmdb", "lmdb"),
        ("parquet", "pyarrow.parquet", "parquet"),
        ("zarr", "zarr", "zarr"),
    ],
)
def test_a_missing_library_raises_everywhere(comm, make, monkeypatch, library, extra):
    """Where a dataset is made, and on all ranks where one that is given it lacks the library."""
    dataset = make(make_samples(3 * comm.size))
    expected = rf"needs {library.split('.')[0]}.* pip install 'chainer_dist\[{extra}\]'"
    if comm.rank == comm.size - 1:
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ImportError, match=expected):
            make_again(dataset)
    if comm.size > 1:
        with pytest.raises(ImportError, match=f"rank {comm.size - 1}: .*{expected}"):
            chainer_dist.scatter_dataset(dataset, comm)


def make_again(dataset):
    """Make a dataset of the same class and file."""
    return type(dataset)(dataset.paths[0])


@pytest.fixture
def own_folder(comm, folder, monkeypatch):
    """Return a path that each rank finds a folder of its own under."""
    if sys.platform != "linux":
        pytest.skip("looks into /proc")
    own = folder / str(comm.rank)
    own.mkdir()
    monkeypatch.chdir(own)
    return Path("/proc/self/cwd")


@pytest.mark.parametrize("what", ["missing", "longer"])
def test_another_file_on_another_rank_raises_everywhere(comm, folder, own_folder, name, what):
    """scatter_dataset says on which rank the file is not the one that root has."""
    write, open_ = FORMATS[name]
    last = comm.size - 1
    if comm.rank == 0:
        write(own_folder / "data", make_samples(6), 1)
    comm.mpi_comm.Barrier()
    if 0 < comm.rank < last:  # a copy with the time of the last change
        original = folder / "0" / "data"
        (shutil.copytree if original.is_dir() else shutil.copy2)(original, own_folder / "data")
    elif comm.rank and what == "longer":
        write(own_folder / "data", make_samples(60), 1)
    dataset = open_(own_folder / "data") if comm.rank == 0 else None
    if comm.size == 1:
        assert len(chainer_dist.scatter_dataset(dataset, comm)) == 6
        return
    expected = FileNotFoundError if what == "missing" else RuntimeError
    with pytest.raises(expected, match=rf"rank {last}: .*data .* all ranks"):
        chainer_dist.scatter_dataset(dataset, comm)


def test_other_lengths_on_ranks_are_a_mismatch(comm, own_folder, name):
    """Ranks that iterate together must have the same samples."""
    write, open_ = FORMATS[name]
    write(own_folder / "data", make_samples(6 + comm.rank))
    dataset = open_(own_folder / "data")
    if comm.size == 1:
        assert len(DistributedIterator(dataset, 1, comm).dataset) == 6
        return
    with pytest.raises(
        RankMismatchError, match="rank 1: the length of the dataset is 7, expected 6"
    ):
        DistributedIterator(dataset, 1, comm)


@pytest.mark.mpi_skip
@pytest.mark.parametrize("n", [9, 8])
def test_a_file_that_changes_is_noticed(tmp_path, name, n):
    """Where it is opened again, in this process and in another."""
    FORMATS[name][0](tmp_path / "data", make_samples(8))
    dataset = FORMATS[name][1](tmp_path / "data")
    sent = pickle.dumps(dataset)
    dataset.close()
    path = Path(dataset.paths[0])
    if path.is_dir():
        for each in sorted(path.rglob("*"), reverse=True):
            each.rmdir() if each.is_dir() else each.unlink()
    else:
        path.unlink()
    FORMATS[name][0](path, make_samples(n, 100))
    for stale in (dataset, pickle.loads(sent)):
        with pytest.raises(
            RuntimeError, match=f"{path} .*has changed since.*make the dataset anew"
        ):
            stale[0]
    assert len(make_again(dataset)) == n
