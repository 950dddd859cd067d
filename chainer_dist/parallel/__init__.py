"""Work beside training: a function or a trained model applied to many items, on all ranks.

:func:`~chainer_dist.pmap` and :func:`~chainer_dist.predict`, and in :mod:`~chainer_dist.parallel.dealing` what they have in common.
"""

from __future__ import annotations

from chainer_dist.parallel.mapping import pmap
from chainer_dist.parallel.prediction import predict

__all__ = ["pmap", "predict"]
