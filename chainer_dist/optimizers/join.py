"""Updates with ranks that have run out of data.

Every update is collective, so a rank with fewer batches than the others would leave them waiting.
With :class:`Join` it stands by instead: it takes part in the others' updates, with gradients that
do not count, until all have finished.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import chainer
import numpy as np

from chainer_dist.collectives.agreement import raise_mismatch
from chainer_dist.collectives.operation import WAITING, Kind, Operation
from chainer_dist.links.batch_normalization import MultiNodeBatchNormalization

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from typing_extensions import Self

    from chainer_dist.communicators import CommunicatorBase
    from chainer_dist.optimizers.multi_node_optimizer import MultiNodeOptimizer

__all__ = ["Join"]

# What a rank says when ranks meet, besides the number of the optimizer that it updates.
_STANDS_BY, _CANNOT_REPEAT, _STEP_IS_OVER = -1, -2, -3

_MEETING = Kind("meeting of joined ranks", WAITING)


class Join:
    """Lets ranks with different numbers of batches train together.

    A context manager::

        with chainer_dist.Join(optimizer):
            for x, t in batches:  # fewer on some ranks
                optimizer.update(lossfun, x, t)

    A rank that leaves the block takes part in the updates that others still make until they leave
    it too. Each update uses the mean of the gradients over the ranks that still have batches, and
    all ranks' parameters stay equal. A rank may have no batch at all. With ``accumulate_steps`` it
    is the mean over all batches that were accumulated on any rank; where the last ones do not make
    up an update, they stay for the first update after this block.

    With :class:`~chainer_dist.links.MultiNodeBatchNormalization` in a model, forward and backward
    are collective as well: a rank that stands by repeats them with its last batch, which counts
    neither in statistics nor in gradients. ``update`` must then be given the loss function (a loss
    computed before it raises an error), and every rank must have at least one batch. Other
    collectives inside the block, such as those of :mod:`chainer_dist.functions`, wait for the ranks
    that left it forever.

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
            if not hasattr(optimizer, "take_part"):
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
        self._calls: dict[int, Any] = {}  # what each optimizer last computed, if it is repeated

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

    def update(
        self,
        optimizer: MultiNodeOptimizer,
        lossfun: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwds: dict[str, Any],
        *,
        postponed: bool = False,
    ) -> None:
        """Update by this rank's gradients and those of other ranks that have any. Collective."""
        number = next(i for i, each in enumerate(self._optimizers) if each is optimizer)
        if lossfun is not None and _repeats(optimizer):
            self._calls[number] = lossfun, args, kwds
        _, ranks, _ = self._meet(number, postponed=postponed)
        with chainer.using_config("chainer_dist_joined", value=False):
            optimizer.take_part(lossfun, args, kwds, ranks, postponed=postponed)

    def end_step(self) -> None:
        """Tell ranks that stand by that this step is over. Collective."""
        self._meet(_STEP_IS_OVER)

    def stand_by(self) -> None:
        """Take part in updates until the step is over, or no rank makes any more. Collective."""
        while True:
            able = all(
                number in self._calls or not _repeats(optimizer)
                for number, optimizer in enumerate(self._optimizers)
            )
            word = _STANDS_BY if able else _CANNOT_REPEAT
            number, ranks, postponed = self._meet(word)
            if not ranks or number == _STEP_IS_OVER:
                return
            lossfun, args, kwds = self._calls.get(number, (None, (), {}))
            with _standing_by():
                self._optimizers[number].take_part(
                    lossfun, args, kwds, ranks, stands_by=True, postponed=postponed
                )

    @property
    def _comm(self) -> CommunicatorBase:
        return self._optimizers[0]._connected()

    def _meet(self, word: int, *, postponed: bool = False) -> tuple[int, int, bool]:
        """Find out what the other ranks are about to do. Collective.

        Returns:
            The number of the optimizer that is updated, or that the step is over; how many
            ranks do that, 0 if all stand by; and whether they postpone the update.
        """
        if word >= 0:
            word = 2 * word + postponed
        words = np.empty(self._comm.size, dtype=np.int64)
        with Operation(_MEETING, self._comm):
            self._comm.mpi_comm.Allgather(np.array([word], dtype=np.int64), words)
        active = [int(each) for each in words if each not in (_STANDS_BY, _CANNOT_REPEAT)]
        if len(set(active)) > 1:
            raise_mismatch(self._comm, [("the update", self._describe(word, active[0]))])
        if not active:
            return _STANDS_BY, 0, False
        number, postpones = divmod(active[0], 2) if active[0] >= 0 else (active[0], 0)
        if number >= 0 and _CANNOT_REPEAT in words and _repeats(self._optimizers[number]):
            rank = int(np.flatnonzero(words == _CANNOT_REPEAT)[0])
            raise RuntimeError(
                f"rank {rank} stands by without a batch that it could repeat, as a model with "
                "MultiNodeBatchNormalization needs: give every rank at least one batch, and "
                "optimizer.update the loss function"
            )
        return number, len(active), bool(postpones)

    def _describe(self, word: int, default: int) -> str:
        word = default if word in (_STANDS_BY, _CANNOT_REPEAT) else word
        if word == _STEP_IS_OVER:
            return "none, the step is over"
        number, postponed = divmod(word, 2)
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
    """Tell whether forward and backward of an optimizer's model are collective. Local."""
    return any(isinstance(link, MultiNodeBatchNormalization) for link in optimizer.target.links())
