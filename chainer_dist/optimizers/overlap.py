"""Gradients averaged while backward still computes others.

Between nodes the exchange of gradients takes long, and most of that time the processors wait for the
network. Backward comes to the last layers first; their gradients are final long before it is over,
so they are sent while it goes on. They are cut into blocks in the order in which they became final
on rank 0, and a block is exchanged as soon as all that is in it is there. This is like PyTorch's
DistributedDataParallel (Li et al., VLDB 2020), with the blocks of the exchange in the place of buckets.

MPI goes on with what is under way only while it is called, so it is polled after each function of
backward. A thread that polls in between was tried, every 0.3 to 5 ms: less was left to exchange
after backward, and backward took longer by as much or more, because no core is idle meanwhile.

Nothing of a step is changed before backward is over on all ranks: means go to memory of their own,
as backward may still read gradients that it has reported. So ranks can find out together, afterwards, that
the exchange cannot be used, and average after backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chainer_dist.collectives.agreement import agree, digest
from chainer_dist.collectives.operation import EXCHANGE, Kind, Operation
from chainer_dist.communicators.shared_memory.exchange import Exchange
from chainer_dist.optimizers.final_gradients import FinalGradients
from chainer_dist.updates.sharding.layout import positions

if TYPE_CHECKING:
    from collections.abc import Sequence

    import chainer

    from chainer_dist._typing import Array
    from chainer_dist.communicators.shared_memory.between_nodes import Codec
    from chainer_dist.communicators.shared_memory.communicator import SharedMemoryCommunicator
    from chainer_dist.communicators.shared_memory.layout import Block
    from chainer_dist.communicators.shared_memory.pipeline import Pipeline
    from chainer_dist.parameters import ParameterSet
    from chainer_dist.updates.base import EarlyExchanges, GradientExchange

__all__ = ["Overlap"]

_EXCHANGE = Kind("exchange begun in backward", EXCHANGE)
_PLAN = Kind("order of gradients", EXCHANGE)


class Overlap:
    """The exchange of an optimizer's gradients during backward.

    Args:
        comm: The communicator over whose ranks gradients are averaged.
        code: Codec of gradients between nodes; None to send them as they are.

    Attributes:
        comm: The communicator.
        is_stale: Whether a new :meth:`plan` is to be made; the same on every rank.
        was_used: Whether the last gradients were averaged during backward; the same on every rank.
    """

    def __init__(self, comm: SharedMemoryCommunicator, code: Codec | None = None) -> None:
        self.comm = comm
        self._code = code
        self._order: list[int] = []  # of the last backward, as far as gradients were reported
        self._reached: tuple[int, ...] = ()
        self._early: EarlyExchanges | None = None
        self._planned: tuple[int, ...] = ()  # what the loss came from when that was planned
        self._watch: FinalGradients | None = None
        self._exchange: _EarlyExchange | None = None  # the last one, if that is of use
        self.is_stale = False
        self.was_used = False

    def prepare(
        self, loss: chainer.Variable | None, parameters: ParameterSet, *, is_usual: bool
    ) -> None:
        """Find out whether gradients are exchanged during this backward. Collective.

        All ranks come to the same.

        Args:
            loss: Variable from which this rank's backward starts, or None if there is no backward here.
            parameters: The parameters of the model.
            is_usual: Whether all that the plan was made for is unchanged.
        """
        self._exchange = None
        self._watch = watch = None
        if loss is not None and FinalGradients.can_watch(loss):
            self._watch = watch = FinalGradients(loss, parameters.params)
        early = self._early
        is_able = is_other = False
        absent: frozenset[int] = frozenset()  # what this rank's loss does not come from
        if is_usual and not self.is_stale and early is not None and watch is not None:
            # What the loss does not come from has no gradient, and is left out of the exchange.
            is_other = not early.is_for_all and self._planned != watch.reached
            is_able = not is_other
            absent = frozenset(range(len(parameters.params))).difference(watch.reached)
        same_able, same_other, same_absent = agree(
            self.comm, int(is_able), int(is_other), digest(sorted(absent)) if absent else 0
        )
        self.is_stale = self.is_stale or is_other or not same_other
        if early is not None and is_able and same_able:
            nowhere = absent if same_absent else frozenset()
            self._exchange = _EarlyExchange(
                self.comm, early.exchanges, parameters, self._code, nowhere
            )

    def backward(self, loss: chainer.Variable, loss_scale: float | None) -> None:
        """Run backward, and the exchange that :meth:`prepare` has arranged. Collective in that case.

        Args:
            loss: The variable that :meth:`prepare` got.
            loss_scale: See ``chainer.Variable.backward``.
        """
        watch, exchange = self._watch, self._exchange
        self._watch = None
        if watch is None:
            self._order, self._reached = [], ()
            loss.backward(loss_scale=loss_scale)
            return
        self._order, self._reached = [], watch.reached

        def report(number: int, grad: Array) -> None:
            self._order.append(number)
            if exchange is not None:
                exchange.take(number, grad)

        watch.backward(report, (lambda: None) if exchange is None else exchange.advance, loss_scale)
        if exchange is not None:
            exchange.finish()

    def is_clean(self) -> bool:
        """Return whether this rank's gradients are still the ones that were exchanged, if any were. Local."""
        return self._exchange is None or self._exchange.is_clean()

    def accept(self, *, is_clean: bool, is_changed: bool) -> None:
        """Take note of what ranks have found out together of the exchange, if there was one. Local.

        Args:
            is_clean: Whether :meth:`is_clean` is true on all ranks.
            is_changed: Whether parameters of any rank were changed, so that means are of no use.
        """
        was_exchanged, self._exchange = self._exchange is not None, None
        self.was_used = was_exchanged and is_clean and not is_changed
        if was_exchanged:
            self.is_stale = self.is_stale or not is_clean

    def agree_on_order(self, parameters: ParameterSet) -> list[int]:
        """Return all parameters' numbers in the order in which gradients become final. Collective.

        It is rank 0's. What was not reported there comes last.
        """
        with Operation(_PLAN, self.comm):
            order, self._reached = self.comm.bcast_obj((self._order, self._reached))
        return list(dict.fromkeys([*order, *range(len(parameters.params))]))

    def plan(self, early: EarlyExchanges | None) -> None:
        """Exchange this during backward from now on; nothing if it is None. Local."""
        self._early, self._planned = early, self._reached
        self.is_stale = self.was_used = False

    def drop(self) -> None:
        """Forget what was planned. Local."""
        self._early = None


