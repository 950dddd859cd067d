"""Updates with ranks that have run out of data.

Every update is collective, so a rank with fewer batches than the others would leave them waiting.
With :class:`Join` it stands by instead: it joins the updates of the others, with gradients that
do not count, until all have finished.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import chainer
import numpy as np

from chainer_dist.collectives.agreement import raise_mismatch
from chainer_dist.collectives.extremes import arrive
from chainer_dist.collectives.operation import WAITING, Kind, Operation
from chainer_dist.links.batch_normalization import MultiNodeBatchNormalization
from chainer_dist.optimizers.call import Call

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from typing_extensions import Self

    from chainer_dist.communicators import CommunicatorBase
    from chainer_dist.optimizers.multi_node_optimizer import MultiNodeOptimizer

__all__ = ["Join"]

# What a rank is about to do, besides updating an optimizer, which is that one's number.
_STANDS_BY, _CANNOT_REPEAT, _STEP_IS_OVER = -1, -2, -3

_INTENTS = Kind("meeting of joined ranks", WAITING)


class Join:
    """Lets ranks with different numbers of batches train together.

    A context manager::

        with chainer_dist.Join(optimizer):
            for x, t in batches:  # fewer on some ranks
                optimizer.update(lossfun, x, t)

    A rank that leaves the block joins the updates that others still make until they leave
    it too. Each update uses the mean of the gradients over the ranks that still have batches, and
    all ranks' parameters stay equal. A rank may have no batch at all. With ``accumulate_steps`` it
    is the mean over all batches that were accumulated on any rank; where the last ones do not make
    up an update, they stay for the first update after this block.

    With :class:`~chainer_dist.links.MultiNodeBatchNormalization` in a model, forward and backward
    are collective as well: a rank that stands by repeats them with its last batch, which counts
    neither in statistics nor in gradients. ``update`` must then be given the loss function (a loss
    computed before it raises an error), and every rank must have at least one batch. Other
    collectives inside the block, such as :mod:`chainer_dist.functions` has, wait forever for the ranks
    that left it.

    With a Trainer use :func:`~chainer_dist.create_multi_node_updater`.

    Entering is local, leaving is collective, except by an exception. As torch's ``Join`` with
    ``divide_by_initial_world_size=False``.

    Args:
        optimizers: Made by ``create_multi_node_optimizer`` with one and the same communicator, in
            the same order on every rank.

    Raises:
        ValueError: If they are not, are not set up, or have joined already.
    """

    def __init__(self, *optimizers: MultiNodeOptimizer) -> None:
        if not optimizers:
            raise ValueError("Join takes at least one multi-node optimizer")
        for optimizer in optimizers:
            if not hasattr(optimizer, "run_step"):
                raise ValueError(
                    f"Join takes optimizers made by create_multi_node_optimizer, got {optimizer!r}"
                )
            if not optimizer.alike:
                raise ValueError(
                    "Join takes no optimizers that update on each rank alone, such as local SGD"
                )
            if optimizer.communicator is not optimizers[0].communicator:
                raise ValueError("the optimizers of a Join must have one and the same communicator")
        self._optimizers = optimizers
        self._calls: dict[int, Call] = {}  # what each optimizer last computed, if it is repeated

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.stand_by()
        finally:
            self._calls.clear()
            self.detach()

    def attach(self) -> None:
        """Let the optimizers' updates be arranged from now on. Local."""
        if any(optimizer.target is None for optimizer in self._optimizers):
            raise ValueError("set the optimizers up before joining: optimizer.setup(model)")
        if any(optimizer.join is not None for optimizer in self._optimizers):
            raise ValueError("an optimizer has joined already; leave the other Join first")
        for optimizer in self._optimizers:
            optimizer.join = self
        chainer.config.chainer_dist_joined = True

    def detach(self) -> None:
        """Let the optimizers' updates be ordinary again. Local."""
        chainer.config.chainer_dist_joined = False
        for optimizer in self._optimizers:
            optimizer.join = None

    def update(self, optimizer: MultiNodeOptimizer, call: Call) -> None:
        """Update by the gradients of this rank, and of other ranks that have any. Collective."""
        number = next(i for i, each in enumerate(self._optimizers) if each is optimizer)
        if call.lossfun is not None and _repeats(optimizer):
            self._calls[number] = call
        _, ranks, _ = self._exchange_intents(number, postponed=call.postponed)
        with chainer.using_config("chainer_dist_joined", value=False):
            optimizer.run_step(call._replace(ranks=ranks))

    def end_step(self) -> None:
        """Let ranks that stand by know that this step is over. Collective."""
        self._exchange_intents(_STEP_IS_OVER)

    def stand_by(self) -> None:
        """Join updates until the step is over, or no rank makes any more. Collective."""
        while True:
            able = all(
                number in self._calls or not _repeats(optimizer)
                for number, optimizer in enumerate(self._optimizers)
            )
            intent = _STANDS_BY if able else _CANNOT_REPEAT
            number, ranks, postponed = self._exchange_intents(intent)
            if not ranks or number == _STEP_IS_OVER:
                return
            call = self._calls.get(number, Call(ranks))
            with _standing_by():
                self._optimizers[number].run_step(
                    call._replace(ranks=ranks, stands_by=True, postponed=postponed)
                )

    @property
    def _comm(self) -> CommunicatorBase:
        return self._optimizers[0].connected()

    def _exchange_intents(self, intent: int, *, postponed: bool = False) -> tuple[int, int, bool]:
        """Find out what the other ranks are about to do. Collective.

        Returns:
            The number of the optimizer that is updated, or that the step is over; how many
            ranks do that, 0 if all stand by; and whether they postpone the update.
        """
        if intent >= 0:
            intent = 2 * intent + postponed
        intents = np.empty(self._comm.size, dtype=np.int64)
        with Operation(_INTENTS, self._comm):
            arrive(self._comm)
            self._comm.mpi_comm.Allgather(np.array([intent], dtype=np.int64), intents)
        active = [int(each) for each in intents if each not in (_STANDS_BY, _CANNOT_REPEAT)]
        if len(set(active)) > 1:
            raise_mismatch(self._comm, [("the update", self._describe(intent, active[0]))])
        if not active:
            return _STANDS_BY, 0, False
        number, postpones = divmod(active[0], 2) if active[0] >= 0 else (active[0], 0)
        if number >= 0 and _CANNOT_REPEAT in intents and _repeats(self._optimizers[number]):
            rank = int(np.flatnonzero(intents == _CANNOT_REPEAT)[0])
            raise RuntimeError(
                f"rank {rank} stands by without a batch that it could repeat, as a model with "
                "MultiNodeBatchNormalization needs: give every rank at least one batch, and "
                "optimizer.update the loss function"
            )
        return number, len(active), bool(postpones)

    def _describe(self, intent: int, default: int) -> str:
        intent = default if intent in (_STANDS_BY, _CANNOT_REPEAT) else intent
        if intent == _STEP_IS_OVER:
            return "none, the step is over"
        number, postponed = divmod(intent, 2)
        return f"that of optimizer {number}{', in no_sync' if postponed else ''}"


@contextlib.contextmanager
def _standing_by() -> Iterator[None]:
    """Let links communicate without samples, and report nothing. Local."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(chainer.using_config("chainer_dist_joined", value=False))
        stack.enter_context(chainer.using_config("chainer_dist_standing_by", value=True))
        with contextlib.suppress(IndexError):  # where there is no reporter
            stack.enter_context(chainer.get_current_reporter().scope({}))
        yield


def _repeats(optimizer: MultiNodeOptimizer) -> bool:
    """Return whether forward and backward of an optimizer's model are collective. Local."""
    return any(isinstance(link, MultiNodeBatchNormalization) for link in optimizer.target.links())
