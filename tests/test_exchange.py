"""Gradients averaged and parameters made equal, against NumPy in float64 and ChainerMN."""

from __future__ import annotations

import warnings

import chainer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import RankMismatchError
from chainer_dist.collectives import reduction

SPECS = {
    "a": ((3, 4), np.float32),
    "b": ((), np.float64),
    "c": ((0, 2), np.float32),
    "d": ((6,), np.float16),
    "e": ((2, 3, 2), np.float32),
}


def link(specs=None):
    """Return a link with one initialized parameter for each name."""
    model = chainer.Link()
    with model.init_scope():
        for name, (shape, dtype) in (SPECS if specs is None else specs).items():
            setattr(model, name, chainer.Parameter(np.zeros(shape, dtype)))
    model.cleargrads()
    return model


def gradient(rank, name, seed=0):
    """Return the gradient that a rank has for a parameter, known to every rank."""
    shape, dtype = SPECS[name]
    rng = np.random.RandomState([seed, rank, ord(name)])
    return np.asarray(rng.randn(*shape) * 4).astype(dtype)


def mean(size, name, ranks=None):
    """Return the mean over the ranks that have the gradient, the others counting zero."""
    ranks = range(size) if ranks is None else ranks
    return sum(gradient(rank, name).astype(np.float64) for rank in ranks) / size


def assert_mean(param, want):
    """Compare within the rounding of the parameter's dtype."""
    assert param.grad.dtype == param.dtype
    eps = np.finfo(param.dtype).eps
    np.testing.assert_allclose(param.grad, want, rtol=4 * eps, atol=8 * eps)


def test_mean_of_mixed_dtypes(any_comm):
    """Each gradient becomes the mean of its own over the ranks, in place."""
    model = link()
    arrays = {}
    for name, param in model.namedparams():
        param.grad = arrays[name] = gradient(any_comm.rank, name[1:])
    any_comm.multi_node_mean_grad(model)
    for name, param in model.namedparams():
        assert_mean(param, mean(any_comm.size, name[1:]))
        assert param.grad is arrays[name]


@given(data=st.data())
def test_any_pattern_of_missing_gradients(comm, data):
    """With zero_fill any rank may lack any gradient; without, all ranks must lack the same."""
    names = list(SPECS)
    present = data.draw(
        st.lists(st.sets(st.sampled_from(names)), min_size=comm.size, max_size=comm.size)
    )
    for zero_fill in (True, False):
        model = link()
        for name in present[comm.rank]:
            getattr(model, name).grad = gradient(comm.rank, name)
        if not zero_fill and any(each != present[0] for each in present):
            with pytest.raises(RankMismatchError, match=r"rank \d: the gradient of /\w is"):
                comm.multi_node_mean_grad(model)
            continue
        comm.multi_node_mean_grad(model, zero_fill)
        for name in names:
            ranks = [rank for rank in range(comm.size) if name in present[rank]]
            param = getattr(model, name)
            if zero_fill or ranks:
                assert_mean(param, mean(comm.size, name, ranks))
            else:
                assert param.grad is None


def test_layouts_of_gradients_may_differ_between_ranks(any_comm):
    """Fortran order, strides and read-only views are averaged by element, not by memory."""
    model = link()
    layouts = [
        lambda x: x,
        np.asfortranarray,
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: x[::-1][::-1],
    ]
    model.a.grad = layouts[any_comm.rank](gradient(any_comm.rank, "a"))
    read_only = gradient(any_comm.rank, "e")
    read_only.flags.writeable = False
    model.e.grad = read_only
    any_comm.multi_node_mean_grad(model)
    assert_mean(model.a, mean(any_comm.size, "a"))
    assert_mean(model.e, mean(any_comm.size, "e"))
    np.testing.assert_array_equal(read_only, gradient(any_comm.rank, "e"))


