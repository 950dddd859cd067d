"""Trainer extensions that work on many ranks."""

from __future__ import annotations

from chainer_dist.extensions.multi_node_evaluator import create_multi_node_evaluator

__all__ = ["create_multi_node_evaluator"]
