"""Optimizers that all ranks step together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

from chainer_dist._counts import checked_count
from chainer_dist.collectives.calls import check_call
from chainer_dist.communicators.shared_memory.communicator import SharedMemoryCommunicator
from chainer_dist.compression import Compression
from chainer_dist.compression.quantized import as_codec
from chainer_dist.optimizers.double_buffering import DoubleBufferingOptimizer
from chainer_dist.optimizers.foreign import is_foreign, wrap_foreign
from chainer_dist.optimizers.join import Join
from chainer_dist.optimizers.local_sgd import create_local_sgd_optimizer
from chainer_dist.optimizers.multi_node_optimizer import MultiNodeOptimizer
from chainer_dist.updates.options import JOB, Options

if TYPE_CHECKING:
    import chainer

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["Join", "create_local_sgd_optimizer", "create_multi_node_optimizer"]


def create_multi_node_optimizer(
    actual_optimizer: chainer.Optimizer,
    communicator: CommunicatorBase,
    double_buffering: bool = False,
    zero_fill: bool = True,
    *,
    sharded_update: bool | Literal["job"] | None = None,
    mean_grad: bool = False,
    share_parameters: bool = False,
    compression: Compression | None = None,
    accumulate_steps: int = 1,
    overlap: bool | None = None,
) -> MultiNodeOptimizer:
    """Make an optimizer that averages gradients over the ranks before each of its updates.

    Use it exactly like the optimizer it wraps, on every rank. ``setup`` and ``update`` become
    collective. Attributes read and set, hooks added, and what is saved are the wrapped
    optimizer's, so that hyperparameter schedules and snapshots need no change.

    Training on N ranks then equals training of one process on the concatenated batch, if each rank's
    loss is a mean over an equally large batch.

    With the communicator ``shared_memory`` the update is sharded where that provably gives the same
    parameters: each rank of a node runs Chainer's update rules on a slice of the parameters, and the
    others copy the result. So it is for Chainer's rules (except MSVAG) with the hooks ``WeightDecay``,
    ``Lasso``, ``GradientHardClipping`` and ``GradientClipping``, whose norm is summed over slices, with
    hooks that say that they act elementwise, by a true attribute ``is_elementwise``, and with no others,
    where hyperparameters are numbers and no arrays, outside of Chainer's debug mode. In any other case every rank
    updates all parameters, as in ChainerMN, and rank 0 logs the reason, once, as a warning of the logger
    ``chainer_dist``. ``optimizer.sharded`` is true where the update is sharded. What a sharded update changes:

    - ``param.grad`` stays this rank's own gradient (of ChainerMN's updates it is the average); see
      ``mean_grad``. Hooks see the average in any case.
    - The state of the update rules exists once per node, in arrays that cannot be written. (Deep copies
      and pickles of it, of the model and of the optimizer can.) Any rank can save it. Load it on every
      rank, through this optimizer. Once per job: ``sharded_update="job"``.
    - Parameters are updated in place in each rank's own arrays; see ``share_parameters``.

    For example, on every rank::

        optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.Adam(), comm)
        optimizer.setup(model)
        optimizer.update(model, x, t)  # x and t are this rank's batch

    Args:
        actual_optimizer: Any Chainer optimizer, set up or not. It is changed by the updates. Any other
            object with ``setup``, ``target`` and ``update`` is taken as well, such as a wrapped optimizer of
            another library: gradients are averaged, then its own ``update`` is called on every rank.
            Such an object takes only the option ``zero_fill``.
        communicator: The communicator over whose ranks gradients are averaged.
        double_buffering: Whether gradients are exchanged in the background while the next step
            computes. Each update then uses the gradients of the step before it: the first call
            of ``update`` only starts an exchange, and the last gradients are never used. It pays
            where the network is slow, if training bears gradients that are one step old. Every rank
            updates all parameters then, and a snapshot has no gradients under way.
        zero_fill: Whether a gradient that is None on this rank counts as zero. If False it must
            be None on all ranks or on none.
        sharded_update: False to have every rank update all parameters, True to raise ValueError
            where the update cannot be sharded. ``"job"`` does as well, and shards it over all ranks of
            the job instead of the ranks of each node, as stage 1 of ZeRO (Rajbhandari et al., 2020): the
            state of the update rules exists once per job. Nodes send each other sums of gradients
            before, and the parameters that each has updated after that: as many bytes as otherwise,
            but only the first half can overlap with backward. The state can be saved after
            ``optimizer.consolidate()``, which is collective. Parameters equal the ones of the
            replicated update, to the bit between two nodes (MPI adds up more nodes in another order).
        mean_grad: Whether a sharded update leaves the average in ``param.grad``, as the hooks left
            it: the same on every rank, kept once per node, and read-only for that. It stays as it
            is until this rank's next update; keep a copy for longer.
        share_parameters: Whether a sharded update keeps parameters, too, once per node. It saves
            time and memory. From the first update on ``param.array`` is then memory of all ranks
            of the node: all ranks see what one writes there, so that ``param.array *= 2``
            on every rank doubles it once for each rank; and arrays that were held elsewhere before,
            as by ``model.copy()``, are no longer the model's.
        compression: One of :mod:`chainer_dist.compression`, to average gradients with fewer bytes
            between nodes, approximately, or by their rows that are not zero, exactly; the same kind
            on every rank, and an object of this optimizer alone. Its state is saved with the
            optimizer's. Every rank updates all parameters then, after an exchange that does not
            overlap, except with ``Float16`` and ``BFloat16``, which change nothing but the numbers
            between nodes.
        accumulate_steps: How many calls of ``update`` make one update, for batches that are too
            large for the memory, or for fewer exchanges: k calls compute gradients k times, and
            exchange and update once, by the mean. So k batches of size b, each of whose losses is a
            mean, give what one batch of k * b gives, to rounding (but for batch normalization,
            dropout and the like, which see b samples at a time). A parameter without a gradient in
            some of the batches counts as zero there. ``optimizer.t``, hooks, dynamic loss
            scaling, compression and double buffering count updates; iterations of a Trainer count
            calls, so that a trigger of (1000, "iteration") comes every 1000 / k updates. Batches
            after the last update, if they are fewer than k, bring nothing. Can be set later, as
            ``optimizer.accumulate_steps``. :class:`~chainer_dist.Checkpoint` saves what is being
            accumulated; Chainer's snapshots leave it out. For numbers that change from update to
            update see ``optimizer.no_sync()``.
        overlap: Whether gradients are exchanged while backward still computes others, in the order
            in which they become final. It needs the communicator ``shared_memory``, and
            ``update`` to be given the loss function. None stands for: where there are several
            nodes; within one node no processor is idle meanwhile. The same on every rank. The
            parameters are the same as without it, to the bit where MPI adds in an order that does
            not depend on the size of a message (MPICH does, and any MPI between two nodes); with
            ``GradientClipping`` but for rounding, as its norm is summed in another order. Not
            overlapped are the first update, ``update(None)``, accumulated batches, ``Join``,
            ``double_buffering`` and ``compression`` (but for ``Float16`` and ``BFloat16``), nor,
            where every rank updates all parameters, an update whose loss comes from other
            parameters than that of the update before.

    Returns:
        The optimizer to use in place of ``actual_optimizer``. Pickled, it leaves its communicator
        behind; deep-copied, it keeps it.

    Raises:
        ValueError: If ``double_buffering`` and ``compression`` are asked for together, or one of
            them (but for ``Float16`` and ``BFloat16``) with ``sharded_update=True``, or
            ``double_buffering`` with an MPI library that was not built, or not started, for several
            threads; or one of them with a communicator that has a ``multi_node_mean_grad`` of its own;
            or ``overlap`` with one of them or another communicator than ``shared_memory``; or if
            ``compression`` is the object of another optimizer (``Float16``, ``BFloat16`` and
            ``SparseRows`` may be); or if ``accumulate_steps`` is not 1 or more. From updates, if
            ``sharded_update`` is True and the update cannot be sharded.
        TypeError: If ``compression`` is something else.
        RankMismatchError: Raised by updates on every rank, if ``accumulate_steps``, ``overlap`` or
            the kind of ``compression`` differs.
    """
    check_call(
        "create_multi_node_optimizer(actual_optimizer, communicator)",
        communicator,
        actual_optimizer,
        needs="update",
    )
    if is_foreign(actual_optimizer):
        wanted = {
            "double_buffering": double_buffering,
            "sharded_update": sharded_update,
            "mean_grad": mean_grad,
            "share_parameters": share_parameters,
            "compression": compression,
            "accumulate_steps": accumulate_steps != 1,
            "overlap": overlap,
        }
        return cast(
            "MultiNodeOptimizer", wrap_foreign(actual_optimizer, communicator, zero_fill, wanted)
        )
    accumulate_steps = checked_count("accumulate_steps", accumulate_steps, 1)
    _check_sharding(sharded_update, mean_grad=mean_grad)
    if not isinstance(compression, (Compression, type(None))):
        raise TypeError(
            f"compression is {compression!r}, expected an object such as chainer_dist.compression.Int8()"
        )
    apart = None  # what exchanges gradients in its own way
    if double_buffering:
        apart = "double_buffering"
    elif compression is not None and as_codec(compression) is None:
        apart = f"compression by {type(compression).__name__}"
    if sharded_update and apart:
        raise ValueError(f"{apart} updates on every rank; leave sharded_update out")
    if double_buffering and compression is not None:
        raise ValueError("double_buffering exchanges gradients exactly; leave compression out")
    if overlap and apart:
        raise ValueError(f"{apart} exchanges gradients in its own way; leave overlap out")
    if overlap and not isinstance(communicator, SharedMemoryCommunicator):
        raise ValueError(
            f"overlap needs the communicator shared_memory, this one is {communicator.name}"
        )
    _check_own_mean(
        communicator, apart or (compression and "compression") or (overlap and "overlap")
    )
    if apart:
        sharded_update = overlap = False
    options = Options(
        sharded_update, mean_grad, share_parameters, compression, accumulate_steps, overlap
    )
    kind = DoubleBufferingOptimizer if double_buffering else MultiNodeOptimizer
    return kind(actual_optimizer, communicator, zero_fill, options)


def _check_own_mean(communicator: CommunicatorBase, option: object) -> None:
    if option and communicator.has_own_mean:
        raise ValueError(
            f"{type(communicator).__name__} averages gradients in a multi_node_mean_grad of its own, "
            f"which {option} would pass by; leave that out"
        )


def _check_sharding(sharded_update: object, *, mean_grad: bool) -> None:
    if sharded_update not in {None, False, True, JOB}:
        raise ValueError(
            f"sharded_update is {sharded_update!r}, expected None, False, True or {JOB!r}"
        )
    if sharded_update == JOB and mean_grad:
        raise ValueError(f"no node has all means with sharded_update={JOB!r}; leave mean_grad out")
