"""Products of matrices by oneDNN, or by the BLAS of NumPy where that is faster."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chainer_dist.kernels import memory, replacements
from chainer_dist.kernels.cache import kept
from chainer_dist.kernels.layouts import is_suitable
from chainer_dist.kernels.onednn import BIAS, DST, ITEM, SRC, WEIGHTS, Layout, Operation, address
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
# With AVX-512 dnnl_sgemm takes up to one and a half times as long as the primitive in two cases. The rows of a large second
# matrix are a power of two apart, and conflict in the cache, which many rows of the first matrix outweigh. Or the first
# matrix is transposed, the product has no fewer rows than columns, and both it and the summands are many.
_ROWS_IN_CONFLICT, _LEAST_CONFLICT = range(32, 65), 1024
_LEAST_SIZE_TRANSPOSED = 256
# dnnl_sgemm reads the rows of the second matrix where they are. With AVX-512 and so many rows of the first matrix, a copy
# that begins at a cache line takes less time than it saves, if it has no more bytes than the cache holds.
_ROWS_FOR_COPY, _LARGE_COPY = 512, 1 << 20
# Without AVX-512, oneDNN takes up to two and a half times as long as OpenBLAS where it multiplies up to so many rows by
# matrices whose rows are a multiple of so many values apart, and so conflict in the cache; it does not copy them first.
_NOT_COPIED, _CONFLICT = 512, 256
# Nor does it copy transposed matrices, unless the product is large, in which case few summands do not pay for OpenBLAS's
# copies. Of many summands, both are as fast.
_LARGE, _FEW_SUMMANDS, _MANY_SUMMANDS = 512, 256, 8192


class _Form(NamedTuple):
    """Shape of a float32 matrix, or of a stack of matrices, and its strides in bytes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def order(self) -> tuple[bytes, int]:
        """Return the memory order of the last two dimensions, and the step between rows or columns, in values.

        The order is ``b"N"`` if each row is contiguous, and ``b"T"`` if each column is. It is empty, with a step of 0,
        if neither is, or if they overlap.
        """
        rows, columns = self.shape[-2:]
        by_row, by_column = (stride // ITEM for stride in self.strides[-2:])
        if (by_column == 1 or columns == 1) and (by_row >= columns or rows == 1):
            return b"N", max(columns, by_row if rows > 1 else 1)
        if (by_row == 1 or rows == 1) and (by_column >= rows or columns == 1):
            return b"T", max(rows, by_column if columns > 1 else 1)
        return b"", 0

    def lies_well(self) -> bool:
        """Return whether oneDNN can multiply it in its layout."""
        if not self.order()[0] or min(self.strides) <= 0:
            return False
        return len(self.shape) == 2 or not self._overlaps()  # noqa: PLR2004 - a matrix

    def _overlaps(self) -> bool:
        """Return whether matrices of a stack may share memory, which oneDNN refuses."""
        least = 0
        for stride, n in sorted(zip(self.strides, self.shape)):
            if n > 1 and stride < least:
                return True
            least = max(least, stride * n)
        return False

    def dense(self) -> _Form:
        """Return the form of a C-contiguous copy."""
        steps = Layout.dense(self.shape).strides or ()
        return _Form(self.shape, tuple(ITEM * step for step in steps))

    def layout(self) -> Layout:
        """Return it as oneDNN's primitives take it."""
        return Layout.strided(self.shape, self.strides)


class _Way:
    """How two matrices of given forms are multiplied. Local.

    Attributes:
        by_openblas: Whether NumPy's BLAS multiplies them, which is faster than oneDNN.
        orders: Memory order of each, see :meth:`_Form.order`.
    """

    def __init__(self, a: _Form, b: _Form, has_bias: bool) -> None:
        self._copies = not a.lies_well(), not b.lies_well()
        a, b = (each.dense() if copy else each for each, copy in zip((a, b), self._copies))
        stack = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        self._shape = (*stack, a.shape[-2], b.shape[-1])
        are_matrices = len(self._shape) == 2  # noqa: PLR2004
        self.by_openblas = are_matrices and not has_bias and _is_for_openblas(a, b)
        self.orders = a.order(), b.order()
        self._by_sgemm = are_matrices and _is_for_sgemm(a, b, has_bias)
        self._begins_line = self._by_sgemm and _is_worth_copying(a, b)
        self._forms, self._has_bias = (a, b), has_bias

    @functools.cached_property
    def _operation(self) -> Operation:
        a, b = (form.layout() for form in self._forms)
        y = Layout.dense(self._shape)
        bias = None
        if self._has_bias:
            bias = Layout.dense((*[1] * (len(y.shape) - 1), y.shape[-1]))
        inputs = [(SRC, a), (WEIGHTS, b), *([(BIAS, bias)] if bias else [])]
        return Operation("matmul", [a, b, bias, y], inputs, [(DST, y)])

    def matrices(self, a: Array, b: Array) -> tuple[Array, Array]:
        """Return the matrices as oneDNN can multiply them: themselves, or copies."""
        if self._copies[0]:
            a = memory.dense(a)
        if self._copies[1]:
            b = memory.dense(b)
        elif self._begins_line:
            b = memory.at_line(b)
        return a, b

    def multiply(self, a: Array, b: Array, bias: Array | None = None) -> Array:
        """Return the product as a new array."""
        a, b = self.matrices(a, b)
        y = memory.empty(self._shape)
        if self.by_openblas:
            np.matmul(a, b, out=y)
        elif self._by_sgemm:
            if bias is not None:
                y[...] = bias
            _sgemm(a, b, y, self.orders, adds=bias is not None)
        else:
            biases = () if bias is None else (np.ascontiguousarray(bias),)
            self._operation(a, b, *biases, y)
        return y


@kept
def _find(a: tuple[Any, Any], b: tuple[Any, Any], has_bias: bool) -> _Way:
    return _Way(_Form(*a), _Form(*b), has_bias)


def _way(a: Array, b: Array, bias: Array | None = None) -> _Way:
    """Return how two matrices or stacks are multiplied, which is decided once for each pair of forms. Local."""
    found: _Way = _find((a.shape, a.strides), (b.shape, b.strides), bias is not None)
    return found


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
    return _way(a, b, bias).multiply(a, b, bias)


def multiply_many(a: Array, b: Array, bias: Array | None = None) -> Array | None:
    """Return the same product, or None if it is not for oneDNN. Local.

    It is not where the multiplications are so few that the BLAS of NumPy is faster, or where arrays are not float32 or
    do not fit together.
    """
    arrays = (a, b) if bias is None else (a, b, bias)
    if a.ndim != b.ndim or a.ndim < 2 or a.shape[-1] != b.shape[-2]:  # noqa: PLR2004 - matrices
        return None
    if not is_suitable(*arrays) or (bias is not None and bias.shape != b.shape[-1:]):
        return None
    return multiply(*arrays) if _are_many(a, b) else None


def _is_for_openblas(a: _Form, b: _Form) -> bool:
    """Return whether NumPy's BLAS multiplies two matrices faster than oneDNN. Local."""
    if n_threads() > 1 or library().has_avx512():
        return False
    m, k = a.shape
    if a.order()[0] == b"T":
        is_large = min(m, b.shape[1]) >= _LARGE
        return (_FEW_SUMMANDS if is_large else 0) <= k < _MANY_SUMMANDS
    kind, step = b.order()
    return kind == b"N" and step % _CONFLICT == 0 and m <= _NOT_COPIED


def _is_for_sgemm(a: _Form, b: _Form, has_bias: bool) -> bool:
    """Return whether oneDNN's older way multiplies two matrices faster than its newer one. Local."""
    m = a.shape[0]
    if m <= _FEW_ROWS:
        return True
    if not has_bias and b.order()[0] == b"N":
        return not (library().has_avx512() and _is_slow_for_sgemm(a, b))
    return m >= _MANY_ROWS and b.shape[1] >= _MANY_COLUMNS and n_threads() == 1


def _is_slow_for_sgemm(a: _Form, b: _Form) -> bool:
    """Return whether dnnl_sgemm has a hard time with two matrices by AVX-512, the second of which has its rows. Local."""
    (m, k), n = a.shape, b.shape[1]
    if a.order()[0] == b"T":
        return m >= n >= _LEAST_SIZE_TRANSPOSED <= k
    step = b.order()[1]
    is_power_of_two = step & (step - 1) == 0
    return m in _ROWS_IN_CONFLICT and is_power_of_two and min(step, k) >= _LEAST_CONFLICT


def _is_worth_copying(a: _Form, b: _Form) -> bool:
    """Return whether dnnl_sgemm is to get a second matrix that begins at a cache line, even as a copy. Local."""
    (k, n), m = b.shape, a.shape[0]
    fills_lines = b.order() == (b"N", n) and n * ITEM % memory.LINE == 0
    is_small = k * n * ITEM < _LARGE_COPY
    return m >= _ROWS_FOR_COPY and fills_lines and is_small and library().has_avx512()


def _are_many(a: Array, b: Array) -> bool:
    """Return whether a product has so many multiplications that oneDNN is faster than OpenBLAS. Local."""
    few = _FEW
    if n_threads() > 1:
        few = _FEW_FOR_THREADS
    elif 1 < a.shape[-2] <= _FEW_ROWS and b.strides[-2] < b.strides[-1]:
        few = _FEW_TRANSPOSED
    return bool(max(a.size * b.shape[-1], b.size * a.shape[-2]) >= few)


def multiply_into(a: Array, b: Array, y: Array, *, adds: bool = False) -> None:
    """Write the product of two float32 matrices into ``y``, by oneDNN or NumPy, whichever is faster. Local.

    Args:
        a: Matrix of shape ``(m, k)`` and any layout.
        b: Matrix of shape ``(k, n)`` and any layout.
        y: C-contiguous matrix of shape ``(m, n)``.
        adds: Whether the product is added to the values of ``y``.
    """
    if replacements.uses_onednn() and _are_many(a, b):
        way = _way(a, b)
        if not way.by_openblas:
            _sgemm(*way.matrices(a, b), y, way.orders, adds=adds)
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


def multiply_matrices(a: Array, b: Array, y: Array, *, adds: bool = False) -> None:
    """Write the product of two float32 matrices into a third, C-contiguous one. Local.

    Args:
        a: Matrix of shape ``(m, k)``, of which rows or columns are contiguous.
        b: Matrix of shape ``(k, n)``, likewise.
        y: Matrix of shape ``(m, n)``.
        adds: Whether the product is added to the values of ``y``.

    Raises:
        OneDNNError: If oneDNN refuses.
    """
    orders = _Form(a.shape, a.strides).order(), _Form(b.shape, b.strides).order()
    _sgemm(a, b, y, orders, adds=adds)


def _sgemm(
    a: Array, b: Array, y: Array, orders: tuple[tuple[bytes, int], tuple[bytes, int]], *, adds: bool
) -> None:
    """Do so where the memory orders of both factors are known. Local."""
    (kind_a, step_a), (kind_b, step_b) = orders
    (m, k), n = a.shape, b.shape[1]
    places = address(a), step_a, address(b), step_b, float(adds), address(y), n
    status = library().functions.dnnl_sgemm(kind_a, kind_b, m, n, k, 1.0, *places)
    check(status, "a product of matrices")
