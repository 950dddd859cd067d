"""Datasets on many ranks."""

from __future__ import annotations

from chainer_dist.datasets.empty_dataset import create_empty_dataset
from chainer_dist.datasets.scatter import DataSizeError, scatter_dataset, scatter_index
from chainer_dist.datasets.take import take

__all__ = [
    "DataSizeError",
    "create_empty_dataset",
    "scatter_dataset",
    "scatter_index",
    "take",
]