def test_gradients_in_shared_memory(any_comm):
    """Parameters whose gradients are one array on some ranks get each its own mean."""
    model = link({"a": ((3, 4), np.float32), "b": ((3, 4), np.float32), "c": ((12,), np.float32)})
    rank, size = any_comm.rank, any_comm.size
    mine = {name: np.full((3, 4), 1.0 + rank, np.float32) for name in "abc"}
    if rank == 0:
        model.a.grad = model.b.grad = mine["a"]
        model.c.grad = mine["a"].reshape(-1)
    else:
        model.a.grad, model.b.grad = mine["a"], mine["b"] * 3
        model.c.grad = mine["c"].reshape(-1) * 5
    any_comm.multi_node_mean_grad(model)
    rest = sum(range(2, size + 1))
    np.testing.assert_allclose(model.a.grad, (1 + rest) / size, rtol=1e-6)
    np.testing.assert_allclose(model.b.grad, (1 + 3 * rest) / size, rtol=1e-6)
    np.testing.assert_allclose(model.c.grad, (1 + 5 * rest) / size, rtol=1e-6)


def test_uninitialized_parameters_are_skipped(any_comm):
    """A parameter without a shape has no gradient on any rank."""
    model = link({"a": SPECS["a"]})
    with model.init_scope():
        model.lazy = chainer.Parameter()
    model.a.grad = gradient(any_comm.rank, "a")
    any_comm.multi_node_mean_grad(model, zero_fill=True)
    assert_mean(model.a, mean(any_comm.size, "a"))
    assert model.lazy.array is None


def test_models_without_anything_to_exchange(any_comm):
    """No parameters, or none with a gradient, is fine."""
    any_comm.multi_node_mean_grad(chainer.Link())
    any_comm.bcast_data(chainer.Link())
    any_comm.multi_node_mean_grad(link())


def test_several_models_in_turn(any_comm):
    """Buffers kept for one model do not show in another."""
    small, large = link({"d": SPECS["d"], "b": SPECS["b"]}), link()
    for model in (large, small, large):
        for name, param in model.namedparams():
            param.grad = gradient(any_comm.rank, name[1:])
        any_comm.multi_node_mean_grad(model)
        for name, param in model.namedparams():
            assert_mean(param, mean(any_comm.size, name[1:]))


def test_same_bits_as_chainermn(comm):
    """On contiguous float32 gradients naive does what ChainerMN's naive does."""
    chainermn = pytest.importorskip("chainermn")
    theirs = chainermn.create_communicator("naive", comm.mpi_comm)
    models = []
    for communicator in (comm, theirs):
        model = link({name: SPECS[name] for name in "ae"})
        for name, param in model.namedparams():
            param.grad = gradient(comm.rank, name[1:])
        communicator.multi_node_mean_grad(model)
        models.append(model)
    for name in "ae":
        ours, other = (getattr(model, name).grad for model in models)
        np.testing.assert_array_equal(ours, other)


def test_bcast_data(any_comm):
    """Every rank's parameters become rank 0's, in their own memory, whatever their layout."""
    model = link()
    arrays = {}
    for name, param in model.namedparams():
        param.array[...] = gradient(any_comm.rank, name[1:])
    model.a.array = np.asfortranarray(model.a.array)
    model.e.array = np.repeat(model.e.array, 2, axis=-1)[..., ::2]
    arrays = {name: param.array for name, param in model.namedparams()}
    any_comm.bcast_data(model)
    for name, param in model.namedparams():
        np.testing.assert_array_equal(param.array, gradient(0, name[1:]))
        assert param.array is arrays[name]


def test_bcast_data_in_pieces(comm, monkeypatch):
    """A parameter beyond the reach of one MPI count is broadcast in pieces."""
    monkeypatch.setattr(reduction, "MAX_COUNT", 7)
    model = link()
    model.a.array[...] = gradient(comm.rank, "a")
    comm.bcast_data(model)
    np.testing.assert_array_equal(model.a.array, gradient(0, "a"))


def test_bcast_data_of_read_only_parameters(comm):
    """An array that must not be written is replaced."""
    model = link({"a": SPECS["a"]})
    array = gradient(comm.rank, "a")
    array.flags.writeable = False
    model.a.array = array
    comm.bcast_data(model)
    np.testing.assert_array_equal(model.a.array, gradient(0, "a"))
    np.testing.assert_array_equal(array, gradient(comm.rank, "a"))


