"""What all objects have in common that stand for one of Chainer's: they have its attributes."""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = ["Proxy"]


class Proxy:
    """Passes all attributes read and set, but for its own, on to the object that it wraps.

    A class declares its own attributes, and says which of them is the object::

        class Twice(Proxy, wraps="actual_iterator"):
            actual_iterator: Any
    """

    _wraps: ClassVar[str]
    # What is set on this object; every class declares its attributes, so that none is forgotten here.
    _own: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, wraps: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if wraps is not None:
            cls._wraps = wraps
        for kind in cls.__mro__:
            declared = {*getattr(kind, "__annotations__", ()), *_settable(kind)}
            cls._own = cls._own.union(declared)

    def __getattr__(self, name: str) -> Any:
        try:
            actual = self.__dict__[self._wraps]
        except KeyError:  # while being copied or unpickled
            raise AttributeError(name) from None
        return getattr(actual, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._own:
            super().__setattr__(name, value)
        else:
            setattr(self.__dict__[self._wraps], name, value)


def _settable(kind: type) -> list[str]:
    """Return the properties of a class that can be set."""
    return [
        name
        for name, value in vars(kind).items()
        if isinstance(value, property) and value.fset is not None
    ]
