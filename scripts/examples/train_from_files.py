#!/usr/bin/env python
"""Train from a file that other programs write, too: HDF5, LMDB, Zarr, Parquet, or tar as WebDataset has it.

    mpiexec -n 2 python scripts/examples/train_from_files.py --format hdf5
    mpiexec -n 2 python scripts/examples/train_from_files.py --format tar

Where there is none, handwritten digits are written into one first. Each rank opens the file by itself
and reads the samples of its batches: an epoch is one shuffled order for all ranks. The formats need
``pip install 'chainer_dist[formats]'``.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chainer
import chainer.links as L
import numpy as np
from chainer.training import extensions
from digits import CNN, get_digits
from example import add_reports, make_parser

import chainer_dist
from chainer_dist.datasets import (
    HDF5Dataset,
    LMDBDataset,
    ParquetDataset,
    TarDataset,
    ZarrDataset,
)

if TYPE_CHECKING:
    import argparse

COLUMNS = ["image", "label"]


def write_hdf5(path: Path, images: Any, labels: Any) -> None:
    """Write two HDF5 datasets."""
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=images, chunks=(64, *images.shape[1:]), compression="lzf")
        file["label"] = labels


def write_lmdb(path: Path, images: Any, labels: Any) -> None:
    """Write a record for each sample: the label, then the image."""
    import lmdb

    environment = lmdb.open(str(path), map_size=1 << 30)
    with environment, environment.begin(write=True) as transaction:
        for i, (image, label) in enumerate(zip(images, labels)):
            transaction.put(f"{i:08}".encode(), label.tobytes() + image.tobytes())


def decode(value: bytes) -> tuple[Any, Any]:
    """Return the sample of a record."""
    image = np.frombuffer(value, np.float32, offset=4).reshape(1, 8, 8)
    return image, np.frombuffer(value, np.int32, 1)[0]


def write_zarr(path: Path, images: Any, labels: Any) -> None:
    """Write a group of two arrays."""
    import zarr

    group = zarr.open_group(str(path), mode="w")
    create = getattr(group, "create_array", None) or group.create_dataset  # zarr 3, or 2
    for name, column in zip(COLUMNS, (images, labels)):
        chunks = (64, *column.shape[1:])
        create(name, shape=column.shape, dtype=column.dtype, chunks=chunks)[...] = column


def write_parquet(path: Path, images: Any, labels: Any) -> None:
    """Write a table with a column of tensors, in small row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(images)
    pq.write_table(pa.table({"image": tensors, "label": labels}), path, row_group_size=64)


def write_tar(path: Path, images: Any, labels: Any) -> None:
    """Write two files for each sample."""
    with tarfile.open(path, "w") as archive:
        for i, (image, label) in enumerate(zip(images, labels)):
            file = io.BytesIO()
            np.save(file, image)
            for ending, content in ("npy", file.getvalue()), ("cls", str(label).encode()):
                member = tarfile.TarInfo(f"{i:08}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def open_file(kind: str, path: Path) -> Any:
    """Return the dataset of (image, label)."""
    if kind == "lmdb":
        return LMDBDataset(path, decode)
    if kind == "tar":
        return TarDataset(path, ["npy", "cls"])
    return {"hdf5": HDF5Dataset, "parquet": ParquetDataset, "zarr": ZarrDataset}[kind](
        path, COLUMNS
    )


WRITERS = {
    "hdf5": write_hdf5,
    "lmdb": write_lmdb,
    "parquet": write_parquet,
    "tar": write_tar,
    "zarr": write_zarr,
}


def write_digits(kind: str, path: Path, digits: Any) -> None:
    """Write digits into a file, or a folder, that is there once it is complete."""
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
    images, labels = (np.array([*column]) for column in zip(*digits))
    WRITERS[kind](part, images, labels)
    part.rename(path)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__, epochs=8, batch_size=32, out=Path("result"))
    parser.add_argument("--format", choices=WRITERS, default="hdf5", help="default: hdf5")
    return parser.parse_args()


def main() -> None:
    """Train, validate after each epoch, and say how well it went."""
    args = parse_args()
    comm = chainer_dist.create_communicator()
    np.random.seed(args.seed + comm.rank)  # noqa: NPY002 - what Chainer draws from

    paths = [args.out / f"{part}.{args.format}" for part in ("train", "validation")]
    if comm.rank == 0:  # distributed: one rank writes
        for path, digits in zip(paths, get_digits()):
            if not path.exists():
                write_digits(args.format, path, digits)
    comm.bcast_obj(None)  # distributed: once the files are there, all ranks open them
    train, validation = (open_file(args.format, path) for path in paths)
    n_validation = len(validation)
    validation = chainer_dist.scatter_dataset(  # distributed
        validation, comm, force_equal_length=False
    )

    model = L.Classifier(CNN())
    optimizer = chainer.optimizers.Adam()
    optimizer = chainer_dist.create_multi_node_optimizer(optimizer, comm)  # distributed
    optimizer.setup(model)

    train_iter = chainer_dist.iterators.DistributedIterator(  # distributed
        train, args.batch_size, comm, seed=args.seed
    )
    validation_iter = chainer.iterators.SerialIterator(validation, 256, repeat=False, shuffle=False)
    updater = chainer.training.updaters.StandardUpdater(train_iter, optimizer)
    trainer = chainer.training.Trainer(updater, (args.epochs, "epoch"), out=str(args.out))

    evaluator = extensions.Evaluator(validation_iter, model)
    evaluator = chainer_dist.create_multi_node_evaluator(evaluator, comm)  # distributed
    trainer.extend(evaluator)
    columns = ["main/loss", "validation/main/loss", "validation/main/accuracy"]
    log = add_reports(trainer, comm, columns, columns[2:], args)

    trainer.run()

    if comm.rank == 0:
        accuracy = log.log[-1]["validation/main/accuracy"]
        print(f"\nValidation accuracy: {accuracy:.2%} on {n_validation} images of {paths[1]}")


if __name__ == "__main__":
    main()
