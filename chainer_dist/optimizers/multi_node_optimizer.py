"""The multi-node optimizer: an ordinary Chainer optimizer that all ranks step together."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from chainer_dist import _allocator, exchange
from chainer_dist.collectives.agreement import agree, digest, raise_mismatch
from chainer_dist.collectives.operation import (
    BACKWARD,
    EXCHANGE,
    FORWARD,
    UPDATE,
    WAITING,
    Kind,
    Operation,
    stage,
)
from chainer_dist.communicators.shared_memory.communicator import SharedMemoryCommunicator
from chainer_dist.compression.quantized import as_code
from chainer_dist.optimizers.accumulation import Accumulation
from chainer_dist.optimizers.consensus import (
    Report,
    Settings,
    Verdict,
    describe_states,
)
from chainer_dist.optimizers.descriptions import describe, name_of
from chainer_dist.optimizers.overlap import Overlap
from chainer_dist.optimizers.proxy import OptimizerProxy
from chainer_dist.optimizers.replicas import AS_KNOWN
from chainer_dist.parameters import ParameterSet, private_grads
from chainer_dist.updates.sharded import ShardedUpdate
from chainer_dist.updates.sharding.eligibility import Signature, obstacle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import chainer
    from typing_extensions import Self

    from chainer_dist.communicators import CommunicatorBase
    from chainer_dist.compression import Compression, Rounded
    from chainer_dist.optimizers.join import Join

__all__ = ["JOB", "MultiNodeOptimizer", "Options"]

JOB = "job"  # the value of sharded_update that shards over the ranks of all nodes

_logger = logging.getLogger("chainer_dist")

_FORWARD = Kind("forward", FORWARD, waits=False)
_BACKWARD = Kind("backward", BACKWARD, waits=False)
# The first that all ranks do in an update, and after backward: there they wait for the slowest.
_COMPARISONS = Kind("comparison of parameters", WAITING), Kind("comparison of gradients", WAITING)
_GATHER = Kind("gathering of the state", EXCHANGE)
_CHOOSE = Kind("choice of the update", EXCHANGE)

_BEFORE, _AFTER = range(2)  # at which of an update's comparisons a rank is


class Options(NamedTuple):
    """How the update is shared out; see :func:`chainer_dist.create_multi_node_optimizer`."""

    sharded_update: bool | str | None
    mean_grad: bool
    share_parameters: bool
    compression: Compression | None = None
    accumulate_steps: int = 1
    overlap: bool | None = None


class MultiNodeOptimizer(OptimizerProxy):
    """Wraps an optimizer; everything but the few names below is the wrapped optimizer's own.

    Attributes:
        actual_optimizer: The wrapped one.
        communicator: Over whose ranks gradients are averaged.
        zero_fill: Whether a gradient that is None on this rank counts as zero.
        accumulate_steps: How many calls of :meth:`update` make one update; the same on every rank.
        join: What lets ranks that have run out of data take part, or None.
        alike: Whether parameters and state are the same on all ranks after each update.
    """

    alike: ClassVar[bool] = True

    _OWN = OptimizerProxy._OWN | frozenset(
        {
            "accumulate_steps",
            "_accumulation",
            "_postponed",
            "_settings",
            "_started",
            "_random_state",
            "_options",
            "_shards",
            "_signature",
            "_reported",
            "_overlap",
            "_averaged",
            "join",
        }
    )

    _FRESH: ClassVar[dict[str, Any]] = {
        "_shards": None,
        "_signature": None,
        "_overlap": None,
        "join": None,
    }

    def __init__(
        self,
        actual_optimizer: chainer.Optimizer,
        communicator: CommunicatorBase,
        zero_fill: bool,
        options: Options = Options(None, mean_grad=False, share_parameters=False),  # noqa: B008 - a tuple
    ) -> None:
        super().__init__(actual_optimizer, communicator, zero_fill)
        self.accumulate_steps = options.accumulate_steps
        self._accumulation = Accumulation()  # of batches since the last update
        self._postponed = False  # whether updates are put off, in no_sync
        self._settings = Settings(are_alike=self.alike)
        self._started = False  # whether the first update is over
        self._random_state: Any = None  # numpy.random's during updates, equal on all ranks
        self._options = options
        self._shards: ShardedUpdate | None = None  # None while every rank updates everything
        self._signature: Signature | None = None  # what that was chosen for
        self._reported: str | None = ""  # why the update was last said not to be sharded
        self._averaged = False  # whether this step's gradients are averaged already
        self._overlap: Overlap | None = None  # None while gradients are exchanged after backward
        self.join: Join | None = None
        if actual_optimizer.target is not None:
            self._make_equal(has_gradients=False)

    @property
    def overlapped(self) -> bool:
        """Whether the gradients of the last update were exchanged during backward."""
        return self._averaged

    @property
    def sharded(self) -> bool | None:
        """Whether each rank updates a slice of the parameters only; None before the first update."""
        return None if self._signature is None else self._shards is not None

    def setup(self, link: chainer.Link) -> Self:
        """Set the target link, and make its parameters equal to rank 0's. Collective."""
        self._unshare()
        self.actual_optimizer.setup(link)
        self._accumulation = Accumulation()
        self._started = False
        self._make_equal(has_gradients=False)
        return self

    def update(self, lossfun: Callable[..., Any] | None = None, *args: Any, **kwds: Any) -> None:
        """Update the parameters by the gradients' mean over the ranks. Collective.

        Gradients are averaged after backward and before any hook of the optimizer runs.

        With ``accumulate_steps`` above 1, and in :meth:`no_sync`, a call that is not the last of
        an accumulation adds its gradients to this rank's sum, and leaves the parameters as they
        are, without a gradient. It is local once parameters are known to be equal and initialized.

        The loss function is called once. The first update, and every one before which a snapshot was
        loaded, or parameters or their arrays were added or replaced on some rank, makes the
        parameters equal to rank 0's before that. A layer that gets its shape in this very forward
        pass draws the same numbers from ``numpy.random`` on every rank (those of a single process
        with rank 0's seed, if nothing else is drawn in between); what only some ranks have
        initialized the others get from the lowest of those. Values changed in place are not
        noticed, except in the first update.

        Args:
            lossfun: Returns the loss; None if the gradients are there already.
            args: Passed to ``lossfun``.
            kwds: Passed to ``lossfun``.

        Raises:
            RankMismatchError: On every rank, naming the rank and the parameter, hook, hyperparameter
                or option, if ranks differ; also if a rank has computed gradients from parameters
                that differ from rank 0's: where they were computed by hand after parameters had
                changed, or an initializer drew other values than on rank 0.
        """
        if self.join is None:
            ranks = self._connected().size
            self.take_part(lossfun, args, kwds, ranks, postponed=self._postponed)
        else:
            self.join.update(self, lossfun, args, kwds, postponed=self._postponed)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate only: calls of :meth:`update` in this scope compute gradients. Local.

        The next call outside, on every rank, updates by the mean of all of them and its own::

            with optimizer.no_sync():
                for x, t in batches[:-1]:
                    optimizer.update(lossfun, x, t)
            optimizer.update(lossfun, *batches[-1])

        All ranks make as many calls in it. As torch's ``DistributedDataParallel.no_sync``, where
        gradients are added up instead: as many batches make as large a step here as one does.
        """
        before, self._postponed = self._postponed, True
        try:
            yield
        finally:
            self._postponed = before

    @stage(UPDATE)
    def take_part(
        self,
        lossfun: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwds: dict[str, Any],
        ranks: int,
        *,
        stands_by: bool = False,
        postponed: bool = False,
    ) -> None:
        """Do what :meth:`update` does, with the gradients of some ranks only. Collective.

        Args:
            lossfun: See :meth:`update`.
            args: See :meth:`update`.
            kwds: See :meth:`update`.
            ranks: How many ranks have gradients that count, the same on every rank.
            stands_by: Whether this rank has none.
            postponed: Whether to accumulate only, the same on every rank.
        """
        accumulation, size = self._accumulation, self._connected().size
        is_last = accumulation.calls + 1 >= self.accumulate_steps and not postponed
        if self._code is not None and is_last:
            self._code.sent = 0
        parameters, same_grads = self._compute(
            lossfun,
            args,
            kwds,
            stands_by=stands_by,
            compare=is_last and self._exchanges(),
            is_whole=not accumulation.calls and ranks == size,
        )
        if not is_last:
            accumulation.add(parameters, ranks, stands_by=stands_by)
            return
        if accumulation.calls or ranks != size:
            accumulation.add(parameters, ranks, stands_by=stands_by)
            accumulation.finish(parameters, size)
            self._accumulation = Accumulation()
            if not self.zero_fill and accumulation.batches != accumulation.calls * size:
                same_grads = self._follow_pattern(parameters, has_batch=accumulation.own > 0)
        dynamic = self.actual_optimizer._loss_scaling_is_dynamic  # it deals with overflows itself
        exchange.check_finite(self._connected(), parameters, look=not dynamic)
        self._allow_missing_grads(parameters, same_grads=same_grads)
        self._step(parameters, same_grads=same_grads)
        self._replicas.keep(parameters)

    def _exchanges(self) -> bool:
        """Tell whether ranks communicate in the next update. Local; the same on every rank."""
        return True

    def _own_settings(self) -> list[tuple[str, str]]:
        """Return names and values of options that must be the same on every rank."""
        return [("accumulate_steps", str(self.accumulate_steps))]

    def _compute(
        self,
        lossfun: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwds: dict[str, Any],
        *,
        stands_by: bool,
        compare: bool,
        is_whole: bool,
    ) -> tuple[ParameterSet, bool]:
        """Compute the gradients of a batch from parameters that all ranks have alike.

        Collective where ``compare`` is true or the parameters are not settled yet, otherwise local.
        Where ``is_whole`` is true the batch is all that the next update is of.

        Returns:
            The parameters, and whether the same ones have a gradient on every rank; True if ranks did
            not compare.
        """
        has_gradients = lossfun is None and not stands_by
        is_new = not self._started
        if is_new:
            self._make_equal(has_gradients=has_gradients)
            self._started = True
        elif compare or not self._is_current():
            self._prepare(has_gradients=has_gradients)
        target = self.target
        overlap = self._usable_overlap() if compare else None
        if lossfun is not None:
            self._backward(lossfun, args, kwds, overlap, is_whole=is_whole)
        elif stands_by:
            target.cleargrads()
        elif overlap is not None:
            overlap.meet(None, ParameterSet(target), is_usual=False)
        if not (compare or is_new) and self._is_current():
            return ParameterSet(target), True
        return self._agree(stands_by=stands_by)

    def _is_current(self) -> bool:
        """Tell whether parameters need not be compared before gradients can count. Local.

        Every rank comes to the same answer, or to an error in the next comparison: what is not
        initialized is known to all of them, as some batches may use it and others not.
        """
        state, _ = self._replicas.compare(ParameterSet(self.target))
        return state == AS_KNOWN and not self._replicas.is_waiting

    def _prepare(self, *, has_gradients: bool) -> None:
        """Make parameters equal that were changed since the last update. Collective."""
        report = Report(_BEFORE, t=self.t, calls=self._accumulation.calls)
        if self._compare(ParameterSet(self.target), report).differ:
            self._make_equal(has_gradients=has_gradients)

    def _step(self, parameters: ParameterSet, *, same_grads: bool) -> None:
        """Average the gradients and update the parameters. Collective."""
        if self._shards is not None:
            absent: frozenset[int] = frozenset()
            if same_grads:
                absent = frozenset(
                    [index for index, has in enumerate(parameters.has_grad) if not has]
                )
            parameters.fill_zeros()
            if self._connected().size == 1:  # hooks change the gradients where they are
                private_grads(parameters)
            self._shards.update(parameters, averaged=self._averaged, absent=absent)
            return
        if self._connected().has_own_mean:
            self._connected().multi_node_mean_grad(self.target, self.zero_fill)
            with self._equal_randomness():
                self.actual_optimizer.update(None)
            return
        compression = self._options.compression
        if compression is not None:
            compression.use_loss_scale(self.actual_optimizer._loss_scale or 1.0)
        exchange.mean_agreed_grad(
            self._connected(),
            parameters,
            same_grads=same_grads,
            zero_fill=self.zero_fill,
            compression=compression,
            means=self._overlap.means if self._averaged and self._overlap else None,
        )
        with self._equal_randomness():
            self.actual_optimizer.update(None)

    def _follow_pattern(self, parameters: ParameterSet, *, has_batch: bool) -> bool:
        """Give a rank without a batch, if a gradient is everywhere or nowhere, zeros where others have one.

        Collective.

        Returns:
            Whether the ranks that have a batch have the same gradients.
        """
        patterns = self._connected().allgather_obj(parameters.has_grad if has_batch else None)
        known = [pattern for pattern in patterns if pattern is not None]
        if not has_batch:
            for param, has in zip(parameters.params, known[0]):
                param.grad = np.zeros_like(param.array) if has else None
            parameters.look_at_grads()
        return len(set(known)) == 1

    def _allow_missing_grads(self, parameters: ParameterSet, *, same_grads: bool) -> None:
        if not self.zero_fill:
            exchange.check_same_grads(self._connected(), parameters, same_grads=same_grads)
            return
        # Gradients carry the loss scale; so must those that other ranks compute for this one.
        for param in parameters.without_grad():
            param._loss_scale = self.actual_optimizer._loss_scale

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Save or load the optimizer as Chainer does. Local; to load, load on every rank.

        Any single rank can save alone: all of the state is there on each (with
        ``sharded_update="job"`` after :meth:`consolidate`). A serializer that keeps arrays to write
        them later gets copies of what the ranks of a node share. What is under way is in
        :meth:`serialize_own`: gradients that are being accumulated are left out here, and loading
        begins to accumulate anew.

        Raises:
            RuntimeError: If the state is to be saved and each rank has a part of it only.
        """
        import chainer

        if isinstance(serializer, chainer.Deserializer):
            self._unshare()
            self._replicas.invalidate()
            self._accumulation = Accumulation()
        with contextlib.ExitStack() as stack:
            if self._shards is not None:
                stack.enter_context(self._shards.copied_states())
            self.actual_optimizer.serialize(serializer)
        if self._options.compression is not None:
            self._options.compression.serialize(serializer["compression"], self._connected())

    def consolidate(self) -> None:
        """Let every rank have all of the update rules' state until the next update. Collective.

        Needed, on every rank, before any rank saves an optimizer with ``sharded_update="job"``, or
        copies or reads the state; :class:`~chainer_dist.Checkpoint` does it by itself. It takes memory
        for the whole state on each node until then, and an exchange of as many bytes. Otherwise
        nothing is done. As that of torch's ``ZeroRedundancyOptimizer``.

        Raises:
            RankMismatchError: On every rank, if some have loaded a snapshot since the last update
                that others have not loaded.
        """
        if self._options.sharded_update != JOB:
            return
        shards = self._shards if self._shards is not None and self._shards.is_spread else None
        comm, text = self._connected(), str(shards is not None)
        with Operation(_GATHER, comm):
            if not all(agree(comm, digest(text))):
                subject = "whether the state is spread (was a snapshot loaded on some ranks only?)"
                raise_mismatch(comm, [(subject, text)])
            if shards is not None:
                shards.consolidate()

    def serialize_own(self, serializer: chainer.AbstractSerializer) -> None:
        """Save what only this rank has, beside what rank 0 saves for all. Local.

        That is gradients that are being accumulated, and what compression has left out.
        """
        self._accumulation.serialize(serializer)
        if self._options.compression is not None and self._connected().rank:
            self._options.compression.serialize(serializer["compression"], self._connected())

    def load_own(
        self, sources: Sequence[chainer.AbstractSerializer], *, takes_over: bool = True
    ) -> None:
        """Load what ranks have saved with :meth:`serialize_own`. Local; after :meth:`serialize`.

        Args:
            sources: This rank's; or those of all ranks that have saved, if it was another number.
            takes_over: Whether this rank goes on in their place. If the number is another one, one
                rank does for all.
        """
        self._accumulation.load(sources, takes_sums=takes_over)
        comm = self._connected()
        if self._options.compression is not None and comm.rank and takes_over:
            self._options.compression.serialize(sources[0]["compression"], comm)

    def _backward(
        self,
        lossfun: Callable[..., Any],
        args: tuple[Any, ...],
        kwds: dict[str, Any],
        overlap: Overlap | None,
        *,
        is_whole: bool = True,
    ) -> None:
        """Compute the gradients, in the way of ``chainer.GradientMethod.update``.

        Collective with ``overlap``, which then averages the gradients at the same time, if they are
        all that the next update is of.
        """
        with Operation(_FORWARD):
            loss = lossfun(*args, **kwds)
        optimizer, target = self.actual_optimizer, self.target
        if overlap is not None:
            parameters = ParameterSet(target)
            is_usual = (
                is_whole
                and self._replicas.has_structure_of(parameters)
                and self._is_settled(parameters, Signature(optimizer, parameters))
            )
            overlap.meet(loss, parameters, is_usual=is_usual)
        with Operation(_BACKWARD):
            target.cleargrads()
            if not getattr(self, "_use_cleargrads", True):
                target.zerograds()  # alone it would write to arrays that may be read-only
            if overlap is None:
                loss.backward(loss_scale=optimizer._loss_scale)
            else:
                overlap.backward(loss, optimizer._loss_scale)

    def _is_settled(self, parameters: ParameterSet, signature: Signature) -> bool:
        """Tell whether parameters can be updated in the way that was last chosen. Local."""
        return (
            signature == self._signature
            and (self._shards is None or self._shards.fits(parameters))
            and not (self._overlap is not None and self._overlap.is_stale)
        )

    def _agree(self, *, stands_by: bool = False) -> tuple[ParameterSet, bool]:
        """Compare what the ranks have come to after backward. Collective.

        Returns:
            The parameters, which are equal, and whether the same ones have a gradient on every rank.
        """
        parameters = ParameterSet(self.target)
        self._accumulation.mark(parameters, stands_by=stands_by)
        signature = Signature(self.actual_optimizer, parameters)
        planned = self._is_settled(parameters, signature)
        clean = self._overlap is None or self._overlap.is_clean()
        options = self._own_settings()
        verdict = self._compare(
            parameters,
            Report(
                _AFTER,
                grads=parameters.digests[1],
                t=self.t,
                calls=self._accumulation.calls,
                settings=self._settings.digest(options, self.actual_optimizer, parameters),
                planned=int(planned),
                clean=int(clean),
            ),
        )
        self._averaged = (
            self._overlap is not None
            and self._overlap.settle(is_clean=clean and bool(verdict.same.clean))
            and not verdict.changed
        )
        if verdict.differ:
            self._make_equal(has_gradients=not stands_by)
            return self._agree(stands_by=stands_by)
        parameters.check_supported()
        if not (planned and verdict.same.planned):
            self._averaged = False
            self.consolidate()
            self._unshare()
            with Operation(_CHOOSE, self._connected()):
                self._choose(parameters, signature)
        return parameters, bool(verdict.same.grads)

    def _compare(self, parameters: ParameterSet, report: Report) -> Verdict:
        """Compare the ranks' reports, and whether their parameters are still equal. Collective.

        Raises:
            RankMismatchError: On every rank, if ranks differ in what they cannot make equal.
        """
        comm, replicas = self._connected(), self._replicas
        state, values = replicas.compare(parameters)
        report = report._replace(structure=parameters.digest, state=state, values=values)
        with Operation(_COMPARISONS[report.stage], comm):
            same = Report(*agree(comm, *report))
        if not same.stage:
            subject = (
                "the update (were parameters changed, or a snapshot loaded, on some ranks only, amid "
                "batches that are accumulated?)"
            )
            raise_mismatch(comm, [(subject, f"at the {_COMPARISONS[report.stage].name}")])
        if not same.t:
            subject = "optimizer.t (was a snapshot loaded on some ranks only?)"
            raise_mismatch(comm, [(subject, str(report.t))])
        if not same.settings:
            lines = self._settings.lines(self._own_settings(), self.actual_optimizer, parameters)
            raise_mismatch(comm, lines)
        if not same.calls:
            subject = (
                "the number of batches accumulated before this one (did only some ranks call update "
                "in no_sync, add links or load a snapshot?)"
            )
            raise_mismatch(comm, [(subject, str(report.calls))])
        changed, differ = replicas.judge(
            comm,
            self.target,
            state,
            same_state=bool(same.state),
            same_structure=bool(same.structure),
            same_values=bool(same.values),
        )
        return Verdict(same, changed=changed, differ=differ)

    def _choose(self, parameters: ParameterSet, signature: Signature) -> None:
        """Choose how parameters are updated, for as long as the signature stays. Collective."""
        comm = self._connected()
        reasons = comm.allgather_obj(self._against_sharding(parameters))
        reason = next(filter(None, reasons), None)
        if reason is None:
            states = describe_states(parameters)
            if not all(agree(comm, digest(states))):
                raise_mismatch(comm, states)
            assert isinstance(comm, SharedMemoryCommunicator)  # noqa: S101 - no reason against it
            overlap = self._overlap
            self._shards = ShardedUpdate(
                comm,
                self.actual_optimizer,
                parameters,
                mean_grad=self._options.mean_grad,
                share_parameters=self._options.share_parameters,
                order=None if overlap is None else overlap.agree_on_order(parameters),
                code=self._code,
                across_nodes=self._options.sharded_update == JOB,
            )
            if overlap is not None:
                overlap.plan_parts(self._shards.parts)
        elif self._options.sharded_update:
            raise ValueError(f"the update cannot be sharded: {reason}")
        elif self._overlap is not None:
            self._overlap.plan_means(parameters)
        self._signature = signature
        _allocator.release_freed_memory()  # initializing parameters takes much that steps do not
        if comm.rank == 0 and reason != self._reported:
            if reason is None:
                _logger.info("chainer_dist: each rank updates a slice of the parameters")
            elif self._options.sharded_update is None and isinstance(
                comm, SharedMemoryCommunicator
            ):
                _logger.warning("chainer_dist: every rank updates all parameters, as %s", reason)
            self._reported = reason

    def _against_sharding(self, parameters: ParameterSet) -> str | None:
        comm = self._connected()
        if self._options.sharded_update is False:
            return "sharded_update is False"
        if not isinstance(comm, SharedMemoryCommunicator):
            return f"the communicator is {comm.name}, not shared_memory"
        if comm.has_own_mean:
            return f"{type(comm).__name__} has its own multi_node_mean_grad()"
        return obstacle(self.actual_optimizer, parameters)

    def _unshare(self) -> None:
        """Go back to state and gradients of one's own. Local; the next update chooses anew."""
        if self._shards is not None:
            self._shards.release()
        self._shards = self._signature = None
        if self._overlap is not None:
            self._overlap.drop()

    def _usable_overlap(self) -> Overlap | None:
        """Return what can exchange gradients during backward, or None. Local, the same everywhere."""
        comm, options = self._connected(), self._options
        if (
            options.overlap is False
            or not isinstance(comm, SharedMemoryCommunicator)
            or comm.has_own_mean
            or not (comm.inter_size > 1 or (options.overlap and comm.size > 1))
        ):
            return None
        if self._overlap is None or self._overlap.comm is not comm:
            self._overlap = Overlap(comm, self._code)
        # Ranks of a Join may have no backward, and their gradients do not count as they are.
        return self._overlap if self.join is None else None

    @property
    def _code(self) -> Rounded | None:
        """How gradients that are exchanged in the ordinary way are sent between nodes."""
        return as_code(self._options.compression)

    def _make_equal(self, *, has_gradients: bool, kept: frozenset[str] = frozenset()) -> None:
        """Make parameters equal to rank 0's; see :meth:`Replicas.synchronize`. Collective."""
        comm = self._connected()
        # Ranks that differ in these would not even communicate at the same time.
        options = self._options._replace(compression=None, accumulate_steps=0)._asdict()
        options["zero_fill"] = self.zero_fill
        options["compression"] = _describe_compression(self._options.compression)
        lines = [
            (f"the option {name} of the multi-node optimizer", str(value))
            for name, value in options.items()
        ]
        lines.append(("the multi-node optimizer", type(self).__name__))
        if not all(agree(comm, digest(lines))):
            raise_mismatch(comm, lines)
        self._replicas.synchronize(comm, self.target, has_gradients=has_gradients, kept=kept)

    @contextlib.contextmanager
    def _equal_randomness(self) -> Iterator[None]:
        """Let hooks and update rules draw the same numbers on every rank. Collective at first.

        A hook such as ``GradientNoise`` would otherwise move the ranks' parameters apart. Outside
        of updates the ranks' random states stay their own (for dropout, say).
        """
        comm = self._connected()
        if comm.size == 1:
            yield
            return
        own: Any = np.random.get_state()  # noqa: NPY002 - what Chainer draws from
        if self._random_state is None:
            # From rank 0's seed, but without drawing from it.
            seed = comm.bcast_obj(np.random.RandomState(own[1]).randint(2**31))
            self._random_state = np.random.RandomState(seed).get_state()
        np.random.set_state(self._random_state)  # noqa: NPY002
        try:
            yield
        finally:
            self._random_state = np.random.get_state()  # noqa: NPY002
            np.random.set_state(own)  # noqa: NPY002


def _describe_compression(compression: Compression | None) -> str:
    """Return the class and the numbers of a compression, without what it keeps of gradients."""
    if compression is None:
        return "None"
    numbers = {
        name: value
        for name, value in vars(compression).items()
        if not name.startswith("_") and name != "sent"
    }
    return f"{name_of(type(compression))} {describe(numbers)}"
