"""The sharded update: each rank of a node updates its slice of the parameters, once for all of them.

An optimizer that every rank runs on all parameters repeats the same work, bound by memory, on every
core of a node. Here each rank runs Chainer's own update rules on the slice whose gradients it has
just averaged, in chunks that stay in the cache, and the others copy the new parameters. The state of
the rules exists once per node, or on request once per job.

The idea of sharding the update is that of ZeRO (Rajbhandari et al., 2020), among ranks that share
memory, so that nothing has to be sent within a node; across nodes it is its stage 1.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

import numpy as np

from chainer_dist.collectives import reduction
from chainer_dist.collectives.agreement import together
from chainer_dist.collectives.operation import EXCHANGE, Kind, Operation
from chainer_dist.communicators.shared_memory.communicator import SharedMemoryCommunicator
from chainer_dist.communicators.shared_memory.layout import cut
from chainer_dist.communicators.shared_memory.memory import read_only, share_memory
from chainer_dist.parameters import private_grads, same
from chainer_dist.updates.base import EarlyExchanges, Exchange, Update
from chainer_dist.updates.comparison import check_same, describe_states
from chainer_dist.updates.options import JOB
from chainer_dist.updates.sharding.chunk import Chunk, state_keys
from chainer_dist.updates.sharding.eligibility import is_elementwise, obstacle, obstacle_in_arrays
from chainer_dist.updates.sharding.layout import positions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import chainer

    from chainer_dist._typing import Array
    from chainer_dist.communicators.shared_memory.between_nodes import Code
    from chainer_dist.communicators.shared_memory.exchange import Deliver
    from chainer_dist.communicators.shared_memory.layout import Block, Slice
    from chainer_dist.parameters import ParameterSet
    from chainer_dist.updates.base import Context, Gradients

__all__ = ["Sharded"]

_NORM = Kind("norm of gradients", EXCHANGE)

_ALIGNMENT = 64  # bytes: a cache line

SPREAD = (
    "each rank has a part of the optimizer's state only (sharded_update='job'): call "
    "optimizer.consolidate() on every rank, before any of them saves, copies or reads it"
)

_CHUNK_BYTES = 1 << 19  # of a parameter, where one rank updates all of it


class Sharded(Update):
    """Each rank of a node, or of the job, updates its slice of the parameters; see :class:`ShardedUpdate`."""

    name = "sharded"
    news = "each rank updates a slice of the parameters"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._shards: ShardedUpdate | None = None  # None until it is prepared
        self._is_early = False

    @classmethod
    def obstacle(cls, context: Context, parameters: ParameterSet) -> str | None:
        """Say why the update might not equal the replicated one, or return None. Local."""
        comm = context.comm
        if not isinstance(comm, SharedMemoryCommunicator):
            return f"the communicator is {comm.name}, not shared_memory"
        if comm.has_own_mean:
            return f"{type(comm).__name__} has its own multi_node_mean_grad()"
        return obstacle(context.optimizer, parameters)

    def prepare(
        self, parameters: ParameterSet, agree_on_order: Callable[[], list[int]] | None
    ) -> None:
        """Share state and parameters out to ranks. Collective."""
        comm, optimizer, options, _ = self.context
        check_same(comm, describe_states(parameters))
        self._shards = ShardedUpdate(
            cast("SharedMemoryCommunicator", comm),
            optimizer,
            parameters,
            mean_grad=options.mean_grad,
            share_parameters=options.share_parameters,
            order=None if agree_on_order is None else agree_on_order(),
            code=options.code,
            across_nodes=options.sharded_update == JOB,
        )
        self._is_early = agree_on_order is not None

    @property
    def _prepared(self) -> ShardedUpdate:
        if self._shards is None:
            raise RuntimeError("this update is not prepared")
        return self._shards

    def early(self) -> EarlyExchanges | None:
        """Return the exchanges of all gradients, if they may come before the update. Local."""
        if not self._is_early:
            return None
        return EarlyExchanges(self._prepared.parts, is_for_all=True)

    def fits(self, parameters: ParameterSet) -> bool:
        """See :meth:`ShardedUpdate.fits`. Local."""
        return self._prepared.fits(parameters)

    def apply(self, gradients: Gradients) -> None:
        """Average the gradients, and update. Collective."""
        parameters = gradients.parameters
        absent: frozenset[int] = frozenset()
        if gradients.are_matched:
            absent = frozenset([index for index, has in enumerate(parameters.has_grad) if not has])
        parameters.fill_zeros()
        if self.context.comm.size == 1:  # hooks change the gradients where they are
            private_grads(parameters)
        self._prepared.update(parameters, averaged=gradients.are_averaged, absent=absent)

    @property
    def is_spread(self) -> bool:
        """Whether each rank has a share of the state only."""
        return self._shards is not None and self._shards.is_spread

    def consolidate(self) -> None:
        """See :meth:`ShardedUpdate.consolidate`. Collective."""
        self._prepared.consolidate()

    def copied_states(self) -> contextlib.AbstractContextManager[None]:
        """See :meth:`ShardedUpdate.copied_states`. Local."""
        return self._prepared.copied_states()

    def release(self) -> None:
        """See :meth:`ShardedUpdate.release`. Local."""
        if self._shards is not None:
            self._shards.release()
        self._shards = None


class ShardedUpdate:
    """The update of one optimizer, shared out to the ranks of each node. Creating one is collective.

    From then on the state of the update rules is in memory that the ranks of the node share: every
    rank sees all of it, and can save it; nobody can change it but :meth:`update`. Copies of it are
    ordinary arrays of their own.

    Args:
        comm: Over whose ranks gradients are averaged.
        optimizer: A Chainer optimizer for which :func:`~chainer_dist.updates.sharding.obstacle` found
            nothing on any rank.
        parameters: Of its target; of equal structure on every rank.
        mean_grad: Whether ``param.grad`` becomes the averaged gradient, read-only, once per node.
            Otherwise it stays this rank's own gradient.
        share_parameters: Whether parameters, too, exist once per node: ``param.array`` becomes
            memory that the ranks share. Otherwise each rank keeps its own arrays.
        order: The numbers of the parameters in the order in which gradients are exchanged, the same
            on every rank, if they are exchanged before the update; see :attr:`parts`.
        code: How gradients are sent between nodes; None as they are.
        across_nodes: Whether each rank of the communicator updates a slice of its own, of which it
            alone has the state; see :meth:`consolidate`. Not with ``mean_grad``.

    Raises:
        OSError: On every rank, if a node has no memory to share.
    """

    def __init__(
        self,
        comm: SharedMemoryCommunicator,
        optimizer: chainer.Optimizer,
        parameters: ParameterSet,
        *,
        mean_grad: bool = False,
        share_parameters: bool = False,
        order: Sequence[int] | None = None,
        code: Code | None = None,
        across_nodes: bool = False,
    ) -> None:
        self._comm = comm
        self._code = code
        self._across = across_nodes and comm.inter_size > 1
        self._optimizer = optimizer
        self._params = parameters.params
        self._rules = [param.update_rule for param in self._params]
        # Nothing of these can be shared out; their rules count updates all the same.
        self._loose = [each for each in parameters.all.values() if not _size(each)]
        self._shared = share_parameters and comm.size > 1
        found = list(parameters.arrays)
        self._arrays = found
        hooks = optimizer._hookable._pre_update_hooks.values()
        # Where the norm of all gradients is wanted, or they come before the update, they are read twice.
        clips = not all(map(is_elementwise, hooks))
        stored = mean_grad or clips or order is not None
        # Nobody wants to know the mean of these.
        self._unwanted = frozenset(
            index
            for index, rule in enumerate(self._rules)
            if not (mean_grad or clips or (rule is not None and rule.enabled))
        )

        memory = _Memory(comm)
        members: dict[np.dtype[Any], list[int]] = {}
        for index in range(len(found)) if order is None else order:
            array = found[index]
            if array.size:
                members.setdefault(array.dtype, []).append(index)
        shares_means = stored and comm.size > 1 and not self._across
        planned_means = [
            memory.plan(sum(found[index].size for index in indices), dtype)
            if shares_means
            else None
            for dtype, indices in members.items()
        ]
        self._keys = [state_keys(rule) for rule in self._rules]
        planned_states = [
            {} if self._across else {key: memory.plan(array.size, array.dtype) for key in keys}
            for array, keys in zip(found, self._keys)
        ]
        planned_arrays = [memory.plan(each.size, each.dtype) for each in found if self._shared]
        memory.allocate()

        states = [{key: place() for key, place in each.items()} for each in planned_states]
        if self._shared:
            self._arrays = [
                place().reshape(array.shape) for place, array in zip(planned_arrays, found)
            ]
        self._chunks: list[list[Chunk]] = [[] for _ in found]
        self._means: list[Array | None] = [None] * len(found)
        self._groups = [
            self._make_group(
                indices,
                states,
                place and place(),
                keep=mean_grad,
                early=order is not None,
                stored=stored,
            )
            for indices, place in zip(members.values(), planned_means)
        ]
        self._pieces = self._pieces_of_node() if self._shared else []
        with together(comm):  # and so waits until everything is there
            for index, array in enumerate(found):
                if self._shared:
                    self._copy_to_node(index, array)
                for chunk in self._chunks[index]:
                    chunk.take_state()
        self._states: list[dict[str, Array] | None] = [
            self._whole_state(index, state) for index, state in enumerate(states)
        ]
        self._state_arrays = self._states_now()
        if self._shared:
            self._attach()

    def _states_now(self) -> list[Any]:
        """Return the states and their arrays, as the rules have them now."""
        found: list[Any] = []
        for rule, state in zip(self._rules, self._states):
            if state is not None:
                found.append(rule._state)
                if not isinstance(rule._state, _SpreadState):
                    found += (rule._state or {}).values()
        return found

    def _make_group(
        self,
        indices: list[int],
        states: list[dict[str, Array]],
        means: Array | None,
        *,
        keep: bool,
        early: bool,
        stored: bool,
    ) -> _Group:
        """Cut the parameters of one dtype into blocks, and this rank's part of them into chunks."""
        arrays = [self._arrays[index] for index in indices]
        dtype = arrays[0].dtype
        wire = reduction.wire_dtype(dtype)
        sizes = tuple(array.size for array in arrays)
        alone = self._comm.size == 1
        if alone:
            blocks = cut(sizes, _CHUNK_BYTES // wire.itemsize, 1)
            own = [block.slices[0] for block in blocks]
        else:
            blocks = self._comm.ring.cut(sizes, wire, seldom=early, across=self._across)
            own = [self._comm.ring.own(block) for block in blocks]
        if alone or dtype != wire:
            scratch = np.empty(max(part.stop - part.start for part in own), dtype)
        else:
            scratch = self._comm.ring.scratch.view(dtype)
        slices = []
        for block, part in zip(blocks, own):
            size = part.stop - part.start
            start = block.start + part.start
            if means is not None:
                mean = means[start : start + size]
            elif stored and self._across:
                mean = np.empty(size, dtype)
            else:
                mean = scratch[:size]
            chunks = []
            for index, elements, inside in _elements(indices, part):
                chunk = self._make_chunk(index, elements, states[index])
                if not alone:
                    chunk.take_grad(mean[inside])
                chunks.append(chunk)
            slices.append(_Slice(part, mean, chunks))
        if means is not None and keep:
            for index, size, end in zip(indices, sizes, itertools.accumulate(sizes)):
                mean = means[end - size : end].reshape(self._arrays[index].shape)
                self._means[index] = read_only(mean)
        return _Group(indices, wire, blocks, slices)

    def _make_chunk(self, index: int, elements: slice, whole: dict[str, Array]) -> Chunk:
        """Make a part of a parameter one that this rank updates."""
        size, dtype = elements.stop - elements.start, self._arrays[index].dtype
        state = {
            key: np.empty(size, dtype) if self._across else whole[key][elements]
            for key in self._keys[index]
        }
        chunk = Chunk(self._params[index], elements, state)
        chunk.bind(self._arrays[index])
        self._chunks[index].append(chunk)
        return chunk

    def _whole_state(self, index: int, state: dict[str, Array]) -> dict[str, Array] | None:
        """Make shared memory the state of a rule; return it, or None for a rule that has none."""
        rule, array = self._rules[index], self._arrays[index]
        if rule is None or not rule.enabled or not array.size:
            return None
        if self._across:
            spread = rule._state = _SpreadState()
            return spread
        whole = {key: value.reshape(array.shape) for key, value in state.items()}
        if self._comm.intra_size > 1:  # a rank that changed it would change it for the others
            whole = {key: read_only(value) for key, value in whole.items()}
        rule._state = whole
        return whole

    def _pieces_of_node(self) -> list[list[slice]]:
        """Share all elements of each parameter out to the ranks of the node, and return this rank's.

        They are its chunks, and with slices over nodes those of the ranks of equal number as well.
        """
        pieces: list[list[slice]] = [[] for _ in self._params]
        for group in self._groups:
            for block in group.blocks:
                for part in self._comm.ring.of_rank(block, self._comm.intra_rank):
                    for index, elements, _ in _elements(group.indices, part):
                        pieces[index].append(elements)
        return pieces

    def _copy_to_node(self, index: int, array: Array) -> None:
        """Copy this rank's pieces of a parameter to the memory that the ranks of the node share."""
        shared, flat = self._arrays[index].reshape(-1), array.reshape(-1)
        for elements in self._pieces[index]:
            shared[elements] = flat[elements]

    def _attach(self) -> None:
        for param, array in zip(self._params, self._arrays):
            if param.array is not array:
                param.array = array

    def fits(self, parameters: ParameterSet) -> bool:
        """Tell whether these are still the parameters, rules and states that were shared out. Local.

        Arrays that were replaced by others of the same kind are taken over.
        """
        if not same(self._params, parameters.params):
            return False
        if not same(self._states_now(), self._state_arrays):
            return False
        return same(self._arrays, parameters.arrays) or not obstacle_in_arrays(parameters)

    def update(
        self,
        parameters: ParameterSet,
        *,
        averaged: bool = False,
        absent: frozenset[int] = frozenset(),
    ) -> None:
        """Average the gradients, run hooks and update rules on them, share the result. Collective.

        Args:
            parameters: They :meth:`fit <fits>`, and all of them have a gradient.
            averaged: Whether the gradients were averaged already, by :attr:`parts`.
            absent: The numbers of those whose gradients are zero on every rank, the same on every
                rank. They need not be exchanged.

        Raises:
            Exception: On every rank of the node, what a hook or a rule raised on one.
        """
        self._spread()
        self._follow(parameters.arrays)
        stages: list[list[Any]] = [[]]
        clips: list[Any] = []
        for hook in self._optimizer._hookable._pre_update_hooks.values():
            if is_elementwise(hook):
                stages[-1].append(hook)
            else:
                clips.append(hook)
                stages.append([])
        flat = None
        if not averaged:
            flat = [cast("Array", grad).reshape(-1) for grad in parameters.grads]
        for group in self._groups:
            self._run(group, flat, stages[0], last=not clips, absent=absent)
        for number, clip in enumerate(clips, start=1):
            self._clip(clip.threshold)
            if number < len(clips):
                for chunk in itertools.chain.from_iterable(self._chunks):
                    chunk.prepare(stages[number])
        if clips:
            for group in self._groups:
                self._run(group, None, stages[-1], last=True)
        self._finish()

    @property
    def parts(self) -> list[Exchange]:
        """How to exchange the gradients before :meth:`update`; only with an ``order``."""

        def deliver_to(group: _Group) -> Deliver:
            def deliver(number: int, total: Array, scale: float, out: Array) -> None:
                del out
                np.multiply(total, scale, out=group.slices[number].mean, casting="same_kind")

            return deliver

        return [
            Exchange(
                group.indices, group.blocks, group.dtype, deliver_to(group), None, self._unwanted
            )
            for group in self._groups
        ]

    def _follow(self, arrays: Sequence[Array]) -> None:
        """Go on with the arrays that a user has put in the place of others."""
        if same(self._arrays, arrays):
            return
        for index, array in enumerate(arrays):
            if array is self._arrays[index]:
                continue
            if self._shared:
                self._copy_to_node(index, array)
            else:
                for chunk in self._chunks[index]:
                    chunk.bind(array)
                self._arrays[index] = array

    def _run(
        self,
        group: _Group,
        flat: list[Array] | None,
        hooks: list[Any],
        *,
        last: bool,
        absent: frozenset[int] = frozenset(),
    ) -> None:
        """Average the gradients of a group, if there are any, and run hooks and, at last, rules."""
        sources = flat and [flat[index] for index in group.indices]
        if self._comm.size == 1:
            for part, _, chunks in group.slices:
                if sources is not None:
                    for grad, chunk in zip(part.views(sources), chunks):
                        chunk.take_grad(grad)
                _work(chunks, hooks, last=last)
            return
        arrays = [self._arrays[index].reshape(-1) for index in group.indices] if last else None
        targets = None if self._shared or self._comm.intra_size == 1 else arrays
        from_nodes = arrays if self._across else None

        def deliver(number: int, total: Array, scale: float, out: Array) -> None:
            part, mean, chunks = group.slices[number]
            if sources is not None:
                np.multiply(total, scale, out=mean, casting="same_kind")
            _work(chunks, hooks, last=last)
            results = from_nodes or targets
            if results is not None:
                part.gather(results, out)

        self._comm.ring.run(
            group.blocks,
            group.dtype,
            sources,
            deliver,
            targets,
            code=self._code,
            absent=positions(group.indices, absent | self._unwanted),
            from_nodes=from_nodes,
        )

    def _clip(self, threshold: float) -> None:
        """Do what ``GradientClipping`` does, with the norm summed up over slices."""
        chunks = list(itertools.chain.from_iterable(self._chunks))
        own = 0.0
        for chunk in chunks:
            grad = chunk.param.grad
            wide = grad.astype(reduction.wire_dtype(grad.dtype), copy=False)
            own += float(wide.dot(wide))
        # Of whom together has all slices. In the order of rank, so that all get the same bits.
        ranks = self._comm.mpi_comm if self._across else self._comm.node_comm
        with Operation(_NORM, self._comm):
            norm = math.sqrt(sum(ranks.allgather(own)))
        if norm <= threshold:
            return
        for chunk in chunks:
            chunk.param.grad *= threshold / norm

    def _finish(self) -> None:
        for param, mean in zip(self._params, self._means):
            if mean is not None:
                param._set_grad_without_check(mean)
        if self._shared:
            self._attach()
        self._optimizer.t += 1
        for rule, state in zip(self._rules, self._states):
            if state is not None:
                rule.t += 1
        for param in self._loose:
            param.update()

    @property
    def is_spread(self) -> bool:
        """Whether each rank has a part of the state only."""
        return any(isinstance(state, _SpreadState) for state in self._states)

    def consolidate(self) -> None:
        """Gather the state of all ranks on every node, until the next update. Collective.

        Nothing is done if all of it is there.

        Raises:
            OSError: On every rank, if a node has no memory for it.
        """
        if not self.is_spread:
            return
        memory = _Memory(self._comm)
        planned = [
            {key: memory.plan(array.size, array.dtype) for key in keys}
            for array, keys in zip(self._arrays, self._keys)
        ]
        memory.allocate()
        whole = [{key: place() for key, place in each.items()} for each in planned]
        for group in self._groups:
            for key in dict.fromkeys(key for index in group.indices for key in self._keys[index]):
                self._gather_state(group, key, whole)
        self._comm.node_comm.Barrier()  # what others have written is there
        for index, (rule, state) in enumerate(zip(self._rules, self._states)):
            if state is not None:
                shape = self._arrays[index].shape
                self._states[index] = rule._state = {
                    key: read_only(value.reshape(shape)) for key, value in whole[index].items()
                }
        self._state_arrays = self._states_now()

    def _gather_state(self, group: _Group, key: str, whole: list[dict[str, Array]]) -> None:
        """Write an array of the state of all parameters of a group to shared memory."""
        arrays = [
            whole[index].get(key, np.empty(0, self._arrays[index].dtype)) for index in group.indices
        ]
        # Not every rule may have one of that name.
        arrays = [
            found if found.size else np.empty(self._arrays[index].size, found.dtype)
            for found, index in zip(arrays, group.indices)
        ]

        def deliver(number: int, total: Array, scale: float, out: Array) -> None:
            del total, scale
            part, _, chunks = group.slices[number]
            for chunk, inside in zip(chunks, part.inside):
                chunk.read_state(key, out[inside])
            part.scatter(out, arrays)

        self._comm.ring.run(group.blocks, group.dtype, None, deliver, None, from_nodes=arrays)

    def _spread(self) -> None:
        """Let go of what was gathered. Local."""
        if self._across and not self.is_spread:
            for index, (rule, state) in enumerate(zip(self._rules, self._states)):
                if state is not None:
                    self._states[index] = rule._state = _SpreadState()
            self._state_arrays = self._states_now()

    @contextlib.contextmanager
    def copied_states(self) -> Iterator[None]:
        """Let every rule have a copy of its state for a while. Local.

        Raises:
            RuntimeError: If each rank has a part of it only.
        """
        if self.is_spread:
            raise RuntimeError(SPREAD)
        for rule, state in zip(self._rules, self._states):
            if state is not None:
                rule._state = {key: value.copy() for key, value in rule._state.items()}
        try:
            yield
        finally:
            for rule, state in zip(self._rules, self._states):
                if state is not None:
                    rule._state = state

    def release(self) -> None:
        """Give back to each rank arrays of its own in the place of what the ranks shared. Local.

        A state of which each rank has a part only is given up; see :meth:`consolidate`.
        """
        for rule, state in zip(self._rules, self._states):
            if isinstance(state, _SpreadState):
                rule._state = None
            elif state is not None and rule._state is state:
                rule._state = {key: value.copy() for key, value in state.items()}
        for param, mean, array in zip(self._params, self._means, self._arrays):
            if mean is not None and param.grad is mean:
                param.grad = mean.copy()
            if self._shared and param.array is array:
                param.array = array.copy()


class _SpreadState(dict[str, Any]):
    """What a rule has in the place of its state while each rank has a part of that only.

    Whatever saves, copies or reads it raises RuntimeError, so that nobody takes a part for the whole.
    """

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(SPREAD)

    __iter__ = __getitem__ = __setitem__ = __reduce_ex__ = __copy__ = __deepcopy__ = _refuse
    keys = values = items = get = copy = _refuse


class _Slice(NamedTuple):
    """This rank's part of a block."""

    part: Slice
    mean: Array  # where the averaged gradients are put
    chunks: list[Chunk]  # one an array


class _Group(NamedTuple):
    """The parameters of one dtype."""

    indices: list[int]
    dtype: np.dtype[Any]  # in which gradients are summed
    blocks: list[Block]
    slices: list[_Slice]


class _Memory:
    """Arrays in one piece of memory that the ranks of a node share: first planned, then allocated."""

    def __init__(self, comm: SharedMemoryCommunicator) -> None:
        self._comm = comm
        self._nbytes = 0
        self._bytes: Array

    def plan(self, size: int, dtype: np.dtype[Any]) -> Callable[[], Array]:
        """Plan an array; what is returned returns it once it is there."""
        start = self._nbytes
        stop = start + size * dtype.itemsize
        self._nbytes = stop + -stop % _ALIGNMENT
        return lambda: self._bytes[start:stop].view(dtype)

    def allocate(self) -> None:
        """Get the memory. Collective."""
        self._bytes = share_memory(self._comm, self._nbytes)


def _work(chunks: Iterable[Chunk], hooks: list[Any], *, last: bool) -> None:
    for chunk in chunks:
        chunk.prepare(hooks)
        if last:
            chunk.update()


def _elements(indices: Sequence[int], part: Slice) -> Iterator[tuple[int, slice, slice]]:
    """Yield the number of each parameter in a slice, which of its elements, and where they are there."""
    begin = part.begin
    for index, inside in zip(indices[part.arrays], part.inside):
        yield index, slice(begin, begin + inside.stop - inside.start), inside
        begin = 0


def _size(param: chainer.Parameter) -> int:
    return 0 if param.array is None else param.array.size
