"""Activations, linear layers, normalization of layers, losses, embeddings and dropout, against Chainer in float64."""

from __future__ import annotations

from unittest import mock

import chainer
import chainer.functions as F
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import kernels
from chainer_dist.kernels import add
from kernel_cases import assert_like_chainer, draw_array, outcome

# Nothing here knows of ranks.
pytestmark = [pytest.mark.mpi_skip, pytest.mark.usefixtures("one_thread")]

NAMES = ["numpy", "onednn"]

names = st.sampled_from(NAMES)

ACTIVATIONS = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "leaky_relu that falls": lambda x: F.leaky_relu(x, slope=-0.5),
    "leaky_relu that is relu": lambda x: F.leaky_relu(x, slope=0.0),
    "elu": F.elu,
    "elu that falls": lambda x: F.elu(x, alpha=-0.5),
    "sigmoid": F.sigmoid,
    "tanh": F.tanh,
    "softmax": lambda x: F.softmax(x, axis=-1) if x.ndim else x * 1,
    "softmax of the first axis": lambda x: F.softmax(x, axis=0) if x.ndim else x * 1,
    "log_softmax": lambda x: F.log_softmax(x, axis=x.ndim // 2) if x.ndim else x * 1,
}

shapes = st.sampled_from(
    [
        (),
        (3,),
        (2, 3),
        (4096,),
        (70, 70),
        (3, 20, 9, 9),
        (2, 16, 150),
        (9, 5, 7, 4, 6),
        (2, 20, 30, 30),
        (2,) * 13,
    ]
)


@st.composite
def arrays_of(draw, shapes):
    """Return an array of one of the shapes."""
    return draw_array(draw, draw(shapes))


@pytest.mark.parametrize("function", ACTIVATIONS.values(), ids=ACTIVATIONS)
@given(x=arrays_of(shapes), name=names)
def test_activation(function, x, name):
    """Outputs, gradients and second gradients are Chainer's to rounding."""
    assert_like_chainer(function, [x], name=name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("function", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0])
