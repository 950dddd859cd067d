"""Operations of oneDNN on NumPy arrays, in place in their memory, through its C interface.

The interface is that of oneDNN 3 (``dnnl.h`` and ``dnnl_types.h``, whose numbers the constants below are); every 3.x
has it. An :class:`Operation` is made for one geometry and kept, since making one compiles code; running one takes
some microseconds beside the work itself.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
import sysconfig
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# Names a file instead of the library that is found.
VARIABLE = "CHAINER_DIST_ONEDNN"

# How many operations are kept, for all geometries and threads together. One holds some 100 kB of compiled code.
CAPACITY = 1024

_MAJOR = 3  # the version whose interface this is
_MAX_DIMENSIONS = 12
_FLOAT32 = 3
_ANY_LAYOUT = 1
_EXECUTION_ARGUMENT = 255  # a query: the memory of an argument

# Kinds of propagation.
TRAINING, INFERENCE, BACKWARD = 64, 96, 128

# Arguments of operations.
SRC, DST, WEIGHTS, BIAS = 1, 17, 33, 41
MEAN, VARIANCE, SCALE, SHIFT = 49, 50, 51, 52
WORKSPACE = 64
DIFF_SRC, DIFF_DST, DIFF_WEIGHTS = 129, 145, 161
DIFF_SCALE, DIFF_SHIFT = 255, 256

# Flags of normalizations.
USE_GIVEN_STATISTICS = 1
SCALE_AND_SHIFT = 2 | 4

# Which are transposed; m, n, k; a factor, a and its step, b and its step; a factor, y and its step.
_SIZE, _PLACE = ctypes.c_int64, ctypes.c_void_p
_SGEMM: list[Any] = [ctypes.c_char, ctypes.c_char, _SIZE, _SIZE, _SIZE]
_SGEMM += [ctypes.c_float, _PLACE, _SIZE, _PLACE, _SIZE, ctypes.c_float, _PLACE, _SIZE]

_Dimensions = ctypes.c_int64 * _MAX_DIMENSIONS
_Handle = ctypes.c_void_p


class OneDNNError(RuntimeError):
    """oneDNN refused to do something, or there is no oneDNN that can be used."""


class _Argument(ctypes.Structure):
    _fields_ = (("argument", ctypes.c_int), ("memory", _Handle))


class _Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_int), ("minor", ctypes.c_int), ("patch", ctypes.c_int))


class Library(NamedTuple):
    """A loaded library.

    Attributes:
        functions: Its C functions.
        path: Where it was found; a bare name was found by the loader.
        version: Such as ``3.2.0``.
        instructions: The instruction set that it uses, such as ``avx512_core_bf16``.
        engine: The processor, as oneDNN has it.
        stream: What operations are executed in.
    """

    functions: Any
    path: str
    version: str
    instructions: str
    engine: Any
    stream: Any


def candidates() -> Iterator[str]:
    """Yield where the library may be, the best first. Local.

    The environment variable alone if it is set; else the ``lib`` directory of this Python environment, where the package
    ``onednn-cpu-gomp`` of PyPI puts it, and the loader's path, for those of distributions, conda and modules.
    """
    if chosen := os.environ.get(VARIABLE):
        yield chosen
        return
    for directory in dict.fromkeys((sys.prefix, sysconfig.get_config_var("base") or sys.prefix)):
        path = Path(directory, "lib", "libdnnl.so.3")
        if path.is_file():
            yield str(path)
    yield "libdnnl.so.3"


@functools.lru_cache(maxsize=1)
def library() -> Library:
    """Return the library, loaded at the first call. Local.

    Raises:
        OneDNNError: If there is none that can be used; the message says why for each place.
    """
    if sys.platform != "linux":
        raise OneDNNError(f"oneDNN is looked for on Linux only, this is {sys.platform}")
    reasons = []
    for path in candidates():
        try:
            return _load(path)
        except (OSError, OneDNNError) as error:  # noqa: PERF203 - a few places
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
        functions.dnnl_primitive_desc_query_md.restype = _Handle
        functions.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
        functions.dnnl_cpu_isa2str.restype = ctypes.c_char_p
        functions.dnnl_sgemm.argtypes = _SGEMM
        functions.omp_get_max_threads.restype = ctypes.c_int
        instructions = functions.dnnl_cpu_isa2str(functions.dnnl_get_effective_cpu_isa())
    except AttributeError as error:
        raise OneDNNError(f"{path} lacks a function: {error}") from None
    engine, stream = _Handle(), _Handle()
    _check(functions.dnnl_engine_create(ctypes.byref(engine), 1, ctypes.c_size_t(0)), "an engine")
    _check(functions.dnnl_stream_create(ctypes.byref(stream), engine, 1), "a stream")
    # Operations are kept here, bounded; oneDNN's own cache would keep those that are dropped.
    _check(functions.dnnl_set_primitive_cache_capacity(0), "a cache of no size")
    return Library(
        functions,
        path,
        text,
        (instructions or b"?").decode().replace("cpu_isa_", ""),
        engine,
        stream,
    )


def _check(status: int, what: str) -> None:
    if status:
        raise OneDNNError(f"oneDNN answered {status} when asked for {what}")


class Layout(NamedTuple):
    """Shape and strides, both in values, of a float32 array; no strides mean any layout that oneDNN likes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...] | None

    @classmethod
    def of(cls, array: np.ndarray[Any, Any]) -> Layout:
        """Return that of an array, whose strides may be anything where it has one value. Local."""
        own = zip(array.shape, array.strides, _strides(array.shape))
        steps = (dense if n == 1 else step // array.itemsize for n, step, dense in own)
        return cls(array.shape, tuple(steps))

    @classmethod
    def flat(cls, size: int) -> Layout:
        """Return that of so many values in a row. Local."""
        return cls((size,), (1,))

    @classmethod
    def dense(cls, shape: Sequence[int]) -> Layout:
        """Return that of a C-contiguous array. Local."""
        return cls(tuple(shape), _strides(shape))

    @classmethod
    def channels_last(cls, shape: Sequence[int]) -> Layout:
        """Return that of an array of (batch, channels, ...) whose channels lie side by side. Local."""
        n, c, *sizes = shape
        batch, *others, channels = _strides((n, *sizes, c))
        return cls(tuple(shape), (batch, channels, *others))

    def anyhow(self) -> Layout:
        """Return the same shape in any layout. Local."""
        return Layout(self.shape, None)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


class _Owned:
    """A handle of oneDNN that is destroyed with this object."""

    def __init__(self, create: str, destroy: str, *arguments: Any) -> None:
        functions = library().functions
        self.handle = _Handle()
        self._destroy: Callable[[Any], Any] = getattr(functions, destroy)
        _check(getattr(functions, create)(ctypes.byref(self.handle), *arguments), create)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._destroy(self.handle)


def _descriptor(layout: Layout) -> _Owned:
    n = len(layout.shape)
    shape = _Dimensions(*layout.shape)
    destroy = "dnnl_memory_desc_destroy"
    if layout.strides is None:
        return _Owned("dnnl_memory_desc_create_with_tag", destroy, n, shape, _FLOAT32, _ANY_LAYOUT)
    strides = _Dimensions(*layout.strides)
    return _Owned("dnnl_memory_desc_create_with_strides", destroy, n, shape, _FLOAT32, strides)


def dimensions(values: Sequence[int]) -> Any:
    """Return sizes as an argument of oneDNN's functions. Local."""
    return _Dimensions(*values)


class _Primitive:
    """A primitive and the memory objects of its arguments, whose addresses are set before each execution."""

    def __init__(self, description: _Owned, arguments: Sequence[tuple[int, Any]]) -> None:
        opened = library()
        self._functions = opened.functions
        self._stream = opened.stream
        self._primitive = _Owned(
            "dnnl_primitive_create", "dnnl_primitive_destroy", description.handle
        )
        self._memories = [
            _Owned(
                "dnnl_memory_create",
                "dnnl_memory_destroy",
                _Handle(descriptor),
                opened.engine,
                None,
            )
            for _, descriptor in arguments
        ]
        self._arguments = (_Argument * len(arguments))(
            *[
                _Argument(argument, memory.handle)
                for (argument, _), memory in zip(arguments, self._memories)
            ]
        )

    def run(self, addresses: Sequence[int]) -> None:
        place = self._functions.dnnl_memory_set_data_handle
        for memory, address in zip(self._memories, addresses):
            place(memory.handle, _Handle(address))
        _check(
            self._functions.dnnl_primitive_execute(
                self._primitive.handle, self._stream, len(self._arguments), self._arguments
            ),
            "an execution",
        )


class Description:
    """What oneDNN would do, without the compiled code: as a hint, gradients are made with that of forward. Local.

    Args:
        name: The primitive, such as ``convolution_forward``.
        parameters: What its ``..._primitive_desc_create`` takes between the engine and the attributes. A :class:`Layout`
            stands for its descriptor, a :class:`Description` for itself, None for nothing.

    Raises:
        OneDNNError: If oneDNN has no implementation.
    """

    def __init__(self, name: str, parameters: Sequence[Any]) -> None:
        descriptors: list[_Owned] = []

        def convert(value: Any) -> Any:
            if isinstance(value, Layout):
                descriptors.append(_descriptor(value))
                return descriptors[-1].handle
            if isinstance(value, Description):
                return value.owned.handle
            return ctypes.c_float(value) if isinstance(value, float) else value

        self.owned = _Owned(
            f"dnnl_{name}_primitive_desc_create",
            "dnnl_primitive_desc_destroy",
            library().engine,
            *map(convert, parameters),
            None,
        )


class Operation:
    """One of oneDNN's primitives, for arrays of given layouts. Local.

    Where the primitive was left the choice of an argument's layout and chose another than the array has, the
    argument is reordered on its way in or out.

    Args:
        name: The primitive, such as ``convolution_forward``.
        parameters: See :class:`Description`.
        inputs: Arguments that are read: the constant, and the layout of the array that will be given; None is the one
            that the primitive has for it, as for the workspace, which is not of float32.
        outputs: Arguments that are written likewise.

    Raises:
        OneDNNError: If oneDNN has no implementation.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[Any],
        inputs: Sequence[tuple[int, Layout | None]],
        outputs: Sequence[tuple[int, Layout | None]],
    ) -> None:
        opened = library()
        functions = opened.functions
        descriptors: list[_Owned] = []
        self._description = Description(name, parameters).owned
        arguments = []
        self._inputs: list[tuple[int, int, _Primitive]] = []  # position, bytes, reorder
        self._outputs: list[tuple[int, int, _Primitive]] = []
        for position, (argument, layout) in enumerate([*inputs, *outputs]):
            wanted = self._wanted(argument)
            given = _Handle(wanted)
            if layout is not None:
                descriptors.append(_descriptor(layout))
                given = descriptors[-1].handle
            if not functions.dnnl_memory_desc_equal(given, _Handle(wanted)):
                size = functions.dnnl_memory_desc_get_size(_Handle(wanted))
                if position < len(inputs):
                    reorder = _reorder(opened, given, _Handle(wanted))
                    self._inputs.append((position, size, reorder))
                else:
                    reorder = _reorder(opened, _Handle(wanted), given)
                    self._outputs.append((position, size, reorder))
            arguments.append((argument, wanted))
        self._primitive = _Primitive(self._description, arguments)

    def _wanted(self, argument: int) -> Any:
        return library().functions.dnnl_primitive_desc_query_md(
            self._description.handle, _EXECUTION_ARGUMENT, argument
        )

    def __call__(self, *arrays: np.ndarray[Any, Any]) -> None:
        """Run on arrays in the order of inputs and outputs; outputs are written in place. Local."""
        addresses = [address(array) for array in arrays]
        if not self._inputs and not self._outputs:
            self._primitive.run(addresses)
            return
        reordered = []
        placed = list(addresses)
        for position, size, reorder in self._inputs:
            reordered.append(scratch(size))
            placed[position] = address(reordered[-1])
            reorder.run((addresses[position], placed[position]))
        for position, size, _ in self._outputs:
            reordered.append(scratch(size))
            placed[position] = address(reordered[-1])
        self._primitive.run(placed)
        for position, _, reorder in self._outputs:
            reorder.run((placed[position], addresses[position]))


def multiply_matrices(
    a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], y: np.ndarray[Any, Any], *, adds: bool = False
) -> None:
    """Write the product of two float32 matrices into a third, C-contiguous one. Local.

    Args:
        a: (m, k); either its rows or its columns are contiguous, as :func:`matrix_order` says.
        b: (k, n) likewise.
        y: (m, n).
        adds: Whether the product is added to what is in ``y``.
    """
    (kind_a, step_a), (kind_b, step_b) = matrix_order(a), matrix_order(b)
    (m, k), n = a.shape, b.shape[1]
    places = address(a), step_a, address(b), step_b, float(adds), address(y), n
    status = library().functions.dnnl_sgemm(kind_a, kind_b, m, n, k, 1.0, *places)
    _check(status, "a product of matrices")


def matrix_order(array: np.ndarray[Any, Any]) -> tuple[bytes, int]:
    """Return how the last two dimensions lie in memory, and the step from one row, or column, to the next. Local.

    ``N``: each row is contiguous. ``T``: each column is. Nothing and 0: neither, or they overlap. Steps are in values.
    """
    rows, columns = array.shape[-2:]
    by_row, by_column = (stride // array.itemsize for stride in array.strides[-2:])
    if (by_column == 1 or columns == 1) and (by_row >= columns or rows == 1):
        return b"N", max(columns, by_row if rows > 1 else 1)
    if (by_row == 1 or rows == 1) and (by_column >= rows or columns == 1):
        return b"T", max(rows, by_column if columns > 1 else 1)
    return b"", 0


def address(array: np.ndarray[Any, Any]) -> int:
    """Return where an array's first value lies. Local."""
    return int(array.__array_interface__["data"][0])


def scratch(size: int) -> np.ndarray[Any, Any]:
    """Return so many bytes. Local."""
    return np.empty(size, np.uint8)


def reorder(source: np.ndarray[Any, Any], target: np.ndarray[Any, Any]) -> None:
    """Copy float32 values to an array of the same shape that lies in memory in another order. Local."""
    _kept_reorder(Layout.of(source), Layout.of(target)).run((address(source), address(target)))


def _reorder(opened: Library, source: Any, target: Any) -> _Primitive:
    description = _Owned(
        "dnnl_reorder_primitive_desc_create",
        "dnnl_primitive_desc_destroy",
        source,
        opened.engine,
        target,
        opened.engine,
        None,
    )
    return _Primitive(description, [(SRC, source.value), (DST, target.value)])


def n_threads() -> int:
    """Return how many threads an operation may take. Local."""
    return int(library().functions.omp_get_max_threads())


_kept: OrderedDict[Any, Any] = OrderedDict()
_lock = threading.Lock()


def kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate what makes operations from hashable arguments so that they are made once. Local.

    Each thread has its own, since addresses are put into them; each number of OpenMP threads too, since oneDNN
    divides the work when an operation is made. At most :data:`CAPACITY` are kept, those used last.
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


@kept
def _kept_reorder(source: Layout, target: Layout) -> _Primitive:
    descriptors = _descriptor(source), _descriptor(target)
    return _reorder(library(), *(each.handle for each in descriptors))


def clear() -> None:
    """Give back all operations that are kept. Local."""
    with _lock:
        _kept.clear()
