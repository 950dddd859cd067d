"""Put kernels into Chainer in the place of its own code, and take them out again."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import chainer

if TYPE_CHECKING:
    from collections.abc import Callable


class _Replacement(NamedTuple):
    owner: Any  # a class or a module
    attribute: str
    original: Any
    kernel: Any
    needs_onednn: bool


_replacements: list[_Replacement] = []

_with_onednn = False


def replaces(
    owner: Any, attribute: str, *, needs_onednn: bool = True, is_computation: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a kernel: a function that stands for a method of Chainer's, or for a function of a module. Local.

    The kernel is called with Chainer's own function first, then with the arguments; what it has no way for, it hands to
    Chainer's own.

    Args:
        owner: Class or module that has it.
        attribute: Name that it has there.
        needs_onednn: Whether the kernel is used with oneDNN only.
        is_computation: Whether ``use_ideep`` has a say in it.
    """

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        original = vars(owner)[attribute]

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if is_computation and _is_refused():
                return original(*args, **kwargs)
            return kernel(original, *args, **kwargs)

        # A partial function is faster, but no method.
        partial = functools.partial(kernel, original)
        used: Any = stand_in if is_computation or isinstance(owner, type) else partial
        functools.update_wrapper(used, original)
        _replacements.append(_Replacement(owner, attribute, original, used, needs_onednn))
        return kernel

    return register


def _is_refused() -> bool:
    """Return whether this thread asked Chainer for its own code by ``use_ideep``, the setting that meant oneDNN. Local.

    Chainer's default is "never" too, so that only a value that was set for this thread counts.
    """
    return bool(vars(chainer.config._local).get("use_ideep") == "never")


def uses_onednn() -> bool:
    """Return whether kernels that do without oneDNN may take it where it is faster. Local."""
    return _with_onednn


def may_use_onednn() -> bool:
    """Return whether what is no kernel may take oneDNN in this thread. Local."""
    return _with_onednn and not _is_refused()


def put(*, with_onednn: bool) -> None:
    """Put the kernels into Chainer, those that need oneDNN only where asked for. Local."""
    global _with_onednn  # noqa: PLW0603 - one choice for the process
    _with_onednn = with_onednn
    for each in _replacements:
        used = with_onednn or not each.needs_onednn
        setattr(each.owner, each.attribute, each.kernel if used else each.original)


def take_out() -> None:
    """Give Chainer its own code back. Local."""
    global _with_onednn  # noqa: PLW0603 - one choice for the process
    _with_onednn = False
    for each in _replacements:
        setattr(each.owner, each.attribute, each.original)
