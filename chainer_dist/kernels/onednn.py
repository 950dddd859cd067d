"""Operations of oneDNN on NumPy arrays, without copies, through its C interface.

The constants below are those of ``dnnl_types.h``. An :class:`Operation` is made for one geometry and kept, since
making it compiles code. Running it takes some microseconds beside the work itself.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chainer_dist.kernels.cache import kept
from chainer_dist.kernels.shared_library import Handle, Owned, check, library

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from chainer_dist.kernels.shared_library import Library

MOST_DIMENSIONS = 12  # of an array
_FLOAT32 = 3
ITEM = 4  # bytes of a value
_ANY_LAYOUT = 1
_EXECUTION_ARGUMENT = 255  # a query: the memory of an argument

# Kinds of propagation.
TRAINING, INFERENCE, BACKWARD = 64, 96, 128

# Arguments of operations.
SRC, DST, WEIGHTS, BIAS = 1, 17, 33, 41
SECOND_SRC = 2
MEAN, VARIANCE, SCALE, SHIFT = 49, 50, 51, 52
WORKSPACE = 64
DIFF_SRC, DIFF_DST, DIFF_WEIGHTS = 129, 145, 161
DIFF_SCALE, DIFF_SHIFT = 255, 256
SRC_AFTERWARDS = 32768 | SECOND_SRC  # of the operation that comes after

# Algorithms of binary operations. The last gives 1 or 0, and 1 for NaN.
SUM, PRODUCT, MAXIMUM, IS_GREATER = 0x1FFF0, 0x1FFF1, 0x1FFF2, 0x1FFF7

# Flags of normalizations.
USE_GIVEN_STATISTICS = 1
SCALE_AND_SHIFT = 2 | 4

_Dimensions = ctypes.c_int64 * MOST_DIMENSIONS


# Where an array object has the address of its first value: at the start of NumPy's own fields, in every version. To read it
# there takes a third of the time of ``__array_interface__``, which counts, as a step reads thousands of addresses.
_ADDRESS = object.__basicsize__
_first_value = Handle.from_address


class _Argument(ctypes.Structure):
    _fields_ = (("argument", ctypes.c_int), ("memory", Handle))


class Layout(NamedTuple):
    """Shape and strides of a float32 array.

    Attributes:
        shape: Shape of the array.
        strides: Strides, in values; None for any layout that oneDNN chooses.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...] | None

    @classmethod
    def of(cls, array: np.ndarray[Any, Any]) -> Layout:
        """Return the layout of an array. Strides of dimensions of size 1 are ignored. Local."""
        return cls.strided(array.shape, array.strides)

    @classmethod
    def strided(cls, shape: tuple[int, ...], strides: tuple[int, ...]) -> Layout:
        """Return the same of the shape of an array and its strides in bytes. Local."""
        own = zip(shape, strides, _strides(shape))
        return cls(shape, tuple(dense if n == 1 else step // ITEM for n, step, dense in own))

    @classmethod
    def flat(cls, size: int) -> Layout:
        """Return the layout of a contiguous 1-dimensional array. Local."""
        return cls((size,), (1,))

    @classmethod
    def dense(cls, shape: Sequence[int]) -> Layout:
        """Return the layout of a C-contiguous array. Local."""
        return cls(tuple(shape), _strides(shape))

    @classmethod
    def channels_last(cls, shape: Sequence[int]) -> Layout:
        """Return the layout of an array of shape ``(batch, channels, ...)`` with channels last in memory. Local."""
        n, c, *sizes = shape
        batch, *others, channels = _strides((n, *sizes, c))
        return cls(tuple(shape), (batch, channels, *others))

    def anyhow(self) -> Layout:
        """Return the same shape in any layout that oneDNN chooses. Local."""
        return Layout(self.shape, None)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _descriptor(layout: Layout) -> Owned:
    n = len(layout.shape)
    shape = _Dimensions(*layout.shape)
    destroy = "dnnl_memory_desc_destroy"
    if layout.strides is None:
        return Owned("dnnl_memory_desc_create_with_tag", destroy, n, shape, _FLOAT32, _ANY_LAYOUT)
    strides = _Dimensions(*layout.strides)
    return Owned("dnnl_memory_desc_create_with_strides", destroy, n, shape, _FLOAT32, strides)


def dimensions(values: Sequence[int]) -> Any:
    """Return sizes, one per dimension, as an argument of oneDNN's functions. Local."""
    return _Dimensions(*values)


class _Primitive:
    """A primitive and the memory objects of its arguments, whose addresses are set before each execution."""

    def __init__(self, description: Owned, arguments: Sequence[tuple[int, Any]]) -> None:
        opened = library()
        self._functions = opened.functions
        self._stream = opened.stream
        self._primitive = Owned(
            "dnnl_primitive_create", "dnnl_primitive_destroy", description.handle
        )
        self._memories = [
            Owned(
                "dnnl_memory_create",
                "dnnl_memory_destroy",
                Handle(descriptor),
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

    def run(self, arrays: Iterable[np.ndarray[Any, Any]]) -> None:
        place = self._functions.dnnl_memory_set_data_handle
        for memory, array in zip(self._memories, arrays):
            place(memory.handle, address(array))
        check(
            self._functions.dnnl_primitive_execute(
                self._primitive.handle, self._stream, len(self._arguments), self._arguments
            ),
            "an execution",
        )


class Description:
    """A primitive descriptor of oneDNN, without the compiled code. Local.

    The descriptor of a gradient takes the one of the forward operation as a hint.

    Args:
        name: Name of the primitive, such as ``convolution_forward``.
        parameters: Parameters of ``dnnl_..._primitive_desc_create`` between the engine and the attributes. A
            :class:`Layout` stands for its memory descriptor, a :class:`Description` for its handle, None for NULL.
        afterwards: Algorithm of a binary operation on each result and on one more input, and the layout of that input.

    Raises:
        OneDNNError: If oneDNN has no implementation.
    """

    def __init__(
        self, name: str, parameters: Sequence[Any], afterwards: tuple[int, Layout] | None = None
    ) -> None:
        descriptors: list[Owned] = []

        def convert(value: Any) -> Any:
            if isinstance(value, Layout):
                descriptors.append(_descriptor(value))
                return descriptors[-1].handle
            if isinstance(value, Description):
                return value.owned.handle
            return ctypes.c_float(value) if isinstance(value, float) else value

        attributes = _attributes(*afterwards) if afterwards else None
        self.owned = Owned(
            f"dnnl_{name}_primitive_desc_create",
            "dnnl_primitive_desc_destroy",
            library().engine,
            *map(convert, parameters),
            attributes and attributes.handle,
        )


def _attributes(algorithm: int, layout: Layout) -> Owned:
    """Return the attributes of a primitive that a binary operation follows. Local."""
    functions = library().functions
    operations = Owned("dnnl_post_ops_create", "dnnl_post_ops_destroy")
    descriptor = _descriptor(layout)
    append = functions.dnnl_post_ops_append_binary
    check(append(operations.handle, algorithm, descriptor.handle), "an operation after another")
    attributes = Owned("dnnl_primitive_attr_create", "dnnl_primitive_attr_destroy")
    set_operations = functions.dnnl_primitive_attr_set_post_ops
    check(set_operations(attributes.handle, operations.handle), "attributes")
    return attributes


class Operation:
    """One of oneDNN's primitives, for arrays of given layouts. Local.

    Where the primitive may choose the layout of an argument, and chooses another one than the array has, the argument
    is reordered before or after the primitive.

    Args:
        name: Name of the primitive, such as ``convolution_forward``.
        parameters: Parameters of the primitive; see :class:`Description`.
        inputs: Arguments that are read, each as oneDNN's constant and the layout of the array. None is the primitive's
            own layout, as for the workspace, which is not float32.
        outputs: Arguments that are written, likewise.
        afterwards: See :class:`Description`; its input is ``SRC_AFTERWARDS``.

    Raises:
        OneDNNError: If oneDNN has no implementation.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[Any],
        inputs: Sequence[tuple[int, Layout | None]],
        outputs: Sequence[tuple[int, Layout | None]],
        afterwards: tuple[int, Layout] | None = None,
    ) -> None:
        opened = library()
        functions = opened.functions
        descriptors: list[Owned] = []
        self._description = Description(name, parameters, afterwards).owned
        arguments = []
        self._inputs: list[tuple[int, int, _Primitive]] = []  # position, bytes, reorder
        self._outputs: list[tuple[int, int, _Primitive]] = []
        for position, (argument, layout) in enumerate([*inputs, *outputs]):
            wanted = self._wanted(argument)
            given = Handle(wanted)
            if layout is not None:
                descriptors.append(_descriptor(layout))
                given = descriptors[-1].handle
            if not functions.dnnl_memory_desc_equal(given, Handle(wanted)):
                size = functions.dnnl_memory_desc_get_size(Handle(wanted))
                if position < len(inputs):
                    reorder = _reorder(opened, given, Handle(wanted))
                    self._inputs.append((position, size, reorder))
                else:
                    reorder = _reorder(opened, Handle(wanted), given)
                    self._outputs.append((position, size, reorder))
            arguments.append((argument, wanted))
        self._primitive = _Primitive(self._description, arguments)
        self._held: list[tuple[int, np.ndarray[Any, Any]]] = []

    def hold(self, position: int, array: np.ndarray[Any, Any]) -> None:
        """Give the input of a position for all runs, which then take the other arrays only. Local."""
        for each in self._inputs:
            if each[0] == position:
                self._inputs.remove(each)
                _, size, reorder = each
                own = scratch(size)
                reorder.run((array, own))
                array = own
                break
        self._held.append((position, array))

    def _wanted(self, argument: int) -> Any:
        return library().functions.dnnl_primitive_desc_query_md(
            self._description.handle, _EXECUTION_ARGUMENT, argument
        )

    def size(self, argument: int) -> int:
        """Return how many bytes an argument has, in the primitive's own layout. Local."""
        wanted = Handle(self._wanted(argument))
        return int(library().functions.dnnl_memory_desc_get_size(wanted))

    def __call__(self, *arrays: np.ndarray[Any, Any]) -> None:
        """Run on arrays in the order of inputs and outputs; outputs are written in place. Local.

        Raises:
            OneDNNError: If the execution fails.
        """
        placed = list(arrays)
        for position, array in self._held:
            placed.insert(position, array)
        given = tuple(placed)
        for position, size, reorder in self._inputs:
            placed[position] = scratch(size)
            reorder.run((given[position], placed[position]))
        for position, size, _ in self._outputs:
            placed[position] = scratch(size)
        self._primitive.run(placed)
        for position, _, reorder in self._outputs:
            reorder.run((placed[position], given[position]))


def address(array: np.ndarray[Any, Any]) -> Handle:
    """Return the address of an array's first value, as long as the array lives. Local."""
    return _first_value(id(array) + _ADDRESS)


def scratch(size: int) -> np.ndarray[Any, Any]:
    """Return an uninitialized array of ``size`` bytes. Local."""
    return np.empty(size, np.uint8)


def reorder(source: np.ndarray[Any, Any], target: np.ndarray[Any, Any]) -> None:
    """Copy float32 values to an array of the same shape and another memory order. Local."""
    _kept_reorder(Layout.of(source), Layout.of(target)).run((source, target))


def _reorder(opened: Library, source: Any, target: Any) -> _Primitive:
    description = Owned(
        "dnnl_reorder_primitive_desc_create",
        "dnnl_primitive_desc_destroy",
        source,
        opened.engine,
        target,
        opened.engine,
        None,
    )
    return _Primitive(description, [(SRC, source.value), (DST, target.value)])


@kept
def _kept_reorder(source: Layout, target: Layout) -> _Primitive:
    descriptors = _descriptor(source), _descriptor(target)
    return _reorder(library(), *(each.handle for each in descriptors))
