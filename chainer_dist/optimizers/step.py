"""One step of training, from the loss function to new parameters: ``Step.run``, top to bottom."""

from __future__ import annotations

import copy
import dataclasses
import enum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from chainer_dist import exchange
from chainer_dist.collectives.agreement import check_same
from chainer_dist.collectives.operation import BACKWARD, FORWARD, Kind, Operation
from chainer_dist.optimizers.accumulation import Accumulation
from chainer_dist.optimizers.consensus import GRADIENTS, PARAMETERS, Report, compare
from chainer_dist.optimizers.replicas import Change
from chainer_dist.parameters import ParameterSet
from chainer_dist.updates.base import Gradients

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainer_dist.communicators import CommunicatorBase
    from chainer_dist.optimizers.call import Call
    from chainer_dist.optimizers.consensus import Settings
    from chainer_dist.optimizers.overlap import Overlap
    from chainer_dist.optimizers.plan import Plan
    from chainer_dist.optimizers.replicas import Replicas
    from chainer_dist.updates.base import Context
    from chainer_dist.updates.comparison import Lines

__all__ = ["Phase", "State", "Step"]

_FORWARD = Kind("forward", FORWARD, waits=False)
_BACKWARD = Kind("backward", BACKWARD, waits=False)


class Phase(enum.Enum):
    """How far training has come; the same on every rank.

    It decides whether ranks communicate before forward. That parameters were changed or loaded is
    another matter: each rank knows that of its own only (see :class:`Replicas`), and it only counts in
    what ranks compare.
    """

    NEW = "no update has begun: parameters are made equal first"
    BEGUN = "parameters were equal once: ranks compare whether they still are"


class Verdict(NamedTuple):
    """What ranks have found out together; the same on every rank.

    Attributes:
        same: For each entry of their reports, whether it is the same on every rank.
        changed: Whether any rank's parameters were changed.
        differ: Whether the ranks' parameters may differ because of that.
    """

    same: Report
    changed: bool
    differ: bool


@dataclasses.dataclass
class State:
    """What an optimizer keeps from one step to the next.

    Attributes:
        replicas: Whether parameters are equal on all ranks.
        plan: Which update is made.
        settings: What must be the same on every rank for an update to be the same.
        accumulation: Gradients of batches since the last update.
        phase: How far training has come.
    """

    replicas: Replicas
    plan: Plan
    settings: Settings
    accumulation: Accumulation = dataclasses.field(default_factory=Accumulation)
    phase: Phase = Phase.NEW

    def __copy__(self) -> State:
        return State(*[copy.copy(getattr(self, each.name)) for each in dataclasses.fields(self)])


