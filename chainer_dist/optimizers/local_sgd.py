"""Updates that each rank makes alone, with parameters averaged now and then."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from chainer_dist._counts import checked_count
from chainer_dist.collectives.calls import check_call
from chainer_dist.optimizers.multi_node_optimizer import MultiNodeOptimizer
from chainer_dist.updates.local import Local
from chainer_dist.updates.options import Options, Schedule

if TYPE_CHECKING:
    import chainer

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["LocalSGDOptimizer", "create_local_sgd_optimizer"]


class LocalSGDOptimizer(MultiNodeOptimizer):
    """A multi-node optimizer that averages parameters now and then, and gradients only at first.

    See :func:`chainer_dist.create_local_sgd_optimizer`.
    """

    def __init__(
        self,
        actual_optimizer: chainer.Optimizer,
        communicator: CommunicatorBase,
        period: int,
        warmup_updates: int,
        average_state: bool,
    ) -> None:
        schedule = Schedule(period, warmup_updates, average_state)
        options = Options(sharded_update=False, overlap=False, kind=Local.name, schedule=schedule)
        super().__init__(actual_optimizer, communicator, zero_fill=True, options=options)

    @property
    def _schedule(self) -> Schedule:
        return cast("Schedule", self.options.schedule)

    @property
    def period(self) -> int:
        """Number of updates from one averaging to the next; can be set, on every rank."""
        return self._schedule.period

    @period.setter
    def period(self, period: int) -> None:
        self._schedule.period = checked_count("period", period, 1)

    @property
    def warmup_updates(self) -> int:
        """Number of first updates that average gradients; can be set, on every rank."""
        return self._schedule.warmup_updates

    @warmup_updates.setter
    def warmup_updates(self, warmup_updates: int) -> None:
        self._schedule.warmup_updates = checked_count("warmup_updates", warmup_updates, 0)

    @property
    def average_state(self) -> bool:
        """Whether the state of the update rules is averaged, too; can be set, on every rank."""
        return self._schedule.average_state

    @average_state.setter
    def average_state(self, average_state: bool) -> None:
        self._schedule.average_state = average_state

    def average(self) -> None:
        """Make the parameters of all ranks their mean now. Collective.

        For an evaluation or a snapshot in the middle of a period. The next averaging comes when it
        would have come.

        Raises:
            RankMismatchError: On every rank, naming the rank and the parameter, if ranks differ.
        """
        step = self._step()
        step.agree(stands_by=False)
        cast("Local", step.plan.update).average()


def create_local_sgd_optimizer(
    actual_optimizer: chainer.Optimizer,
    communicator: CommunicatorBase,
    *,
    period: int,
    warmup_updates: int = 0,
    average_state: bool = False,
) -> LocalSGDOptimizer:
    """Make an optimizer whose ranks update alone and average their parameters every few updates.

    Local SGD (Stich, arXiv 1805.09767) communicates ``period`` times less often than
    :func:`~chainer_dist.create_multi_node_optimizer`, and ranks wait for one another that much less
    often. It is another algorithm, whose results only come near to the ones of one process on the concatenated
    batches. With ``warmup_updates`` it is post-local SGD (Lin et al., arXiv 1808.07217),
    which begins with averaged gradients.

    Between two averagings each rank has a model of its own. An evaluator then reports the mean of their
    scores, and a snapshot of rank 0 is of rank 0's model: evaluate and save at updates of which
    ``period`` is a divisor (counted after the warm-up), or call ``optimizer.average()`` before, which
    is collective. :class:`~chainer_dist.Checkpoint` saves the model and the optimizer of every
    rank, in the middle of a period, too: on as many ranks a run goes on exactly, on another
    number where all ranks' parameters were equal, with the optimizer's state of rank 0.

    As with ``create_multi_node_optimizer``, all ranks' parameters begin equal, ``setup`` is collective,
    everything else is the wrapped optimizer's, and there is ``no_sync()`` to accumulate gradients.
    ``update`` is called equally often on every rank, and is collective in the warm-up, at the end of
    a period, and while layers wait for their shape. Every rank updates all parameters. Hooks
    see this rank's gradients (in the warm-up the mean), and random hooks draw each rank's own numbers.

    For example, with averaged gradients in the first 500 updates, and an average of parameters after every
    eighth update from then on::

        optimizer = chainer_dist.create_local_sgd_optimizer(
            chainer.optimizers.MomentumSGD(0.1), comm, period=8, warmup_updates=500
        )
        optimizer.setup(model)

    Args:
        actual_optimizer: Any Chainer optimizer, set up or not. It is changed by the updates.
        communicator: The communicator over whose ranks parameters are averaged.
        period: Number of updates from one averaging to the next, 1 or more; the
            same on every rank. Can be set later, as ``optimizer.period``.
        warmup_updates: Number of first updates that average gradients, as the updates of
            ``create_multi_node_optimizer`` do, 0 or more. ``optimizer.t`` counts them.
        average_state: Whether arrays that the update rules keep (momentum, Adam's moments) are
            averaged with the parameters. Otherwise each rank keeps its own.

    Returns:
        The optimizer to use in place of ``actual_optimizer``.

    Raises:
        ValueError: If ``period`` or ``warmup_updates`` is out of range.
        RankMismatchError: Raised by updates on every rank, if one of the options differs.
    """
    check_call(
        "create_local_sgd_optimizer(actual_optimizer, communicator)",
        communicator,
        actual_optimizer,
        needs="update",
    )
    period = checked_count("period", period, 1)
    warmup_updates = checked_count("warmup_updates", warmup_updates, 0)
    return LocalSGDOptimizer(actual_optimizer, communicator, period, warmup_updates, average_state)
