"""How kernels are compared with Chainer's own code in float64, and the arrays that they are given."""

from __future__ import annotations

import chainer
import numpy as np
from hypothesis import strategies as st

from chainer_dist import kernels

# How an array may lie in memory.
ARRANGEMENTS = ["dense", "channels last", "fortran", "reversed", "spaced", "read-only", "unaligned"]


def arrange(array, how):
    """Return a copy of an array that lies in memory in one of the ARRANGEMENTS."""
    if how == "channels last" and array.ndim > 2:
        last = np.moveaxis(array, 1, -1).copy()
        return np.moveaxis(last, -1, 1)
    if how == "fortran":
        return np.asfortranarray(array)
    if array.ndim == 0:
        return array
    if how == "reversed":
        return array[::-1].copy()[::-1]
    if how == "spaced":
        wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
        wide[..., ::2] = array
        return wide[..., ::2]
    copy = array.copy()
    if how == "read-only":
        copy.flags.writeable = False
    if how == "unaligned":
        place = np.zeros(array.nbytes + 1, np.uint8)[1:]
        copy = place.view(array.dtype).reshape(array.shape)
        copy[...] = array
    return copy


arrangements = st.sampled_from(ARRANGEMENTS)


def draw_array(draw, shape, scale=1.0):
    """Return float32 numbers of a shape, none of which are equal, in some arrangement."""
    rng = np.random.RandomState(draw(st.integers(0, 1000)))
    array = np.asarray(rng.standard_normal(shape) * scale, np.float32)
    return arrange(array, draw(arrangements))


def outcome(function, arrays, *, double):
    """Return the output, the gradients and the second gradients of a function of arrays, as a list of arrays.

    The function is given Variables of floating arrays, and other arrays as they are.
    """
    rng = np.random.RandomState(7)
    given = [chainer.Variable(a) if a.dtype.kind == "f" else a for a in arrays]
    variables = [each for each in given if isinstance(each, chainer.Variable)]
    y = function(*given)

    def draw(like):
        return chainer.Variable(np.asarray(rng.standard_normal(like.shape), like.dtype))

    gy = draw(y)
    gradients = chainer.grad([y], variables, [gy], enable_double_backprop=double)
    found = [y.array, *(None if g is None else g.array for g in gradients)]
    if double:
        reached = [g for g in gradients if g is not None]
        seconds = chainer.grad(reached, [*variables, gy], [draw(g) for g in reached])
        found += [None if g is None else g.array for g in seconds]
    return found


def in_float64(arrays):
    """Return the same numbers in float64, dense."""
    return [a.astype(np.float64) if a.dtype == np.float32 else np.array(a) for a in arrays]


def assert_like_chainer(function, arrays, *, name="onednn", double=True, tolerance=2e-5):
    """Assert that a function with kernels does what Chainer does in float64, to rounding, twice with the same bits."""
    with kernels.use("chainer"), chainer.using_config("dtype", np.float64):
        expected = outcome(function, in_float64(arrays), double=double)
    befores = [a.copy() for a in arrays]
    with kernels.use(name):
        found = outcome(function, arrays, double=double)
        again = outcome(function, arrays, double=double)
    for before, array in zip(befores, arrays):
        np.testing.assert_array_equal(before, array, "an input was changed")
    for place, (wanted, got, once_more) in enumerate(zip(expected, found, again)):
        if wanted is None:
            assert got is None
            continue
        assert got.dtype == np.float32
        assert got.shape == wanted.shape
        np.testing.assert_array_equal(got, once_more)
        size = max(1.0, np.abs(wanted[np.isfinite(wanted)]).max(initial=0))
        np.testing.assert_allclose(got, wanted, tolerance, tolerance * size, err_msg=f"{place}")


def assert_close(got, want, rtol=1e-3, atol=1e-4):
    """Compare lists of arrays, of which some may be None."""
    assert len(got) == len(want)
    for one, other in zip(got, want):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == other.shape
            np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)