class _EarlyExchange:
    """One exchange of gradients, which come one after the other. Begun and finished by all ranks."""

    def __init__(
        self,
        comm: SharedMemoryCommunicator,
        exchanges: list[GradientExchange],
        parameters: ParameterSet,
        code: Codec | None,
        absent: frozenset[int],
    ) -> None:
        self._comm = comm
        self._code = code
        self._params, self._arrays = parameters.params, parameters.arrays
        self._taken: dict[int, Array] = {}
        self._queues = [_Queue(each, self._arrays, absent | each.unwanted) for each in exchanges]
        self._queue_of = {
            index: queue for queue in self._queues for index in queue.exchange.indices
        }
        self._rest = iter(self._queues)
        self._run: Pipeline | None = None
        self._begin_next()

    def _begin_next(self) -> None:
        queue = next(self._rest, None)
        self._run = None
        if queue is not None:
            exchange = queue.exchange
            self._run = self._comm.transport.begin(
                Exchange(
                    exchange.layout,
                    exchange.dtype,
                    queue.sources,
                    exchange.deliver,
                    exchange.targets,
                    codec=self._code,
                    absent=queue.absent,
                    is_ready=queue.is_ready,
                )
            )

    def take(self, index: int, grad: Array) -> None:
        """Take a final gradient."""
        array = self._arrays[index]
        # What Chainer is about to refuse is not taken.
        if index in self._queue_of and (grad.shape, grad.dtype) == (array.shape, array.dtype):
            self._taken[index] = grad
            self._queue_of[index].put(index, grad.reshape(-1))

    def advance(self) -> None:
        """Do what can be done without waiting."""
        while self._run is not None:
            self._run.advance()
            if not self._run.is_done:
                return
            self._run.end()
            self._begin_next()

    def finish(self) -> None:
        """Do the rest, when backward is over. Collective. A gradient that is missing counts zero."""
        for index, queue in self._queue_of.items():
            if index not in self._taken:
                grad = self._params[index].grad
                if grad is None:
                    queue.put_zeros(index)
                elif not (queue.counts_as_zero(index) and grad.any()):
                    self.take(index, grad)
        with Operation(_EXCHANGE, self._comm):
            while self._run is not None:
                self._run.finish()
                self._begin_next()

    def is_clean(self) -> bool:
        """Return whether gradients are still the ones that were taken."""
        return all(
            param.grad is self._taken.get(index) or not self._arrays[index].size
            for index, param in enumerate(self._params)
        )


class _Queue:
    """The gradients of an exchange on their way into its blocks."""

    def __init__(
        self, exchange: GradientExchange, arrays: Sequence[Array], absent: frozenset[int]
    ) -> None:
        self.exchange = exchange
        self.sources: list[Array | None] = [None] * len(exchange.indices)
        self.absent: frozenset[int] = frozenset()  # at which positions
        self._arrays = arrays
        self._positions = {index: position for position, index in enumerate(exchange.indices)}
        self._there = 0  # so many of the first gradients are there
        for index in absent.intersection(
            exchange.indices
        ):  # a block may have some of it beside others
            self.put_zeros(index)
        self.absent = positions(exchange.indices, absent)

    def counts_as_zero(self, index: int) -> bool:
        return self._positions[index] in self.absent

    def put_zeros(self, index: int) -> None:
        array = self._arrays[index]
        self.put(index, np.zeros(array.size, array.dtype))

    def put(self, index: int, grad: Array) -> None:
        if self.counts_as_zero(index):
            return
        self.sources[self._positions[index]] = grad
        while self._there < len(self.sources) and self.sources[self._there] is not None:
            self._there += 1

    def is_ready(self, block: Block) -> bool:
        return block.arrays[-1] < self._there