def test_what_is_not_finite_stays_in_activations(function, value, name):
    """NaN and infinity come out where Chainer lets them."""
    x = np.random.RandomState(0).standard_normal((190, 190)).astype(np.float32)
    x[5, 7] = value
    outcomes = []
    with np.errstate(all="ignore"):
        for each in ("chainer", name):
            with kernels.use(each):
                outcomes.append(outcome(function, [x], double=False))
    if np.isnan(value):  # where there is no slope, any gradient will do
        for _, gradient in outcomes:
            gradient[5] = gradient[:, 7] = 0
    for expected, found in zip(*outcomes):
        np.testing.assert_allclose(found, expected, 2e-5, 2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_are_not_finite_stay(name):
    """NaN and infinity in a gradient are handed on as Chainer hands them on."""
    x = np.random.RandomState(0).standard_normal((190, 190)).astype(np.float32)
    gy = np.ones_like(x)
    gy[3, 4:8] = np.nan, np.inf, -np.inf, np.nan
    for function in ACTIVATIONS.values():
        found = []
        with np.errstate(all="ignore"):
            for each in ("chainer", name):
                with kernels.use(each):
                    variable = chainer.Variable(x)
                    (g,) = chainer.grad([function(variable)], [variable], [chainer.Variable(gy)])
                    found.append(g.array)
        np.testing.assert_allclose(found[1], found[0], 2e-5, 2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [np.nan, -np.nan])
@pytest.mark.parametrize("size", [1 << 15, (1 << 15) + 5])
def test_relu_keeps_nan_of_either_sign(name, value, size):
    """NaN comes out of ReLU wherever it is, so that it is seen that training failed."""
    for place in (0, size // 2, size - 1):
        x = np.full(size, -1, np.float32)
        x[place] = value
        with kernels.use(name):
            y = F.relu(x).array
        assert np.flatnonzero(y != 0).tolist() == [place]
        assert np.isnan(y[place])


@given(st.sampled_from([(3,), (40, 50), (3, 20, 30, 30)]), st.integers(1, 2), st.data())
def test_sum_of_two(shape, threads, data):
    """Branches that meet, by one thread and by several, are added as by NumPy, bit for bit."""
    a, b = (draw_array(data.draw, shape) for _ in range(2))
    counted = mock.patch.object(add, "n_threads", return_value=threads)
    with counted, mock.patch.object(add, "_FEW", 1000):
        assert_like_chainer(lambda a, b: a + b, [a, b])
        with kernels.use("onednn"):
            np.testing.assert_array_equal((chainer.Variable(a) + b).array, a + b)


@st.composite
def linears(draw):
    """Return the arrays of a linear layer, with a bias or without."""
    n, inputs, outputs = (draw(st.sampled_from([1, 2, 5, 33, 64, 130, 300])) for _ in range(3))
    arrays = [draw_array(draw, (n, inputs)), draw_array(draw, (outputs, inputs))]
    if draw(st.booleans()):
        arrays.append(draw_array(draw, (outputs,)))
    return arrays


@given(linears(), names, st.booleans())
def test_linear(arrays, name, double):
    """A linear layer of any size and arrangement is Chainer's to rounding, differentiated once or twice."""
    assert_like_chainer(F.linear, arrays, name=name, double=double)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("places", [(0,), (1,), (0, 2), (1, 2)])
def test_some_gradients_of_a_linear_layer(places, name):
    """Inputs that are arrays need no gradient, as the data of a first layer."""
    rng = np.random.RandomState(0)
    arrays = [rng.standard_normal(shape).astype("f") for shape in ((300, 200), (100, 200), (100,))]

    def function(*variables):
        inputs = [each.astype(variables[0].dtype) for each in arrays]
        for place, variable in zip(places, variables):
            inputs[place] = variable
        return F.linear(*inputs)

    given_arrays = [arrays[place] for place in places]
    assert_like_chainer(function, given_arrays, name=name, double=False, tolerance=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_linear_layer_of_mixed_dtypes(name):
    """Gradients have the dtypes of what they belong to."""
    rng = np.random.RandomState(0)
    x = chainer.Variable(rng.standard_normal((40, 30)).astype(np.float32))
    w = chainer.Variable(rng.standard_normal((20, 30)).astype(np.float16))
    gradients = []
    for choice in ("chainer", name):
        x.cleargrad(), w.cleargrad()
        with kernels.use(choice):
            F.sum(F.linear(x, w) ** 2).backward()
        gradients.append((x.grad, w.grad))
    for ours, chainers in zip(*gradients):
        assert ours.dtype == chainers.dtype
        np.testing.assert_allclose(ours, chainers, 1e-3, 1e-2)


@given(st.sampled_from([(5000, 7), (3, 20, 30, 30), (4, 8, 600), (2, 3)]), st.data(), names)
def test_sum(shape, data, name):
    """Sums over all but channels, and others."""
    axis = data.draw(
        st.sampled_from([None, 0, (0, -1), tuple(i for i in range(len(shape)) if i != 1)])
    )
    x = draw_array(data.draw, shape)
    assert_like_chainer(lambda x: F.sum(x, axis), [x], name=name, tolerance=1e-4)


# Stacks of the first matrices and of the second ones.
stacks = st.sampled_from([(), (2,), (5, 3), (*[1] * 10, 5)]).map(lambda stack: (stack, stack))
stacks |= st.sampled_from([((), (3,)), ((4, 3), (3,)), ((2, 1), (1, 3)), ((1,), (5,))])
stacks = stacks.flatmap(st.permutations)


@given(stacks, st.data(), names, st.booleans())
def test_matmul(stacks, data, name, double):
    """Products of matrices and of stacks, transposed or not, can be differentiated once or twice."""
    m, k, n = (data.draw(st.sampled_from([1, 3, 64])) for _ in range(3))
    transa, transb = data.draw(st.booleans()), data.draw(st.booleans())
    shapes = (k, m) if transa else (m, k), (n, k) if transb else (k, n)
    arrays = [draw_array(data.draw, (*stack, *shape)) for stack, shape in zip(stacks, shapes)]
    assert_like_chainer(
        lambda a, b: F.matmul(a, b, transa, transb), arrays, name=name, double=double
    )


@pytest.mark.parametrize("size", [3, 1100])
def test_matmul_of_vectors(size):
    """Of a matrix and a vector, or of two vectors, however large."""
    rng = np.random.RandomState(0)
    matrix = rng.standard_normal((size, size)).astype(np.float32)
    vector = rng.standard_normal(size).astype(np.float32)
    for factors in ((matrix, vector), (vector, matrix), (vector, vector)):
        assert_like_chainer(F.matmul, factors, double=False, tolerance=1e-4)


@st.composite
def rows(draw):
    """Return a matrix, and two arrays of a value for each of its columns."""
    n, units = draw(st.integers(1, 9)), draw(st.sampled_from([2, 7, 16, 100]))
    return [draw_array(draw, (n, units)), draw_array(draw, (units,)), draw_array(draw, (units,))]


@given(rows(), names)
def test_layer_normalization(arrays, name):
    """Layer normalization can be differentiated twice."""
    assert_like_chainer(F.layer_normalization, arrays, name=name, tolerance=2e-4)


@given(rows(), names)
def test_layer_normalization_differentiated_once(arrays, name):
    """Its gradient as one operation is that of the graph."""
    assert_like_chainer(F.layer_normalization, arrays, name=name, double=False, tolerance=2e-4)


def test_layer_normalization_of_one_gradient_only():
    """Parameters need not be differentiated."""
    x = np.random.RandomState(0).standard_normal((6, 16)).astype(np.float32)

    def function(x):
        return F.layer_normalization(x, np.ones(16, x.dtype), np.zeros(16, x.dtype))

    assert_like_chainer(function, [x], double=False)


@st.composite
def labelled(draw):
    """Return scores, of images or not, and classes, some of which are to be ignored."""
    n, classes = draw(st.integers(1, 40)), draw(st.sampled_from([1, 2, 10, 5000]))
    several = classes <= 10 and draw(st.booleans())
    sizes = draw(st.sampled_from([(3,), (30, 40), (2, 3, 4)])) if several else ()
    x = draw_array(draw, (n, classes, *sizes), scale=draw(st.sampled_from([1.0, 50.0])))
    t = np.random.RandomState(n).randint(-1, classes, (n, *sizes)).astype(np.int32)
    return x, t


@given(labelled(), st.booleans(), st.sampled_from(["mean", "no"]), names)
def test_softmax_cross_entropy(case, normalize, reduce, name):
    """The loss of scores of any size is Chainer's to rounding."""
    x, t = case

    def function(x):
        return F.softmax_cross_entropy(x, t, normalize, reduce=reduce)

    assert_like_chainer(function, [x], name=name, double=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "places", [(3, 7), (3, 0), (3, slice(None)), (slice(None), slice(1, None))]
)
@pytest.mark.parametrize("sizes", [(), (3, 5)])
def test_what_is_not_finite_stays_in_softmax_cross_entropy(name, value, places, sizes):
    """NaN and infinity come out where Chainer lets them, of the label's score or another."""
    x = np.random.RandomState(0).standard_normal((50, 90, *sizes)).astype(np.float32)
    x[(*places, *[1] * len(sizes))] = value
    t = np.zeros((50, *sizes), np.int32)
    outcomes = []
    with np.errstate(all="ignore"):
        for each in ("chainer", name):
            with kernels.use(each):
                outcomes.append(
                    outcome(
                        lambda x: F.softmax_cross_entropy(x, t, reduce="no"),
                        [x],
                        double=False,
                    )
                )
    for expected, found in zip(*outcomes):
        np.testing.assert_allclose(found, expected, 2e-5, 2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_softmax_cross_entropy_of_large_scores(name):
    """Labels of no measurable probability have a finite loss, and sums of scores may overflow."""
    rng = np.random.RandomState(0)
    x = 300 * rng.standard_normal((20, 400)).astype(np.float32)
    t = rng.randint(0, 400, 20).astype(np.int32)
    t[:3] = -1, 5, x[2].argmax()
    x[1, 5] = -1e9
    huge = x.copy()
    huge[4] = 2e38 + 1e38 * np.abs(x[4]) / np.abs(x[4]).max()
    for each in (x, huge):
        assert_like_chainer(
            lambda x: F.softmax_cross_entropy(x, t, reduce="no"), [each], name=name, double=False
        )


@pytest.mark.parametrize("name", NAMES)
def test_sums_that_overflow_are_no_error(name):
    """Scores have a loss though their sum overflows, where NumPy raises errors for what overflows."""
    x = np.full((20, 400), 2e38, np.float32)
    x[:, 3] = 3e38
    with kernels.use(name), np.errstate(over="raise", invalid="raise"):
        loss = F.softmax_cross_entropy(x, np.full(20, 3, np.int32))
    assert loss.array == 0


@pytest.mark.parametrize("name", NAMES)
def test_softmax_cross_entropy_in_other_ways(name):
    """Its other options are right too, and a wrong label is refused in debug mode."""
    rng = np.random.RandomState(0)
    x = rng.standard_normal((4, 5)).astype(np.float32)
    images = rng.standard_normal((2, 5, 3, 3)).astype(np.float32)
    t = np.array([0, 4, -1, 2], np.int32)
    weights = rng.rand(5)
    ways = [
        (x, lambda x: F.softmax_cross_entropy(x, t, class_weight=weights.astype(x.dtype))),
        (x, lambda x: F.softmax_cross_entropy(x, t, ignore_label=4)),
        (x, lambda x: F.softmax_cross_entropy(x, t, cache_score=False)),
        (x, lambda x: F.softmax_cross_entropy(x, F.softmax(x).array)),
        (images, lambda x: F.softmax_cross_entropy(x, np.zeros((2, 3, 3), np.int32))),
    ]
    for given_x, function in ways:
        assert_like_chainer(function, [given_x], name=name, double=False)
    with (
        kernels.use(name),
        chainer.using_config("debug", True),
        pytest.raises(ValueError, match="label"),
    ):
        F.softmax_cross_entropy(x, t + 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_a_loss(value):
    """A loss of NaN or infinity is not hidden."""
    x = np.zeros((3, 4), np.float32)
    x[1, 2] = value
    t = np.array([0, 1, 2], np.int32)
    outcomes = []
    with np.errstate(all="ignore"):
        for each in ("chainer", "numpy"):
            with kernels.use(each):
                outcomes.append(outcome(lambda x: F.softmax_cross_entropy(x, t), [x], double=False))
    for expected, found in zip(*outcomes):
        np.testing.assert_allclose(found, expected, 1e-6)


@st.composite
def words(draw):
    """Return numbers of words, and vectors of all words."""
    n_words, units = draw(st.integers(1, 30)), draw(st.integers(1, 5))
    shape = draw(st.sampled_from([(1,), (7,), (4, 6), (2, 3, 4)]))
    ids = np.random.RandomState(draw(st.integers(0, 99))).randint(0, n_words, shape)
    return ids.astype(draw(st.sampled_from([np.int32, np.int64]))), draw_array(
        draw, (n_words, units)
    )


@given(words(), st.sampled_from([None, -1, 0, 1]), names)
def test_embedding(case, ignore_label, name):
    """The gradient of an embedding is the sum over equal words."""
    ids, w = case

    def function(w):
        return F.embed_id(ids, w, ignore_label)

    assert_like_chainer(function, [w], name=name)


@pytest.mark.parametrize("n_words", [1, 3, 300, 5000])
@pytest.mark.parametrize("skew", [1, 4])
def test_embedding_of_large_vectors(n_words, skew):
    """Of some words there is one vector, of some a few, and of some there are hundreds."""
    rng = np.random.RandomState(0)
    ids = (n_words * rng.uniform(size=(4, 250)) ** skew).astype(np.int32)
    w = rng.standard_normal((n_words, 64)).astype(np.float32)
    assert_like_chainer(lambda w: F.embed_id(ids, w, 0), [w], name="numpy", tolerance=1e-4)


def test_embedding_of_words_counted_from_the_end():
    """Negative numbers of words mean the same as in Chainer."""
    ids = np.array([-1, 2, -1, 4], np.int32)
    w = np.arange(10, dtype=np.float32).reshape(5, 2)
    assert_like_chainer(lambda w: F.embed_id(ids, w), [w], name="numpy")


@given(arrays_of(shapes.filter(len)), st.sampled_from([0.0, 0.3, 0.9]))
def test_dropout_draws_what_chainer_draws(x, ratio):
    """The same seed drops the same values, and leaves the same state."""
    outcomes = []
    for name in ("chainer", "numpy"):
        np.random.seed(5)
        with kernels.use(name):
            outcomes.append(outcome(lambda x: F.dropout(x, ratio), [x], double=True))
        outcomes[-1].append(np.random.rand(3))
    for expected, found in zip(*outcomes):
        np.testing.assert_array_equal(found, expected)
