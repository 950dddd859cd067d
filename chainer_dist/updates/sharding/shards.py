"""One pass over the parameters: average a slice of the gradients, update it while it is in the cache, share it.

Averaging and updating are one pass on purpose. Each alone would read and write all of the memory once more.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from chainer_dist import _chainer
from chainer_dist.collectives import reduction
from chainer_dist.collectives.failures import together
from chainer_dist.collectives.operation import EXCHANGE, Kind, Operation
from chainer_dist.communicators.shared_memory.exchange import Exchange
from chainer_dist.parameters import are_identical
from chainer_dist.updates.base import GradientExchange
from chainer_dist.updates.sharding.eligibility import is_elementwise, obstacle_in_arrays
from chainer_dist.updates.sharding.layout import LayoutPlan, positions
from chainer_dist.updates.sharding.memory import Memory
from chainer_dist.updates.sharding.placement import NodeParameters, OwnParameters
from chainer_dist.updates.sharding.state import JobStates, NodeStates

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import chainer

    from chainer_dist._typing import Array
    from chainer_dist.communicators.shared_memory.communicator import SharedMemoryCommunicator
    from chainer_dist.communicators.shared_memory.exchange import Deliver
    from chainer_dist.parameters import ParameterSet
    from chainer_dist.updates.options import Options
    from chainer_dist.updates.sharding.chunk import Chunk
    from chainer_dist.updates.sharding.groups import Group, LocalSlice
    from chainer_dist.updates.sharding.placement import Placement
    from chainer_dist.updates.sharding.state import RuleStates

__all__ = ["Shards"]

_NORM = Kind("norm of gradients", EXCHANGE)


class Shards:
    """The parameters of one optimizer, shared out to ranks. Creating it is collective.

    Args:
        comm: The communicator over whose ranks gradients are averaged.
        optimizer: A Chainer optimizer for which :func:`~chainer_dist.updates.sharding.obstacle` found
            nothing on any rank.
        parameters: The parameters of its target; of equal structure on every rank.
        options: The user's choice.
        order: Numbers of the parameters in the order in which gradients are exchanged, the same
            on every rank, if they are exchanged before the update; see :attr:`exchanges`.
        across_nodes: Whether each rank of the communicator updates a slice of its own, of which it
            alone has the state; see :meth:`consolidate`.

    Attributes:
        states: The state of the update rules.
        layout: Elements that this rank updates.

    Raises:
        OSError: On every rank, if a node has no memory to share.
    """

    def __init__(
        self,
        comm: SharedMemoryCommunicator,
        optimizer: chainer.Optimizer,
        parameters: ParameterSet,
        options: Options,
        *,
        order: Sequence[int] | None,
        across_nodes: bool,
    ) -> None:
        self._comm = comm
        self._code = options.code
        self._optimizer = optimizer
        self._params = parameters.params
        # Nothing of these can be shared out; their rules count updates all the same.
        self._empty = [each for each in parameters.all.values() if not _size(each)]
        hooks, _ = _chainer.hooks_of(optimizer)
        # Where the norm of all gradients is wanted, or they come before the update, they are read twice.
        clips = not all(map(is_elementwise, hooks.values()))
        self._unwanted = frozenset(  # the numbers of parameters whose means are not used
            index
            for index, param in enumerate(self._params)
            if not (options.mean_grad or clips or _is_enabled(param.update_rule))
        )
        memory = Memory(comm)
        plan = LayoutPlan(
            comm,
            self._params,
            memory,
            order=order,
            stores_means=options.mean_grad or clips or order is not None,
            keeps_means=options.mean_grad,
            across_nodes=across_nodes,
        )
        self.states: RuleStates = (
            JobStates(comm, self._params)
            if across_nodes
            else NodeStates(comm, self._params, memory)
        )
        self._placement: Placement = (
            NodeParameters(comm, self._params, memory)
            if options.share_parameters and comm.size > 1
            else OwnParameters(comm, parameters.arrays)
        )
        memory.allocate()
        self._placement.take_memory()
        self.layout = plan.build(self._placement.arrays, self.states)
        with together(comm):  # and so waits until everything is there
            self._placement.fill(self.layout)
            for chunk in self._chunks:
                chunk.take_state()
        self.states.attach()
        self._placement.attach()
        self._flat = [array.reshape(-1) for array in self._placement.arrays]

    @property
    def _chunks(self) -> Iterable[Chunk]:
        """This rank's chunks, parameter by parameter."""
        return itertools.chain.from_iterable(self.layout.chunks)

    @property
    def _across_nodes(self) -> bool:
        return isinstance(self.states, JobStates)

    def fits(self, parameters: ParameterSet) -> bool:
        """Return whether these are still the parameters, rules and states that were shared out. Local.

        Arrays that were replaced by others of the same kind are taken over.
        """
        if not (are_identical(self._params, parameters.params) and self.states.are_unchanged()):
            return False
        arrays = self._placement.arrays
        return are_identical(arrays, parameters.arrays) or not obstacle_in_arrays(parameters)

    @property
    def exchanges(self) -> list[GradientExchange]:
        """How to exchange the gradients before :meth:`update`; only with an ``order``."""

        def deliver_to(group: Group) -> Deliver:
            def deliver(number: int, total: Array, scale: float, out: Array) -> None:
                del out
                np.multiply(total, scale, out=group.slices[number].mean, casting="same_kind")

            return deliver

        return [
            GradientExchange(
                group.indices, group.layout, group.dtype, deliver_to(group), None, self._unwanted
            )
            for group in self.layout.groups
        ]

    def update(
        self, parameters: ParameterSet, *, are_averaged: bool, absent: frozenset[int]
    ) -> None:
        """Average the gradients, run hooks and update rules on them, share the result. Collective.

        Args:
            parameters: Parameters that :meth:`fit <fits>`, all of them with a gradient.
            are_averaged: Whether the gradients were averaged already, by :attr:`exchanges`.
            absent: Numbers of parameters whose gradients are zero on every rank, the same on every
                rank. They need not be exchanged.

        Raises:
            Exception: On every rank of the node, what a hook or a rule raised on one.
        """
        self.states.spread()
        self._follow(parameters.arrays)
        stages: list[list[Any]] = [[]]  # of hooks, one before each clipping and one after the last
        clips: list[Any] = []
        hooks, _ = _chainer.hooks_of(self._optimizer)
        for hook in hooks.values():
            if is_elementwise(hook):
                stages[-1].append(hook)
            else:
                clips.append(hook)
                stages.append([])
        grads = None
        if not are_averaged:
            grads = [cast("Array", grad).reshape(-1) for grad in parameters.grads]
        for group in self.layout.groups:
            self._pass(group, grads, stages[0], is_last=not clips, absent=absent)
        for number, clip in enumerate(clips, start=1):
            self._clip(clip.threshold)
            if number < len(clips):
                for chunk in self._chunks:
                    chunk.prepare(stages[number])
        if clips:
            for group in self.layout.groups:
                self._pass(group, None, stages[-1], is_last=True, absent=frozenset())
        self._finish()

    def _follow(self, arrays: Sequence[Array]) -> None:
        """Go on with the arrays that a user has put in the place of others."""
        known = self._placement.arrays
        if not are_identical(known, arrays):
            for index, array in enumerate(arrays):
                if array is not known[index]:
                    self._placement.follow(index, array, self.layout)
                    self._flat[index] = known[index].reshape(-1)

    def _pass(
        self,
        group: Group,
        grads: list[Array] | None,
        hooks: list[Any],
        *,
        is_last: bool,
        absent: frozenset[int],
    ) -> None:
        """Average the gradients of a group, if there are any, and run hooks and, at last, rules."""
        sources = grads and [grads[index] for index in group.indices]
        if self._comm.size == 1:
            for local in group.slices:
                if sources is not None:
                    for grad, chunk in zip(local.slice.views(sources), local.chunks):
                        chunk.take_grad(grad)
                _work(local, hooks, is_last=is_last)
            return
        arrays = None
        if is_last:
            arrays = [self._flat[index] for index in group.indices]
        targets = arrays if self._placement.are_copied else None
        from_nodes = arrays if self._across_nodes else None
        results = from_nodes or targets

        def deliver(number: int, total: Array, scale: float, out: Array) -> None:
            local = group.slices[number]
            if sources is not None:
                np.multiply(total, scale, out=local.mean, casting="same_kind")
            _work(local, hooks, is_last=is_last)
            if results is not None:
                local.slice.gather(results, out)

        self._comm.transport.run(
            Exchange(
                group.layout,
                group.dtype,
                sources,
                deliver,
                targets,
                codec=self._code,
                absent=positions(group.indices, absent | self._unwanted),
                from_nodes=from_nodes,
            )
        )

    def _clip(self, threshold: float) -> None:
        """Do what ``GradientClipping`` does, with the norm summed up over slices."""
        chunks = list(self._chunks)
        squares = 0.0
        for chunk in chunks:
            grad = chunk.param.grad
            wide = grad.astype(reduction.wire_dtype(grad.dtype), copy=False)
            squares += float(wide.dot(wide))
        with Operation(_NORM, self._comm):
            # In the order of rank, so that all get the same bits.
            norm = math.sqrt(sum(self.states.ranks.allgather(squares)))
        if norm <= threshold:
            return
        for chunk in chunks:
            chunk.param.grad *= threshold / norm

    def _finish(self) -> None:
        for param, mean in zip(self._params, self.layout.means):
            if mean is not None:
                param._set_grad_without_check(mean)  # noqa: SLF001 - Chainer's, without a check
        self._placement.attach()
        self._optimizer.t += 1
        self.states.count()
        for param in self._empty:
            param.update()

    def release(self) -> None:
        """Give back to each rank arrays of its own in the place of what the ranks shared. Local.

        A state of which each rank has a share only is given up.
        """
        self.states.release()
        for param, mean in zip(self._params, self.layout.means):
            if mean is not None and param.grad is mean:
                param.grad = mean.copy()
        self._placement.release()


def _work(local: LocalSlice, hooks: list[Any], *, is_last: bool) -> None:
    if is_last:
        for update in local.updates:
            update.update(hooks)
        return
    for chunk in local.chunks:
        chunk.prepare(hooks)


def _is_enabled(rule: chainer.UpdateRule | None) -> bool:
    return rule is not None and bool(rule.enabled)


def _size(param: chainer.Parameter) -> int:
    return 0 if param.array is None else param.array.size
