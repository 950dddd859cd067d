"""Updaters for ranks whose datasets differ in length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chainer_dist._proxy import Proxy
from chainer_dist.collectives.calls import check_call
from chainer_dist.optimizers.join import Join

if TYPE_CHECKING:
    import chainer

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["create_multi_node_updater"]


class MultiNodeUpdater(Proxy, wraps="actual_updater"):
    """Wraps an updater for ranks whose datasets differ in length; see :func:`create_multi_node_updater`.

    Epochs are its own; all other attributes, read and set, are the wrapped updater's.
    """

    actual_updater: Any
    communicator: CommunicatorBase
    epoch: int  # that all ranks have finished
    is_new_epoch: bool
    previous_epoch_detail: float
    _join: Join
    _fraction: float  # of the epoch under way, on the rank that has done least
    _is_empty: bool
    _is_done: bool  # with the epoch under way

    def __init__(self, actual_updater: Any, communicator: CommunicatorBase) -> None:
        self.actual_updater = actual_updater
        self.communicator = communicator
        self._join = Join(*actual_updater.get_all_optimizers().values())
        self.epoch = 0
        self.is_new_epoch = False
        self.previous_epoch_detail = -1.0
        self._fraction = 0.0
        dataset: Any = getattr(actual_updater.get_iterator("main"), "dataset", None)
        self._is_empty = hasattr(dataset, "__len__") and len(dataset) == 0
        if all(communicator.allgather_obj(self._is_empty)):
            raise ValueError("no rank has any data: the datasets of all ranks are empty")
        self._is_done = self._is_empty

    @property
    def epoch_detail(self) -> float:
        """How many epochs all ranks have done, with the fraction of the one under way."""
        return self.epoch + self._fraction

    def update(self) -> None:
        """Update once, or stand by if this rank is done with the epoch. Collective."""
        actual = self.actual_updater
        self._join.attach()
        try:
            if self._is_done:
                self._join.stand_by()
                actual.iteration += 1
            else:
                actual.update()
                self._join.end_step()
                self._is_done = bool(actual.is_new_epoch)
        finally:
            self._join.detach()
        done = 1.0 if self._is_done else actual.epoch_detail - self.epoch
        self.previous_epoch_detail = self.epoch_detail
        self._fraction = min(self.communicator.allgather_obj(done))
        self.is_new_epoch = self._fraction >= 1
        if self.is_new_epoch:
            self.epoch += 1
            self._fraction = 0.0
            self._is_done = self._is_empty

    def connect_trainer(self, trainer: chainer.training.Trainer) -> None:
        """Connect the wrapped updater with a trainer. Local."""
        self.actual_updater.connect_trainer(trainer)

    def finalize(self) -> None:
        """Finalize the wrapped updater. Local."""
        self.actual_updater.finalize()

    def get_optimizer(self, name: str) -> Any:
        """Return an optimizer of the wrapped updater. Local."""
        return self.actual_updater.get_optimizer(name)

    def get_all_optimizers(self) -> dict[str, Any]:
        """Return all optimizers of the wrapped updater by name. Local."""
        optimizers: dict[str, Any] = self.actual_updater.get_all_optimizers()
        return optimizers

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Save or load the wrapped updater and how far the epoch is. Local."""
        self.actual_updater.serialize(serializer)
        own = serializer["multi_node"]
        self.epoch = int(own("epoch", self.epoch))
        self.is_new_epoch = bool(own("is_new_epoch", self.is_new_epoch))
        self.previous_epoch_detail = float(own("previous_epoch_detail", self.previous_epoch_detail))
        self._fraction = float(own("fraction", self._fraction))
        self._is_done = bool(own("is_done", self._is_done))


def create_multi_node_updater(
    actual_updater: chainer.training.Updater, communicator: CommunicatorBase
) -> MultiNodeUpdater:
    """Make an updater of a Trainer for ranks whose datasets differ in length. Collective.

    In each epoch every rank goes through its own dataset once. One that is done stands by until
    all are, as :class:`~chainer_dist.Join` says, and counts in none of the means. An epoch is over
    for all ranks at the same iteration, so that evaluators, reports and stop triggers come into
    effect together. A rank may have no data at all.

    For example, where the parts of a dataset differ in length::

        train = chainer_dist.scatter_dataset(train, comm, force_equal_length=False)
        iterator = chainer.iterators.SerialIterator(train, 100)
        updater = chainer.training.updaters.StandardUpdater(iterator, optimizer)
        updater = chainer_dist.create_multi_node_updater(updater, comm)
        trainer = chainer.training.Trainer(updater, (20, "epoch"))

    Args:
        actual_updater: A ``StandardUpdater``, or another with iterators and with optimizers that
            ``create_multi_node_optimizer`` made with this communicator. Each of its updates
            calls these optimizers in the same order on every rank.
        communicator: Communicator.

    Returns:
        The updater to give the Trainer in place of ``actual_updater``. ``iteration`` counts steps
        with this rank and without; ``epoch_detail`` is that of the rank that has done least.
        Without it in ChainerMN, ranks must have equally many batches.

    Raises:
        ValueError: If no rank has any data, or the optimizers are of another kind.
    """
    check_call(
        "create_multi_node_updater(actual_updater, communicator)",
        communicator,
        actual_updater,
        needs="get_all_optimizers",
    )
    return MultiNodeUpdater(actual_updater, communicator)
