"""The library oneDNN: where it is found, its C functions, and handles of its objects.

The interface is that of oneDNN 3 (``dnnl.h``), which every version 3.x has.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Environment variable with the path of the library.
VARIABLE = "CHAINER_DIST_ONEDNN"

_MAJOR = 3  # the version whose interface this is

# Orders of a and b; m, n, k; alpha, a, its step, b, its step; beta, y, its step.
_SIZE, _PLACE = ctypes.c_int64, ctypes.c_void_p
_SGEMM: list[Any] = [ctypes.c_char, ctypes.c_char, _SIZE, _SIZE, _SIZE]
_SGEMM += [ctypes.c_float, _PLACE, _SIZE, _PLACE, _SIZE, ctypes.c_float, _PLACE, _SIZE]

Handle = ctypes.c_void_p


class OneDNNError(RuntimeError):
    """oneDNN refused to do something, or there is no oneDNN that can be used."""


class _Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_int), ("minor", ctypes.c_int), ("patch", ctypes.c_int))


class Library(NamedTuple):
    """A loaded library.

    Attributes:
        functions: C functions of the library.
        path: Path of the library; a bare name if the loader found it.
        version: Version, such as ``3.2.0``.
        instructions: Instruction set that it uses, such as ``avx512_core_bf16``.
        engine: Handle of the engine, which stands for the processor.
        stream: Handle of the stream in which operations are executed.
    """

    functions: Any
    path: str
    version: str
    instructions: str
    engine: Any
    stream: Any

    def has_avx512(self) -> bool:
        """Return whether it uses the instructions AVX-512. Local."""
        return self.instructions.startswith("avx512")


def candidates() -> Iterator[str]:
    """Yield the paths at which the library may be, the best one first. Local.

    If ``CHAINER_DIST_ONEDNN`` is set, its value is the only one. Otherwise the ``lib`` directory of this Python
    environment is the first, where the package ``onednn-cpu-gomp`` of PyPI installs it. A bare name is the last, for
    libraries of distributions, conda and environment modules, which the loader finds.
    """
    if chosen := os.environ.get(VARIABLE):
        yield chosen
        return
    for directory in dict.fromkeys((sys.prefix, sysconfig.get_config_var("base") or sys.prefix)):
        path = Path(directory, "lib", "libdnnl.so.3")
        if path.is_file():
            yield str(path)
    yield "libdnnl.so.3"


_was_forked = False


def forbid_after_fork() -> None:
    """Forbid the library in this process, if the process that it was forked from has it. Local.

    The threads of OpenMP do not survive a fork, and would be waited for.
    """
    global _was_forked  # noqa: PLW0603 - a fact about the process
    if library.cache_info().currsize:
        _was_forked = True
        library.cache_clear()


@functools.lru_cache(maxsize=1)
def library() -> Library:
    """Return the library, which the first call loads. Local.

    Raises:
        OneDNNError: If no library can be used; the message has the reason for each path. Also in a process that was
            forked from one with the library.
    """
    if _was_forked:
        raise OneDNNError(
            "this process was forked from one with oneDNN, whose threads are not here"
        )
    if sys.platform != "linux":
        raise OneDNNError(f"oneDNN is looked for on Linux only, this is {sys.platform}")
    reasons = []
    for path in candidates():
        try:
            return _load(path)
        except (OSError, OneDNNError) as error:  # noqa: PERF203 - there are few paths
            reasons.append(f"{path}: {error}" if path not in str(error) else str(error))
    raise OneDNNError("; ".join(reasons))


def _load(path: str) -> Library:
    functions = ctypes.CDLL(path)
    try:
        functions.dnnl_version.restype = ctypes.POINTER(_Version)
        version = functions.dnnl_version().contents
        text = f"{version.major}.{version.minor}.{version.patch}"
        if version.major != _MAJOR:
            raise OneDNNError(f"{path} is oneDNN {text}, and {_MAJOR}.x is needed")
        functions.dnnl_primitive_desc_query_md.restype = Handle
        functions.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
        functions.dnnl_cpu_isa2str.restype = ctypes.c_char_p
        functions.dnnl_sgemm.argtypes = _SGEMM
        functions.omp_get_max_threads.restype = ctypes.c_int
        instructions = functions.dnnl_cpu_isa2str(functions.dnnl_get_effective_cpu_isa())
    except AttributeError as error:
        raise OneDNNError(f"{path} lacks a function: {error}") from None
    engine, stream = Handle(), Handle()
    check(functions.dnnl_engine_create(ctypes.byref(engine), 1, ctypes.c_size_t(0)), "an engine")
    check(functions.dnnl_stream_create(ctypes.byref(stream), engine, 1), "a stream")
    # This package keeps operations itself, up to a limit; oneDNN's own cache would keep dropped ones as well.
    check(functions.dnnl_set_primitive_cache_capacity(0), "a cache of no size")
    return Library(
        functions,
        path,
        text,
        (instructions or b"?").decode().replace("cpu_isa_", ""),
        engine,
        stream,
    )


def check(status: int, what: str) -> None:
    """Check the status that a C function returned. Local.

    Args:
        status: The status.
        what: Object that was asked for, for the message.

    Raises:
        OneDNNError: If the status is not success.
    """
    if status:
        raise OneDNNError(f"oneDNN answered {status} when asked for {what}")


class Owned:
    """A handle of oneDNN that is destroyed together with this object. Local.

    Args:
        create: Name of the C function that makes the handle.
        destroy: Name of the C function that destroys it.
        arguments: Arguments of ``create`` after the handle.

    Raises:
        OneDNNError: If oneDNN refuses.
    """

    def __init__(self, create: str, destroy: str, *arguments: Any) -> None:
        functions = library().functions
        self.handle = Handle()
        self._destroy: Callable[[Any], Any] = getattr(functions, destroy)
        check(getattr(functions, create)(ctypes.byref(self.handle), *arguments), create)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._destroy(self.handle)


def n_threads() -> int:
    """Return how many threads an operation may use. Local."""
    return int(library().functions.omp_get_max_threads())
