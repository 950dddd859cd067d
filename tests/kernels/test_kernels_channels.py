"""Arithmetic of each channel, by oneDNN and in NumPy, against NumPy in float64."""

from __future__ import annotations

from unittest import mock

import chainer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import kernels
from chainer_dist.kernels import channels
from kernel_cases import arrange, draw_array

# Nothing here knows of ranks.
pytestmark = [pytest.mark.mpi_skip, pytest.mark.usefixtures("one_thread")]

NAMES = ["numpy", "onednn"]


def channels_of(x, name, axis=None):
    """Return what computes with an array with a choice of kernels, of however few values."""
    axis = (0, *range(2, x.ndim)) if axis is None else axis
    with kernels.use(name), mock.patch.object(channels, "_FEW", 0):
        return channels.of(x, axis, np.result_type(x, np.float32))


@st.composite
def cases(draw):
    """Return an array of channels, a gradient of it, its axes, and a number for the size of blocks."""
    n, n_channels = draw(st.integers(1, 6)), draw(st.sampled_from([1, 3, 16, 20]))
    shape = (n, n_channels, *(draw(st.integers(1, 5)) for _ in range(draw(st.integers(0, 3)))))
    mean = draw(st.sampled_from([0.0, 1.0, 1e4]))
    x = draw_array(draw, shape)
    if draw(st.booleans()):
        x = arrange(x, "channels last")
    if x.flags.writeable:
        x += np.float32(mean)
    axis = draw(st.sampled_from([(0, *range(2, len(shape))), (0,), tuple(range(len(shape)))[1:]]))
    return x, draw_array(draw, shape), axis, draw(st.sampled_from([7, 60, 1 << 18]))


@pytest.mark.parametrize("name", NAMES)
@given(cases())
def test_arithmetic(name, case):
    """Moments, normalization and sums of products are right to float32, block by block too, and far from zero."""
    x, gy, axis, block = case
    before = x.copy()
    with mock.patch.object(channels, "_BLOCK", block):
        own = channels_of(x, name, axis)
        mean, squares = own.moments()
        x64, gy64 = x.astype(np.float64), gy.astype(np.float64)
        expected = x64.mean(axis)
        spread = np.abs(x64).max()
        np.testing.assert_allclose(mean, expected, 1e-6, 1e-6)
        want = ((x64 - x64.mean(axis, keepdims=True)) ** 2).sum(axis)
        np.testing.assert_allclose(squares, want, 1e-4, 1e-5)
        rng = np.random.RandomState(0)
        scale, shift = rng.standard_normal((2, *mean.shape))
        wide = tuple(None if i in axis else slice(None) for i in range(x.ndim))
        deviation = x64 - expected[wide]
        y = own.normalize(expected, scale, shift)
        wanted = deviation * scale[wide] + shift[wide]
        np.testing.assert_allclose(y, wanted, 1e-4, 1e-6 * max(spread, 1))
        gx, sums, products = channels_of(x, name, axis).products(gy, expected, scale)
        np.testing.assert_allclose(gx, gy64 * scale[wide], 1e-5)
        np.testing.assert_allclose(sums, gy64.sum(axis), 1e-4, 1e-4)
        np.testing.assert_allclose(products, (gy64 * deviation).sum(axis), 1e-3, 1e-3)
        last = channels_of(x, name, axis)
        gx, *_ = last.products(gy, expected, scale)
        last.add_normalized(gx, expected, scale, shift)
        np.testing.assert_allclose(gx, gy64 * scale[wide] + wanted, 1e-4, 1e-6 * max(spread, 1))
    assert y.dtype == gx.dtype == np.float32
    np.testing.assert_array_equal(x, before)


def test_which_computes():
    """By oneDNN only what it can, and only where it was asked for."""
    plain = np.ones((200, 8, 10, 10), np.float32)
    images = arrange(plain, "channels last")
    axis = (0, 2, 3)

    def by_onednn(x, axis=axis, dtype=np.float32):
        return type(channels.of(x, axis, dtype)) is not channels.Channels

    with kernels.use("onednn"):
        assert by_onednn(images)
        assert by_onednn(np.ones((20000, 8), np.float32), (0,))
        assert not by_onednn(plain)
        assert not by_onednn(images[:2])
        assert not by_onednn(images[:, ::2])
        assert not by_onednn(images, (0, 2))
        assert not by_onednn(images, dtype=np.float64)
        assert not by_onednn(images.astype(np.float16))
        with chainer.using_config("use_ideep", "never"):
            assert not by_onednn(images)
        with kernels.use("chainer"):
            assert not by_onednn(images)
        with kernels.use("numpy"):
            assert not by_onednn(images)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(bad):
    """A channel with NaN or infinity has moments that are NaN, and others have not; so it is in NumPy."""
    x = arrange(np.random.RandomState(0).standard_normal((4, 3, 5, 5)).astype("f"), "channels last")
    x[2, 1, 3, 3] = bad
    ones, zeros = np.ones(3), np.zeros(3)
    found = []
    for name in NAMES:
        with np.errstate(all="ignore"):
            own = channels_of(x, name)
            _, squares = own.moments()
            gx, sums, products = own.products(x, zeros, ones)
            found.append([own.normalize(zeros, ones, ones), squares, gx, sums, products])
        assert np.isnan(squares).tolist() == [False, True, False]
    for one, other in zip(*found):
        np.testing.assert_array_equal(np.isfinite(one), np.isfinite(other))
