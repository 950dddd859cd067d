"""Links that span several ranks."""

from __future__ import annotations

from chainer_dist.links.batch_normalization import MultiNodeBatchNormalization
from chainer_dist.links.create_mnbn_model import create_mnbn_model
from chainer_dist.links.multi_node_chain_list import MultiNodeChainList
from chainer_dist.links.n_step_rnn import create_multi_node_n_step_rnn

__all__ = [
    "MultiNodeBatchNormalization",
    "MultiNodeChainList",
    "create_mnbn_model",
    "create_multi_node_n_step_rnn",
]
