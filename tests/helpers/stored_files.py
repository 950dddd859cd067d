"""Files of each format that chainer_dist.datasets reads, written by the libraries themselves."""

from __future__ import annotations

import io
import tarfile

import h5py
import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from chainer_dist.datasets import (
    HDF5Dataset,
    LMDBDataset,
    ParquetDataset,
    TarDataset,
    ZarrDataset,
)

SHAPE = (2, 3)


def make_samples(n, start=0):
    """Return n samples: an array, float32 of shape (2, 3), and a label, int32."""
    x = np.arange(6 * start, 6 * (start + n), dtype=np.float32).reshape(n, *SHAPE)
    t = np.arange(start, start + n, dtype=np.int32)
    return list(zip(x, t))


def _columns(samples):
    return np.array([x for x, _ in samples], np.float32), np.array(
        [t for _, t in samples], np.int32
    )


def write_hdf5(path, samples, block=4):
    """Write two datasets, one of them in compressed chunks."""
    x, t = _columns(samples)
    with h5py.File(path, "w") as file:
        chunks = (min(block, len(x)), *x.shape[1:])
        file.create_dataset("x", data=x, chunks=chunks, compression="gzip")
        file["t"] = t


def write_zarr(path, samples, block=4):
    """Write a group of two arrays with chunks of different lengths."""
    group = zarr.open_group(str(path), mode="w")
    for name, column, rows in zip("xt", _columns(samples), (block, block + 1)):
        create_zarr(group, name, column, (rows, *column.shape[1:]))


def create_zarr(group, name, column, chunks):
    """Create an array in a group, by either version of the library."""
    create = getattr(group, "create_array", None) or group.create_dataset
    array = create(name, shape=column.shape, dtype=column.dtype, chunks=chunks)
    array[...] = column


def write_parquet(path, samples, block=4):
    """Write a table with a column of tensors."""
    x, t = _columns(samples)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(x)
    pq.write_table(pa.table({"x": tensors, "t": t}), path, row_group_size=block)


def write_lmdb(path, samples, block=4):
    """Write records of bytes: the label, then the array."""
    del block
    environment = lmdb.open(str(path), map_size=1 << 26, subdir=False)
    with environment, environment.begin(write=True) as transaction:
        for i, (x, t) in enumerate(samples):
            # The first key has nothing but zeros.
            transaction.put(i.to_bytes(5, "big"), np.int32(t).tobytes() + x.tobytes())


def decode_record(value):
    """Decode what :func:`write_lmdb` has written."""
    return (
        np.frombuffer(value, np.float32, offset=4).reshape(-1, SHAPE[1]).copy(),
        np.frombuffer(value, np.int32, 1)[0],
    )


def npy(array):
    """Return an array as the bytes of an .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def add_member(archive, name, data):
    """Add a file to a tar file."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_tar(path, samples, block=4):
    """Write an array and a label for each sample, and a file that is of no sample."""
    del block
    with tarfile.open(path, "w") as archive:
        for i, (x, t) in enumerate(samples):
            add_member(archive, f"part/{i:06}.x.npy", npy(x))
            add_member(archive, f"part/{i:06}.CLS", str(t).encode())
        add_member(archive, "README", b"read me")


def open_hdf5(paths, **options):
    """Return the dataset of (x, t)."""
    return HDF5Dataset(paths, ["x", "t"], **options)


def open_zarr(paths, **options):
    """Return the dataset of (x, t)."""
    return ZarrDataset(paths, ["x", "t"], **options)


def open_parquet(paths, **options):
    """Return the dataset of (x, t)."""
    return ParquetDataset(paths, ["x", "t"], **options)


def open_lmdb(paths, **options):
    """Return the dataset of (x, t)."""
    return LMDBDataset(paths, decode_record, **options)


def open_tar(paths, **options):
    """Return the dataset of (x, t)."""
    return TarDataset(paths, ["x.npy", "cls"], **options)


# For each format how it is written and opened.
FORMATS = {
    "hdf5": (write_hdf5, open_hdf5),
    "lmdb": (write_lmdb, open_lmdb),
    "parquet": (write_parquet, open_parquet),
    "tar": (write_tar, open_tar),
    "zarr": (write_zarr, open_zarr),
}
