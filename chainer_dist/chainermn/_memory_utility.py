"""ChainerMN's helpers around arrays of models, as far as they are of use without GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import chainer

    from chainer_dist._typing import Array

__all__ = [
    "DeviceMemory",
    "HostPinnedMemory",
    "array_to_buffer_object",
    "count_grad_elements",
    "extract_params_set_data",
    "extract_params_set_grad",
    "get_device_memory_pointer",
    "pack_params",
    "unpack_params",
]


def extract_params_set_data(model: chainer.Link) -> list[chainer.Parameter]:
    """Return a model's initialized parameters in the order of their names. Local."""
    return [param for _, param in sorted(model.namedparams()) if param.array is not None]


def extract_params_set_grad(model: chainer.Link, zero_fill: bool) -> list[chainer.Parameter]:
    """Return the parameters of a model whose gradients are exchanged, in the order of their names. Local.

    Args:
        model: Anything with ``namedparams()``.
        zero_fill: Whether a gradient that is None counts as zero.
    """
    params = extract_params_set_data(model)
    return params if zero_fill else [param for param in params if param.grad is not None]


def count_grad_elements(params: Sequence[chainer.Parameter], zero_fill: bool) -> int:
    """Return how many elements the gradients of parameters have together. Local."""
    return sum((param.array if zero_fill else param.grad).size for param in params)


def pack_params(  # noqa: PLR0917 - ChainerMN's positional parameters
    params: Sequence[chainer.Parameter],
    attr_name: str,
    buffer: Any,
    transfer_dtype: Any,
    zero_fill: bool,
    stream: Any = None,
) -> None:
    """Copy an attribute of parameters, one after the other, to a buffer. Local.

    Args:
        params: Parameters.
        attr_name: ``grad`` or ``data``.
        buffer: It has ``from_device(array, n_bytes, offset, stream)``.
        transfer_dtype: dtype of the numbers in the buffer.
        zero_fill: Whether a gradient that is None counts as zero.
        stream: Passed on.
    """
    offset = 0
    for param in params:
        array = getattr(param, attr_name)
        if array is None and attr_name == "grad" and zero_fill:
            array = np.zeros_like(param.array)
        array = np.ascontiguousarray(array, dtype=transfer_dtype)
        buffer.from_device(array, array.nbytes, offset, stream)
        offset += array.nbytes


def unpack_params(  # noqa: PLR0917 - ChainerMN's positional parameters
    params: Sequence[chainer.Parameter],
    attr_name: str,
    buffer: Any,
    transfer_dtype: Any,
    zero_fill: bool,
    stream: Any = None,
) -> None:
    """Copy to an attribute of parameters, in place, what :func:`pack_params` copied. Local.

    Args:
        params: Parameters.
        attr_name: ``grad`` or ``data``.
        buffer: It has ``to_device(array, n_bytes, offset, stream)``, which fills the array.
        transfer_dtype: dtype of the numbers in the buffer.
        zero_fill: Whether a gradient that is None becomes an array.
        stream: Passed on.
    """
    offset = 0
    for param in params:
        array = getattr(param, attr_name)
        if array is None and attr_name == "grad" and zero_fill:
            array = np.empty_like(param.array)
            param.grad = array
        received = np.empty(array.shape, dtype=transfer_dtype)
        buffer.to_device(received, received.nbytes, offset, stream)
        array[...] = received
        offset += received.nbytes


def array_to_buffer_object(array: Array, mpi_dtype: Any = None) -> Array:
    """Return what mpi4py takes for a NumPy array: the array, or a contiguous copy of it. Local."""
    del mpi_dtype
    return get_device_memory_pointer(array)


def get_device_memory_pointer(array: Array) -> Array:
    """Return a NumPy array, or a contiguous copy of it. Local.

    Raises:
        ValueError: If it is another kind of array.
    """
    if not isinstance(array, np.ndarray):
        raise ValueError(  # noqa: TRY004 - as ChainerMN
            f"{type(array)} is from an unsupported array module; chainer_dist exchanges NumPy arrays"
        )
    return np.ascontiguousarray(array)


class HostPinnedMemory:
    """Memory that a GPU reads and writes; to make some is an error, as there are no GPUs."""

    def __init__(self) -> None:
        raise RuntimeError(f"{type(self).__name__} cannot be used: Cupy is not available.")


class DeviceMemory(HostPinnedMemory):
    """Memory of a GPU; to make some is an error, as there are no GPUs."""
