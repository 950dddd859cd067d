"""Distributed training for Chainer: MPI-based data parallelism on CPU cores and cluster nodes."""

from chainer_dist import _compat  # isort: skip  # noqa: F401 - repairs Chainer before its first import

from chainer_dist._version import __version__

__all__ = ["__version__"]
