"""Checkpoints of all ranks: everything that a resume needs, written beside the training."""

from chainer_dist.checkpoints.checkpoint import Checkpoint
from chainer_dist.checkpoints.preemption import Preempted

__all__ = ["Checkpoint", "Preempted"]
