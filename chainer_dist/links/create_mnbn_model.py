"""Making a model's batch normalization span the ranks."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import chainer
from chainer import links as L

from chainer_dist.collectives.calls import check_call
from chainer_dist.functions.batch_normalization import get_communication_backend
from chainer_dist.links.batch_normalization import MultiNodeBatchNormalization

if TYPE_CHECKING:
    from chainer_dist.communicators import CommunicatorBase


def create_mnbn_model(
    link: chainer.Link, comm: CommunicatorBase, communication_backend: str = "auto"
) -> chainer.Link:
    """Copy a model with every BatchNormalization in it made to span all ranks. Local.

    The copy is deep and the original stays as it is. Each :class:`chainer.links.BatchNormalization`,
    however deep in Chains, ChainLists and Sequentials, and wherever else the model refers to it,
    becomes a :class:`~chainer_dist.links.MultiNodeBatchNormalization` with all that it had: axis,
    decay, eps, dtype, parameters and their update rules, running statistics, initializers of what
    waits for the first input, hooks, name and device. A link that is registered at two places is
    one link in the copy, too.

    So does a subclass of BatchNormalization, unless it has a ``forward`` of its own, as
    :class:`chainer.links.BatchRenormalization` has: that one is left as it is, and goes on
    normalizing the local batch, after a warning.

    For example, before an optimizer is set up with the model::

        model = chainer_dist.links.create_mnbn_model(model, comm)

    Args:
        link: Any link; it may be a BatchNormalization itself.
        comm: Communicator of the new links.
        communication_backend: ``auto`` or ``mpi``, which mean the same.

    Returns:
        A new link of the class of ``link``, or a MultiNodeBatchNormalization.

    Raises:
        ValueError: If ``communication_backend`` is another.

    The same as ChainerMN's ``create_mnbn_model``, which forgets ``axis``.
    """
    check_call("create_mnbn_model(link, comm)", comm, link, needs="namedlinks")
    get_communication_backend(comm, communication_backend)
    replaced: list[tuple[L.BatchNormalization, MultiNodeBatchNormalization]] = []
    memo: dict[int, Any] = {}  # deepcopy takes what is in here for copied already
    for path, each in link.namedlinks():
        if not isinstance(each, L.BatchNormalization) or id(each) in memo:
            continue
        if type(each).forward is L.BatchNormalization.forward:
            memo[id(each)] = MultiNodeBatchNormalization.__new__(MultiNodeBatchNormalization)
            replaced.append((each, memo[id(each)]))
        elif not isinstance(each, MultiNodeBatchNormalization):
            warnings.warn(
                f"{path} is a {type(each).__name__} with a forward() of its own, which normalizes "
                "the batch of each rank alone",
                UserWarning,
                stacklevel=2,
            )
    # Only now that all are known: what one of them holds may refer to another.
    for old, new in replaced:
        new.__dict__.update(copy.deepcopy(vars(old), memo))
        new.comm = comm
    return copy.deepcopy(link, memo)
