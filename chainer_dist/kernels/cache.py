"""Operations of oneDNN that are kept, since making one compiles code."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from chainer_dist.kernels.shared_library import n_threads

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CAPACITY", "clear", "kept"]

# Most operations that a thread keeps, of all geometries together. Each has some 100 kB of compiled code.
CAPACITY = 1024


class _Thread(threading.local):
    """Operations of the thread that asks, dropped when the thread ends."""

    def __init__(self) -> None:
        self.operations: OrderedDict[Any, Any] = OrderedDict()


_thread = _Thread()


def kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function that makes operations from hashable arguments, so that it makes each once. Local.

    Each thread has operations of its own, since an operation holds the addresses of its arguments, and drops them
    itself: oneDNN counts the users of a thread's scratch memory in that thread, and frees it after the last one. Each
    number of OpenMP threads has its own too, since oneDNN divides the work when an operation is made. At most
    :data:`CAPACITY` are kept in a thread, the ones that were used last.
    """

    @functools.wraps(make)
    def get(*arguments: Any) -> Any:
        operations = _thread.operations
        key = (make, n_threads(), arguments)
        made = operations.get(key)
        if made is not None:
            operations.move_to_end(key)
            return made
        made = operations[key] = make(*arguments)
        if len(operations) > CAPACITY:
            operations.popitem(last=False)
        return made

    return get


def clear() -> None:
    """Drop all operations that this thread keeps. Local."""
    _thread.operations.clear()
