"""The sharded update: each rank of a node updates one slice of the parameters for all of them.

If every rank updates all parameters, all cores of a node repeat the same work, whose speed is that of the
memory. Here each rank runs Chainer's own update rules on the slice whose gradients it has just averaged, in
chunks that stay in the cache, and the other ranks copy the new parameters. The state of the rules exists
once per node, or on request once per job.

The idea of sharding the update is from ZeRO (Rajbhandari et al., 2020). Here it is applied to ranks that share
memory, so that nothing has to be sent within a node; across nodes it is ZeRO's stage 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from chainer_dist.collectives.agreement import check_same
from chainer_dist.communicators.shared_memory.communicator import SharedMemoryCommunicator
from chainer_dist.parameters import private_grads
from chainer_dist.updates.base import EarlyExchanges, Update
from chainer_dist.updates.comparison import describe_states
from chainer_dist.updates.options import JOB
from chainer_dist.updates.sharding.eligibility import obstacle
from chainer_dist.updates.sharding.shards import Shards

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable

    from chainer_dist.parameters import ParameterSet
    from chainer_dist.updates.base import Context, Gradients

__all__ = ["Sharded"]


class Sharded(Update):
    """The update in which each rank of a node, or of the job, updates its slice of the parameters.

    While it is prepared, the state of the update rules is in memory that the ranks of a node share, or
    spread over the ranks of the job.
    """

    name = "sharded"
    news = "each rank updates a slice of the parameters"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._shards: Shards | None = None  # None unless it is prepared
        self._is_early = False

    @classmethod
    def obstacle(cls, context: Context, parameters: ParameterSet) -> str | None:
        """Return the reason why the result might differ from the replicated update's, in words, or None. Local."""
        comm = context.comm
        if not isinstance(comm, SharedMemoryCommunicator):
            return f"the communicator is {comm.name}, not shared_memory"
        if comm.has_own_mean:
            return f"{type(comm).__name__} has its own multi_node_mean_grad()"
        return obstacle(context.optimizer, parameters)

    def prepare(
        self, parameters: ParameterSet, agree_on_order: Callable[[], list[int]] | None
    ) -> None:
        """Distribute state and parameters over the ranks. Collective."""
        comm, optimizer, options, _ = self.context
        check_same(comm, describe_states(parameters))
        self._is_early = agree_on_order is not None
        self._shards = Shards(
            cast("SharedMemoryCommunicator", comm),
            optimizer,
            parameters,
            options,
            order=None if agree_on_order is None else agree_on_order(),
            across_nodes=options.sharded_update == JOB and comm.inter_size > 1,
        )

    @property
    def prepared(self) -> Shards:
        """The parameters as they are distributed over the ranks; only while the update is prepared."""
        if self._shards is None:
            raise RuntimeError("the sharded update is not prepared")
        return self._shards

    def early(self) -> EarlyExchanges | None:
        """Return the exchanges of all gradients, if they may take place during backward. Local."""
        if not self._is_early:
            return None
        return EarlyExchanges(self.prepared.exchanges, is_for_all=True)

    def fits(self, parameters: ParameterSet) -> bool:
        """See :meth:`Shards.fits`. Local."""
        return self.prepared.fits(parameters)

    def apply(self, gradients: Gradients) -> None:
        """Average the gradients, and update. Collective."""
        parameters = gradients.parameters
        absent: frozenset[int] = frozenset()
        if gradients.are_matched:
            absent = frozenset([index for index, has in enumerate(parameters.has_grad) if not has])
        parameters.fill_zeros()
        if self.context.comm.size == 1:  # hooks change the gradients in place
            private_grads(parameters)
        self.prepared.update(parameters, are_averaged=gradients.are_averaged, absent=absent)

    @property
    def is_spread(self) -> bool:
        """Whether each rank has only a share of the state."""
        return self._shards is not None and self._shards.states.is_spread

    def consolidate(self) -> None:
        """Gather the state of all ranks on every node, until the next update. Collective."""
        self.prepared.states.consolidate(self.prepared.layout.groups)

    def copied_states(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which every rule has a copy of its state. Local.

        Raises:
            RuntimeError: On entering, if each rank has only a share of the state.
        """
        return self.prepared.states.copied()

    def release(self) -> None:
        """See :meth:`Shards.release`. Local."""
        if self._shards is not None:
            self._shards.release()
        self._shards = None
