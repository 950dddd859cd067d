"""What all multi-node optimizers have in common: they stand for the optimizer that they wrap."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar

from chainer_dist.optimizers.replicas import Replicas
from chainer_dist.parameters import ParameterSet

if TYPE_CHECKING:
    from collections.abc import Callable

    import chainer
    from typing_extensions import Self

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["OptimizerProxy"]


class OptimizerProxy:
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

    # What is set on this object; every class declares its attributes, so that none is forgotten here.
    _own: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for kind in cls.__mro__:
            declared = {*getattr(kind, "__annotations__", ()), *_settable(kind)}
            cls._own = cls._own.union(declared)

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

    def __getattr__(self, name: str) -> Any:
        try:
            actual = self.__dict__["actual_optimizer"]
        except KeyError:  # while being copied or unpickled
            raise AttributeError(name) from None
        return getattr(actual, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._own:
            super().__setattr__(name, value)
        else:
            setattr(self.actual_optimizer, name, value)

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


def _settable(kind: type) -> list[str]:
    """Return the properties of a class that can be set."""
    return [
        name
        for name, value in vars(kind).items()
        if isinstance(value, property) and value.fset is not None
    ]
