"""Convolutions by Winograd's algorithm, against Chainer in float64."""

from __future__ import annotations

from unittest import mock

import chainer
import chainer.functions as F
import numpy as np
import pytest
import threadpoolctl
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import kernels
from chainer_dist.kernels import winograd
from chainer_dist.kernels.geometry import Window
from kernel_cases import arrange, assert_like_chainer, draw_array, outcome

# Nothing here knows of ranks.
pytestmark = [pytest.mark.mpi_skip, pytest.mark.usefixtures("one_thread", "any_size")]

PADDED = Window(stride=(1, 1), pad=(1, 1), dilate=(1, 1), groups=1)


@pytest.fixture
def any_size(monkeypatch):
    """Have even the smallest convolutions computed in this way, in blocks of few tiles."""
    monkeypatch.setattr(winograd, "_FEWEST_CHANNELS", 0)
    for name in ("_FEWEST_CHANNELS_OF_GRADIENT", "_FEWEST_WITH_AVX512"):
        monkeypatch.setattr(winograd, name, 0)
    monkeypatch.setattr(winograd, "_FEWEST_POSITIONS", 0)
    monkeypatch.setattr(winograd, "_BLOCK", 400)


@pytest.fixture
def used(monkeypatch):
    """Return the list of the names of functions that were called, and whether they computed a result."""
    names = []
    for name in ("convolve", "transposed", "gradient_of_weights"):
        monkeypatch.setattr(winograd, name, noted(names, name, getattr(winograd, name)))
    return names


def noted(names, name, compute):
    """Return a function that notes its name and whether it computed a result."""

    def compute_and_note(*args):
        result = compute(*args)
        names.append((name, result is not None))
        return result

    return compute_and_note


def images(rng, *shape):
    """Return random images with channels last in memory."""
    return arrange(rng.standard_normal(shape).astype(np.float32), "channels last")


@given(st.data(), st.booleans())
def test_like_chainer(data, transposed):
    """Outputs, gradients and second gradients of all sizes and paddings are Chainer's to rounding."""
    rng = np.random.RandomState(data.draw(st.integers(0, 1000)))
    pad = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    sizes = [data.draw(st.integers(3, 14)) for _ in pad]
    c, out_c = (data.draw(st.integers(1, 20)) for _ in range(2))
    w = draw_array(data.draw, (c, out_c, 3, 3) if transposed else (out_c, c, 3, 3))
    arrays = [images(rng, data.draw(st.integers(1, 4)), c, *sizes), w]
    if data.draw(st.booleans()):
        arrays.append(draw_array(data.draw, (out_c,)))
    function = F.deconvolution_2d if transposed else F.convolution_2d
    assert_like_chainer(lambda *inputs: function(*inputs, pad=pad), arrays, tolerance=1e-4)


