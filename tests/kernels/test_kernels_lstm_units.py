"""``F.lstm`` as cells of one's own call it, by its kernel, against Chainer's own code in float32 and in float64."""

from __future__ import annotations

from unittest import mock

import chainer
import chainer.functions as F
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import kernels
from chainer_dist.kernels import lstm_units
from kernel_cases import ARRANGEMENTS, arrange, assert_close

# Nothing of it is collective.
pytestmark = [pytest.mark.mpi_skip, pytest.mark.usefixtures("one_thread")]


def draw(shapes, dtype=np.float32, arrangement="dense"):
    """Return as many Variables, whose values do not depend on the dtype."""
    rng = np.random.RandomState(0)
    arrays = [rng.standard_normal(shape).astype("f").astype(dtype) for shape in shapes]
    return [chainer.Variable(arrange(array, arrangement)) for array in arrays]


def run(given_, times, uses):
    """Return states, outputs and gradients of a cell that is called some times."""
    c, *xs = given_
    h = None
    for x in xs[:times]:
        c, h = F.lstm(c, x)
    outputs = [each for each, used in zip((c, h), uses) if used]
    loss = sum(F.sum(each * each) for each in outputs)
    loss.backward()
    return [each.array for each in (c, h)] + [each.grad for each in given_]


@given(
    n=st.integers(1, 5),
    rest=st.integers(0, 2),
    units=st.integers(1, 6),
    times=st.integers(1, 3),
    arrangement=st.sampled_from(ARRANGEMENTS),
    uses=st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_as_chainers_own(n, rest, units, times, arrangement, uses):
    """Whatever the shapes, however arrays lie in memory, and whichever result is used."""
    shapes = [(n + rest, units), *[(n, 4 * units)] * times]
    with kernels.use("numpy"):
        got = run(draw(shapes, arrangement=arrangement), times, uses)
    with kernels.use("chainer"):
        own = run(draw(shapes, arrangement=arrangement), times, uses)
        exact = run(draw(shapes, np.float64), times, uses)
    assert_close(got, own, 1e-4, 1e-5)
    assert_close(got, exact, 1e-4, 1e-5)


def test_the_kernel_is_used():
    """In float32 and two dimensions; anything else is Chainer's."""
    with (
        kernels.use("numpy"),
        mock.patch.object(lstm_units, "compute", wraps=lstm_units.compute) as compute,
    ):
        F.lstm(*draw([(2, 3), (2, 12)]))
        assert compute.call_count == 1
        F.lstm(*draw([(2, 3), (2, 12)], np.float64))
        F.lstm(*draw([(2, 3, 2), (2, 12, 2)]))
        F.lstm(*draw([(2, 3), (0, 12)]))
        assert compute.call_count == 1


@pytest.mark.parametrize("name", ["numpy", "chainer"])
def test_gradients_of_gradients(name):
    """They are Chainer's."""

    def second(dtype):
        c, x = draw([(3, 2), (2, 8)], dtype)
        c_next, h = F.lstm(c, x)
        grads = chainer.grad(
            [F.sum(c_next * c_next) + F.sum(h)], [c, x], enable_double_backprop=True
        )
        sum(F.sum(each * each) for each in grads).backward()
        return [c.grad, x.grad]

    with kernels.use(name):
        got = second(np.float32)
    with kernels.use("chainer"):
        exact = second(np.float64)
    assert_close(got, exact, 1e-3, 1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite(value):
    """NaN and infinity come out where Chainer lets them."""

    def compute():
        c, x = draw([(2, 2), (2, 8)])
        x.array[0, 3], c.array[1, 1] = value, value
        c_next, h = F.lstm(c, x)
        F.sum(c_next + h).backward()
        return [c_next.array, h.array, c.grad, x.grad]

    with np.errstate(all="ignore"):
        with kernels.use("numpy"):
            got = compute()
        with kernels.use("chainer"):
            own = compute()
    for one, other in zip(got, own):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
