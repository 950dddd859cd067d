"""Convolutions, pooling and normalization by oneDNN, against Chainer in float64."""

from __future__ import annotations

from unittest import mock

import chainer
import chainer.functions as F
import numpy as np
import pytest
import threadpoolctl
from chainer.utils.conv import get_conv_outsize, get_deconv_outsize
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import kernels
from chainer_dist.kernels import group_normalization, pooling
from chainer_dist.kernels.unpooling import _axes, is_shortened
from kernel_cases import arrange, assert_like_chainer, draw_array

# Nothing here knows of ranks.
pytestmark = [pytest.mark.mpi_skip, pytest.mark.usefixtures("one_thread")]


@st.composite
def convolutions(draw, transposed=False):
    """Return a convolution's dimensions, arrays and options."""
    ndim = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    each = [groups * draw(st.integers(1, 3)) for _ in range(2)]
    size, stride, pad, dilate = (
        [draw(st.integers(low, high)) for _ in range(ndim)]
        for low, high in ((1, 3), (1, 3), (0, 2), (1, 2))
    )
    outer = [draw(st.integers(1, 6)) for _ in range(ndim)]
    options = {"stride": stride, "pad": pad, "dilate": dilate, "groups": groups}
    outs = zip(outer, size, stride, pad, dilate)
    if transposed:
        fits = all(get_deconv_outsize(n, k, s, p, d=d) > 0 for n, k, s, p, d in outs)
        w = (each[0], each[1] // groups, *size)
    else:
        options["cover_all"] = draw(st.booleans())
        fits = all(
            get_conv_outsize(n, k, s, p, options["cover_all"], d) > 0 for n, k, s, p, d in outs
        )
        w = (each[1], each[0] // groups, *size)
    if not fits:
        outer = [n + (k - 1) * d for n, k, d in zip(outer, size, dilate)]
        options["pad"] = [0] * ndim
    arrays = [
        draw_array(draw, (draw(st.integers(1, 3)), each[0], *outer)),
        draw_array(draw, w),
    ]
    if draw(st.booleans()):
        arrays.append(draw_array(draw, (each[1],)))
    return (
        ndim,
        arrays,
        {k: v if k in ("groups", "cover_all") else tuple(v) for k, v in options.items()},
    )


def _without_lists(ndim, options, function_2d, function_nd, x, w, b=None):
    if ndim == 2:
        return function_2d(x, w, b, **options)
    return function_nd(x, w, b, **options)


@given(convolutions())
def test_convolution(case):
    """Convolutions in 1, 2 and 3 dimensions are Chainer's to rounding."""
    ndim, arrays, options = case

    def function(*inputs):
        return _without_lists(ndim, options, F.convolution_2d, F.convolution_nd, *inputs)

    assert_like_chainer(function, arrays)


@given(convolutions(transposed=True))
def test_transposed_convolution(case):
    """So are transposed ones."""
    ndim, arrays, options = case

    def function(*inputs):
        return _without_lists(ndim, options, F.deconvolution_2d, F.deconvolution_nd, *inputs)

    assert_like_chainer(function, arrays)


@given(st.data(), st.booleans())
def test_windows_of_one_position(data, transposed):
    """They are products of matrices, whether the stride leaves positions out or not."""
    ndim = data.draw(st.integers(1, 3))
    stride = [data.draw(st.integers(1, 3)) for _ in range(ndim)]
    sizes = [data.draw(st.integers(1, 7)) for _ in range(ndim)]
    inputs, outputs = (data.draw(st.integers(1, 20)) for _ in range(2))
    x = draw_array(data.draw, (data.draw(st.integers(1, 3)), inputs, *sizes))
    x = data.draw(st.sampled_from([x, arrange(x, "channels last")]))
    w = (inputs, outputs) if transposed else (outputs, inputs)
    arrays = [x, draw_array(data.draw, (*w, *[1] * ndim)), draw_array(data.draw, (outputs,))]
    if transposed:
        more = [data.draw(st.integers(0, s - 1)) for s in stride]
        options = {"outsize": [s * (n - 1) + 1 + m for s, n, m in zip(stride, sizes, more)]}
    else:
        options = {"cover_all": data.draw(st.booleans())}
    function = F.deconvolution_nd if transposed else F.convolution_nd
    assert_like_chainer(lambda *inputs: function(*inputs, stride=stride, **options), arrays)


@given(st.data(), st.sampled_from([1, -3, 2]), st.sampled_from([1, 30]))
def test_concatenated_and_split(data, axis, size):
    """Channels are put together and taken apart as by Chainer, whatever part a convolution reads afterwards."""
    counts = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    shapes = [[2, 5, size, size] for _ in counts]
    for shape, count in zip(shapes, counts):
        shape[axis] = count
    arrays = [draw_array(data.draw, shape) for shape in shapes]
    ends = np.cumsum(counts)[:-1]

    def function(*inputs):
        parts = F.split_axis(F.concat(inputs, axis) * inputs[0].dtype.type(2), ends, axis)
        return F.concat(parts[::-1], axis)

    assert_like_chainer(function, arrays)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolution_of_a_part_of_the_channels(threads, transposed):
    """Input and gradient may be parts of an array with channels last, and are not copied into another order."""
    rng = np.random.RandomState(0)
    wide = arrange(rng.standard_normal((2, 24, 40, 40)).astype(np.float32), "channels last")
    w = rng.standard_normal((16, 16, 2, 2)).astype(np.float32)
    convolve = F.deconvolution_2d if transposed else F.convolution_2d

    def function(part, w):
        return F.concat([convolve(part, w, stride=2), convolve(part, w, stride=2)])

    with threadpoolctl.threadpool_limits(threads):
        assert_like_chainer(function, [wide[:, 8:], w])
        with mock.patch.object(np, "ascontiguousarray", side_effect=np.asarray) as copies:
            function(wide[:, 8:], w)
    assert all(call.args[0].flags.c_contiguous for call in copies.call_args_list)


@st.composite
def poolings(draw):
    """Return an array to pool, and window sizes, strides and padding."""
    ndim = draw(st.integers(1, 3))
    size = [draw(st.integers(1, 3)) for _ in range(ndim)]
    stride = tuple(draw(st.integers(1, 3)) for _ in range(ndim))
    pad = tuple(draw(st.integers(0, k - 1)) for k in size)
    sizes = [k + draw(st.integers(0, 4)) for k in size]
    x = draw_array(draw, (draw(st.integers(1, 3)), draw(st.integers(1, 5)), *sizes))
    return x, tuple(size), stride, pad


@given(poolings(), st.booleans())
def test_max_pooling(case, cover_all):
    """The maximum of windows and its gradients are Chainer's."""
    x, size, stride, pad = case

    def function(x):
        return F.max_pooling_nd(x, size, stride, pad, cover_all=cover_all)

    assert_like_chainer(function, [x])


@given(poolings())
def test_max_pooling_tells_the_same_indexes(case):
    """Unpooling and others use the indexes of the largest values."""
    x, size, stride, pad = case
    indexes = {}
    for name in ("chainer", "onednn"):
        with kernels.use(name):
            _, indexes[name] = F.max_pooling_nd(x, size, stride, pad, return_indices=True)
    assert indexes["onednn"].dtype == indexes["chainer"].dtype
    np.testing.assert_array_equal(indexes["chainer"], indexes["onednn"])
    assert_like_chainer(
        lambda x: F.max_pooling_nd(x, size, stride, pad, return_indices=True)[0], [x]
    )


def test_maxima_of_values_whose_sum_overflows():
    """They are finite, so oneDNN finds them."""
    x = arrange(np.full((2, 3, 8, 8), 3e38, np.float32), "channels last")
    x[0, 0, 0, 0] = -3e38
    with (
        kernels.use("onednn"),
        mock.patch.object(pooling, "_forward", wraps=pooling._forward) as used,
    ):
        y = F.max_pooling_2d(x, 2).array
    assert used.called
    np.testing.assert_array_equal(y, np.full((2, 3, 4, 4), 3e38, np.float32))


def test_the_first_of_equal_values_has_the_gradient():
    """Of equal values the first counts, as in Chainer."""
    x = np.zeros((2, 3, 4, 4), np.float32)
    assert_like_chainer(lambda x: F.max_pooling_2d(x, 2), [x])


@given(poolings(), st.sampled_from([0, None]))
def test_average_pooling(case, pad_value):
    """Means of windows, with and without padding in them."""
    x, size, stride, pad = case

    def function(x):
        return F.average_pooling_nd(x, size, stride, pad, pad_value)

    assert_like_chainer(function, [x], double=pad_value == 0)  # Chainer's changes its input else


@given(poolings())
def test_average_pooling_2d(case):
    """The function for two dimensions is another one in Chainer."""
    x, size, stride, pad = case
    if len(size) == 2:
        assert_like_chainer(lambda x: F.average_pooling_2d(x, size, stride, pad), [x])


@st.composite
def batches(draw, least=2):
    """Return a batch of at least two values a channel, and two arrays of a value a channel."""
    ndim = draw(st.integers(0, 4))
    n, channels = draw(st.integers(least, 4)), draw(st.sampled_from([1, 3, 16, 20]))
    x = draw_array(draw, (n, channels, *(draw(st.integers(1, 4)) for _ in range(ndim))))
    return [x, draw_array(draw, (channels,)), draw_array(draw, (channels,))]


@given(batches(least=3))
def test_batch_normalization(arrays):
    """Outputs, gradients and running statistics are Chainer's to rounding."""
    _, gamma, _ = arrays
    statistics = {}

    def function(*inputs):
        mean, var = np.zeros(gamma.shape), np.ones(gamma.shape)
        y = F.batch_normalization(*inputs, eps=1e-2, running_mean=mean, running_var=var)
        statistics[y.dtype] = mean, var
        return y

    assert_like_chainer(function, arrays, tolerance=1e-4)
    for ours, chainers in zip(statistics[np.dtype("f")], statistics[np.dtype("d")]):
        np.testing.assert_allclose(ours, chainers, 1e-5, 1e-6)


@given(batches())
def test_batch_normalization_by_given_statistics(arrays):
    """Fixed statistics can be differentiated too."""
    x, gamma, beta = arrays
    variance = np.abs(gamma) + np.float32(0.1)

    def function(x, gamma, beta, mean, variance):
        return F.fixed_batch_normalization(x, gamma, beta, mean, variance)

    assert_like_chainer(function, [x, gamma, beta, beta.copy(), variance], tolerance=1e-4)


FUNCTIONS = {
    "convolution": lambda x: F.convolution_2d(x, np.ones((4, 3, 3, 3), np.float32), pad=1),
    "transposed convolution": lambda x: F.deconvolution_2d(x, np.ones((3, 4, 2, 2), np.float32)),
    "max pooling": lambda x: F.max_pooling_2d(x, 2),
    "average pooling": lambda x: F.average_pooling_2d(x, 2),
    "group normalization": lambda x: F.group_normalization(
        x, 3, np.ones(3, np.float32), np.zeros(3, np.float32)
    ),
    "local response normalization": F.local_response_normalization,
    "batch normalization": lambda x: F.batch_normalization(
        x, np.ones(3, np.float32), np.zeros(3, np.float32)
    ),
}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_is_not_finite_stays(function, value, monkeypatch):
    """NaN and infinity come out where Chainer lets them."""
    monkeypatch.setattr(group_normalization, "_FEW", 0)
    x = np.random.RandomState(0).standard_normal((2, 3, 6, 6)).astype(np.float32)
    x[1, 2, 3, 3] = value
    x = arrange(x, "channels last")
    with np.errstate(all="ignore"):
        with kernels.use("chainer"):
            expected = function(x).array
        with kernels.use("onednn"):
            found = function(x).array
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_dtypes_are_chainers(function, dtype):
    """float16 and float64 are computed by Chainer's own code."""
    x = np.random.RandomState(0).standard_normal((2, 3, 6, 6)).astype(dtype)
    outcomes = []
    for name in ("chainer", "onednn"):
        with kernels.use(name):
            outcomes.append(function(x).array)
    np.testing.assert_array_equal(*outcomes)
    assert outcomes[1].dtype == outcomes[0].dtype


@st.composite
def unpoolings(draw, ndims=(1, 3)):
    """Return an array to unpool, and window sizes, strides, padding and the size of the output if it is given."""
    ndim = draw(st.integers(*ndims))
    size = tuple(draw(st.integers(1, 3)) for _ in range(ndim))
    stride = tuple(draw(st.sampled_from([k, *range(1, 5)])) for k in size)
    pad = tuple(draw(st.integers(0, k - 1)) for k in size)
    cover_all = draw(st.booleans())
    large = [2 * k + s * draw(st.integers(0, 3)) for k, s in zip(size, stride)]
    windows = zip(large, size, stride, pad)
    sizes = [get_conv_outsize(n, k, s, p, cover_all) for n, k, s, p in windows]
    x = draw_array(draw, (draw(st.integers(1, 3)), draw(st.integers(1, 5)), *sizes))
    options = {"stride": stride, "pad": pad, "cover_all": cover_all}
    if draw(st.booleans()):
        options["outsize"] = tuple(large)
    return x, size, options


@pytest.mark.parametrize("name", ["numpy", "onednn"])
@given(unpoolings())
def test_unpooling(name, case):
    """Values are spread over windows that touch, overlap or leave gaps, as Chainer does."""
    x, size, options = case
    assert_like_chainer(lambda x: F.unpooling_nd(x, size, **options), [x], name=name)
    function = chainer.functions.pooling.unpooling_2d.Unpooling2D
    if len(size) == 2 and not is_shortened(_axes(function(size, **options), x.shape[2:])):
        assert_like_chainer(lambda x: F.unpooling_2d(x, size, **options), [x], name=name)


def test_unpooling_that_chainer_shortens():
    """What Chainer makes of some paddings stays as it is, its failing gradient too."""
    x = np.random.RandomState(0).standard_normal((1, 1, 5, 5)).astype(np.float32)
    outcomes = []
    for name in ("chainer", "numpy"):
        with kernels.use(name):
            outcomes.append(F.unpooling_2d(chainer.Variable(x), 3, pad=2, outsize=(9, 9)))
            with pytest.raises(ValueError, match="broadcast"):
                F.sum(outcomes[-1]).backward()
    np.testing.assert_array_equal(*[each.array for each in outcomes])


@pytest.mark.parametrize("name", ["numpy", "onednn"])
@given(unpoolings(ndims=(2, 2)), st.data())
def test_upsampling(name, case, data):
    """Values go to the indexes of maxima, also where these share a place or lie outside."""
    x, size, options = case
    rng = np.random.RandomState(data.draw(st.integers(0, 99)))
    indexes = rng.randint(0, np.prod(size), x.shape).astype(data.draw(st.sampled_from("bil")))
    indexes = arrange(indexes, data.draw(st.sampled_from(["dense", "channels last"])))
    assert_like_chainer(lambda x: F.upsampling_2d(x, indexes, size, **options), [x], name=name)


@st.composite
def neighbours(draw):
    """Return images, and options of local response normalization."""
    channels = draw(st.sampled_from([1, 2, 3, 5, 15, 16, 17, 20, 31, 33, 64, 100]))
    shape = (draw(st.integers(1, 3)), channels, *(draw(st.integers(1, 4)) for _ in range(2)))
    x = draw_array(draw, shape, scale=draw(st.sampled_from([1.0, 50.0])))
    options = {
        "n": draw(st.sampled_from([5, 5, 4, 3, 1])),
        "k": draw(st.sampled_from([2, 1.0])),
        "alpha": draw(st.sampled_from([1e-4, 0.1])),
        "beta": draw(st.sampled_from([0.75, 0.75, 0.5])),
    }
    return x, options


@given(neighbours())
def test_local_response_normalization(case):
    """It is Chainer's to rounding; Chainer cannot differentiate it twice."""
    x, options = case
    options["n"] = min(options["n"], 2 * x.shape[1] - 1)  # Chainer fails for fewer channels

    def function(x):
        return F.local_response_normalization(x, **options)

    assert_like_chainer(function, [x], double=False)


@pytest.mark.parametrize("value", [1e8, 1e9, 1e15])
def test_local_response_normalization_of_large_values(value):
    """They are not zero where their squares are finite, but their powers would not be."""
    x = np.zeros((1, 16, 2, 2), np.float32)
    x[0, 3] = value
    found = []
    for name in ("chainer", "onednn"):
        with kernels.use(name):
            found.append(F.local_response_normalization(x).array)
    np.testing.assert_allclose(*found, 1e-4)


@pytest.mark.parametrize("double", [False, True])
@given(batches(least=1), st.data())
def test_group_normalization(double, arrays, data):
    """Groups of channels are normalized as Chainer does, however few values there are."""
    x, gamma, beta = arrays
    if data.draw(st.booleans()):
        x = arrange(x, "channels last")
    channels = x.shape[1]
    groups = data.draw(st.sampled_from([n for n in range(1, channels + 1) if channels % n == 0]))

    def function(x, gamma, beta):
        return F.group_normalization(x, groups, gamma, beta, eps=1e-2)

    with mock.patch.object(group_normalization, "_FEW", 0):
        assert_like_chainer(function, [x, gamma, beta], double=double, tolerance=1e-4)


@pytest.mark.parametrize(("forward", "backward"), [("chainer", "onednn"), ("onednn", "chainer")])
def test_group_normalization_differentiated_with_another_choice(forward, backward):
    """What the one keeps for the gradient the other can take."""
    rng = np.random.RandomState(0)
    x = arrange(rng.standard_normal((3, 8, 50, 50)).astype(np.float32), "channels last")
    gamma, beta = rng.standard_normal((2, 8)).astype(np.float32)

    def gradients(forward, backward):
        inputs = [chainer.Variable(each) for each in (x, gamma, beta)]
        with kernels.use(forward):
            y = F.group_normalization(inputs[0], 4, *inputs[1:])
        y.grad = x
        with kernels.use(backward):
            y.backward()
        return [each.grad for each in inputs]

    found = zip(gradients(forward, backward), gradients("chainer", "chainer"))
    for got, want in found:
        np.testing.assert_allclose(got, want, 1e-3, 1e-3)
