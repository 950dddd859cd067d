"""Adam's update: parameters and states are Chainer's to the bit, for all variants and whatever the arrays are."""

from __future__ import annotations

import chainer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import kernels
from chainer_dist.kernels import adam

# Nothing of it is collective.
pytestmark = pytest.mark.mpi_skip

VARIANTS = {
    "Adam": chainer.optimizers.Adam,
    "AdamW": lambda **other: chainer.optimizers.AdamW(weight_decay_rate=0.01, **other),
    "AMSGrad": chainer.optimizers.AMSGrad,
    "AdaBound": chainer.optimizers.AdaBound,
    "AMSBound": chainer.optimizers.AMSBound,
    "eta": lambda **other: chainer.optimizers.Adam(eta=0.5, weight_decay_rate=0.1, **other),
    "no eps": lambda **other: chainer.optimizers.Adam(**{"eps": 0.0, **other}),
}
SIZES = [1, 5, 4096, adam._BLOCK, adam._BLOCK + 3, 2 * adam._BLOCK + 17]


def train(name, variant, param, grads, **hyperparameters):
    """Return what is left of a parameter after some updates: its values, and the arrays of its state."""
    optimizer = VARIANTS[variant](**hyperparameters)
    link = chainer.Link()
    with link.init_scope():
        link.w = chainer.Parameter(param.copy(order="A"))
    optimizer.setup(link)
    with kernels.use(name), np.errstate(all="ignore"):
        for grad in grads:
            before = link.w.array, dict(link.w.update_rule.state or {})
            link.w.grad = grad
            optimizer.update()
            assert link.w.array is before[0]
            assert all(link.w.update_rule.state[key] is each for key, each in before[1].items())
    return {"w": link.w.array, **link.w.update_rule.state}


def assert_like_chainer(variant, param, grads, **hyperparameters):
    """Compare every bit with Chainer's own code."""
    expected = train("chainer", variant, param, grads, **hyperparameters)
    found = train("numpy", variant, param, grads, **hyperparameters)
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].dtype == array.dtype
        np.testing.assert_array_equal(found[key], array, err_msg=key)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
def test_variants(variant, size):
    """Several updates leave the same parameters and states."""
    rng = np.random.RandomState(size)
    param, *grads = rng.standard_normal((4, size)).astype(np.float32)
    assert_like_chainer(variant, param, grads)


@given(
    st.sampled_from(list(VARIANTS)),
    st.sampled_from([(7,), (), (3, 4), (2, 3, 1, 5), (0,), (200, 300)]),
    st.sampled_from([np.float32, np.float64, np.float16]),
    st.sampled_from("CF"),
    st.integers(0, 99),
    st.floats(1e-6, 1.0),
    st.floats(0.0, 0.99),
)
def test_arrays(variant, shape, dtype, order, seed, alpha, beta1):
    """Arrays of any shape, dtype and memory order get Chainer's bits."""
    rng = np.random.RandomState(seed)
    param, *grads = (np.asarray(rng.standard_normal(shape), dtype, order=order) for _ in range(3))
    assert_like_chainer(variant, param, grads, alpha=alpha, beta1=beta1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-40, 3e38, -0.0])
def test_what_is_not_usual(value):
    """NaN, infinity, what is not normal and what overflows in between come out as Chainer's."""
    rng = np.random.RandomState(0)
    param, *grads = rng.standard_normal((4, 50)).astype(np.float32)
    grads[0][3], param[5] = value, value
    for variant in VARIANTS:
        assert_like_chainer(variant, param, grads)


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {"alpha": np.float64(0.1)},
        {"alpha": np.float32(0.1)},
        {"alpha": 1},
        {"beta2": np.float64(0.9)},
        {"eps": np.float64(1e-3)},
    ],
)
def test_numbers(hyperparameters):
    """Hyperparameters that are not Python's numbers are computed with as Chainer does."""
    rng = np.random.RandomState(1)
    param, *grads = rng.standard_normal((3, 100)).astype(np.float32)
    for variant in ("Adam", "AMSBound"):
        assert_like_chainer(variant, param, grads, **hyperparameters)


@pytest.mark.parametrize("name", ["chainer", "numpy"])
def test_nothing_to_update(name):
    """Without a gradient nothing is changed, and an eps that is none is refused."""
    link = chainer.Link()
    with link.init_scope():
        link.w = chainer.Parameter(np.ones(3, np.float32))
        link.late = chainer.Parameter()
    optimizer = chainer.optimizers.Adam().setup(link)
    link.cleargrads()
    with kernels.use(name):
        optimizer.update()
        np.testing.assert_array_equal(link.w.array, 1)
        link.w.grad = np.ones(3, np.float32)
        optimizer.eps = 1e-60
        with pytest.raises((ValueError, AttributeError)):  # Chainer fails to name the dtype
            optimizer.update()
