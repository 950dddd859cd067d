"""What all multi-node optimizers have in common: they stand for the optimizer that they wrap."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from chainer_dist._proxy import Proxy
from chainer_dist.optimizers.replicas import Replicas
from chainer_dist.parameters import ParameterSet

if TYPE_CHECKING:
    from collections.abc import Callable

    import chainer
    from typing_extensions import Self

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["OptimizerProxy"]


class OptimizerProxy(Proxy, wraps="actual_optimizer"):
    """Passes all attributes read and set, but for its own, on to the optimizer that it wraps.

    Args:
        actual_optimizer: The wrapped one.
        communicator: The communicator over whose ranks gradients are averaged.
        zero_fill: Whether a gradient that is None on this rank counts as zero.

    Attributes:
        actual_optimizer: The wrapped one.
        communicator: The communicator; None after unpickling.
        zero_fill: Whether a gradient that is None on this rank counts as zero.
    """

    actual_optimizer: Any
    communicator: CommunicatorBase | None
    zero_fill: bool
    _replicas: Replicas

    def __init__(
        self, actual_optimizer: Any, communicator: CommunicatorBase, zero_fill: bool
    ) -> None:
        self.actual_optimizer = actual_optimizer
        self.communicator = communicator
        self.zero_fill = zero_fill
        self._replicas = Replicas()

    @property
    def target_params(self) -> list[tuple[str, bool]]:
        """Names of the parameters last made equal, and whether they were initialized. ChainerMN's."""
        return [(name, spec is not None) for name, spec in self._replicas.structure or ()]

    def is_changed(self, target: chainer.Link, previous_params: Any = None) -> bool:
        """Return whether parameters appeared, or were initialized, since those last made equal. Local.

        Args:
            target: A link.
            previous_params: Pairs to compare with instead, as in ChainerMN's double buffering.
        """
        now = [(name, spec is not None) for name, spec in ParameterSet(target).structure]
        if previous_params is None:
            return now != self.target_params
        return now != [(name, param.array is not None) for name, param in previous_params]

    def _check_set_up(self) -> None:
        if self.actual_optimizer.target is None:
            raise RuntimeError(
                "update() was called before setup(): call optimizer.setup(model) first, on every rank"
            )

    def connected(self) -> CommunicatorBase:
        """Return the communicator. Local.

        Raises:
            RuntimeError: If there is none, as after unpickling.
        """
        if self.communicator is None:
            raise RuntimeError(
                "this multi-node optimizer was unpickled and has no communicator; "
                "assign one: optimizer.communicator = comm"
            )
        return self.communicator

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.actual_optimizer)})

    def __getstate__(self) -> dict[str, Any]:
        return {**self._copied_state(), "communicator": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __copy__(self) -> Self:
        return self._copied(copy.copy)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self._copied(lambda value: copy.deepcopy(value, memo))

    def _copied_state(self) -> dict[str, Any]:
        """Return the attributes that a copy gets, copied or pickled. Local."""
        return dict(self.__dict__)

    def _copied(self, copy_one: Callable[[Any], Any]) -> Self:
        twin = type(self).__new__(type(self))
        state = self._copied_state()
        twin.__dict__.update({key: copy_one(value) for key, value in state.items()})
        return twin