def test_used(used):
    """These are computed in this way, forward and backward."""
    rng = np.random.RandomState(0)
    w = rng.standard_normal((8, 4, 3, 3)).astype(np.float32)
    with kernels.use("onednn"):
        outcome(
            lambda x, w: F.convolution_2d(x, w, pad=1), [images(rng, 2, 4, 9, 7), w], double=False
        )
    assert sorted(used) == [
        (name, True) for name in ("convolve", "gradient_of_weights", "transposed")
    ]


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"dilate": 2}, {"groups": 2}, {"pad": 3}, {"stride": (1, 2)}]
)
def test_other_windows_are_direct(options, used):
    """Strides, dilation, groups and wide paddings are not."""
    rng = np.random.RandomState(0)
    w = rng.standard_normal((4, 4 // options.get("groups", 1), 3, 3)).astype(np.float32)
    assert_like_chainer(
        lambda x, w: F.convolution_2d(x, w, **options), [images(rng, 2, 4, 9, 9), w]
    )
    assert not any(is_computed for _, is_computed in used)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["x", "w", "gy"])
def test_what_is_not_finite_stays_where_it_was(value, which, used):
    """It does not spread over a tile, as the two of three results that it reaches are computed directly."""
    for found, expected in in_this_way_and_directly(which, value):
        np.testing.assert_allclose(found, expected, 1e-4, 1e-4)
    assert [is_computed for _, is_computed in used[:3]].count(False) == 2


@pytest.mark.parametrize("which", ["x", "w", "gy"])
def test_large_values(which, used):
    """What is finite stays finite, with errors that are small beside the largest value."""
    for found, expected in in_this_way_and_directly(which, 3e37):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert [is_computed for _, is_computed in used[:3]].count(False) == 2


def in_this_way_and_directly(which, value):
    """Return pairs of output and gradients of a convolution that has a value in one of its arrays."""
    rng = np.random.RandomState(0)
    arrays = {
        "x": images(rng, 1, 3, 12, 12),
        "w": rng.standard_normal((5, 3, 3, 3)).astype(np.float32),
        "gy": images(rng, 1, 5, 12, 12),
    }
    arrays[which][0, 1, 2, 2] = value
    results = []
    for fewest in (0, 1 << 20):
        x, w = chainer.Variable(arrays["x"]), chainer.Variable(arrays["w"])
        few = mock.patch.object(winograd, "_FEWEST_POSITIONS", fewest)
        with few, kernels.use("onednn"), np.errstate(all="ignore"):
            y = F.convolution_2d(x, w, pad=1)
            y.grad = arrays["gy"]
            y.backward()
        results.append((y.array, x.grad, w.grad))
    return zip(*results)


def test_rounding():
    """With many channels, errors are at most ten times those of the direct way, and some millionths of the largest value."""
    rng = np.random.RandomState(0)
    x = np.maximum(images(rng, 2, 256, 14, 14), 0)
    w = rng.standard_normal((64, 256, 3, 3)).astype(np.float32)
    gy = images(rng, 2, 64, 14, 14)
    exact = direct_in_float64(x, w, gy)
    found = (
        winograd.convolve(x, w, None, (14, 14), PADDED),
        winograd.transposed(gy, w, None, (14, 14), PADDED),
        winograd.gradient_of_weights(x, gy, (3, 3), PADDED),
    )
    for value, expected in zip(found, exact):
        assert np.abs(value - expected).max() < 5e-6 * np.abs(expected).max()


def direct_in_float64(x, w, gy):
    """Return output and gradients of a convolution with a padding of 1."""
    x, w = (chainer.Variable(each.astype(np.float64)) for each in (x, w))
    with kernels.use("chainer"):
        y = F.convolution_2d(x, w, pad=1)
        y.grad = gy.astype(np.float64)
        y.backward()
    return y.array, x.grad, w.grad


def test_blocks_and_threads():
    """Blocks of whole images, of rows of tiles, and several threads give the same, to rounding."""
    rng = np.random.RandomState(0)
    x, gy = images(rng, 3, 8, 30, 21), images(rng, 3, 16, 30, 21)
    w = rng.standard_normal((16, 8, 3, 3)).astype(np.float32)

    def compute():
        return (
            winograd.convolve(x, w, None, (30, 21), PADDED),
            winograd.transposed(gy, w, None, (30, 21), PADDED),
            winograd.gradient_of_weights(x, gy, (3, 3), PADDED),
        )

    exact = direct_in_float64(x, w, gy)
    for threads in (1, 2):
        for block in (1, 5000, 30000, 1 << 20):
            with pytest.MonkeyPatch.context() as patch, threadpoolctl.threadpool_limits(threads):
                patch.setattr(winograd, "_BLOCK", block)
                for found, again, expected in zip(compute(), compute(), exact):
                    np.testing.assert_array_equal(found, again)
                    # Of a sum of many products, some that cancel out may be left.
                    np.testing.assert_allclose(found, expected, 1e-4, 3e-6 * abs(expected).max())