@pytest.mark.parametrize("source", ["first", "last"])
def test_bcast_data_initializes(comm, source):
    """A parameter that only some ranks have initialized is taken from the lowest of them."""
    model = chainer.Link()
    with model.init_scope():
        model.lazy = chainer.Parameter(chainer.initializers.Normal())
        model.never = chainer.Parameter()
    owner = 0 if source == "first" else comm.size - 1
    if comm.rank == owner:
        model.lazy.initialize((2, 3))
        model.lazy.array[...] = owner + 1
    comm.bcast_data(model)
    np.testing.assert_array_equal(model.lazy.array, np.full((2, 3), owner + 1, np.float32))
    assert model.never.array is None


def test_bcast_data_renews_float32_master_copies(comm):
    """The float32 copy behind a float16 parameter does not bring the old value back."""
    model = link({"d": SPECS["d"]})
    model.d.array[...] = comm.rank
    optimizer = chainer.optimizers.SGD(0.0)
    optimizer.use_fp32_update()
    optimizer.setup(model)
    model.d.grad = np.zeros(6, np.float16)
    optimizer.update()
    comm.bcast_data(model)
    optimizer.update()
    np.testing.assert_array_equal(model.d.array, np.zeros(6))


@pytest.mark.parametrize("operation", ["bcast_data", "multi_node_mean_grad"])
@pytest.mark.parametrize("difference", ["shape", "dtype", "missing"])
def test_ranks_that_differ(any_comm, operation, difference):
    """All ranks raise one error that names rank and parameter, and can go on afterwards."""
    if any_comm.size == 1:
        return
    specs = dict(SPECS)
    last = any_comm.size - 1
    if any_comm.rank == last:
        specs["b"] = {
            "shape": ((1,), np.float64),
            "dtype": ((), np.float32),
            "missing": None,
        }[difference]
        if difference == "missing":
            del specs["b"]
    what = {"shape": r"\(1,\) float64", "dtype": r"\(\) float32", "missing": "missing"}[difference]
    with pytest.raises(RankMismatchError, match=f"rank {last}: /b is {what}") as caught:
        getattr(any_comm, operation)(link(specs))
    assert len(set(any_comm.allgather_obj(str(caught.value)))) == 1
    getattr(any_comm, operation)(link())


def test_models_that_cannot_be_hashed(any_comm):
    """A link may be compared by value."""

    class Equal(chainer.Link):
        __hash__ = None

        def __eq__(self, other):
            return True

    for value in range(3):
        model = Equal()
        with model.init_scope():
            model.w = chainer.Parameter(np.zeros(value + 1, np.float32))
        model.w.grad = np.full(value + 1, any_comm.rank + value, np.float32)
        any_comm.multi_node_mean_grad(model)
        np.testing.assert_allclose(model.w.grad, value + (any_comm.size - 1) / 2)
        model.w.array = np.zeros(5, np.float32)
        model.w.grad = np.full(5, any_comm.rank, np.float32)
        any_comm.multi_node_mean_grad(model)
        np.testing.assert_allclose(model.w.grad, (any_comm.size - 1) / 2)


def test_deprecated_names(comm):
    """ChainerMN's old names warn and do the same."""
    model = link({"a": SPECS["a"]})
    model.a.grad = gradient(comm.rank, "a")
    model.a.array[...] = comm.rank
    with pytest.warns(DeprecationWarning, match="multi_node_mean_grad"):
        comm.allreduce_grad(model)
    with pytest.warns(DeprecationWarning, match="bcast_data"):
        comm.broadcast_data(model)
    assert_mean(model.a, mean(comm.size, "a"))
    assert not model.a.array.any()


def test_dummy_exchanges_nothing():
    """It copies gradients to and fro and leaves them as they are."""
    from chainer_dist import create_communicator

    with create_communicator("dummy") as comm:
        model = link()
        for name, param in model.namedparams():
            param.grad = gradient(comm.rank, name[1:])
        comm.multi_node_mean_grad(model)
        for name, param in model.namedparams():
            np.testing.assert_array_equal(param.grad, gradient(comm.rank, name[1:]))


def test_no_warnings_in_a_step(comm):
    """An ordinary exchange is silent."""
    model = link()
    for name, param in model.namedparams():
        param.grad = gradient(comm.rank, name[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comm.multi_node_mean_grad(model)
        comm.bcast_data(model)
