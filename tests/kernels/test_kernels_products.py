"""Products of matrices by oneDNN, however they lie in memory, against NumPy in float64."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist.kernels import matrices
from kernel_cases import ARRANGEMENTS, arrange

# Nothing here knows of ranks.
pytestmark = [pytest.mark.mpi_skip, pytest.mark.usefixtures("one_thread")]

sizes = st.sampled_from([1, 2, 3, 17, 64])
arrangements = st.sampled_from([how for how in ARRANGEMENTS if how != "unaligned"])


@given(st.sampled_from([(), (1,), (3,), (2, 2)]), sizes, sizes, sizes, st.data())
def test_products(stack, m, k, n, data):
    """Matrices, and stacks of them, transposed or not, with a bias or not."""
    rng = np.random.RandomState(m + k + n)
    factors = []
    for rows, columns in ((m, k), (k, n)):
        transposed = data.draw(st.booleans())
        shape = (*stack, columns, rows) if transposed else (*stack, rows, columns)
        factor = arrange(rng.standard_normal(shape).astype("f"), data.draw(arrangements))
        factors.append(factor.swapaxes(-1, -2) if transposed else factor)
    bias = rng.standard_normal(n).astype("f") if data.draw(st.booleans()) else None
    a, b = factors
    expected = a.astype(np.float64) @ b.astype(np.float64) + (0 if bias is None else bias)
    many = data.draw(
        st.sampled_from([1, 1 << 20])
    )  # a product of many rows and columns, or of fewer
    few = mock.patch.multiple(matrices, _MANY_ROWS=many, _MANY_COLUMNS=many)
    for_openblas = mock.patch.object(matrices, "_is_for_openblas", return_value=many == 1)
    with few, for_openblas:
        found = matrices.multiply(a, b, bias)
    np.testing.assert_allclose(found, expected, 1e-4, 1e-4)
    assert found.flags.c_contiguous


def test_overlapping_rows():
    """A window that slides over a row is no matrix to BLAS, and windows that overlap are no stack to oneDNN."""
    windows = np.lib.stride_tricks.sliding_window_view(np.arange(40, dtype=np.float32), 8)
    w = np.ones((8, 3), np.float32)
    np.testing.assert_array_equal(matrices.multiply(windows, w), windows.astype(np.float64) @ w)
    stack = np.lib.stride_tricks.sliding_window_view(np.arange(90, dtype=np.float32), 24)
    stack = stack[::8].reshape(9, 3, 8)
    assert stack.strides == (32, 32, 4)
    np.testing.assert_array_equal(matrices.multiply(stack, np.stack([w] * 9)), stack @ w)
    one = np.broadcast_to(np.arange(8, dtype=np.float32), (5, 8))
    np.testing.assert_array_equal(matrices.multiply(one, w), one.astype(np.float64) @ w)
