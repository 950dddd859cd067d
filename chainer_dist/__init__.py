"""Distributed training for Chainer: MPI-based data parallelism on CPU cores and cluster nodes.

One line makes an ordinary Chainer trainer distributed::

    chainer_dist.distribute(trainer)

and two lines a loop of one's own::

    comm = chainer_dist.create_communicator()
    optimizer = chainer_dist.create_multi_node_optimizer(optimizer, comm)

One training step is four files, in the order in which it runs through them:
:mod:`~chainer_dist.optimizers.multi_node_optimizer` (backward, then the mean, then the update),
:mod:`~chainer_dist.exchange` (which gradients there are, and whether the ranks agree on that),
:mod:`~chainer_dist.collectives.agreement` (how they find out), and a communicator such as
:mod:`~chainer_dist.communicators.flat` (how the mean is computed).

``import chainer_dist as chainermn`` serves scripts written for ChainerMN; :mod:`chainer_dist.chainermn`
is for those that cannot be changed.
"""

from chainer_dist import _compat  # isort: skip  # noqa: F401 - repairs Chainer before its first import

from chainer_dist import (
    chainermn,
    checkpoints,
    communicators,
    compression,
    datasets,
    errors,
    exchange,
    extensions,
    functions,
    global_except_hook,
    iterators,
    kernels,
    links,
    optimizers,
    parallel,
    training,
    updaters,
    watch,
)
from chainer_dist._version import __version__
from chainer_dist.chainermn import replace_chainermn
from chainer_dist.checkpoints import Checkpoint
from chainer_dist.communicators import CommunicatorBase, create_communicator
from chainer_dist.datasets import (
    DataSizeError,
    create_empty_dataset,
    scatter_dataset,
    scatter_index,
)
from chainer_dist.errors import FailedItem, FailedItemsError, RankMismatchError
from chainer_dist.extensions import create_multi_node_checkpointer, create_multi_node_evaluator
from chainer_dist.launcher.call import launch
from chainer_dist.launcher.errors import LaunchError
from chainer_dist.links import MultiNodeChainList
from chainer_dist.optimizers import (
    Join,
    create_local_sgd_optimizer,
    create_multi_node_optimizer,
)
from chainer_dist.parallel import pmap, predict
from chainer_dist.training import distribute, on_rank_zero
from chainer_dist.training.script import install as _distribute_if_asked
from chainer_dist.updaters import create_multi_node_updater

__all__ = [
    "Checkpoint",
    "CommunicatorBase",
    "DataSizeError",
    "FailedItem",
    "FailedItemsError",
    "Join",
    "LaunchError",
    "MultiNodeChainList",
    "RankMismatchError",
    "__version__",
    "chainermn",
    "checkpoints",
    "communicators",
    "compression",
    "create_communicator",
    "create_empty_dataset",
    "create_local_sgd_optimizer",
    "create_multi_node_checkpointer",
    "create_multi_node_evaluator",
    "create_multi_node_optimizer",
    "create_multi_node_updater",
    "datasets",
    "distribute",
    "errors",
    "exchange",
    "extensions",
    "functions",
    "global_except_hook",
    "iterators",
    "kernels",
    "launch",
    "links",
    "on_rank_zero",
    "optimizers",
    "parallel",
    "pmap",
    "predict",
    "replace_chainermn",
    "scatter_dataset",
    "scatter_index",
    "training",
    "updaters",
    "watch",
]

kernels.use_default()
global_except_hook.add_hook_if_enabled()
_distribute_if_asked()
