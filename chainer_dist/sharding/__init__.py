"""Sharing the update of parameters out to the ranks of a node."""

from __future__ import annotations

from chainer_dist.sharding.eligibility import Signature, obstacle
from chainer_dist.sharding.sharded_update import Part, ShardedUpdate, places

__all__ = ["Part", "ShardedUpdate", "Signature", "obstacle", "places"]
