"""The replicated update: every rank updates all parameters by the mean of the gradients."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from chainer_dist import exchange
from chainer_dist.collectives import reduction
from chainer_dist.communicators.shared_memory.exchange import mean_to
from chainer_dist.updates.base import EarlyExchanges, GradientExchange, Update

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainer_dist._typing import Array
    from chainer_dist.communicators.shared_memory.communicator import SharedMemoryCommunicator
    from chainer_dist.parameters import ParameterSet
    from chainer_dist.updates.base import Context, Gradients

__all__ = ["Replicated"]


class Replicated(Update):
    """Averages the gradients, then lets Chainer's own optimizer update on every rank."""

    name = "replicated"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._early: EarlyExchanges | None = None
        self._means: dict[str, Array] = {}  # of early exchanges, by name of the parameter

    def prepare(
        self, parameters: ParameterSet, agree_on_order: Callable[[], list[int]] | None
    ) -> None:
        """Plan an early exchange, if there is an order. Collective in that case.

        It leaves out gradients that rank 0 does not have now.
        """
        if agree_on_order is None:
            return
        order = agree_on_order()
        comm = cast("SharedMemoryCommunicator", self.context.comm)  # no other kind overlaps
        has_grad = comm.bcast_obj(parameters.has_grad)
        groups: dict[np.dtype[Any], list[int]] = {}
        for index in order:
            array = parameters.arrays[index]
            if array.size and has_grad[index]:
                groups.setdefault(array.dtype, []).append(index)
        exchanges = []
        for dtype, indices in groups.items():
            sizes = [parameters.arrays[index].size for index in indices]
            means = np.split(np.empty(sum(sizes), dtype), list(itertools.accumulate(sizes))[:-1])
            wire = reduction.wire_dtype(dtype)
            layout = comm.transport.layout(sizes, wire, seldom=True)
            self._means.update(zip([parameters.names[index] for index in indices], means))
            deliver = mean_to(layout, means)
            exchanges.append(GradientExchange(indices, layout, wire, deliver, means))
        self._early = EarlyExchanges(exchanges, is_for_all=False)

    def early(self) -> EarlyExchanges | None:
        """Return the exchanges that :meth:`prepare` has planned. Local."""
        return self._early

    def apply(self, gradients: Gradients) -> None:
        """Average the gradients in place, and update all parameters. Collective."""
        comm, optimizer, options, randomness = self.context
        if comm.has_own_mean:
            comm.multi_node_mean_grad(optimizer.target, gradients.zero_fill)
        else:
            mean = None
            if options.compression is not None:
                scale = optimizer._loss_scale  # noqa: SLF001 - Chainer's
                options.compression.use_loss_scale(scale or 1.0)
                if options.compression.needs_all:
                    gradients.parameters.scale_missing(scale)
                    gradients.parameters.fill_zeros()
                mean = functools.partial(options.compression.mean, comm)
            exchange.mean_agreed_grad(
                comm,
                gradients.parameters,
                same_grads=gradients.are_matched,
                zero_fill=gradients.zero_fill,
                mean=mean,
                means=self._means if gradients.are_averaged else None,
            )
        with randomness.in_use(comm):
            optimizer.update(None)

    def release(self) -> None:
        """Drop the early exchanges. Local."""
        self._early = None
        self._means = {}
