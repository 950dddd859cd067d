"""The state of the update rules, which exists once per node, or once per job."""

from __future__ import annotations

import abc
import contextlib
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from chainer_dist.communicators.shared_memory.exchange import Exchange
from chainer_dist.communicators.shared_memory.memory import read_only
from chainer_dist.parameters import are_identical
from chainer_dist.updates.sharding.chunk import state_keys
from chainer_dist.updates.sharding.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import chainer
    from mpi4py import MPI

    from chainer_dist._typing import Array
    from chainer_dist.communicators.shared_memory.communicator import SharedMemoryCommunicator
    from chainer_dist.updates.sharding.groups import Group

__all__ = ["SPREAD", "JobStates", "NodeStates", "RuleStates"]

SPREAD = (
    "each rank has only a share of the optimizer's state (sharded_update='job'): call "
    "optimizer.consolidate() on every rank, before any of them saves, copies or reads it"
)


class RuleStates(abc.ABC):
    """The states of the update rules of all parameters. Creating them is local.

    Args:
        comm: The communicator whose ranks share the update.
        params: The parameters.

    Attributes:
        is_spread: Whether each rank has only a share of the state.
        ranks: Communicator of the ranks whose slices together are all elements.
    """

    def __init__(self, comm: SharedMemoryCommunicator, params: Sequence[chainer.Parameter]) -> None:
        self._comm = comm
        self._rules = [param.update_rule for param in params]
        self._shapes = [param.shape for param in params]
        self._dtypes = [param.dtype for param in params]
        self._keys = [state_keys(rule) for rule in self._rules]
        self._held: list[dict[str, Any] | None] = [None] * len(params)  # by the rules
        self._known: list[Any] = []  # the states, and their arrays, when they were last set

    @property
    def is_spread(self) -> bool:
        """See the attributes of this class."""
        return False

    @property
    @abc.abstractmethod
    def ranks(self) -> MPI.Intracomm:
        """See the attributes of this class."""

    @abc.abstractmethod
    def of_chunk(self, index: int, elements: slice) -> dict[str, Array]:
        """Return 1-dimensional arrays for the state of a chunk, by name. Local.

        Args:
            index: Index of the parameter.
            elements: Slice of the parameter's elements that are in the chunk.
        """

    @abc.abstractmethod
    def _first(self, index: int) -> dict[str, Any]:
        """Return the first state that a rule gets when the update is prepared. Local."""

    def attach(self) -> None:
        """Give the rules their new states, once all chunks have copied the old ones. Local."""
        for index, (rule, shape) in enumerate(zip(self._rules, self._shapes)):
            if rule is not None and rule.enabled and 0 not in shape:
                self._held[index] = rule._state = self._first(index)
        self._known = self._now()

    def _now(self) -> list[Any]:
        """Return the states that the rules have now, and the arrays of these. Local."""
        found: list[Any] = []
        for rule, state in zip(self._rules, self._held):
            if state is not None:
                own = rule._state
                found.append(own)
                if own and type(own) is not _SpreadState:
                    found += own.values()
        return found

    def are_unchanged(self) -> bool:
        """Return whether all rules have the states that they were given. Local."""
        return are_identical(self._now(), self._known)

    def count(self) -> None:
        """Count an update in all rules that have a state here. Local."""
        for rule, state in zip(self._rules, self._held):
            if state is not None:
                rule.t += 1

    @contextlib.contextmanager
    def copied(self) -> Iterator[None]:
        """Return a context in which every rule has a copy of its state. Local.

        Raises:
            RuntimeError: On entering, if each rank has only a share of the state.
        """
        if self.is_spread:
            raise RuntimeError(SPREAD)
        for rule, state in zip(self._rules, self._held):
            if state is not None:
                rule._state = _copied(rule._state)
        try:
            yield
        finally:
            for rule, state in zip(self._rules, self._held):
                if state is not None:
                    rule._state = state

    def release(self) -> None:
        """Give every rule a state of its own. Local."""
        for rule, state in zip(self._rules, self._held):
            if state is not None and rule._state is state:
                rule._state = _copied(state)

    def consolidate(self, groups: Sequence[Group]) -> None:  # noqa: B027 - most have all of it
        """Gather the state of all ranks on every node, until :meth:`spread`. Collective.

        Args:
            groups: The layout of the parameters.

        Raises:
            OSError: On every rank, if a node has no memory for it.
        """

    def spread(self) -> None:  # noqa: B027 - most have all of it
        """Drop the gathered state. Local."""


