"""Products of matrices by oneDNN, or by the BLAS of NumPy where that is faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chainer_dist.kernels import replacements
from chainer_dist.kernels.cache import kept
from chainer_dist.kernels.onednn import BIAS, DST, SRC, WEIGHTS, Layout, Operation, address
from chainer_dist.kernels.shared_library import check, library, n_threads

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array

# Number of multiplications up to which OpenBLAS does not copy the matrices first, so that it is faster.
_FEW = 10**6
# The same number for few rows by a transposed matrix.
_FEW_TRANSPOSED = 1 << 18
# The same number with several threads: after a product, those of OpenBLAS keep the cores from oneDNN's for a while.
_FEW_FOR_THREADS = 1 << 16

# Number of values below which a sum of rows as a product costs more than it saves.
FEW_TO_SUM = 1 << 14

# Number of rows up to which dnnl_sgemm is faster than the primitive matmul for any second matrix.
_FEW_ROWS = 12
# From so many rows and columns of the product on it is faster in one thread, too.
_MANY_ROWS, _MANY_COLUMNS = 128, 2048
# Without AVX-512, oneDNN takes up to two and a half times as long as OpenBLAS where it multiplies up to so many rows by
# matrices whose rows are a multiple of so many values apart, and so conflict in the cache; it does not copy them first.
_NOT_COPIED, _CONFLICT = 512, 256
# Nor does it copy transposed matrices, unless the product is large, in which case few summands do not pay for OpenBLAS's
# copies. Of many summands, both are as fast.
_LARGE, _FEW_SUMMANDS, _MANY_SUMMANDS = 512, 256, 8192


@kept
def _multiply(a: Layout, b: Layout, has_bias: bool) -> Operation:
    y = Layout.dense(_shape_of_product(a, b))
    bias = Layout.dense((*[1] * (len(b.shape) - 1), b.shape[-1])) if has_bias else None
    inputs = [(SRC, a), (WEIGHTS, b), *([(BIAS, bias)] if bias else [])]
    return Operation("matmul", [a, b, bias, y], inputs, [(DST, y)])


def multiply(a: Array, b: Array, bias: Array | None = None) -> Array:
    """Return the product of two matrices, or of two stacks of them, as a new C-contiguous array. Local.

    Stacks are broadcast against each other, as by ``numpy.matmul``, but have as many dimensions.

    oneDNN's primitive ``matmul`` is faster where the second matrix is transposed or a bias is added, and ``dnnl_sgemm``
    otherwise.

    Args:
        a: Matrices of shape ``(..., m, k)``, float32. They are copied unless their last two dimensions are C- or
            Fortran-contiguous.
        b: Matrices of shape ``(..., k, n)``, float32, likewise.
        bias: Array of shape ``(n,)``, float32; None for zeros.
    """
    a, b = _matrices(a), _matrices(b)
    y = np.empty(_shape_of_product(a, b), np.float32)
    if a.ndim == 2 and bias is None and _is_for_openblas(a, b):  # noqa: PLR2004 - matrices
        np.matmul(a, b, out=y)
    elif a.ndim == 2 and _is_for_sgemm(a, b, bias):  # noqa: PLR2004 - matrices
        if bias is not None:
            y[...] = bias
        multiply_matrices(a, b, y, adds=bias is not None)
    else:
        biases = () if bias is None else (np.ascontiguousarray(bias),)
        _multiply(Layout.of(a), Layout.of(b), bias is not None)(a, b, *biases, y)
    return y


def _shape_of_product(a: Array | Layout, b: Array | Layout) -> tuple[int, ...]:
    stack = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return (*stack, a.shape[-2], b.shape[-1])


def _is_for_openblas(a: Array, b: Array) -> bool:
    """Return whether NumPy's BLAS multiplies two matrices faster than oneDNN. Local."""
    if n_threads() > 1 or library().has_avx512():
        return False
    m, k = a.shape
    if matrix_order(a)[0] == b"T":
        is_large = min(m, b.shape[1]) >= _LARGE
        return bool((_FEW_SUMMANDS if is_large else 0) <= k < _MANY_SUMMANDS)
    kind, step = matrix_order(b)
    return kind == b"N" and step % _CONFLICT == 0 and m <= _NOT_COPIED


def _is_for_sgemm(a: Array, b: Array, bias: Array | None) -> bool:
    """Return whether oneDNN's older way multiplies two matrices faster than its newer one. Local."""
    if len(a) <= _FEW_ROWS or (bias is None and matrix_order(b)[0] == b"N"):
        return True
    return len(a) >= _MANY_ROWS and b.shape[1] >= _MANY_COLUMNS and n_threads() == 1


