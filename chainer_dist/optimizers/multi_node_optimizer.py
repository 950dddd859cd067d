"""The multi-node optimizer: an ordinary Chainer optimizer that all ranks step together."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

from chainer_dist._counts import count_property
from chainer_dist.collectives.operation import UPDATE, stage
from chainer_dist.optimizers.accumulation import Accumulation
from chainer_dist.optimizers.call import Call
from chainer_dist.optimizers.consensus import Settings, describe_options
from chainer_dist.optimizers.plan import Plan, kinds
from chainer_dist.optimizers.proxy import OptimizerProxy
from chainer_dist.optimizers.step import Phase, State, Step
from chainer_dist.updates.base import Context
from chainer_dist.updates.options import Options
from chainer_dist.updates.randomness import Randomness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import chainer
    from typing_extensions import Self

    from chainer_dist.communicators import CommunicatorBase
    from chainer_dist.optimizers.arrangement import Arrangement

__all__ = ["MultiNodeOptimizer"]


class MultiNodeOptimizer(OptimizerProxy):
    """Wraps an optimizer, to which all attributes and methods belong except the few below.

    This class is the interface for users; :mod:`~chainer_dist.optimizers.step` has the course of an update.

    Args:
        actual_optimizer: The optimizer to wrap.
        communicator: The communicator over whose ranks gradients are averaged.
        zero_fill: Whether a gradient that is None on this rank counts as zero.
        options: Options of the update, the same on every rank.

    Attributes:
        actual_optimizer: The wrapped optimizer.
        communicator: The communicator over whose ranks gradients are averaged.
        zero_fill: Whether a gradient that is None on this rank counts as zero.
        join: Arrangement by which ranks that have run out of data take part, or None.
        options: Options of the update, the same on every rank.
        randomness: Random numbers of hooks and update rules, the same on every rank.
    """

    join: Arrangement | None
    options: Options
    _accumulate_steps: int
    _state: State
    randomness: Randomness
    _postponed: bool  # whether updates are put off, in no_sync

    def __init__(
        self,
        actual_optimizer: chainer.Optimizer,
        communicator: CommunicatorBase,
        zero_fill: bool,
        options: Options = Options(),  # noqa: B008 - a tuple
    ) -> None:
        super().__init__(actual_optimizer, communicator, zero_fill)
        if options.compression is not None and options.code is None:
            options.compression.belong()
        self.accumulate_steps = options.accumulate_steps
        self.join = None
        self.options = options
        self._state = State(self._replicas, Plan(options), Settings(are_alike=self.alike))
        self.randomness = Randomness()
        self._postponed = False
        if actual_optimizer.target is not None:
            self._step().synchronize(has_gradients=False)

    accumulate_steps = count_property(
        "accumulate_steps",
        1,
        "Number of calls of :meth:`update` that make one update; can be set, on every rank.",
    )

    @property
    def alike(self) -> bool:
        """Whether parameters and state are the same on all ranks after each update."""
        return all(kind.keeps_equal for kind in kinds(self.options))

    @property
    def overlapped(self) -> bool:
        """Whether the gradients of the last update were exchanged during backward."""
        return self._state.plan.is_overlapped

    @property
    def sharded(self) -> bool | None:
        """Whether each rank updates a slice of the parameters only; None before the first update."""
        chosen = self._state.plan.chosen
        return None if chosen is None else chosen.name == "sharded"

    def setup(self, link: chainer.Link) -> Self:
        """Set the target link, and make its parameters equal to rank 0's. Collective."""
        self._state.plan.drop()
        if self.options.compression is not None:
            self.options.compression.forget()
        self.actual_optimizer.setup(link)
        self._state.accumulation = Accumulation()
        self._state.phase = Phase.NEW
        self._step().synchronize(has_gradients=False)
        return self

    def update(self, lossfun: Callable[..., Any] | None = None, *args: Any, **kwds: Any) -> None:
        """Update the parameters by the gradients' mean over the ranks. Collective.

        Gradients are averaged after backward and before any hook of the optimizer runs.

        With ``accumulate_steps`` above 1, and in :meth:`no_sync`, a call that is not the last of
        an accumulation adds its gradients to this rank's sum, and leaves the parameters as they
        are, without a gradient. It is local once parameters are known to be equal and initialized.

        The loss function is called once. The first update makes the parameters equal to rank 0's
        before that. So does every update before which, on some rank, a snapshot was loaded, or
        parameters or their arrays were added or replaced. Values changed in place are not noticed,
        except in the first update.

        A layer that gets its shape in this very forward pass draws the same numbers from
        ``numpy.random`` on every rank: the numbers of a single process with rank 0's seed, if nothing
        else is drawn in between. If only some ranks have initialized a parameter, the lowest of them
        sends its values to the others.

        Args:
            lossfun: Function that returns the loss; None if the gradients are computed already.
            args: Arguments of ``lossfun``.
            kwds: Keyword arguments of ``lossfun``.

        Raises:
            RankMismatchError: On every rank, naming the rank and the parameter, hook, hyperparameter
                or option, if ranks differ. Also if a rank has computed gradients from parameters
                that differ from rank 0's: either the script computed them after parameters had
                changed, or an initializer drew other values than on rank 0.
        """
        self._check_set_up()
        call = Call(self.connected().size, lossfun, args, kwds, postponed=self._postponed)
        if self.join is None:
            self.run_step(call)
        else:
            self.join.update(self, call)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate only: calls of :meth:`update` in this scope compute gradients. Local.

        The next call outside, on every rank, updates by the mean of all of them and its own::

            with optimizer.no_sync():
                for x, t in batches[:-1]:
                    optimizer.update(lossfun, x, t)
            optimizer.update(lossfun, *batches[-1])

        All ranks make the same number of calls in it. The method is named after
        ``DistributedDataParallel.no_sync`` of torch. There the update takes the sum over the batches,
        here their mean, so that the size of a step does not depend on their number.
        """
        before, self._postponed = self._postponed, True
        try:
            yield
        finally:
            self._postponed = before

    @stage(UPDATE)
    def run_step(self, call: Call) -> None:
        """Run one step, possibly with the gradients of some ranks only. Collective."""
        self._step().run(call)

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Save or load the optimizer as Chainer does. Local; to load, load on every rank.

        Any single rank can save alone, as each rank has all of the state (with
        ``sharded_update="job"`` after :meth:`consolidate`). A serializer that keeps arrays to write
        them later gets copies of the memory that the ranks of a node share. Gradients that are being
        accumulated are not saved here but in :meth:`serialize_own`; loading discards them.

        Raises:
            RuntimeError: On saving, if each rank has only a share of the state.
        """
        import chainer

        state = self._state
        if isinstance(serializer, chainer.Deserializer):
            state.plan.drop()
            state.replicas.invalidate()
            state.accumulation = Accumulation()
        chosen = state.plan.chosen
        with contextlib.nullcontext() if chosen is None else chosen.copied_states():
            self.actual_optimizer.serialize(serializer)
        if self.options.compression is not None:
            self.options.compression.serialize(serializer["compression"], self.connected())

    def consolidate(self) -> None:
        """Let every rank have all of the update rules' state until the next update. Collective.

        With ``sharded_update="job"`` every rank must call it before any rank saves the optimizer, or
        copies or reads the state; :class:`~chainer_dist.Checkpoint` does so by itself. Until the next
        update it takes memory for the whole state on each node, and it exchanges as many bytes.
        With other options it does nothing. Its model is the method of torch's
        ``ZeroRedundancyOptimizer``.

        Raises:
            RankMismatchError: On every rank, if some have loaded a snapshot since the last update
                that others have not loaded.
        """
        step = self._step()
        step.plan.consolidate(step.context)

    def serialize_own(self, serializer: chainer.AbstractSerializer) -> None:
        """Save the state that differs between ranks, in addition to :meth:`serialize` on one rank. Local.

        It consists of the gradients that are being accumulated, and the residuals of compression.
        """
        self._state.accumulation.serialize(serializer)
        if self.options.compression is not None and self.connected().rank:
            self.options.compression.serialize(serializer["compression"], self.connected())

    def load_own(
        self, sources: Sequence[chainer.AbstractSerializer], *, takes_over: bool = True
    ) -> None:
        """Load state that ranks have saved with :meth:`serialize_own`. Local; after :meth:`serialize`.

        Args:
            sources: This rank's file; the files of all ranks that saved, if their number was another one.
            takes_over: Whether this rank continues with the state of ``sources``. If the number of ranks
                has changed, only one rank does.
        """
        self._state.accumulation.load(sources, takes_sums=takes_over)
        comm = self.connected()
        if self.options.compression is not None and comm.rank and takes_over:
            self.options.compression.serialize(sources[0]["compression"], comm)

    def _step(self) -> Step:
        """Return the next step. Local."""
        context = Context(self.connected(), self.actual_optimizer, self.options, self.randomness)
        self._state.plan.connect(context)
        return Step(
            context,
            self._state,
            lambda: describe_options(type(self), self.options, zero_fill=self.zero_fill),
            zero_fill=self.zero_fill,
            accumulate_steps=self.accumulate_steps,
            is_joined=self.join is not None,
        )

    def _copied_state(self) -> dict[str, Any]:
        return {**super()._copied_state(), "join": None}

    def _copied(self, copy_one: Callable[[Any], Any]) -> Self:
        twin = super()._copied(copy_one)
        options, state = twin.options, twin._state  # noqa: SLF001 - of the same class
        options = options._replace(schedule=copy.copy(options.schedule))
        twin.options, twin._replicas = options, state.replicas  # noqa: SLF001 - of the same class
        state.plan.options = options
        return twin
