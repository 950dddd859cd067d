"""Installing kernels in the place of Chainer's own code, and removing them again."""

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


_BACKWARD = frozenset({"backward", "backward_accumulate"})

_replacements: list[_Replacement] = []

_with_onednn = False


def replaces(
    owner: Any, attribute: str, *, needs_onednn: bool = True, is_computation: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a kernel: a function in the place of a method of Chainer's, or of a module's function. Local.

    The kernel is called with Chainer's own function as the first argument, followed by the arguments of the call. It
    calls Chainer's function for everything that it does not support.

    Args:
        owner: Class or module of Chainer's function.
        attribute: Name of the function in ``owner``.
        needs_onednn: Whether the kernel is used with oneDNN only.
        is_computation: Whether ``use_ideep="never"`` disables the kernel.
    """

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        original = vars(owner)[attribute]
        is_backward = attribute in _BACKWARD

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if is_computation and (_is_refused() or (is_backward and is_recorded())):
                return original(*args, **kwargs)
            return kernel(original, *args, **kwargs)

        # A partial function is faster, but cannot be a method.
        partial = functools.partial(kernel, original)
        used: Any = stand_in if is_computation or isinstance(owner, type) else partial
        functools.update_wrapper(used, original)
        _replacements.append(_Replacement(owner, attribute, original, used, needs_onednn))
        return kernel

    return register


def is_unchanged(method: Any, original: Any) -> bool:
    """Return whether a method of an object is this function of a class, in the place of which nothing was put. Local.

    A subclass may have a function of its own in its place, and so may the object itself.
    """
    return getattr(method, "__func__", None) is original


def is_recorded() -> bool:
    """Return whether a static graph is recorded, which repeats the forward methods that are called meanwhile. Local.

    So code of a backward method must not compute by itself, but call functions.
    """
    return chainer.config.schedule_func is not None


def _is_refused() -> bool:
    """Return whether this thread has set ``use_ideep``, Chainer's own setting for oneDNN, to ``never``. Local.

    Chainer's default is ``never`` too, so only a value that was set for this thread counts.
    """
    return bool(vars(chainer.config._local).get("use_ideep") == "never")


def uses_onednn() -> bool:
    """Return whether kernels that do not need oneDNN may use it where it is faster. Local."""
    return _with_onednn


def may_use_onednn() -> bool:
    """Return whether code that is not a kernel may use oneDNN in this thread. Local."""
    return _with_onednn and not _is_refused()


def put(*, with_onednn: bool) -> None:
    """Install the kernels. Local.

    Args:
        with_onednn: Whether kernels that need oneDNN are installed as well.
    """
    global _with_onednn  # noqa: PLW0603 - one choice for the process
    _with_onednn = with_onednn
    for each in _replacements:
        used = with_onednn or not each.needs_onednn
        setattr(each.owner, each.attribute, each.kernel if used else each.original)


def take_out() -> None:
    """Remove all kernels. Local."""
    global _with_onednn  # noqa: PLW0603 - one choice for the process
    _with_onednn = False
    for each in _replacements:
        setattr(each.owner, each.attribute, each.original)
