"""The choice of the update that an optimizer makes, and the reason that is logged."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from chainer_dist import _allocator
from chainer_dist.collectives.agreement import check_same
from chainer_dist.collectives.operation import EXCHANGE, Kind, Operation
from chainer_dist.communicators.shared_memory.communicator import SharedMemoryCommunicator
from chainer_dist.optimizers.overlap import Overlap
from chainer_dist.updates import UPDATES
from chainer_dist.updates.options import JOB, Options
from chainer_dist.updates.sharding.eligibility import Signature, modes

if TYPE_CHECKING:
    import chainer

    from chainer_dist.parameters import ParameterSet
    from chainer_dist.updates.base import Context, Update

__all__ = ["Plan", "kinds"]

_logger = logging.getLogger("chainer_dist")

_GATHER = Kind("gathering of the state", EXCHANGE)
_CHOOSE = Kind("choice of the update", EXCHANGE)


def kinds(options: Options) -> list[type[Update]]:
    """Return the ways to update that a user allows, best first. Local."""
    if options.kind is not None:
        names = [options.kind]
    elif options.sharded_update is None:
        names = ["sharded", "replicated"]
    else:
        names = ["sharded" if options.sharded_update else "replicated"]
    return [UPDATES[name] for name in names]


class Plan:
    """Which update an optimizer makes, for as long as its parameters, rules and hooks stay.

    Args:
        options: The user's choice.

    Attributes:
        options: The user's choice.
        chosen: The update that is prepared; None before the first choice, and after :meth:`drop`.
        overlap: The exchange of gradients during backward; None where that was never possible.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.chosen: Update | None = None
        self.overlap: Overlap | None = None
        self._signature: Signature | None = None  # of the optimizer for which the update was chosen
        self._seen: Any = None  # what, with these parameters, had that signature
        self._params: list[chainer.Parameter] | None = None
        self._context: Context | None = None
        self._updates: dict[type[Update], Update] = {}
        self._logged = ""  # the last line on the choice

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(Plan(self.options)), "_logged": self._logged}  # a copy chooses anew

    def connect(self, context: Context) -> None:
        """Plan for a communicator and an optimizer from now on. Local."""
        if context != self._context:
            self.drop()
            for update in self._updates.values():
                update.discard()
            self._updates = {kind: kind(context) for kind in kinds(self.options)}
            self._context = context

    @property
    def update(self) -> Update:
        """The chosen update, or the best one that is allowed while none is chosen."""
        return self.chosen or next(iter(self._updates.values()))

    @property
    def is_overlapped(self) -> bool:
        """Whether the gradients of the last update were exchanged during backward."""
        return self.overlap is not None and self.overlap.was_used

    def fits(self, context: Context, parameters: ParameterSet, version: int | None = None) -> bool:
        """Return whether parameters can be updated in the way that was last chosen. Local.

        Args:
            context: Communicator and optimizer.
            parameters: The parameters of its target.
            version: That of the optimizer's :class:`Settings`, which have just been looked at, so that what they are
                about need not be looked at again; None if they have not.
        """
        if (
            self.chosen is None
            or not self.chosen.fits(parameters)
            or (self.overlap is not None and self.overlap.is_stale)
        ):
            return False
        seen = (version, modes(context.optimizer))
        if version is None or seen != self._seen or parameters.params is not self._params:
            if Signature(context.optimizer, parameters) != self._signature:
                return False
            self._seen, self._params = seen, parameters.params
        return True

    def usable_overlap(self, context: Context, *, is_joined: bool) -> Overlap | None:
        """Return what can exchange gradients during backward, or None. Local, the same everywhere.

        Args:
            context: Communicator and optimizer.
            is_joined: Whether the optimizer is in a :class:`~chainer_dist.Join`, whose ranks may have no
                backward, and gradients that do not count as they are.
        """
        comm, options = context.comm, self.options
        if (
            options.overlap is False
            or not isinstance(comm, SharedMemoryCommunicator)
            or comm.has_own_mean
            or not (comm.inter_size > 1 or (options.overlap and comm.size > 1))
        ):
            return None
        if self.overlap is None or self.overlap.comm is not comm:
            self.overlap = Overlap(comm, options.code)
        return None if is_joined else self.overlap

    def choose(self, context: Context, parameters: ParameterSet) -> None:
        """Choose how parameters are updated, for as long as that :meth:`fits`. Collective.

        Raises:
            ValueError: On every rank, if no allowed update can be made.
        """
        comm, overlap = context.comm, self.overlap
        self.consolidate(context)
        self.drop()
        with Operation(_CHOOSE, comm):
            signature = Signature(context.optimizer, parameters)
            update, reason = self._first_without_obstacle(context, parameters)
            update.prepare(
                parameters,
                None if overlap is None else lambda: overlap.agree_on_order(parameters),
            )
            if overlap is not None:
                overlap.plan(update.early())
            self.chosen, self._signature = update, signature
            _allocator.release_freed_memory()  # initializing parameters takes much that steps do not
            if comm.rank == 0:
                self._tell(context, reason)

    def _first_without_obstacle(
        self, context: Context, parameters: ParameterSet
    ) -> tuple[Update, str | None]:
        """Return an update, and what any rank has against the one that would be better. Collective."""
        own = [kind.obstacle(context, parameters) for kind in self._updates]
        everyone = context.comm.allgather_obj(own)
        reason = None
        for update, reasons in zip(self._updates.values(), zip(*everyone)):
            found = next(filter(None, reasons), None)
            if found is None:
                return update, reason
            reason = reason or f"{found}"
        raise ValueError(f"the update cannot be {next(iter(self._updates)).name}: {reason}")

    def _tell(self, context: Context, reason: str | None) -> None:
        """Log what was chosen, unless that was said last time. Local."""
        if reason is None:
            level, text = logging.INFO, self.update.news
        elif isinstance(context.comm, SharedMemoryCommunicator):
            level, text = logging.WARNING, f"every rank updates all parameters, as {reason}"
        else:
            level, text = logging.INFO, ""
        if text and text != self._logged:
            _logger.log(level, "chainer_dist: %s", text)
        self._logged = text

    def consolidate(self, context: Context) -> None:
        """Let every rank have all of the state until the next update. Collective.

        Nothing is done, and ranks do not communicate, but for updates that are sharded over the job.

        Raises:
            RankMismatchError: On every rank, if the state is spread on some of them only.
        """
        if self.options.sharded_update != JOB:
            return
        update = self.chosen if self.chosen is not None and self.chosen.is_spread else None
        with Operation(_GATHER, context.comm):
            subject = "whether the state is spread (was a snapshot loaded on some ranks only?)"
            check_same(context.comm, [(subject, str(update is not None))])
            if update is not None:
                update.consolidate()

    def drop(self) -> None:
        """Go back to state and gradients of one's own; the next update chooses anew. Local."""
        if self.chosen is not None:
            self.chosen.release()
        self.chosen = self._signature = self._seen = None
        if self.overlap is not None:
            self.overlap.drop()
