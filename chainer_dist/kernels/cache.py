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

# Most operations that are kept, of all geometries and threads together. Each has some 100 kB of compiled code.
CAPACITY = 1024

_kept: OrderedDict[Any, Any] = OrderedDict()
_lock = threading.Lock()


def kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function that makes operations from hashable arguments, so that it makes each once. Local.

    Each thread has operations of its own, since an operation holds the addresses of its arguments. So has each number
    of OpenMP threads, since oneDNN divides the work when an operation is made. At most :data:`CAPACITY` are kept, the
    ones that were used last.
    """

    @functools.wraps(make)
    def get(*arguments: Any) -> Any:
        key = (
            make,
            threading.get_ident(),
            n_threads(),
            arguments,
        )
        with _lock:
            made = _kept.get(key)
            if made is not None:
                _kept.move_to_end(key)
                return made
        made = make(*arguments)
        with _lock:
            _kept[key] = made
            if len(_kept) > CAPACITY:
                _kept.popitem(last=False)
        return made

    return get


def clear() -> None:
    """Drop all operations that are kept. Local."""
    with _lock:
        _kept.clear()
