"""Arrays for the results of kernels begin where a cache line does, and products by others are the same to the bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import kernels
from chainer_dist.kernels import memory
from chainer_dist.kernels.matrices import multiply

# Nothing here knows of ranks.
pytestmark = pytest.mark.mpi_skip

SHAPES = [
    (),
    (0, 3),
    (5,),
    (4096,),
    (4097, 1),
    (70, 60),
    (3, 40, 7, 9),
    (1, 5000),
    (2, 3, 4, 1, 500),
]


def shifted(array, n_bytes):
    """Return a copy that begins so many bytes after the beginning of a cache line."""
    room = memory.empty((array.nbytes + 2 * memory.LINE + memory._FEW,), np.uint8)
    copy = np.ndarray(array.shape, array.dtype, room, n_bytes)
    copy[...] = array
    return copy


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8])
@pytest.mark.parametrize("shape", SHAPES)
def test_empty(shape, dtype):
    """They have the shape, dtype and order that was asked for, memory of their own, and begin a line if they are large."""
    one, other = memory.empty(shape, dtype), memory.empty(shape, dtype)
    for each in (one, other):
        assert (each.shape, each.dtype) == (shape, np.dtype(dtype))
        assert each.flags.c_contiguous
        assert each.flags.writeable
        assert each.flags.aligned
        assert memory.begins_line(each) == (each.ctypes.data % 64 == 0)
        assert memory.begins_line(each) or each.nbytes < memory._FEW
    assert not np.shares_memory(one, other)
    one.fill(1)
    other.fill(2)
    assert (one == 1).all()


@given(
    st.sampled_from(SHAPES),
    st.integers(0, 119),
    st.booleans(),
    st.sampled_from([np.float32, np.float16]),
)
def test_empty_like(shape, order, is_cut, dtype):
    """They have the memory order of the other array, as NumPy's own."""
    axes = list(itertools.permutations(range(len(shape))))
    axes = axes[order % len(axes)]
    like = np.zeros([shape[axis] for axis in axes], dtype).transpose(np.argsort(axes))
    if is_cut and like.ndim:
        like = like[..., ::2]
    made, numpys = memory.empty_like(like), np.empty_like(like)
    assert (made.shape, made.dtype) == (like.shape, like.dtype)
    steps = [
        [step for step, n in zip(each.strides, each.shape) if n > 1] for each in (made, numpys)
    ]
    assert steps[0] == steps[1] or not like.size
    assert memory.begins_line(made) or made.nbytes < memory._FEW


@pytest.mark.parametrize("n_bytes", [0, 4, 48])
@pytest.mark.parametrize("size", [10, 100_000])
def test_at_line(n_bytes, size):
    """An array is copied if it is large and begins elsewhere, and else returned as it is."""
    array = shifted(np.arange(size, dtype="f"), n_bytes)
    found = memory.at_line(array)
    assert (found is array) == (not n_bytes or array.nbytes < memory._FEW)
    assert memory.begins_line(found) or found is array
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("n_bytes", [4, 16, 32, 60])
@pytest.mark.parametrize("rows", [3, 600])
@pytest.mark.parametrize("columns", [16, 112, 114])
def test_products(n_bytes, rows, columns):
    """Where a factor begins changes no bit of a product, and not the factor."""
    rng = np.random.RandomState(0)
    a, b = (rng.standard_normal(shape).astype("f") for shape in ((rows, 40), (40, columns)))
    products = []
    with kernels.use("onednn"):
        for shift in (0, n_bytes):
            factor = shifted(b, shift)
            products.append(multiply(shifted(a, shift), factor))
            np.testing.assert_array_equal(factor, b)
    np.testing.assert_array_equal(products[0], products[1])
    np.testing.assert_allclose(products[0], a.astype(float) @ b, 1e-4, 1e-4)