class Step:
    """One step of a multi-node optimizer. Creating one is local.

    Args:
        context: Communicator and wrapped optimizer.
        state: What earlier steps have left, and later ones go on from.
        describe_options: Function that returns names and values of the multi-node optimizer's options.
        zero_fill: Whether a gradient that is None on this rank counts as zero.
        accumulate_steps: Number of calls that make one update.
        is_joined: Whether the optimizer is in a :class:`~chainer_dist.Join`.
    """

    def __init__(
        self,
        context: Context,
        state: State,
        describe_options: Callable[[], Lines],
        *,
        zero_fill: bool,
        accumulate_steps: int,
        is_joined: bool,
    ) -> None:
        self.context = context
        self.comm: CommunicatorBase = context.comm
        self.optimizer = context.optimizer
        self.state = state
        self.plan = state.plan
        self._describe_options = describe_options
        self._zero_fill = zero_fill
        self._accumulate_steps = accumulate_steps
        self._is_joined = is_joined

    def run(self, call: Call) -> None:
        """Compute the gradients of a batch, and update if it is the last one of an update. Collective.

        Ranks do not communicate in a call that is not the last, once parameters are known to be equal.
        """
        accumulation = self.state.accumulation
        is_last = accumulation.calls + 1 >= self._accumulate_steps and not call.postponed
        if is_last and self.plan.options.code is not None:
            self.plan.options.code.sent = 0
        gradients = self.compute(call, is_last=is_last)
        if not is_last:
            accumulation.add(gradients.parameters, call.ranks, stands_by=call.stands_by)
            return
        gradients = self.collect(call, gradients)
        self.plan.update.apply(gradients)
        self.state.replicas.keep(gradients.parameters)

    def compute(self, call: Call, *, is_last: bool) -> Gradients:
        """Compute the gradients of a batch from parameters that all ranks have alike.

        Collective if the update is, and where parameters are not known to be equal; otherwise local.
        """
        is_new = self.state.phase is Phase.NEW
        exchanges = is_last and self.plan.update.exchanges
        if is_new:
            self.synchronize(has_gradients=call.has_gradients)
            self.state.phase = Phase.BEGUN
        elif exchanges or not self.is_current():
            verdict = self.compare(PARAMETERS, ParameterSet(self.optimizer.target))
            if verdict.differ:
                self.synchronize(has_gradients=call.has_gradients)
        overlap = None
        if exchanges:
            overlap = self.plan.usable_overlap(self.context, is_joined=self._is_joined)
        self.differentiate(call, overlap)
        if not (exchanges or is_new) and self.is_current():
            return Gradients(
                ParameterSet(self.optimizer.target),
                are_matched=True,
                zero_fill=self._zero_fill,
                are_averaged=False,
            )
        return self.agree(stands_by=call.stands_by)

    def differentiate(self, call: Call, overlap: Overlap | None) -> None:
        """Run forward and backward, in the way of ``chainer.GradientMethod.update``.

        Collective with ``overlap``, which then averages the gradients at the same time, if they are
        all that the next update is made of. Otherwise local.
        """
        optimizer, target = self.optimizer, self.optimizer.target
        if call.lossfun is None:
            if call.stands_by:
                target.cleargrads()
            elif overlap is not None:
                overlap.prepare(None, ParameterSet(target), is_usual=False)
            return
        with Operation(_FORWARD):
            loss = call.lossfun(*call.args, **call.kwds)
        if overlap is not None:
            parameters = ParameterSet(target)
            is_usual = (
                not self.state.accumulation.calls
                and call.ranks == self.comm.size
                and self.state.replicas.has_structure_of(parameters)
                and self.plan.fits(self.context, parameters)
            )
            overlap.prepare(loss, parameters, is_usual=is_usual)
        with Operation(_BACKWARD):
            target.cleargrads()
            if not getattr(optimizer, "_use_cleargrads", True):
                target.zerograds()  # alone it would write to arrays that may be read-only
            if overlap is None:
                loss.backward(loss_scale=optimizer._loss_scale)  # noqa: SLF001 - Chainer's
            else:
                overlap.backward(loss, optimizer._loss_scale)  # noqa: SLF001 - Chainer's

    def agree(self, *, stands_by: bool) -> Gradients:
        """Compare what the ranks have come to after backward; choose an update if need be. Collective.

        Args:
            stands_by: Whether this rank's gradients do not count.

        Returns:
            The gradients, of parameters that are equal.
        """
        parameters = ParameterSet(self.optimizer.target)
        accumulation = self.state.accumulation
        if accumulation.own or stands_by:
            parameters.count_as_having(accumulation.has_grad(parameters, stands_by=stands_by))
        settings = self.state.settings.digest(self.settings, self.optimizer, parameters)
        fits = self.plan.fits(self.context, parameters, self.state.settings.version)
        overlap = self.plan.overlap
        is_clean = overlap is None or overlap.is_clean()
        verdict = self.compare(
            GRADIENTS,
            parameters,
            grads=parameters.digests[1],
            settings=settings,
            planned=int(fits),
            clean=int(is_clean),
        )
        if overlap is not None:
            overlap.accept(
                is_clean=is_clean and bool(verdict.same.clean), is_changed=verdict.changed
            )
        if verdict.differ:
            self.synchronize(has_gradients=not stands_by)
            return self.agree(stands_by=stands_by)
        parameters.check_supported()
        if not (fits and verdict.same.planned):
            self.plan.choose(self.context, parameters)
        return Gradients(
            parameters,
            are_matched=bool(verdict.same.grads),
            zero_fill=self._zero_fill,
            are_averaged=self.plan.is_overlapped,
        )

    def collect(self, call: Call, gradients: Gradients) -> Gradients:
        """Return the gradients of all batches of an update, as far as they are this rank's. Collective.

        Ranks communicate in checked mode only, and where some have had no batch.
        """
        parameters, size = gradients.parameters, self.comm.size
        accumulation = self.state.accumulation
        if accumulation.calls or call.ranks != size:
            accumulation.add(parameters, call.ranks, stands_by=call.stands_by)
            accumulation.finish(parameters, size)
            self.state.accumulation = Accumulation()
            if not self._zero_fill and accumulation.batches != accumulation.calls * size:
                are_matched = self.follow(parameters, has_batch=accumulation.own > 0)
                gradients = gradients._replace(are_matched=are_matched)
        dynamic = self.optimizer._loss_scaling_is_dynamic  # noqa: SLF001 - Chainer's; it deals with overflows itself
        exchange.check_finite(self.comm, parameters, look=not dynamic)
        if not self._zero_fill:
            exchange.check_same_grads(self.comm, parameters, same_grads=gradients.are_matched)
            return gradients
        # Gradients carry the loss scale; so must those that other ranks compute for this one.
        parameters.scale_missing(self.optimizer._loss_scale)  # noqa: SLF001 - Chainer's
        return gradients

    def follow(self, parameters: ParameterSet, *, has_batch: bool) -> bool:
        """Give a rank without a batch, if a gradient is everywhere or nowhere, zeros where others have one.

        Collective.

        Returns:
            Whether the ranks that have a batch have the same gradients.
        """
        patterns = self.comm.allgather_obj(parameters.has_grad if has_batch else None)
        known = [pattern for pattern in patterns if pattern is not None]
        if not has_batch:  # and so no gradient
            parameters.scale_missing(self.optimizer._loss_scale)  # noqa: SLF001 - Chainer's
            for param, has in zip(parameters.params, known[0]):
                param.grad = np.zeros_like(param.array) if has else None
            parameters.look_at_grads()
        return len(set(known)) == 1

    def is_current(self) -> bool:
        """Tell whether parameters need not be compared before gradients can count. Local.

        Every rank comes to the same answer, or to an error in the next comparison: what is not
        initialized is known to all of them, as some batches may use it and others not.
        """
        replicas = self.state.replicas
        change, _ = replicas.compare(ParameterSet(self.optimizer.target))
        return change is Change.NONE and not replicas.is_waiting

    @property
    def settings(self) -> Lines:
        """Names and values of options that must be the same on every rank in each update."""
        return [("accumulate_steps", str(self._accumulate_steps)), *self.plan.update.settings()]

    def compare(self, kind: Kind, parameters: ParameterSet, **own: int) -> Verdict:
        """Compare whether the ranks' parameters are still equal, and what else they report. Collective.

        Args:
            kind: Which comparison of the step it is.
            parameters: The parameters.
            own: Other entries of this rank's :class:`Report`.

        Raises:
            RankMismatchError: On every rank, if ranks differ in what they cannot make equal.
        """
        replicas = self.state.replicas
        change, values = replicas.compare(parameters)
        report = Report(
            parameters.digest,
            change,
            values,
            t=self.optimizer.t,
            calls=self.state.accumulation.calls,
            **own,
        )
        same = compare(
            self.comm,
            kind,
            report,
            lambda: self.state.settings.lines(self.settings, self.optimizer, parameters),
        )
        changed, differ = replicas.judge(
            self.comm,
            self.optimizer.target,
            change,
            same_change=bool(same.change),
            same_structure=bool(same.structure),
            same_values=bool(same.values),
        )
        return Verdict(same, changed=changed, differ=differ)

    def synchronize(self, *, has_gradients: bool) -> None:
        """Make parameters equal to rank 0's. Collective.

        Args:
            has_gradients: See :meth:`Replicas.synchronize`.
        """
        self.plan.update.discard()  # gradients of parameters that are no more
        # Ranks that differ in these would not even communicate at the same time.
        check_same(self.comm, self._describe_options())
        replicas, target = self.state.replicas, self.optimizer.target
        if self.plan.update.keeps_equal:
            replicas.synchronize(self.comm, target, has_gradients=has_gradients)
        else:
            replicas.synchronize_new(
                self.comm, target, has_gradients=has_gradients, has_updated=bool(self.optimizer.t)
            )
