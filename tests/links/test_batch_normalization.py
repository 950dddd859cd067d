"""Batch normalization over all ranks, against Chainer on the concatenated batch."""

from __future__ import annotations

import copy
import pickle
import warnings
from unittest import mock

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import serializers
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import RankMismatchError
from chainer_dist.functions.batch_normalization import get_communication_backend
from chainer_dist.kernels import channels
from chainer_dist.links import MultiNodeBatchNormalization
from kernel_cases import arrange

# Shape of a sample, and axes: channels are what is left.
LAYOUTS = {
    "vectors": ((5,), None),
    "images": ((3, 4, 2), None),
    "channels last": ((4, 2, 3), (0, 1, 2)),
    "a statistic each pixel": ((2, 3, 2), 0),
    "time and features": ((4, 3), (0,)),
}


def channels_of(layout):
    """Return the shape of the channels of a layout."""
    shape, axis = LAYOUTS[layout]
    if axis is None:
        return shape[:1]
    axis = (axis,) if isinstance(axis, int) else axis
    return tuple(length for i, length in enumerate(shape, start=1) if i not in axis)


def batches(sizes, shape, seed=0, mean=0.0, dtype=np.float32):
    """Return one batch a rank; ranks differ in mean and spread."""
    rng = np.random.RandomState(seed)
    return [
        (rng.randn(size, *shape) * (1 + rank) + rank + mean).astype(dtype)
        for rank, size in enumerate(sizes)
    ]


def own_part(comm, sizes, whole):
    """Return this rank's part of what one process has of all ranks."""
    start = sum(sizes[: comm.rank])
    return whole[start : start + sizes[comm.rank]]


def randomize(*links):
    """Give links the same gamma and beta, none of them ones or zeros."""
    rng = np.random.RandomState(7)
    for name, param in sorted(links[0].namedparams()):
        values = rng.rand(*param.shape) + 0.5
        for link in links:
            dict(link.namedparams())[name].array[...] = values
    return links


def backward(link, x, weights):
    """Return output, gradients and x's gradient of a loss that weighs every output."""
    x = chainer.Variable(x)
    y = link(x)
    link.cleargrads()
    F.sum(y * y * weights + y).backward()
    return y.array, x.grad, {name: param.grad for name, param in link.namedparams()}


def same_bits(comm, *arrays):
    """Tell whether arrays are the same on all ranks, to the bit."""
    mine = [array.tobytes() for array in arrays]
    return comm.allgather_obj(mine) == [mine] * comm.size


