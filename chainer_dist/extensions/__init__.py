"""Trainer extensions that work on many ranks."""

from __future__ import annotations

from chainer_dist.extensions._multi_node_snapshot import multi_node_snapshot
from chainer_dist.extensions.allreduce_persistent import AllreducePersistent
from chainer_dist.extensions.checkpoint import create_multi_node_checkpointer
from chainer_dist.extensions.generic_multi_node_evaluator import GenericMultiNodeEvaluator
from chainer_dist.extensions.multi_node_early_stopping_trigger import MultiNodeEarlyStoppingTrigger
from chainer_dist.extensions.multi_node_evaluator import create_multi_node_evaluator
from chainer_dist.extensions.observation_aggregator import ObservationAggregator

__all__ = [
    "AllreducePersistent",
    "GenericMultiNodeEvaluator",
    "MultiNodeEarlyStoppingTrigger",
    "ObservationAggregator",
    "create_multi_node_checkpointer",
    "create_multi_node_evaluator",
    "multi_node_snapshot",
]
