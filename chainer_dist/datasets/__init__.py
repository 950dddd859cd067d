"""Datasets on many ranks."""

from __future__ import annotations

from chainer_dist.datasets.empty_dataset import create_empty_dataset
from chainer_dist.datasets.files import FilesDataset, open_arrays
from chainer_dist.datasets.formats import (
    HDF5Dataset,
    LMDBDataset,
    ParquetDataset,
    TarDataset,
    ZarrDataset,
    decode_member,
)
from chainer_dist.datasets.scatter import DataSizeError, scatter_dataset, scatter_index
from chainer_dist.datasets.shard import shard_array, shard_files
from chainer_dist.datasets.take import take

__all__ = [
    "DataSizeError",
    "FilesDataset",
    "HDF5Dataset",
    "LMDBDataset",
    "ParquetDataset",
    "TarDataset",
    "ZarrDataset",
    "create_empty_dataset",
    "decode_member",
    "open_arrays",
    "scatter_dataset",
    "scatter_index",
    "shard_array",
    "shard_files",
    "take",
]
