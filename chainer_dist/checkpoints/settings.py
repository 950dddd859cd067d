"""Hyperparameters that were loaded, and are to be set when nothing sets them otherwise any more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from chainer.training import extension

from chainer_dist._chainer import extension_entries
from chainer_dist.checkpoints.trainers import trainers

if TYPE_CHECKING:
    import chainer

__all__ = ["PutOff", "put_off"]


class PutOff(NamedTuple):
    """A hyperparameter that is to be set once all extensions of a trainer are initialized."""

    owner: Any
    name: str
    value: Any


def put_off(settings: list[PutOff], target: Any) -> None:
    """Set hyperparameters; in a trainer once all extensions are initialized, as some then set them. Local."""
    found = [trainer for _, trainer in trainers(target)]
    if not found:
        _set(settings)
    elif settings:
        found[0].extend(_Setter(settings), "chainer_dist.hyperparameters", trigger=lambda _: False)


class _Setter(extension.Extension):  # type: ignore[misc]  # Chainer has no types
    """Sets hyperparameters when a trainer begins to run."""

    priority = -(2**31)  # the last one

    def __init__(self, settings: list[PutOff]) -> None:
        self._settings = settings

    def initialize(self, trainer: chainer.training.Trainer) -> None:
        _set(self._settings)
        del extension_entries(trainer)[self.name]  # it has nothing to save


def _set(settings: list[PutOff]) -> None:
    for owner, name, value in settings:
        vars(owner)[name] = value
