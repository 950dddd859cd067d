"""Gradients of slices by kernels, against Chainer's own code."""

from __future__ import annotations

import chainer
import chainer.functions as F
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from chainer_dist import kernels

# Nothing of it is collective.
pytestmark = pytest.mark.mpi_skip

SHAPE = (4, 3, 5)

slices = hnp.basic_indices(SHAPE, allow_newaxis=True) | st.just(np.array([0, 0, 2]))


def grads(which, parts, dtype, is_leaf):
    """Return the gradients of two inputs from parts of them and of their sum."""
    rng = np.random.RandomState(0)
    inputs = [chainer.Variable(rng.standard_normal(SHAPE).astype(dtype)) for _ in range(2)]
    with kernels.use(which):
        x, y = (each if is_leaf else F.identity(each) for each in inputs)
        total = 0
        sums = {"x": x, "y": y, "sum": x + y, "identity": F.identity(x)}
        for name, part, later in parts:
            value = sums[name][part]
            value = F.sum(value * value * rng.standard_normal(value.shape).astype(dtype))
            for _ in range(later):  # changes the order of backward
                value = F.identity(value)
            total += value
        total.backward()
    return [each.grad for each in inputs]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["x", "y", "sum", "identity"]), slices, st.integers(0, 2)),
        min_size=1,
        max_size=7,
    ),
    st.sampled_from([np.float32, np.float64]),
    st.booleans(),
)
def test_parts(parts, dtype, is_leaf):
    """Parts that overlap, indexes that repeat, and gradients that two variables share add up as in Chainer."""
    got, want = (grads(which, parts, dtype, is_leaf) for which in ("numpy", "chainer"))
    for one, other in zip(got, want):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == dtype
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_no_other_gradient_changes():
    """The gradient of a sum is that of both summands, and is not written into for one of them."""
    x, y = (chainer.Variable(np.ones((2, 3), np.float32)) for _ in range(2))
    with kernels.use("numpy"):
        middle = F.identity(x)
        of_sum = F.sum((middle + F.identity(y))[0])
        # Chainer comes to the sum before it comes to this.
        of_middle = F.identity(F.sum(middle[1]))
        (of_sum + of_middle).backward()
    np.testing.assert_array_equal(x.grad, [[1] * 3, [1] * 3])
    np.testing.assert_array_equal(y.grad, [[1] * 3, [0] * 3])


def test_backward_twice():
    """What backward left in a variable does not change by the next backward, which leaves the sum."""
    for which in ("numpy", "chainer"):
        x = chainer.Variable(np.ones((2, 3), np.float32))
        with kernels.use(which):
            middle = F.identity(x)
            loss = F.sum(x[0]) + F.sum(middle[1]) + F.sum(middle[0] * 2)
            loss.backward(retain_grad=True)
            first, of_middle = x.grad, middle.grad
            np.testing.assert_array_equal(of_middle, [[2] * 3, [1] * 3])
            loss.grad = np.ones((), np.float32)
            loss.backward(retain_grad=True)
        np.testing.assert_array_equal(first, [[3] * 3, [1] * 3])
        np.testing.assert_array_equal(of_middle, [[2] * 3, [1] * 3])
        np.testing.assert_array_equal(x.grad, [[6] * 3, [2] * 3])


def test_a_gradient_that_is_added_to():
    """What an earlier call returned does not change where a script adds to it in the next one."""
    for which in ("numpy", "chainer"):
        middle = F.identity(chainer.Variable(np.ones((2, 3), np.float32)))
        with kernels.use(which):
            (first,) = chainer.grad([F.sum(middle[0])], [middle])
            (both,) = chainer.grad([F.sum(middle[1])], [middle], grad_inputs=[first])
        np.testing.assert_array_equal(first.array, [[1] * 3, [0] * 3])
        np.testing.assert_array_equal(both.array, [[1] * 3, [1] * 3])


def test_gradients_of_gradients():
    """The gradient has one of its own."""
    found = []
    for which in ("numpy", "chainer"):
        x = chainer.Variable(np.arange(6, dtype=np.float32).reshape(2, 3))
        with kernels.use(which):
            middle = F.identity(x)
            loss = F.sum(middle[0] ** 3) + F.sum(middle[:, 1] ** 2)
            (gx,) = chainer.grad([loss], [x], enable_double_backprop=True)
            F.sum(gx * gx).backward()
        found.append((gx.array, x.grad))
    np.testing.assert_allclose(*[each[0] for each in found])
    np.testing.assert_allclose(*[each[1] for each in found])


def test_one_array_for_all_parts(monkeypatch):
    """There is one array of the whole shape for all parts, and Chainer's gradient is not called."""
    made = []
    zeros = np.zeros
    x = chainer.Variable(np.ones((5, 2), np.float32))
    with kernels.use("numpy"):
        middle = F.identity(x)
        loss = sum(F.sum(middle[i]) for i in range(5))
        monkeypatch.setattr(np, "zeros", lambda *args: made.append(args) or zeros(*args))
        loss.backward()
    assert made == [((5, 2), np.float32)]
    np.testing.assert_array_equal(x.grad, np.ones((5, 2)))
