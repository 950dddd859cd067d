"""Pickling functions and classes that no other process could import, for example from a notebook."""

from __future__ import annotations

import io
import sys
from typing import Any

import cloudpickle

__all__ = ["dumps"]


def dumps(value: Any) -> bytes:
    """Return a value as bytes that ``pickle.loads`` makes anew in another process. Local.

    Args:
        value: Anything that ``cloudpickle`` takes, and classes derived from Chainer's.
    """
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """cloudpickle's, for classes whose metaclass was made by a function, as that of ``chainer.Link`` was.

    cloudpickle would send such a metaclass by its value, and another process would have two of it.
    """

    def reducer_override(self, value: Any) -> Any:
        """Return how to make a value anew, or NotImplemented for the usual way."""
        if isinstance(value, type) and issubclass(value, type) and not _is_importable(value):
            example = _importable_class_of(value)
            if example is not None:
                return type, (example,)
        return super().reducer_override(value)


def _is_importable(cls: type) -> bool:
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls and cls.__module__ != "__main__"


def _importable_class_of(metaclass: type) -> type | None:
    """Return a class with this metaclass that other processes can import, or None."""
    classes: list[type] = [object]
    seen: set[type] = {object}
    for cls in classes:
        if type(cls) is metaclass and _is_importable(cls):
            return cls
        derived: list[type] = type.__subclasses__(cls)
        classes += [each for each in derived if each not in seen]
        seen.update(derived)
    return None
