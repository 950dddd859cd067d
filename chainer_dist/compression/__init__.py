"""Averaging gradients over the network in fewer bytes: approximately, or only what is not zero.

Read :mod:`~chainer_dist.compression.compression` for what all ways have in common; each is one small
file. Give one of them to :func:`~chainer_dist.create_multi_node_optimizer`::

    optimizer = chainer_dist.create_multi_node_optimizer(
        optimizer, comm, compression=chainer_dist.compression.PowerSGD(rank=4))
"""

from __future__ import annotations

from chainer_dist.compression.compression import Compression, NodeCompression
from chainer_dist.compression.low_rank import PowerSGD
from chainer_dist.compression.quantized import BFloat16, Float16, Int8, Rounded
from chainer_dist.compression.sparse import TopK
from chainer_dist.compression.sparse_rows import SparseRows

__all__ = [
    "BFloat16",
    "Compression",
    "Float16",
    "Int8",
    "NodeCompression",
    "PowerSGD",
    "Rounded",
    "SparseRows",
    "TopK",
]
