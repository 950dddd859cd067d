"""Products of matrices by oneDNN, however they lie in memory, against NumPy in float64."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist.kernels import cache, matrices
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
    cache.clear()  # of how such matrices were multiplied before
    with few, for_openblas:
        found = matrices.multiply(a, b, bias)
    cache.clear()
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


@pytest.mark.parametrize("is_slow", [False, True])
@pytest.mark.parametrize("sizes", [(40, 1024, 1024), (1030, 300, 257), (2, 70, 4096)])
@pytest.mark.parametrize("transposed", ["", "a", "b", "ab"])
def test_ways(sizes, transposed, is_slow):
    """Both ways in which oneDNN multiplies compute the same, also into an array that has values."""
    m, k, n = sizes
    rng = np.random.RandomState(0)
    a = rng.standard_normal((k, m) if "a" in transposed else (m, k)).astype("f")
    b = rng.standard_normal((n, k) if "b" in transposed else (k, n)).astype("f")
    a, b = a.T if "a" in transposed else a, b.T if "b" in transposed else b
    y = rng.standard_normal((m, n)).astype("f")
    expected = a.astype(np.float64) @ b.astype(np.float64)
    with_y = expected + y
    cache.clear()
    with mock.patch.object(matrices, "_is_for_sgemm", return_value=not is_slow):
        product = matrices.multiply(a, b)
        matrices.multiply_into(a, b, y, adds=True)
    cache.clear()
    for found, wanted in ((product, expected), (y, with_y)):
        np.testing.assert_allclose(found, wanted, 1e-3, 1e-3)


def test_a_way_is_found_once():
    """How matrices are multiplied is decided once for each pair of layouts."""
    a, b = np.ones((32, 64), np.float32), np.ones((64, 48), np.float32)
    cache.clear()
    with mock.patch.object(matrices, "_is_for_sgemm", wraps=matrices._is_for_sgemm) as decide:
        for _ in range(3):
            matrices.multiply(a, b)
            matrices.multiply(a.copy(), b.copy())
        assert decide.call_count == 1
        matrices.multiply(a, np.asfortranarray(b))
        assert decide.call_count == 2


@pytest.mark.parametrize(
    ("a", "b", "bias"),
    [
        ((200, 100), (101, 200), None),
        ((200, 100), (100, 200), (1,)),
        ((2, 200, 100), (100, 200), None),
    ],
)
def test_what_does_not_fit(a, b, bias):
    """Arrays that do not fit together are left to Chainer, which says what is wrong."""
    arrays = [None if shape is None else np.ones(shape, np.float32) for shape in (a, b, bias)]
    assert matrices.multiply_many(*arrays) is None
