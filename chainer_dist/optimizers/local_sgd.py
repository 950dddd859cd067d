"""Updates that each rank makes alone, with parameters averaged now and then."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist.collectives.agreement import agree, digest, raise_mismatch
from chainer_dist.collectives.operation import EXCHANGE, Kind, Operation
from chainer_dist.optimizers.consensus import describe_states
from chainer_dist.optimizers.multi_node_optimizer import MultiNodeOptimizer, Options
from chainer_dist.parameters import ParameterSet

if TYPE_CHECKING:
    import chainer

    from chainer_dist._typing import Array
    from chainer_dist.communicators import CommunicatorBase

__all__ = ["LocalSGDOptimizer", "create_local_sgd_optimizer"]

_AVERAGE = Kind("mean of parameters", EXCHANGE)


class LocalSGDOptimizer(MultiNodeOptimizer):
    """A multi-node optimizer that averages parameters now and then, and gradients only at first.

    See :func:`chainer_dist.create_local_sgd_optimizer`.

    Attributes:
        period: How many updates there are from one averaging to the next.
        warmup_updates: How many updates average gradients first.
        average_state: Whether the state of the update rules is averaged, too.
    """

    alike = False
    _OWN = MultiNodeOptimizer._OWN | {"period", "warmup_updates", "average_state"}

    def __init__(
        self,
        actual_optimizer: chainer.Optimizer,
        communicator: CommunicatorBase,
        period: int,
        warmup_updates: int,
        average_state: bool,
    ) -> None:
        self.period = period
        self.warmup_updates = warmup_updates
        self.average_state = average_state
        options = Options(
            sharded_update=False, mean_grad=False, share_parameters=False, overlap=False
        )
        super().__init__(actual_optimizer, communicator, zero_fill=True, options=options)

    def average(self) -> None:
        """Make the parameters of all ranks their mean now. Collective.

        For an evaluation or a snapshot in the middle of a period. The next averaging comes when it
        would have come.

        Raises:
            RankMismatchError: On every rank, naming the rank and the parameter, if ranks differ.
        """
        self._agree()
        self._average()

    def _exchanges(self) -> bool:
        return self._warms_up() or (self.t + 1 - self.warmup_updates) % self.period == 0

    def _warms_up(self) -> bool:
        warms_up: bool = self.t < self.warmup_updates
        return warms_up

    def _step(self, parameters: ParameterSet, *, same_grads: bool) -> None:
        if self._warms_up():
            super()._step(parameters, same_grads=same_grads)
            return
        is_last = self._exchanges()
        self.actual_optimizer.update(None)
        if is_last:
            self._average()

    def _average(self) -> None:
        """Average the parameters of ranks whose parameters are of equal structure. Collective."""
        comm = self._connected()
        parameters = ParameterSet(self.target)
        described = self._describe_averaged(parameters)
        if not all(agree(comm, digest(described))):
            raise_mismatch(comm, described)
        arrays: list[Array] = []
        for param in parameters.params:
            if not param.array.flags.writeable:
                param.array = param.array.copy()
            rule = param.update_rule
            wide = None if rule is None else rule._fp32_param
            arrays.append(param.array if wide is None else wide.array)
            if self.average_state and rule is not None:
                arrays += [each for each in (rule.state or {}).values() if _is_float(each)]
        with Operation(_AVERAGE, comm):
            comm.mean_arrays(arrays)
        for param in parameters.params:
            wide = None if param.update_rule is None else param.update_rule._fp32_param
            if wide is not None:
                np.copyto(param.array, wide.array, casting="same_kind")

    def _describe_averaged(self, parameters: ParameterSet) -> list[tuple[str, str]]:
        wide = [
            (f"the float32 copy of {name}", "not there" if rule._fp32_param is None else "there")
            for name, param in parameters.all.items()
            if (rule := param.update_rule) is not None
        ]
        return wide + describe_states(parameters) if self.average_state else wide

    def _own_settings(self) -> list[tuple[str, str]]:
        return [
            *super()._own_settings(),
            ("period", str(self.period)),
            ("warmup_updates", str(self.warmup_updates)),
            ("average_state", str(self.average_state)),
        ]

    def _make_equal(self, *, has_gradients: bool, kept: frozenset[str] = frozenset()) -> None:
        """Make parameters equal that were not updated or loaded yet; others are each rank's own."""
        parameters = ParameterSet(self.target)
        own = [
            (name, param, param.array.copy(), param.update_rule and param.update_rule._fp32_param)
            for name, param in zip(parameters.names, parameters.params)
            if self._replicas.is_loaded or (self.t and self._replicas.knows(name, parameters))
        ]
        names = kept.union(name for name, *_ in own)
        try:
            super()._make_equal(has_gradients=has_gradients, kept=names)
        finally:
            for _, param, array, wide in own:
                np.copyto(param.array, array)
                if param.update_rule is not None:
                    param.update_rule._fp32_param = wide


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def create_local_sgd_optimizer(
    actual_optimizer: chainer.Optimizer,
    communicator: CommunicatorBase,
    *,
    period: int,
    warmup_updates: int = 0,
    average_state: bool = False,
) -> LocalSGDOptimizer:
    """Make an optimizer whose ranks update alone and average their parameters every few updates.

    Local SGD (Stich, arXiv 1805.09767) talks ``period`` times less often than
    :func:`~chainer_dist.create_multi_node_optimizer`, and ranks wait for one another that much less
    often. It is another algorithm: what one process would compute on the concatenated batches it
    only comes near to. With ``warmup_updates`` it is post-local SGD (Lin et al., arXiv 1808.07217),
    which begins with averaged gradients.

    Between two averagings each rank has a model of its own. An evaluator then tells the mean of their
    scores, and a snapshot of rank 0 is of rank 0's model: evaluate and save at updates of which
    ``period`` is a divisor (counted after the warm-up), or call ``optimizer.average()`` before, which
    is collective. :class:`~chainer_dist.Checkpoint` saves the model and the optimizer of every
    rank, in the middle of a period, too: on as many ranks a run goes on exactly, on another
    number where all ranks' parameters were equal, with the optimizer's state of rank 0.

    As with ``create_multi_node_optimizer``, all ranks' parameters begin equal, ``setup`` is collective,
    everything else is the wrapped optimizer's, and there is ``no_sync()`` to accumulate gradients.
    ``update`` is called equally often on every rank, and is collective in the warm-up, at the end of
    a period, and while layers wait for their shape. Every rank updates all parameters. Hooks
    see this rank's gradients (in the warm-up the mean), and random hooks draw each rank's own numbers.

    Args:
        actual_optimizer: Any Chainer optimizer, set up or not. It is changed by the updates.
        communicator: Over whose ranks parameters are averaged.
        period: How many updates there are from one averaging to the next, 1 or more; the
            same on every rank. Can be set later, as ``optimizer.period``.
        warmup_updates: How many updates average gradients first, as those of
            ``create_multi_node_optimizer`` do, 0 or more. Their number is that of ``optimizer.t``.
        average_state: Whether arrays that the update rules keep (momentum, Adam's moments) are
            averaged with the parameters. Otherwise each rank keeps its own.

    Returns:
        The optimizer to use in place of ``actual_optimizer``.

    Raises:
        ValueError: If ``period`` or ``warmup_updates`` is out of range.
        RankMismatchError: From updates, on every rank, if one of the options differs.
    """
    period, warmup_updates = operator.index(period), operator.index(warmup_updates)
    if period < 1:
        raise ValueError(f"period is {period}, expected 1 or more")
    if warmup_updates < 0:
        raise ValueError(f"warmup_updates is {warmup_updates}, expected 0 or more")
    return LocalSGDOptimizer(actual_optimizer, communicator, period, warmup_updates, average_state)