def multiply_into(a: Array, b: Array, y: Array, *, adds: bool = False) -> None:
    """Write the product of two float32 matrices into ``y``, by oneDNN or NumPy, whichever is faster. Local.

    Args:
        a: Matrix of shape ``(m, k)`` and any layout.
        b: Matrix of shape ``(k, n)`` and any layout.
        y: C-contiguous matrix of shape ``(m, n)``.
        adds: Whether the product is added to the values of ``y``.
    """
    if replacements.uses_onednn() and are_many(a, b):
        a, b = _matrices(a), _matrices(b)
        if not _is_for_openblas(a, b):
            multiply_matrices(a, b, y, adds=adds)
            return
    if adds:
        y += a @ b
    else:
        np.matmul(a, b, out=y)


def sum_of_rows(rows: Array) -> Array:
    """Return the sums over the rows of a float32 matrix of any layout, as a new array. Local."""
    if rows.size < FEW_TO_SUM or not rows.flags.c_contiguous:
        few: Array = rows.sum(axis=0)
        return few
    ones, sums = np.ones((1, len(rows)), np.float32), np.empty(rows.shape[1], np.float32)
    if replacements.uses_onednn() and n_threads() > 1:
        # Not by BLAS, which is faster in one thread: its threads would keep the cores from oneDNN's for a while.
        multiply_matrices(ones, rows, sums[None])
    else:
        np.matmul(ones, rows, out=sums[None])
    return sums


def _matrices(array: Array) -> Array:
    """Return the array itself if oneDNN can multiply it in its layout, or a copy. Local."""
    lies_well = matrix_order(array)[0] and min(array.strides) > 0
    if not lies_well or (array.ndim > 2 and _overlap(array)):  # noqa: PLR2004 - a stack
        return np.ascontiguousarray(array)
    return array


def _overlap(matrices: Array) -> bool:
    """Return whether matrices of a stack may share memory, which oneDNN refuses. Local."""
    least = 0
    for stride, n in sorted(zip(matrices.strides, matrices.shape)):
        if n > 1 and stride < least:
            return True
        least = max(least, stride * n)
    return False


def are_many(a: Array, b: Array) -> bool:
    """Return whether a product has so many multiplications that oneDNN is faster than OpenBLAS. Local."""
    few = _FEW
    if n_threads() > 1:
        few = _FEW_FOR_THREADS
    elif 1 < a.shape[-2] <= _FEW_ROWS and b.strides[-2] < b.strides[-1]:
        few = _FEW_TRANSPOSED
    return bool(max(a.size * b.shape[-1], b.size * a.shape[-2]) >= few)


def multiply_matrices(a: Array, b: Array, y: Array, *, adds: bool = False) -> None:
    """Write the product of two float32 matrices into a third, C-contiguous one. Local.

    Args:
        a: Matrix of shape ``(m, k)``, of which rows or columns are contiguous, see :func:`matrix_order`.
        b: Matrix of shape ``(k, n)``, likewise.
        y: Matrix of shape ``(m, n)``.
        adds: Whether the product is added to the values of ``y``.

    Raises:
        OneDNNError: If oneDNN refuses.
    """
    (kind_a, step_a), (kind_b, step_b) = matrix_order(a), matrix_order(b)
    (m, k), n = a.shape, b.shape[1]
    places = address(a), step_a, address(b), step_b, float(adds), address(y), n
    status = library().functions.dnnl_sgemm(kind_a, kind_b, m, n, k, 1.0, *places)
    check(status, "a product of matrices")


def matrix_order(array: Array) -> tuple[bytes, int]:
    """Return the memory order of the last two dimensions, and the step between rows or columns, in values. Local.

    The order is ``b"N"`` if each row is contiguous, and ``b"T"`` if each column is. It is empty, with a step of 0, if
    neither is, or if they overlap.
    """
    rows, columns = array.shape[-2:]
    by_row, by_column = (stride // array.itemsize for stride in array.strides[-2:])
    if (by_column == 1 or columns == 1) and (by_row >= columns or rows == 1):
        return b"N", max(columns, by_row if rows > 1 else 1)
    if (by_row == 1 or rows == 1) and (by_column >= rows or columns == 1):
        return b"T", max(rows, by_column if columns > 1 else 1)
    return b"", 0
