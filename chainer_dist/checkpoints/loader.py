"""Chainer's serializer that loads: it takes each array from the first source that has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from chainer.serializers import NpzDeserializer

from chainer_dist.checkpoints.entries import BESIDE, SCALARS, decode
from chainer_dist.serialization.npz import ArrayFile, is_none

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chainer_dist._typing import Array

__all__ = ["Loader"]


class Loader(NpzDeserializer):  # type: ignore[misc]  # Chainer has no types
    """Loads from several files, only into arrays of the shape that was saved, and numbers of the same type.

    Chainer's own would broadcast one number into a whole array, and makes Python's numbers of NumPy's: sums
    of these would be rounded otherwise.

    Args:
        sources: Mappings of names to arrays; the first that has a name counts.
        path: Beginning of all names.
        ignored: Function that returns for a name whether it is left out; None leaves out none.

    Attributes:
        stateless: Paths of the update rules that had no state.
    """

    def __init__(self, sources: Any, path: str = "", ignored: Any = None) -> None:
        super().__init__(sources, path)
        self._ignored = ignored
        self.stateless: set[str] = set()
        # None where an earlier version has saved, without these names.
        self._scalars: set[str] | None = None
        for source in sources:
            if SCALARS in source:
                self._scalars = (self._scalars or set()) | {*decode(source[SCALARS])}

    def __getitem__(self, key: str) -> Loader:
        child = type(self).__new__(type(self))
        child.__dict__.update(self.__dict__)
        child.path = f"{self.path}{key.strip('/')}/"
        return child

    def __call__(self, key: str, value: Any) -> Any:
        """Return what was saved, or ``value`` where that is ignored. Local.

        Raises:
            KeyError: If no source has it.
            ValueError: If it has another shape.
        """
        key = self.path + key.lstrip("/")
        if self._ignored is not None and self._ignored(key[key.startswith(BESIDE) :]):
            return value
        for source in self.npz:
            if key in source:
                return self._load(source, key, value)
        if self.path in self.stateless:
            return None
        raise KeyError(key)

    def _load(self, source: Mapping[str, Array], key: str, value: Any) -> Any:
        if isinstance(value, np.ndarray) and isinstance(source, ArrayFile):
            self._check(key, source.shape(key), value, may_be_none=True)
        saved = source[key]
        if is_none(saved):
            return None
        if isinstance(value, np.ndarray):
            self._check(key, saved.shape, value)
        if self._scalars is not None and type(value) in (bool, int, float, str):
            return saved.item() if key in self._scalars else saved[()]
        return NpzDeserializer({key: saved})(key, value)

    @staticmethod
    def _check(
        key: str, shape: tuple[int, ...], value: Array, *, may_be_none: bool = False
    ) -> None:
        if shape != value.shape and (shape or not may_be_none):
            raise ValueError(f"{key} was saved as {shape}, and is {value.shape} now")

    def has_nothing_but(self, prefix: str, name: str) -> bool:
        """Return whether at most the entry ``name`` was saved below ``prefix``. Local."""
        return not any(
            key.startswith(prefix) and key != f"{prefix}{name}"
            for source in self.npz
            for key in source
        )
