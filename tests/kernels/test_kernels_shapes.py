"""Shapes and axes that do not fit each other: NumPy repeats values in Chainer's code, or refuses them."""

from __future__ import annotations

import chainer
import chainer.functions as F
import numpy as np
import pytest

from chainer_dist import kernels

# Nothing here knows of ranks.
pytestmark = [pytest.mark.mpi_skip, pytest.mark.usefixtures("one_thread")]

NAMES = ["numpy", "onednn"]


def draw(*shape):
    """Return random numbers; four dimensions have channels last in memory."""
    array = np.random.RandomState(0).standard_normal(shape).astype(np.float32)
    return np.moveaxis(np.moveaxis(array, 1, -1).copy(), -1, 1) if len(shape) == 4 else array


def outcome(name, function):
    """Return arrays, or the type of the error that came instead."""
    with kernels.use(name):
        try:
            return function()
        except Exception as error:  # noqa: BLE001 - whichever Chainer raises
            return type(error)


def assert_same(name, function):
    """Assert that kernels return what Chainer returns, or raise what it raises."""
    wanted, found = (outcome(each, function) for each in ("chainer", name))
    if isinstance(wanted, type):
        assert found is wanted
    else:
        for one, other in zip(wanted, found):
            np.testing.assert_allclose(other, one, 1e-3, 1e-4)


