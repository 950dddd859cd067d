"""Open files in a dataset: what is refused, where it is said to be, and what is let through."""

from __future__ import annotations

import functools
import io
import multiprocessing
import subprocess
import sys
import tarfile
import textwrap
import warnings

import h5py
import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from chainer import datasets, iterators
from chainer.dataset import DatasetMixin

import chainer_dist
from chainer_dist.datasets.handles import check_workers, refuse_handles
from chainer_dist.iterators import DistributedIterator
from stored_files import create_zarr


class Holder(DatasetMixin):
    """A user's dataset that holds something."""

    def __init__(self, held):
        self.held = held

    def __len__(self):
        return 3

    def get_example(self, i):
        """Return a sample."""
        return self.held[i]


class Careful(Holder):
    """One that leaves its open file out of the pickle."""

    def __getstate__(self):
        return {"held": [5, 6, 7]}


@pytest.fixture
def h5(tmp_path):
    """Return an open HDF5 file."""
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"] = np.arange(3)
        yield file


@pytest.fixture(params=["h5py.Dataset", "h5py.File", "lmdb", "parquet", "tar", "file"])
def handle(request, tmp_path, h5):
    """Return something open, what it is called, and what is to be used."""
    if request.param == "h5py.Dataset":
        yield h5["x"], "h5py.Dataset", "HDF5Dataset"
    elif request.param == "h5py.File":
        yield h5, "h5py.File", "HDF5Dataset"
    elif request.param == "lmdb":
        with lmdb.open(str(tmp_path / "db")) as environment:
            yield environment, r"\w+.Environment", "LMDBDataset"
    elif request.param == "parquet":
        pq.write_table(pa.table({"x": [1]}), tmp_path / "data.parquet")
        with pq.ParquetFile(tmp_path / "data.parquet") as file:
            yield file, "pyarrow.ParquetFile", "ParquetDataset"
    elif request.param == "tar":
        with tarfile.open(tmp_path / "data.tar", "w") as file:
            yield file, "tarfile.TarFile", "TarDataset"
    else:
        with (tmp_path / "file").open("wb") as file:
            yield file, "_io.BufferedWriter", "open the file where it is read"


HELD = {
    "alone": lambda it: (it, "the dataset"),
    "in an attribute": lambda it: (Holder(it), r"the dataset\.held"),
    "in a column": lambda it: (
        datasets.DictDataset(x=Holder(it), t=range(3)),
        r"the dataset\._datasets\['x'\]\.held",
    ),
    "in a transform": lambda it: (
        datasets.TransformDataset(range(3), functools.partial(print, it)),
        r"an argument of the dataset\._transform",
    ),
    "in a method": lambda it: (
        datasets.TransformDataset(range(3), Holder(it).get_example),
        r"the dataset\._transform\.__self__\.held",
    ),
    "in a function": lambda it: (
        datasets.TransformDataset(range(3), lambda i: (i, it)),
        r"it in the dataset\._transform",
    ),
}


@pytest.mark.parametrize("how", HELD)
def test_a_dataset_with_an_open_file_is_refused_everywhere(comm, handle, how):
    """The error says where it is, what it is, and what to use, on all ranks."""
    open_, kind, advice = handle
    dataset, where = HELD[how](open_)
    if comm.size == 1 and hasattr(dataset, "__len__"):
        assert chainer_dist.scatter_dataset(dataset, comm)._dataset is dataset  # nothing is sent
        return
    with pytest.raises(TypeError, match=f"{where} is an open {kind}, .*{advice}"):
        chainer_dist.scatter_dataset(dataset if comm.rank == 0 else None, comm)


def test_what_leaves_its_file_out_is_sent(comm, h5):
    """A dataset with a way of its own to be pickled, and text and bytes in memory."""
    part = chainer_dist.scatter_dataset(Careful(h5), comm)
    if comm.rank > 0:  # rank 0 keeps its own object, with the open file
        assert part[0] in {5, 6, 7}
    refuse_handles(Holder([io.BytesIO(), io.StringIO(), "text", None]))


def test_arrays_of_zarr(comm, tmp_path):
    """They are sent as their paths; one that has no length needs a dataset around it."""
    path = comm.bcast_obj(str(tmp_path))
    if comm.rank == 0:
        create_zarr(zarr.open_group(path, mode="w"), "x", np.arange(3), (2,))
    comm.mpi_comm.Barrier()
    array = zarr.open_group(path, mode="r")["x"]
    part = chainer_dist.scatter_dataset(Holder(array), comm, force_equal_length=False)
    assert sum(comm.allgather_obj([int(x) for x in part]), []) == [0, 1, 2]  # noqa: RUF017 - a few
    if not hasattr(array, "__len__"):
        with pytest.raises(TypeError, match=r"open zarr\.Array.*ZarrDataset"):
            chainer_dist.scatter_dataset(array, comm)


def test_objects_that_refer_to_one_another(h5):
    """Are looked at once, and long lists at their beginning."""
    first, second = Holder(None), Holder(None)
    first.held, second.held = second, [first] * 10**6
    refuse_handles(first)
    second.held[5] = Holder(h5["x"])
    with pytest.raises(TypeError, match=r"the dataset\.held\.held\[5\]\.held is"):
        refuse_handles(first)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_of_a_distributed_iterator(comm, h5, method):
    """Spawned workers cannot have the file, and forked ones had better not."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(method, force=True)
    loader = functools.partial(iterators.MultiprocessIterator, n_processes=1)
    try:
        if method == "fork":
            worker = loader(Holder(h5["x"]), 1)
            with pytest.warns(RuntimeWarning, match=r"held is an open h5py\.Dataset.*HDF5Dataset"):
                check_workers(worker)
            worker.finalize()
            return
        iterator = DistributedIterator(Holder(h5["x"]), 1, comm, make_iterator=loader)
        with pytest.raises(TypeError, match=r"held is an open h5py\.Dataset.*HDF5Dataset"):
            next(iterator)
        iterator.finalize()
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_iterators_without_processes_are_let_alone(comm, h5):
    """They read in this process, which has the file open."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iterator = DistributedIterator(Holder(h5["x"]), 1, comm, shuffle=False)
        assert next(iterator) == [comm.rank % 3]


@pytest.mark.mpi_skip
def test_no_library_is_imported_for_it():
    """What a script does not use takes no time to look for."""
    script = """
        import sys
        import chainer  # which imports h5py where it is installed
        before = {*sys.modules}
        import chainer_dist
        from chainer_dist.datasets.handles import check_files, refuse_handles

        refuse_handles([range(3), lambda: 0])
        check_files(range(3))
        assert not {"h5py", "lmdb", "zarr", "pyarrow"} & ({*sys.modules} - before)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=100)