class NodeStates(RuleStates):
    """States that exist once per node, in memory that its ranks share.

    Every rank can read and save all of them, but only the update can change them. Copies of them are
    ordinary arrays.

    Args:
        comm: See :class:`RuleStates`.
        params: See :class:`RuleStates`.
        memory: Memory in which they are planned.
    """

    def __init__(
        self,
        comm: SharedMemoryCommunicator,
        params: Sequence[chainer.Parameter],
        memory: Memory,
    ) -> None:
        super().__init__(comm, params)
        self._planned = [
            {key: memory.plan(param.size, param.dtype) for key in keys}
            for param, keys in zip(params, self._keys)
        ]

    @property
    def ranks(self) -> MPI.Intracomm:
        """The ranks of this node."""
        return self._comm.node_comm

    def of_chunk(self, index: int, elements: slice) -> dict[str, Array]:
        """Return views of the memory that the ranks of the node share. Local."""
        return {key: array()[elements] for key, array in self._planned[index].items()}

    def _first(self, index: int) -> dict[str, Any]:
        whole = {
            key: array().reshape(self._shapes[index]) for key, array in self._planned[index].items()
        }
        if self._comm.intra_size == 1:
            return whole
        # They are read-only, as a rank that changed them would change them for the others.
        return {key: read_only(value) for key, value in whole.items()}


class JobStates(RuleStates):
    """States that exist once per job: each rank has the state of its slices in its own memory."""

    @property
    def ranks(self) -> MPI.Intracomm:
        """All ranks."""
        return self._comm.mpi_comm

    @property
    def is_spread(self) -> bool:
        """Whether the states have not been gathered since the last update."""
        return any(isinstance(state, _SpreadState) for state in self._held)

    def of_chunk(self, index: int, elements: slice) -> dict[str, Array]:
        """Return new arrays in this rank's own memory. Local."""
        size = elements.stop - elements.start
        return {key: np.empty(size, self._dtypes[index]) for key in self._keys[index]}

    def _first(self, index: int) -> dict[str, Any]:
        del index
        return _SpreadState()

    def consolidate(self, groups: Sequence[Group]) -> None:
        """See the base class. It does nothing if the state is gathered already."""
        if not self.is_spread:
            return
        memory = Memory(self._comm)
        planned = [
            {key: memory.plan(int(np.prod(shape)), dtype) for key in keys}
            for shape, dtype, keys in zip(self._shapes, self._dtypes, self._keys)
        ]
        memory.allocate()
        whole = [{key: array() for key, array in each.items()} for each in planned]
        for group in groups:
            for key in dict.fromkeys(key for index in group.indices for key in self._keys[index]):
                self._gather(group, key, whole)
        self._comm.node_comm.Barrier()  # all ranks of the node have written their slices
        for index, (rule, state) in enumerate(zip(self._rules, self._held)):
            if state is not None:
                self._held[index] = rule._state = {
                    key: read_only(value.reshape(self._shapes[index]))
                    for key, value in whole[index].items()
                }
        self._known = self._now()

    def _gather(self, group: Group, key: str, whole: list[dict[str, Array]]) -> None:
        """Write an array of the state of all parameters of a group to shared memory."""
        arrays = [
            whole[index][key]
            if key in whole[index]  # rules of a group may have different arrays
            else np.empty(int(np.prod(self._shapes[index])), self._dtypes[index])
            for index in group.indices
        ]

        def deliver(number: int, total: Array, scale: float, out: Array) -> None:
            del total, scale
            local = group.slices[number]
            for chunk, inside in zip(local.chunks, local.slice.inside):
                chunk.read_state(key, out[inside])
            local.slice.scatter(out, arrays)

        self._comm.transport.run(
            Exchange(group.layout, group.dtype, None, deliver, from_nodes=arrays)
        )

    def spread(self) -> None:
        """See the base class."""
        if self.is_spread:
            return
        for index, (rule, state) in enumerate(zip(self._rules, self._held)):
            if state is not None:
                self._held[index] = rule._state = _SpreadState()
        self._known = self._now()

    def release(self) -> None:
        """See the base class. A state that is spread is lost."""
        if not self.is_spread:
            super().release()
            return
        for rule, state in zip(self._rules, self._held):
            if state is not None:
                rule._state = None


class _SpreadState(dict[str, Any]):
    """The placeholder that a rule has for its state while each rank has only a share of that.

    To save, copy or read it raises RuntimeError, so that a share is not mistaken for the whole state.
    """

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(SPREAD)

    __iter__ = __getitem__ = __setitem__ = __reduce_ex__ = __copy__ = __deepcopy__ = _refuse
    keys = values = items = get = copy = _refuse


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.copy() for key, value in state.items()}