@given(data=st.data())
def test_as_chainer_on_the_concatenated_batch(comm, data):
    """Output, gradients and running statistics are right for unequal and empty batches."""
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=comm.size, max_size=comm.size))
    sizes[data.draw(st.integers(0, comm.size - 1))] += 2
    layout = data.draw(st.sampled_from([*LAYOUTS]))
    mean = data.draw(st.sampled_from([0.0, 1e3]))
    options = {"use_gamma": data.draw(st.booleans()), "use_beta": data.draw(st.booleans())}
    arrangement = data.draw(st.sampled_from(["dense", "channels last"]))
    shape, axis = LAYOUTS[layout]
    size = channels_of(layout)
    link = MultiNodeBatchNormalization(size, comm, eps=1e-3, decay=0.7, axis=axis, **options)
    plain = L.BatchNormalization(size, 0.7, 1e-3, np.float64, axis=axis, **options)
    randomize(link, plain)
    for step in range(2):
        xs = batches(sizes, shape, step, mean)
        ws = batches(sizes, shape, step + 10)
        whole = np.concatenate(xs).astype(np.float64)
        want_y, want_gx, want_grads = backward(plain, whole, np.concatenate(ws).astype(np.float64))
        x = arrange(xs[comm.rank], arrangement)
        # Few values go to NumPy, and so do other layouts.
        with mock.patch.object(channels, "_FEW", data.draw(st.sampled_from([0, channels._FEW]))):
            y, gx, grads = backward(link, x, ws[comm.rank])
        assert y.dtype == gx.dtype == np.float32
        np.testing.assert_allclose(y, own_part(comm, sizes, want_y), rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(gx, own_part(comm, sizes, want_gx), rtol=1e-3, atol=1e-4)
        assert grads.keys() == want_grads.keys()
        for name, grad in grads.items():
            total = comm.allreduce(grad)
            np.testing.assert_allclose(total, want_grads[name], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(link.avg_mean, plain.avg_mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(link.avg_var, plain.avg_var, rtol=1e-5)
    assert same_bits(comm, link.avg_mean, link.avg_var)


def test_gradients_of_mean_losses(comm):
    """Averaged over ranks, they are those of the mean of the ranks' losses, batches unequal."""
    sizes = [3, 1, 4, 2][: comm.size]
    xs, ws = batches(sizes, (3, 2)), batches(sizes, (3, 2), 1)
    link, plain = randomize(MultiNodeBatchNormalization(3, comm), L.BatchNormalization(3))
    x = chainer.Variable(xs[comm.rank])
    F.mean(F.tanh(link(x)) * ws[comm.rank]).backward()
    whole = chainer.Variable(np.concatenate(xs))
    parts = F.split_axis(F.tanh(plain(whole)), np.cumsum(sizes)[:-1], axis=0)
    (sum(F.mean(part * w) for part, w in zip(parts, ws)) / comm.size).backward()
    comm.multi_node_mean_grad(link)
    for name in ("gamma", "beta"):
        want = getattr(plain, name).grad
        np.testing.assert_allclose(getattr(link, name).grad, want, rtol=1e-4, atol=1e-6)
    # What came before x has its gradients averaged as well.
    want = own_part(comm, sizes, whole.grad)
    np.testing.assert_allclose(x.grad / comm.size, want, rtol=1e-4, atol=1e-6)


def test_as_chainermn_on_ordinary_data(comm):
    """With equal batches near zero, after the optimizer's mean, all is what ChainerMN finds."""
    chainermn = pytest.importorskip("chainermn")
    theirs_comm = chainermn.create_communicator("naive", comm.mpi_comm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = chainermn.links.MultiNodeBatchNormalization(4, theirs_comm)
        ours, theirs = randomize(MultiNodeBatchNormalization(4, comm), theirs)
        rng = np.random.RandomState(comm.rank)
        x, w = rng.randn(2, 6, 4, 3).astype(np.float32)
        results = [backward(link, x, w)[:2] for link in (ours, theirs)]
    for got, want in zip(*results):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    for link in (ours, theirs):
        comm.multi_node_mean_grad(link)
    for name, param in ours.namedparams():
        want = dict(theirs.namedparams())[name].grad
        np.testing.assert_allclose(param.grad, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_data_far_from_zero_keep_their_variance(comm, mean):
    """Where squares have no digits left for the variance, all is right to float32."""
    sizes = [64] * comm.size
    xs, ws = batches(sizes, (2, 9), mean=mean), batches(sizes, (2, 9), 1)
    link, plain = MultiNodeBatchNormalization(2, comm), L.BatchNormalization(2, dtype=np.float64)
    wholes = (np.concatenate(each).astype(np.float64) for each in (xs, ws))
    results = zip(backward(link, xs[comm.rank], ws[comm.rank])[:2], backward(plain, *wholes))
    for got, want in results:
        np.testing.assert_allclose(got, own_part(comm, sizes, want), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(link.avg_var, plain.avg_var, rtol=1e-6)


def test_large_images(comm):
    """Channels that are computed block by block are right, and so are those of a rank that stands by."""
    sizes, active = [5, 3, 2, 4][: comm.size], max(comm.size - 1, 1)
    xs, ws = batches(sizes, (5, 80, 130), mean=3), batches(sizes, (5, 80, 130), 1)
    link, plain = randomize(
        MultiNodeBatchNormalization(5, comm), L.BatchNormalization(5, dtype=np.float64)
    )
    wholes = (np.concatenate(each[:active]).astype(np.float64) for each in (xs, ws))
    want_y, want_gx, want = backward(plain, *wholes)
    with chainer.using_config("chainer_dist_standing_by", comm.rank >= active):
        y, gx, grads = backward(link, arrange(xs[comm.rank], "channels last"), ws[comm.rank])
    np.testing.assert_allclose(link.avg_mean, plain.avg_mean, rtol=1e-6)
    np.testing.assert_allclose(link.avg_var, plain.avg_var, rtol=2e-6)
    assert same_bits(comm, link.avg_mean, link.avg_var)
    if comm.rank < active:
        np.testing.assert_allclose(y, own_part(comm, sizes, want_y), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(gx, own_part(comm, sizes, want_gx), rtol=1e-4, atol=1e-4)
    for name, grad in grads.items():
        total = comm.allreduce(grad if comm.rank < active else np.zeros_like(grad))
        np.testing.assert_allclose(total, want[name], rtol=1e-4, atol=0.1)


def test_long_batches(comm):
    """Many values a channel are summed without losing the small ones."""
    rng = np.random.RandomState(comm.rank)
    x = rng.rand(1 << 18, 2).astype(np.float32)
    link = MultiNodeBatchNormalization(2, comm, decay=0)
    link(x)
    whole = np.concatenate(comm.allgather(x)).astype(np.float64)
    np.testing.assert_allclose(link.avg_mean, whole.mean(0), rtol=2e-7)
    np.testing.assert_allclose(link.avg_var, whole.var(0, ddof=1), rtol=1e-6)


def test_constant_data_have_no_negative_variance(comm):
    """Rounding in sums of many equal, large values does not make the output NaN."""
    x = np.full((3, 1, 52002), 9.2740256e11, np.float32)
    link = MultiNodeBatchNormalization(1, comm, decay=0)
    assert np.isfinite(link(x).array).all()
    assert link.avg_var[0] >= 0


@pytest.mark.parametrize("n_channels", [0, 1, 127, 128, 255, 256, 700])
def test_any_number_of_channels(comm, n_channels):
    """More than one message holds are exchanged as well."""
    sizes = [2] * comm.size
    xs, ws = batches(sizes, (n_channels,)), batches(sizes, (n_channels,), 1)
    link, plain = MultiNodeBatchNormalization(n_channels, comm), L.BatchNormalization(n_channels)
    results = backward(link, xs[comm.rank], ws[comm.rank])
    if n_channels == 0:  # Chainer divides by it
        assert results[0].shape == (2, 0)
        return
    want = backward(plain, np.concatenate(xs), np.concatenate(ws))
    for got, whole in zip(results[:2], want):
        np.testing.assert_allclose(got, own_part(comm, sizes, whole), rtol=1e-3, atol=1e-4)


def test_layouts_in_memory(comm):
    """Strided and Fortran-ordered inputs are normalized like others."""
    x = np.random.RandomState(comm.rank).randn(6, 4, 5).astype(np.float32)
    link = MultiNodeBatchNormalization(4, comm)
    want = link(x).array
    for other in (np.asfortranarray(x), np.repeat(x, 2, axis=2)[:, :, ::2]):
        np.testing.assert_allclose(link(other).array, want, rtol=1e-5, atol=1e-6)


def test_gradients_that_are_repeated(comm):
    """A function of one's own may return one gradient for many values."""
    link = MultiNodeBatchNormalization(8, comm)
    array = arrange(np.random.RandomState(comm.rank).randn(4, 8, 80, 80), "channels last")
    found = []
    for shape in ((1, 8, 1, 1), (4, 8, 80, 80)):
        x = chainer.Variable(array.astype(np.float32))
        gy = np.broadcast_to(np.arange(8, dtype=np.float32)[:, None, None], shape)
        found += chainer.grad([link(x)], [x, link.gamma, link.beta], [chainer.Variable(gy)])
    for one, other in zip(found[:3], found[3:]):
        np.testing.assert_array_equal(one.array, other.array)


@pytest.mark.parametrize(("config", "x_dtype"), [("mixed16", "e"), ("float16", "e")])
def test_half_precision(comm, config, x_dtype):
    """float16 comes out as float16, from statistics of float32; parameters are as in Chainer."""
    sizes = [40] * comm.size
    xs = [np.abs(x) + 100 for x in batches(sizes, (2, 30), dtype=x_dtype)]
    with chainer.using_config("dtype", chainer.mixed16 if config == "mixed16" else np.float16):
        link, plain = MultiNodeBatchNormalization(2, comm), L.BatchNormalization(2)
    for name in ("gamma", "beta", "avg_mean", "avg_var"):
        assert getattr(link, name).dtype == getattr(plain, name).dtype
    y, gx, grads = backward(link, xs[comm.rank], np.ones_like(xs[comm.rank]))
    assert y.dtype == gx.dtype == np.float16
    assert grads["/gamma"].dtype == link.gamma.dtype
    whole = np.concatenate(xs).astype(np.float64)
    mean, var = whole.mean((0, 2)), whole.var((0, 2))
    want = (xs[comm.rank] - mean[:, None]) / np.sqrt(var[:, None] + 2e-5)
    np.testing.assert_allclose(y, want, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(link.avg_mean, 0.1 * mean, rtol=1e-3)


def test_fine_tuning(comm):
    """Running statistics become the mean over the calls since start_finetuning."""
    sizes = [3 + rank for rank in range(comm.size)]
    link, plain = MultiNodeBatchNormalization(3, comm), L.BatchNormalization(3, dtype=np.float64)
    for start in range(2):
        link.start_finetuning()
        plain.start_finetuning()
        for step in range(3):
            xs = batches(sizes, (3,), 5 * start + step)
            link(xs[comm.rank], finetune=True)
            plain(np.concatenate(xs).astype(np.float64), finetune=True)
            assert link.N == plain.N == step + 1
        np.testing.assert_allclose(link.avg_mean, plain.avg_mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(link.avg_var, plain.avg_var, rtol=1e-5)


def test_sizes_found_at_the_first_call(comm):
    """Without a size all ranks take it from their inputs, and must find the same."""
    link = MultiNodeBatchNormalization(None, comm, axis=(0, 2))
    assert link.avg_mean is None
    link(np.ones((comm.rank + 1, 3, 2), np.float32))
    assert link.gamma.shape == link.avg_var.shape == (3,)
    if comm.size == 1:
        return
    link = MultiNodeBatchNormalization(None, comm, axis=(0, 2))
    with pytest.raises(RankMismatchError, match=r"gamma of batch normalization is \(4,\)"):
        link(np.ones((2, 3 if comm.rank < comm.size - 1 else 4, 2), np.float32))


def test_test_mode_is_local(comm):
    """A rank may evaluate alone, and gets what Chainer's link gives it."""
    link, plain = randomize(MultiNodeBatchNormalization(3, comm), L.BatchNormalization(3))
    for each in (link, plain):
        each.avg_mean[...], each.avg_var[...] = [1, 2, 3], [4, 5, 6]
    if comm.rank == 0:
        x = np.random.RandomState(0).randn(4, 3).astype(np.float32)
        with chainer.using_config("train", False):
            np.testing.assert_array_equal(link(x).array, plain(x).array)


def test_training_without_backprop(comm):
    """No graph is built, running statistics are updated all the same."""
    link = MultiNodeBatchNormalization(2, comm)
    with chainer.no_backprop_mode():
        y = link(np.full((3, 2), comm.rank, np.float32))
    assert y.creator is None
    np.testing.assert_allclose(link.avg_mean, np.full(2, 0.1 * (comm.size - 1) / 2), rtol=1e-6)


def test_recomputing_counts_once(comm):
    """F.forget runs forward again in backward, which leaves running statistics alone."""
    x = np.random.RandomState(comm.rank).randn(4, 3).astype(np.float32)
    links = [MultiNodeBatchNormalization(3, comm) for _ in range(2)]
    for link, call in zip(links, [lambda link, x: link(x), F.forget]):
        variable = chainer.Variable(x)
        F.sum(call(link, variable) ** 3).backward()
        link.x_grad = variable.grad
    for name in ("avg_mean", "avg_var", "x_grad"):
        np.testing.assert_array_equal(*(getattr(link, name) for link in links))


def penalized(link, x, weights):
    """Return a loss in which gradients of gradients of all inputs and parameters are."""
    loss = F.sum(F.tanh(link(x)) * weights)
    gx, ggamma = chainer.grad([loss], [x, link.gamma], enable_double_backprop=True)
    return F.sum(gx * gx) + F.sum(F.sin(gx) * weights) + F.sum(ggamma * link.beta)


def test_double_backward(comm):
    """A loss made of gradients has the gradients that it has on one process."""
    sizes = [3, 0, 4, 2][: comm.size]
    xs = batches(sizes, (3, 2), dtype=np.float64)
    ws = batches(sizes, (3, 2), 1, dtype=np.float64)
    link = MultiNodeBatchNormalization(3, comm, dtype=np.float64)
    link, plain = randomize(link, L.BatchNormalization(3, dtype=np.float64))
    x, whole = chainer.Variable(xs[comm.rank]), chainer.Variable(np.concatenate(xs))
    penalized(link, x, ws[comm.rank]).backward()
    penalized(plain, whole, np.concatenate(ws)).backward()
    np.testing.assert_allclose(x.grad, own_part(comm, sizes, whole.grad), rtol=1e-8, atol=1e-9)
    for name, param in link.namedparams():
        want = dict(plain.namedparams())[name].grad
        np.testing.assert_allclose(comm.allreduce(param.grad), want, rtol=1e-8, atol=1e-9)


def standing_by_case(comm):
    """Return batches of which the last rank's is not to count, and a link on ranks and on one."""
    if comm.size == 1:
        pytest.skip("somebody else has to have samples")
    sizes = [2 + rank for rank in range(comm.size)]
    xs = batches(sizes, (3, 2), dtype=np.float64)
    ws = batches(sizes, (3, 2), 1, dtype=np.float64)
    xs[-1][0, 0, 0] = np.nan  # would be seen wherever it counted
    link = MultiNodeBatchNormalization(3, comm, dtype=np.float64)
    link, plain = randomize(link, L.BatchNormalization(3, dtype=np.float64))
    return sizes, xs, ws, link, plain


def test_standing_by(comm):
    """A rank that stands by gets the others' statistics and leaves them as they are."""
    sizes, xs, ws, link, plain = standing_by_case(comm)
    active = np.concatenate(xs[:-1])
    want_y, want_gx, want = backward(plain, active, np.concatenate(ws[:-1]))
    stands_by = comm.rank == comm.size - 1
    with chainer.using_config("chainer_dist_standing_by", stands_by):
        y, gx, grads = backward(link, xs[comm.rank], ws[comm.rank])
    np.testing.assert_allclose(link.avg_mean, plain.avg_mean, rtol=1e-10)
    np.testing.assert_allclose(link.avg_var, plain.avg_var, rtol=1e-10)
    if stands_by:  # as with statistics that are given
        fixed = L.BatchNormalization(3, dtype=np.float64)
        randomize(fixed)
        fixed.avg_mean, fixed.avg_var = active.mean((0, 2)), active.var((0, 2))
        with chainer.using_config("train", False):
            want_y, want_gx, _ = backward(fixed, xs[-1], ws[-1])
    else:
        want_y, want_gx = (own_part(comm, sizes, whole) for whole in (want_y, want_gx))
    np.testing.assert_allclose(y, want_y, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(gx, want_gx, rtol=1e-8, atol=1e-9)
    for name, grad in grads.items():
        total = comm.allreduce(np.zeros(3) if stands_by else grad)
        np.testing.assert_allclose(total, want[name], rtol=1e-8)


def test_standing_by_in_double_backward(comm):
    """Gradients of gradients of the others are as if the rank that stands by were not there."""
    sizes, xs, ws, link, plain = standing_by_case(comm)
    whole = chainer.Variable(np.concatenate(xs[:-1]))
    penalized(plain, whole, np.concatenate(ws[:-1])).backward()
    stands_by = comm.rank == comm.size - 1
    x = chainer.Variable(xs[comm.rank])
    with chainer.using_config("chainer_dist_standing_by", stands_by):
        penalized(link, x, ws[comm.rank]).backward()
        if not stands_by:
            want = own_part(comm, sizes, whole.grad)
            np.testing.assert_allclose(x.grad, want, rtol=1e-8, atol=1e-9)
        loss = F.sum(link(x) ** 3 * ws[comm.rank])
        single, double = (
            chainer.grad([loss], [x, link.gamma, link.beta], enable_double_backprop=double)
            for double in (False, True)
        )
    for got, want in zip(double, single):
        np.testing.assert_allclose(got.array, want.array, rtol=1e-10, atol=1e-12)


def test_saved_as_chainers_link(comm, tmp_path):
    """What it saves Chainer's link loads, and the other way round, uninitialized ones too."""
    link, plain = randomize(MultiNodeBatchNormalization(3, comm), L.BatchNormalization(3))
    link(np.random.RandomState(comm.rank).randn(4, 3).astype(np.float32), finetune=True)
    serializers.save_npz(str(tmp_path / "ours"), link)
    serializers.load_npz(str(tmp_path / "ours"), plain)
    lazy = MultiNodeBatchNormalization(None, comm, axis=0)
    serializers.save_npz(str(tmp_path / "theirs"), plain)
    serializers.load_npz(str(tmp_path / "theirs"), lazy)
    for other in (plain, lazy):
        assert other.N == 1
        for name in ("avg_mean", "avg_var"):
            np.testing.assert_array_equal(getattr(other, name), getattr(link, name))
        for name, param in link.namedparams():
            np.testing.assert_array_equal(dict(other.namedparams())[name].array, param.array)


def test_copies_use_the_same_communicator(comm):
    """A link is copied in every way that Chainer has, except by pickle."""
    link = MultiNodeBatchNormalization(3, comm)
    copies = [copy.copy(link), copy.deepcopy(link), *link.repeat(2), *link.repeat(2, "copy")]
    copies += [link.copy(mode) for mode in ("share", "copy", "init")]
    for each in copies:
        assert each.comm is comm
        assert each is not link
        each(np.ones((2, 3), np.float32))
    assert copies[1].gamma.array is not link.gamma.array
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(link)


BAD_INPUTS = {
    "channels": (lambda: np.ones((2, 4), np.float32), ValueError, r"\(2, 4\)"),
    "dimensions": (lambda: np.ones(3, np.float32), ValueError, r"\(3,\)"),
    "integers": (lambda: np.ones((2, 3), np.int32), TypeError, "int32"),
    "no array": (lambda: [[1.0, 2.0, 3.0]], TypeError, "list"),
    "nothing": (lambda: None, TypeError, "NoneType"),
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
@pytest.mark.parametrize("axis", [None, 0])
def test_a_bad_input_on_one_rank_raises_on_all(comm, kind, axis):
    """The error names the rank; afterwards all can go on."""
    make, error, text = BAD_INPUTS[kind]
    last = comm.size - 1
    link = MultiNodeBatchNormalization(3, comm, axis=axis)
    good = np.ones((2, 3), np.float32)
    where = f"rank {last}: " if comm.size > 1 else ""
    with pytest.raises(error, match=f"^{where}x of batch normalization is .*{text}"):
        link(make() if comm.rank == last else good)
    np.testing.assert_array_equal(link.avg_mean, np.zeros(3))
    link(good)


@pytest.mark.parametrize("axis", [(1, 0), (0, 5), (0, 0)])
def test_bad_axes(comm, axis):
    """Axes are ascending axes of the input."""
    link = MultiNodeBatchNormalization(3, comm, axis=axis)
    with pytest.raises(ValueError, match=r"axis of batch normalization is .* expected ascending"):
        link(np.ones((2, 4, 3), np.float32))


@pytest.mark.parametrize(
    ("options", "x_dtype", "text"),
    [
        ({"size": 300}, "f", r"\(300,\) float32"),
        ({"eps": 0.5}, "f", "eps 0.5"),
        ({"dtype": np.float64}, "f", r"\(3,\) float64"),
        ({}, "d", "x float64"),
    ],
)
def test_links_that_differ(comm, options, x_dtype, text):
    """Ranks with other channels, eps or dtypes are told so, and none waits."""
    last = comm.size - 1
    options = {"size": 3, **(options if comm.rank == last else {})}
    link = MultiNodeBatchNormalization(comm=comm, **options)
    x = np.ones((2, options["size"]), x_dtype if comm.rank == last else "f")
    if comm.size == 1:
        link(x)
        return
    expected = rf"rank {last}: gamma of batch normalization is .*{text}.*as on rank 0"
    with pytest.raises(RankMismatchError, match=expected) as caught:
        link(x)
    assert len(set(comm.allgather_obj(str(caught.value)))) == 1


def test_ranks_out_of_step(comm):
    """One rank in forward while the others are in backward is an error on all of them."""
    if comm.size == 1:
        pytest.skip("a rank alone is in step with itself")
    link = MultiNodeBatchNormalization(3, comm)
    x = chainer.Variable(np.random.RandomState(0).randn(2, 3).astype(np.float32))
    loss = F.sum(link(x))
    with pytest.raises(RankMismatchError, match="is backward, expected forward as on rank 0"):
        link(x) if comm.rank == 0 else loss.backward()


def test_no_samples_at_all(comm):
    """All ranks empty, or all standing by, is an error everywhere."""
    link = MultiNodeBatchNormalization(3, comm)
    with pytest.raises(ValueError, match="no rank has a sample"):
        link(np.ones((0, 3), np.float32))
    standing_by = chainer.using_config("chainer_dist_standing_by", value=True)
    with standing_by, pytest.raises(ValueError, match="no rank has a sample"):
        link(np.ones((2, 3), np.float32))
    assert link.N == 0


def test_a_single_value_is_warned_of(comm):
    """One sample on each rank is ordinary; one sample on all ranks together is not."""
    link = MultiNodeBatchNormalization(3, comm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        link(np.full((1 if comm.size > 1 else 2, 3), comm.rank, np.float32))
    with pytest.warns(UserWarning, match="one value a channel"):
        link(np.ones((1 if comm.rank == 0 else 0, 3), np.float32))


def test_a_nan_reaches_every_rank(comm):
    """A rank with a NaN spoils its channel everywhere, and no other channel."""
    x = np.random.RandomState(comm.rank).randn(4, 3).astype(np.float32)
    if comm.rank == comm.size - 1:
        x[2, 1] = np.nan
    y = MultiNodeBatchNormalization(3, comm)(x).array
    assert np.isnan(y[:, 1]).all()
    assert np.isfinite(y[:, [0, 2]]).all()


def test_communication_backends(comm):
    """The ones that ChainerMN has, of which nccl needs GPUs."""
    for name in ("auto", "mpi"):
        assert get_communication_backend(comm, name) == "mpi"
        MultiNodeBatchNormalization(3, comm, communication_backend=name)
    for name in ("nccl", "tcp"):
        with pytest.raises(ValueError, match=f"communication_backend is .*{name}"):
            MultiNodeBatchNormalization(3, comm, communication_backend=name)
