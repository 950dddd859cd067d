"""Dataset iterators that work on many ranks."""

from __future__ import annotations

from chainer_dist.iterators.distributed_iterator import DistributedIterator
from chainer_dist.iterators.divided import DividedIterator
from chainer_dist.iterators.multi_node_iterator import create_multi_node_iterator
from chainer_dist.iterators.synchronized_iterator import create_synchronized_iterator

__all__ = [
    "DistributedIterator",
    "DividedIterator",
    "create_multi_node_iterator",
    "create_synchronized_iterator",
]