# Functions, and the shapes of their inputs.
INPUTS = {
    "linear": (F.linear, [(64, 300), (400, 200)]),
    "linear, bias": (F.linear, [(64, 300), (400, 300), (1,)]),
    "linear, biases": (F.linear, [(64, 300), (400, 300), (399,)]),
    "linear, matrix of biases": (F.linear, [(64, 300), (400, 300), (64, 400)]),
    "matmul": (F.matmul, [(64, 300), (400, 300)]),
    "matmul of stacks": (F.matmul, [(4, 100, 300), (4, 200, 300)]),
    "convolution, bias": (F.convolution_2d, [(4, 16, 9, 9), (24, 16, 3, 3), (1,)]),
    "convolution, biases": (F.convolution_2d, [(4, 16, 9, 9), (24, 16, 3, 3), (7,)]),
    "convolution of one position": (F.convolution_2d, [(4, 16, 9, 9), (24, 16, 1, 1), (1,)]),
    "convolution, dimensions": (F.convolution_2d, [(4, 16, 9, 9), (24, 16, 3)]),
    "convolution of too little": (F.convolution_nd, [(4, 16, 2, 2), (24, 16, 3, 3)]),
    "convolution, padding": (
        lambda x, w: F.convolution_2d(x, w, pad=-1),
        [(4, 16, 9, 9), (24, 16, 3, 3)],
    ),
    "transposed convolution, padding": (
        lambda x, w: F.deconvolution_nd(x, w, pad=-1),
        [(4, 16, 9, 9), (16, 24, 3, 3)],
    ),
    "maximum pooling, padding": (lambda x: F.max_pooling_2d(x, 3, pad=-1), [(3, 4, 9, 9)]),
    "unpooling, padding": (lambda x: F.unpooling_2d(x, 3, pad=-1), [(2, 3, 6, 6)]),
    "layer normalization": (F.layer_normalization, [(300, 200), (1,), (1,)]),
    "layer normalization, few": (F.layer_normalization, [(300, 200), (100,), (100,)]),
    "layer normalization, more": (F.layer_normalization, [(30, 2, 3), (3,), (3,)]),
    "group normalization": (
        lambda x, gamma, beta: F.group_normalization(x, 4, gamma, beta),
        [(2, 16, 40, 40), (1,), (1,)],
    ),
    "average pooling": (lambda x: F.average_pooling_2d(x, 2), [(3, 4, 5)]),
    "softmax": (lambda x: F.softmax(x, axis=2), [(100, 100)]),
    "softmax, axis of NumPy": (lambda x: F.softmax(x, axis=np.int64(0)), [(100, 99)]),
    "log_softmax": (lambda x: F.log_softmax(x, axis=-3), [(100, 100)]),
    "sum": (lambda x: F.sum(x, axis=2), [(200, 100)]),
    "sum, an axis twice": (lambda x: F.sum(x, axis=(0, -2)), [(200, 100)]),
    "eps of batch normalization": (
        lambda *inputs: F.batch_normalization(*inputs, eps=np.array(1e-3)),
        [(3, 4, 5), (4,), (4,)],
    ),
    "cross entropy": (
        lambda x: F.softmax_cross_entropy(x, np.zeros(1, np.int32)),
        [(100, 100)],
    ),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize("case", INPUTS.values(), ids=INPUTS)
def test_inputs(case, checks, name):
    """Chainer lets some pass even where it checks types, and anything where it does not."""
    function, shapes = case
    inputs = [draw(*shape) for shape in shapes]
    with chainer.using_config("type_check", checks):
        assert_same(name, lambda: [function(*inputs).array])


# Functions, the shapes of their inputs, and shapes of gradients that are not those of their outputs.
GRADIENTS = {
    "leaky_relu": (F.leaky_relu, [(300, 200)], [(1, 200), (150, 200)]),
    "tanh": (F.tanh, [(300, 200)], [(1, 200), (300, 1)]),
    "softmax": (F.softmax, [(300, 200)], [(1, 200), (300, 1), (150, 200)]),
    "log_softmax": (F.log_softmax, [(300, 200)], [(1, 200), (300, 1), (150, 200)]),
    "linear": (F.linear, [(300, 200), (400, 200), (400,)], [(150, 400), (600, 400)]),
    "lstm": (lambda c, x: F.lstm(c, x)[0], [(5, 3), (5, 12)], [(5, 1), (1, 3)]),
    "weights of a convolution": (
        lambda w: F.convolution_2d(draw(4, 16, 9, 9), w),
        [(24, 16, 3, 3)],
        [(1, 24, 7, 7), (4, 24, 6, 6)],
    ),
    "weights of one position": (
        lambda w: F.convolution_2d(draw(4, 16, 9, 9), w),
        [(24, 16, 1, 1)],
        [(1, 24, 9, 9), (4, 24, 8, 8)],
    ),
    "max pooling": (
        lambda x: F.max_pooling_2d(x, 2),
        [(4, 16, 8, 8)],
        [(1, 16, 4, 4), (4, 16, 1, 1)],
    ),
    "average pooling": (
        lambda x: F.average_pooling_2d(x, 2),
        [(4, 16, 8, 8)],
        [(1, 16, 4, 4), (4, 16, 1, 1)],
    ),
    "batch normalization": (
        F.batch_normalization,
        [(4, 16, 9, 9), (16,), (16,)],
        [(1, 16, 9, 9), (4, 16, 1, 1)],
    ),
    "layer normalization": (
        F.layer_normalization,
        [(300, 200), (200,), (200,)],
        [(1, 200), (300, 1)],
    ),
    "group normalization": (
        lambda x, gamma, beta: F.group_normalization(x, 4, gamma, beta),
        [(2, 16, 40, 40), (16,), (16,)],
        [(1, 16, 40, 40), (2, 16, 1, 1)],
    ),
    "local response normalization": (
        F.local_response_normalization,
        [(4, 16, 9, 9)],
        [(1, 16, 9, 9), (4, 1, 9, 9)],
    ),
    "cross entropy": (
        lambda x: F.softmax_cross_entropy(x, np.zeros(300, np.int32)),
        [(300, 200)],
        [(1,), (300,), (300, 1)],
    ),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients(case, name):
    """A function of one's own may return a gradient whose values NumPy repeats."""
    function, shapes, gradients = case
    for gradient in gradients:
        gy = chainer.Variable(draw(*gradient))

        def differentiate(gy=gy):
            inputs = [chainer.Variable(draw(*shape)) for shape in shapes]
            found = chainer.grad([function(*inputs)], inputs, [gy])
            return [each.array for each in found]

        assert_same(name, differentiate)
