"""Products of matrices by oneDNN, or by the BLAS of NumPy where that is faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chainer_dist.kernels import replacements
from chainer_dist.kernels.onednn import BIAS, DST, SRC, WEIGHTS, Layout, Operation, address, kept
from chainer_dist.kernels.shared_library import check, library, n_threads

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array

# Up to so many multiplications OpenBLAS does not copy the matrices first, and the call costs more than it saves.
_FEW = 10**6
# The same of few rows by a transposed matrix.
_FEW_TRANSPOSED = 1 << 18
# Several threads of OpenBLAS would keep those of oneDNN from the cores for a while after a product.
_FEW_FOR_THREADS = 1 << 16

# Up to so many rows oneDNN's older way is faster whatever the second matrix is.
_FEW_ROWS = 12


@kept
def _multiply(a: Layout, b: Layout, has_bias: bool) -> Operation:
    y = Layout.dense((*a.shape[:-1], b.shape[-1]))
    bias = Layout.dense((*[1] * (len(b.shape) - 1), b.shape[-1])) if has_bias else None
    inputs = [(SRC, a), (WEIGHTS, b), *([(BIAS, bias)] if bias else [])]
    return Operation("matmul", [a, b, bias, y], inputs, [(DST, y)])


def multiply(a: Array, b: Array, bias: Array | None = None) -> Array:
    """Return the product of two matrices, or of two stacks of as many matrices, new, C-contiguous. Local.

    Of oneDNN's two ways the one is faster where the second matrix is transposed, or a bias is added; the other otherwise.

    Args:
        a: (..., m, k), float32; in its last two dimensions C- or Fortran-contiguous, or any other layout
            at the price of a copy.
        b: (..., k, n) likewise.
        bias: (n,), float32; None for zeros.
    """
    a, b = _matrices(a), _matrices(b)
    y = np.empty((*a.shape[:-1], b.shape[-1]), np.float32)
    rows_are_contiguous = matrix_order(b)[0] == b"N"
    if a.ndim == 2 and (len(a) <= _FEW_ROWS or (bias is None and rows_are_contiguous)):  # noqa: PLR2004 - matrices
        multiply_matrices(a, b, y)
        if bias is not None:
            y += bias
    else:
        biases = () if bias is None else (np.ascontiguousarray(bias),)
        _multiply(Layout.of(a), Layout.of(b), bias is not None)(a, b, *biases, y)
    return y


def multiply_into(a: Array, b: Array, y: Array, *, adds: bool = False) -> None:
    """Write the product of two float32 matrices into ``y`` by what is faster, with oneDNN or without it. Local.

    Args:
        a: (m, k), of any layout.
        b: (k, n) likewise.
        y: (m, n), C-contiguous.
        adds: Whether the product is added to what is in ``y``.
    """
    if replacements.uses_onednn() and are_many(a, b):
        multiply_matrices(_matrices(a), _matrices(b), y, adds=adds)
    elif adds:
        y += a @ b
    else:
        np.matmul(a, b, out=y)


def _matrices(array: Array) -> Array:
    """Return the array itself if oneDNN can multiply it as it lies, or a copy. Local."""
    lies_well = matrix_order(array)[0] and min(array.strides) > 0
    return array if lies_well else np.ascontiguousarray(array)


def are_many(a: Array, b: Array) -> bool:
    """Return whether there are so many multiplications that oneDNN is faster than OpenBLAS. Local."""
    few = _FEW
    if n_threads() > 1:
        few = _FEW_FOR_THREADS
    elif 1 < a.shape[-2] <= _FEW_ROWS and b.strides[-2] < b.strides[-1]:
        few = _FEW_TRANSPOSED
    return bool(a.size * b.shape[-1] >= few)


def multiply_matrices(a: Array, b: Array, y: Array, *, adds: bool = False) -> None:
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
    check(status, "a product of matrices")


def matrix_order(array: Array) -> tuple[bytes, int]:
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
