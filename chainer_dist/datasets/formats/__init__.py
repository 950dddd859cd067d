"""Datasets of files that other programs write: one class for each format, in a module of its name."""

from __future__ import annotations

from chainer_dist.datasets.formats.decode import decode_member
from chainer_dist.datasets.formats.hdf5 import HDF5Dataset
from chainer_dist.datasets.formats.lmdb import LMDBDataset
from chainer_dist.datasets.formats.parquet import ParquetDataset
from chainer_dist.datasets.formats.stored import StoredDataset
from chainer_dist.datasets.formats.tar import TarDataset
from chainer_dist.datasets.formats.zarr import ZarrDataset

__all__ = [
    "HDF5Dataset",
    "LMDBDataset",
    "ParquetDataset",
    "StoredDataset",
    "TarDataset",
    "ZarrDataset",
    "decode_member",
]
