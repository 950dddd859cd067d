"""The update of local SGD: each rank updates alone, and parameters are averaged after some updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import numpy as np

from chainer_dist import _chainer
from chainer_dist.collectives.agreement import check_same
from chainer_dist.collectives.operation import EXCHANGE, Kind, Operation
from chainer_dist.parameters import ParameterSet
from chainer_dist.updates.base import Update
from chainer_dist.updates.comparison import describe_states
from chainer_dist.updates.options import Schedule
from chainer_dist.updates.replicated import Replicated

if TYPE_CHECKING:
    from chainer_dist._typing import Array
    from chainer_dist.updates.base import Context, Gradients
    from chainer_dist.updates.comparison import Lines

__all__ = ["Local"]

_AVERAGE = Kind("mean of parameters", EXCHANGE)


class Local(Update):
    """The update that averages gradients during the warm-up, and then parameters at the end of each period."""

    name = "local"
    keeps_equal = False

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._schedule = context.options.schedule or Schedule()
        self._warm_up = Replicated(context)

    @property
    def _warms_up(self) -> bool:
        warms_up: bool = self.context.optimizer.t < self._schedule.warmup_updates
        return warms_up

    @property
    def exchanges(self) -> bool:
        """Whether the next update is part of the warm-up, or the last one of a period."""
        ends: bool = (
            self.context.optimizer.t + 1 - self._schedule.warmup_updates
        ) % self._schedule.period == 0
        return self._warms_up or ends

    def settings(self) -> Lines:
        """Return the schedule, which must be the same on every rank. Local."""
        return [(name, str(value)) for name, value in vars(self._schedule).items()]

    def apply(self, gradients: Gradients) -> None:
        """Update by this rank's gradients, or in the warm-up by their mean. Collective if :attr:`exchanges`."""
        if self._warms_up:
            self._warm_up.apply(gradients)
            return
        is_last = self.exchanges
        self.context.optimizer.update(None)
        if is_last:
            self.average()

    def average(self) -> None:
        """Replace the parameters, whose structure is equal on all ranks, by their mean. Collective.

        Raises:
            RankMismatchError: On every rank, if the arrays to average differ in kind.
        """
        comm, optimizer, *_ = self.context
        parameters = ParameterSet(optimizer.target)
        if optimizer._loss_scaling_is_dynamic:  # noqa: SLF001 - Chainer's; the same on every rank
            self._make_up(parameters)
        check_same(comm, self._describe(parameters))
        arrays: list[Array] = []
        for param in parameters.params:
            if not param.array.flags.writeable:
                param.array = param.array.copy()
            rule = param.update_rule
            wide = _chainer.float32_copy(param)
            arrays.append(param.array if wide is None else wide.array)
            if self._schedule.average_state and rule is not None:
                arrays += [each for each in (rule.state or {}).values() if _is_float(each)]
        with Operation(_AVERAGE, comm):
            comm.mean_arrays(arrays)
        for param in parameters.params:
            wide = _chainer.float32_copy(param)
            if wide is not None:
                np.copyto(param.array, wide.array, casting="same_kind")

    def _make_up(self, parameters: ParameterSet) -> None:
        """Give rules what rules of other ranks have that had fewer overflows. Collective.

        That is a float32 copy of the parameter and, if states are averaged, a first state and the most updates.
        """
        rules = [param.update_rule for param in parameters.params]
        own = [
            (0, False, False)
            if rule is None
            else (rule.t, _chainer.float32_copy(param) is not None, rule.state is not None)
            for param, rule in zip(parameters.params, rules)
        ]
        everyone = self.context.comm.allgather_obj(own)
        for param, rule, *others in zip(parameters.params, rules, *everyone):
            if rule is None:
                continue
            t, has_copy, has_state = map(max, zip(*others))
            wide = _chainer.float32_copy(param)
            if has_copy and wide is None:
                wide = chainer.Parameter(param.array.astype(np.float32), name=param.name)
                rule._fp32_param = wide  # noqa: SLF001 - as Chainer's first update does
            if self._schedule.average_state:
                rule.t = t
                if has_state:
                    rule._init_states(param if wide is None else wide)  # noqa: SLF001 - as Chainer's first update does

    def _describe(self, parameters: ParameterSet) -> Lines:
        wide = [
            (
                f"the float32 copy of {name}",
                "not there" if _chainer.float32_copy(param) is None else "there",
            )
            for name, param in parameters.all.items()
            if param.update_rule is not None
        ]
        return wide + describe_states(parameters) if self._schedule.average_state else wide


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"
