"""The sharded update: each rank of a node updates its slice of the parameters, once for all of them.

An optimizer that every rank runs on all parameters repeats the same work, bound by memory, on every
core of a node. Here each rank runs Chainer's own update rules on the slice whose gradients it has
just averaged, in chunks that stay in the cache, and the others copy the new parameters. The averaged
gradients and the state of the rules exist once per node.

The idea of sharding the update is that of ZeRO (Rajbhandari et al., 2020), among ranks that share
memory, so that nothing has to be sent within a node.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chainer_dist.communicators import _reduction
from chainer_dist.communicators.agreement import raise_together
from chainer_dist.communicators.node_memory import share_memory
from chainer_dist.communicators.ring import cut, gather
from chainer_dist.exchange import same

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import chainer

    from chainer_dist.communicators.arrays import Array
    from chainer_dist.communicators.ring import Block, Piece
    from chainer_dist.communicators.shared_memory import SharedMemoryCommunicator
    from chainer_dist.exchange import ParameterSet

__all__ = ["ShardedUpdate", "Signature", "obstacle"]

_ALIGNMENT = 64  # bytes: a cache line

_CHUNK_BYTES = 1 << 20  # of a parameter, where one rank updates all of it

# Chainer's rules that compute each element from that element's gradient and state alone, and keep
# nothing but `t` outside of their state.
_RULES = frozenset(
    {
        "AdaDeltaRule",
        "AdaGradRule",
        "AdamRule",
        "CorrectedMomentumSGDRule",
        "MomentumSGDRule",
        "NesterovAGRule",
        "RMSpropGravesRule",
        "RMSpropRule",
        "SGDRule",
        "SMORMS3Rule",
    }
)
# What GradientMethod.update calls: the sharded update stands for these, unless they are overridden.
_METHODS = (
    "update",
    "call_hook",
    "call_hooks",
    "reallocate_cleared_grads",
    "check_nan_in_grads",
    "is_safe_to_update",
    "update_loss_scale",
)


def obstacle(optimizer: chainer.Optimizer, parameters: ParameterSet) -> str | None:
    """Say why a sharded update might not equal the optimizer's own, or return None. Local.

    Args:
        optimizer: A Chainer optimizer that is set up.
        parameters: Of its target.
    """
    return (
        _obstacle_in_optimizer(optimizer)
        or _obstacle_in_arrays(parameters)
        or next(filter(None, map(_obstacle_in_param, parameters.names, parameters.params)), None)
    )


def _obstacle_in_optimizer(optimizer: chainer.Optimizer) -> str | None:
    import chainer

    kind = type(optimizer)
    for name in _METHODS:
        if name in vars(optimizer) or (
            getattr(kind, name, None) is not getattr(chainer.GradientMethod, name)
        ):
            return f"{kind.__name__} has its own {name}()"
    if optimizer._loss_scaling_is_dynamic:
        return "dynamic loss scaling looks at all gradients before the update"
    hookable = optimizer._hookable
    if hookable._post_update_hooks:
        return f"the hook {next(iter(hookable._post_update_hooks))} runs after the update"
    known = (*_elementwise_hooks(), chainer.optimizer_hooks.GradientClipping)
    for name, hook in hookable._pre_update_hooks.items():
        if type(hook) not in known:
            return f"the hook {name} may look at whole parameters"
    params = list(optimizer.target.params())
    if len(params) != len({id(param) for param in params}):
        return "a parameter is registered twice, and so updated twice"
    return None


def _obstacle_in_arrays(parameters: ParameterSet) -> str | None:
    end = 0
    extents = [
        (array.ctypes.data, array.nbytes, name)
        for name, array in zip(parameters.names, parameters.arrays)
        if array.size
    ]
    for name, array in zip(parameters.names, parameters.arrays):
        if not (array.flags.c_contiguous and array.flags.writeable):
            return f"{name} is not a writable array in C order"
    for begin, nbytes, name in sorted(extents):
        if begin < end:
            return f"{name} shares memory with another parameter"
        end = begin + nbytes
    return None


def _obstacle_in_param(name: str, param: chainer.Parameter) -> str | None:
    import chainer

    rule = param.update_rule
    if rule is None:
        return None
    kind = type(rule)
    module = kind.__module__
    if type(param).update is not chainer.Parameter.update or "update" in vars(param):
        return f"{name} has its own update()"
    if not (module.startswith("chainer.optimizers.") and kind.__name__ in _RULES):
        return f"nothing is known of the update rule {kind.__name__} of {name}"
    if "update" in vars(rule) or "update_core" in vars(rule):
        return f"the update rule of {name} has its own update()"
    if rule._use_fp32_update and param.dtype == np.float16:
        return f"{name} is updated in float32 (use_fp32_update)"
    hookable = rule._hookable
    if hookable._post_update_hooks:
        return f"the hook {next(iter(hookable._post_update_hooks))} runs after the update of {name}"
    for hook_name, hook in hookable._pre_update_hooks.items():
        if type(hook) not in _elementwise_hooks():
            return f"the hook {hook_name} of {name} may look at the whole parameter"
    for key, value in (rule.state or {}).items():
        array = param.array
        if not (
            isinstance(value, np.ndarray)
            and value.shape == array.shape
            and value.dtype == array.dtype
        ):
            return f"the state {key} of {name} is not an array like the parameter"
    return None


def _elementwise_hooks() -> tuple[type, ...]:
    from chainer import optimizer_hooks

    return (
        optimizer_hooks.GradientHardClipping,
        optimizer_hooks.Lasso,
        optimizer_hooks.WeightDecay,
    )


class Signature:
    """What the choice between a sharded and a replicated update rests on, cheap to compare. Local."""

    def __init__(self, optimizer: chainer.Optimizer, parameters: ParameterSet) -> None:
        rules = [param.update_rule for param in parameters.params]
        actual = [rule for rule in rules if rule is not None]
        hookables = [optimizer._hookable, *(rule._hookable for rule in actual)]
        self._objects: list[Any] = [*parameters.params, *rules]
        for hookable in hookables:
            if hookable._pre_update_hooks or hookable._post_update_hooks:
                self._objects += hookable._pre_update_hooks.values()
                self._objects += [None, *hookable._post_update_hooks.values(), None]
        self._values = (
            [rule.enabled for rule in actual],
            [rule._use_fp32_update for rule in actual],
            optimizer._loss_scaling_is_dynamic,
            [name for name in _METHODS if name in vars(optimizer)],
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Signature)
            and same(self._objects, other._objects)
            and self._values == other._values
        )

    __hash__ = None  # type: ignore[assignment]


class ShardedUpdate:
    """The update of one optimizer, shared out to the ranks of each node. Creating one is collective.

    From then on the state of the update rules is in memory that the ranks of the node share: every
    rank sees all of it, and can save it; nobody can change it but :meth:`update`.

    Args:
        comm: Over whose ranks gradients are averaged.
        optimizer: A Chainer optimizer for which :func:`obstacle` found nothing on any rank.
        parameters: Of its target; of equal structure on every rank.

    Raises:
        OSError: On every rank, if a node has no memory to share.
    """

    def __init__(
        self,
        comm: SharedMemoryCommunicator,
        optimizer: chainer.Optimizer,
        parameters: ParameterSet,
    ) -> None:
        self._comm = comm
        self._optimizer = optimizer
        self._params = parameters.params
        self._arrays = list(parameters.arrays)
        self._rules = [param.update_rule for param in self._params]
        # Nothing of these can be shared out; their rules count updates all the same.
        self._loose = [each for each in parameters.all.values() if not _size(each)]
        keys = [_state_keys(rule) for rule in self._rules]
        members: dict[np.dtype[Any], list[int]] = {}
        for index, array in enumerate(self._arrays):
            if array.size:
                members.setdefault(array.dtype, []).append(index)
        memory = _Memory(comm)
        means = [
            None if comm.size == 1 else memory.plan(sum(self._arrays[i].size for i in group), dtype)
            for dtype, group in members.items()
        ]
        places = [
            {key: memory.plan(array.size, array.dtype) for key in names}
            for array, names in zip(self._arrays, keys)
        ]
        memory.allocate()
        self._states: list[dict[str, Array] | None] = [None] * len(self._params)
        self._means: list[Array | None] = [None] * len(self._params)
        self._chunks: list[list[_Chunk]] = [[] for _ in self._params]
        self._groups: list[_Group] = []
        states = [{key: place() for key, place in each.items()} for each in places]
        for group, mean in zip(members.values(), means):
            self._groups.append(self._make_group(group, mean and mean(), states))
        error: Exception | None = None
        try:
            for chunk in itertools.chain.from_iterable(self._chunks):
                chunk.take_state()
        except Exception as caught:  # noqa: BLE001 - whatever a rule raises, all ranks raise
            error = caught
        raise_together(comm, error)  # and so waits until all states are there
        for index, (rule, names) in enumerate(zip(self._rules, keys)):
            if rule is not None and rule.enabled and self._arrays[index].size:
                whole = {key: states[index][key].reshape(self._arrays[index].shape) for key in names}
                for value in whole.values():
                    value.flags.writeable = False
                rule._state = self._states[index] = whole

    def _make_group(
        self, indices: list[int], mean: Array | None, states: list[dict[str, Array]]
    ) -> _Group:
        """Cut the parameters of one dtype into blocks, and this rank's part of them into chunks."""
        wire = _reduction.wire_dtype(self._arrays[indices[0]].dtype)
        sizes = tuple(self._arrays[index].size for index in indices)
        if mean is None:
            blocks = cut(sizes, _CHUNK_BYTES // wire.itemsize, 1)
        else:
            blocks = self._comm.ring.cut(sizes, wire)
            ends = list(itertools.accumulate(sizes))
            for index, size, end in zip(indices, sizes, ends):
                whole = mean[end - size : end].reshape(self._arrays[index].shape)
                whole.flags.writeable = False
                self._means[index] = whole
        slices = []
        for block in blocks:
            if mean is None:
                own, pieces = slice(*block.edges), block.slices[0]
            else:
                own, pieces = self._comm.ring.own(block)
            chunks = []
            for piece in pieces:
                index = indices[piece.array]
                chunk = _Chunk(self._params[index], slice(piece.start, piece.stop), states[index])
                chunk.bind(self._arrays[index])
                if mean is not None:
                    start = block.start + piece.offset
                    chunk.param.grad = mean[start : start + piece.stop - piece.start]
                self._chunks[index].append(chunk)
                chunks.append(chunk)
            region = slice(block.start + own.start, block.start + own.stop)
            slices.append(_Slice(pieces, None if mean is None else mean[region], chunks))
        return _Group(indices, wire, blocks, slices)

    def fits(self, parameters: ParameterSet) -> bool:
        """Tell whether these are still the parameters, rules and states that were shared out. Local.

        Arrays that were replaced by others of the same kind are taken over.
        """
        if not same(self._params, parameters.params):
            return False
        for rule, state in zip(self._rules, self._states):
            if state is not None and rule._state is not state:
                return False
        if not same(self._arrays, parameters.arrays):
            if _obstacle_in_arrays(parameters):
                return False
            for index, array in enumerate(parameters.arrays):
                if array is not self._arrays[index]:
                    self._arrays[index] = array
                    for chunk in self._chunks[index]:
                        chunk.bind(array)
        return True

    def update(self, grads: Sequence[Array]) -> None:
        """Average the gradients, run hooks and update rules on them, share the result. Collective.

        Every rank's ``param.grad`` is then a read-only array of the mean, as the hooks left it, that
        stays as it is until this rank's next update.

        Args:
            grads: Of each parameter, in the parameters' shapes and dtypes.

        Raises:
            Exception: On every rank of the node, what a hook or a rule raised on one.
        """
        stages: list[list[Any]] = [[]]
        clips: list[Any] = []
        for hook in self._optimizer._hookable._pre_update_hooks.values():
            if type(hook) in _elementwise_hooks():
                stages[-1].append(hook)
            else:
                clips.append(hook)
                stages.append([])
        flat = [grad.reshape(-1) for grad in grads]
        for index, chunks in enumerate(self._chunks):
            loss_scale = self._params[index]._loss_scale
            for chunk in chunks:
                chunk.param._loss_scale = loss_scale
        for group in self._groups:
            self._reduce(group, flat, stages[0], last=not clips)
        for clip, hooks in zip(clips, stages[1:]):
            self._clip(clip.threshold)
            if clip is not clips[-1]:
                for chunk in itertools.chain.from_iterable(self._chunks):
                    chunk.call(hooks)
        if clips:
            for group in self._groups:
                self._reduce(group, None, stages[-1], last=True)
        self._finish()

    def _reduce(
        self, group: _Group, flat: list[Array] | None, hooks: list[Any], *, last: bool
    ) -> None:
        """Average the gradients of a group, if there are any, and run hooks and, at last, rules."""
        sources = flat and [flat[index] for index in group.indices]
        targets = [self._arrays[index].reshape(-1) for index in group.indices]
        if self._comm.size == 1:
            for each in group.slices:
                for piece, chunk in zip(each.pieces, each.chunks):
                    if sources is not None:
                        chunk.param.grad = sources[piece.array][piece.start : piece.stop]
                    chunk.call(hooks)
                    if last:
                        chunk.update()
            return
        scale = self._comm.ring.scale

        def deliver(number: int, block: Array) -> None:
            pieces, mean, chunks = group.slices[number]
            if sources is not None:
                np.multiply(block, scale, out=mean, casting="same_kind")
            for chunk in chunks:
                chunk.call(hooks)
                if last:
                    chunk.update()
            if last:
                gather(targets, pieces, block)

        self._comm.ring.run(
            group.blocks, group.dtype, sources, deliver, targets if last else None
        )

    def _clip(self, threshold: float) -> None:
        """Do what ``GradientClipping`` does, with the norm summed up over slices."""
        own = 0.0
        chunks = list(itertools.chain.from_iterable(self._chunks))
        for chunk in chunks:
            grad = chunk.param.grad
            wide = grad.astype(_reduction.wire_dtype(grad.dtype), copy=False)
            own += float(wide.dot(wide))
        # Each node has all slices; in the order of rank, so that all get the same bits.
        norm = math.sqrt(sum(self._comm.node_comm.allgather(own)))
        if norm <= threshold:
            return
        for chunk in chunks:
            chunk.param.grad *= threshold / norm

    def _finish(self) -> None:
        for param, mean in zip(self._params, self._means):
            if mean is not None:
                param._set_grad_without_check(mean)
        self._optimizer.t += 1
        for rule, state in zip(self._rules, self._states):
            if state is not None:
                rule.t += 1
        for param in self._loose:
            param.update()

    def release(self) -> None:
        """Give every rule a state of its own, and every parameter a gradient of its own. Local."""
        for rule, state in zip(self._rules, self._states):
            if state is not None and rule._state is state:
                rule._state = {key: value.copy() for key, value in state.items()}
        for param, mean in zip(self._params, self._means):
            if mean is not None and param.grad is mean:
                param.grad = mean.copy()


class _Slice(NamedTuple):
    """This rank's part of a block."""

    pieces: list[Piece]
    mean: Array | None  # where the averaged gradients are put
    chunks: list[_Chunk]  # one a piece


class _Group(NamedTuple):
    """The parameters of one dtype."""

    indices: list[int]
    dtype: np.dtype[Any]  # in which gradients are summed
    blocks: list[Block]
    slices: list[_Slice]


class _Chunk:
    """A part of a parameter: itself a parameter, with an update rule like the whole one's."""

    def __init__(self, whole: chainer.Parameter, part: slice, state: dict[str, Array]) -> None:
        import chainer

        self._whole = whole
        self._part = part
        self._state = {key: value[part] for key, value in state.items()}
        self._rule = copy.copy(whole.update_rule)
        self.param = chainer.Parameter()

    def bind(self, array: Array) -> None:
        """Make this a part of ``array``."""
        self._array = array.reshape(-1)[self._part]
        self.param.array = self._array

    def take_state(self) -> None:
        """Copy this part of the rule's state, or initialize it, to where it is from now on."""
        rule = self._rule
        if rule is None or not rule.enabled:
            return
        if rule._state is None:
            rule._state = {}
            rule.init_state(self.param)
        for key, place in self._state.items():
            value = rule._state[key].reshape(-1)
            place[...] = value if value.size == place.size else value[self._part]

    def call(self, hooks: Sequence[Callable[[Any, chainer.Parameter], None]]) -> None:
        """Call hooks of the optimizer."""
        for hook in hooks:
            hook(self._rule, self.param)

    def update(self) -> None:
        """Update this part as the whole parameter's rule would."""
        rule = self._rule
        if rule is None:
            return
        vars(rule).update(vars(self._whole.update_rule))  # hyperparameters, t, hooks as they are now
        rule._state = state = dict(self._state)
        rule.update(self.param)
        for key, place in self._state.items():
            if state[key] is not place:
                place[...] = state[key]
        if self.param.array is not self._array:
            self._array[...] = self.param.array
            self.param.array = self._array


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


def _state_keys(rule: chainer.UpdateRule | None) -> list[str]:
    """Return the names of the arrays that an enabled rule keeps for a parameter."""
    import chainer

    if rule is None or not rule.enabled:
        return []
    if rule.state is not None:
        return list(rule.state)
    probe = copy.copy(rule)  # as UpdateRule.serialize finds them out
    probe._state = {}
    array = np.empty(1, dtype=np.float32)
    probe.init_state(chainer.Variable(array, grad=array))
    return list(probe._state)


def _size(param: chainer.Parameter) -> int:
    return 0 if param.array is None else param.array.size

