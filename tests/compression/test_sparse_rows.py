"""Rows that are not zero, averaged: against the mean of all rows in NumPy and the exact exchange."""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import optimizers
from conftest import LAYOUTS, on_nodes
from hypothesis import given, settings
from hypothesis import strategies as st

from chainer_dist import compression, create_communicator, create_multi_node_optimizer

SHAPES = {"embedding": (300, 6), "table": (200, 3, 2), "dense": (40, 7), "vector": (9,), "n": ()}


@pytest.fixture(params=LAYOUTS)
def comm(request):
    """Return a communicator whose real ranks are taken to be on several nodes."""
    communicator = on_nodes("shared_memory", request.param)
    yield communicator
    communicator.finalize()


def grads_of(rank, dtype=np.float32, seed=0, used=10):
    """Return gradients of a rank, of which two have few rows."""
    rng = np.random.RandomState([rank, seed])
    grads = {}
    for name, shape in SHAPES.items():
        grad = np.array(rng.randn(*shape), dtype)
        if name in ("embedding", "table"):
            zero = np.ones(len(grad), bool)
            zero[rng.randint(0, len(grad), used)] = False
            grad[zero] = 0
        grads[name] = grad
    return grads


def exact(size, **options):
    """Return the mean of all ranks' gradients in float64."""
    everyone = [grads_of(rank, **options) for rank in range(size)]
    return {
        name: np.mean([grads[name].astype(np.float64) for grads in everyone], axis=0)
        for name in SHAPES
    }


def assert_equal_on_all_ranks(comm, grads):
    """All ranks have the same bits."""
    mine = {name: grad.tobytes() for name, grad in grads.items()}
    assert comm.allgather_obj(mine) == [mine] * comm.size


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("used", [0, 40, 1000])
def test_the_mean(comm, dtype, used):
    """It is that of all rows, to rounding, in place, whether few rows are there or all."""
    grads = grads_of(comm.rank, dtype, used=used)
    before = dict(grads)
    compression.SparseRows().mean(comm, grads)
    assert_equal_on_all_ranks(comm, grads)
    eps = np.finfo(dtype).eps
    for name, want in exact(comm.size, dtype=dtype, used=used).items():
        assert grads[name] is before[name]
        np.testing.assert_allclose(grads[name], want, rtol=4 * eps, atol=4 * eps, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_same_bits_as_shared_memory(dtype):
    """On one node the order of summation is that of the ranks, with and without."""
    with create_communicator("shared_memory") as comm:
        sparse, dense = grads_of(comm.rank, dtype), grads_of(comm.rank, dtype)
        compression.SparseRows().mean(comm, sparse)
        comm.mean_arrays(list(dense.values()))
        for name, want in dense.items():
            np.testing.assert_array_equal(sparse[name], want, err_msg=name)


@settings(max_examples=10)
@given(data=st.data())
def test_any_rows(any_comm, data):
    """Any rows of any rank, none or all of them; what is not a number is no zero."""
    size = any_comm.size
    chosen = data.draw(st.lists(st.sets(st.integers(0, 99)), min_size=size, max_size=size))
    dense = np.zeros((size, 100, 3), np.float32)
    for rank, rows in enumerate(chosen):
        for row in rows:
            dense[rank, row] = [rank, row, (row % 7) * 1e30]
        if rows and data.draw(st.booleans()):
            dense[rank, min(rows)] = [0, np.nan, 0]
    want = dense.astype(np.float64).mean(axis=0)
    grads = {"W": dense[any_comm.rank].copy()}
    compression.SparseRows().mean(any_comm, grads)
    np.testing.assert_allclose(grads["W"], want, rtol=1e-6)


def test_layouts(comm):
    """Gradients of any layout are averaged by element."""
    first = grads_of(comm.rank)["embedding"]
    layouts = {
        "fortran": np.asfortranarray(first),
        "strided": np.repeat(first, 2, axis=1)[:, ::2],
        "C": first.copy(),
    }
    compression.SparseRows().mean(comm, layouts)
    want = exact(comm.size)["embedding"]
    for name, grad in layouts.items():
        np.testing.assert_allclose(grad, want, rtol=1e-6, atol=1e-7, err_msg=name)


def test_bytes():
    """Between nodes go the rows of each node; where these were more, all of the gradient."""
    comm = on_nodes("shared_memory", "a node each")
    if comm.size == 1:
        pytest.skip("one node sends nothing")
    way = compression.SparseRows()
    rows = np.random.RandomState(comm.rank).permutation(1000)[:20]
    few = np.zeros((1000, 16), np.float32)
    few[rows] = 1
    way.mean(comm, {"W": few})
    assert way.sent == (comm.size - 1) * 20 * (16 * 4 + 8)
    full = np.ones((1000, 16), np.float32)
    if comm.rank == 0:  # one rank decides nothing alone
        full[:] = 0
    way.mean(comm, {"W": full})
    np.testing.assert_allclose(full, (comm.size - 1) / comm.size, rtol=1e-6)
    assert way.sent == 2 * 64000 * (comm.size - 1) // comm.size
    comm.finalize()


def words(rank, number, n_words=500):
    """Return a batch of a rank: words, and whether the first is of the lower half."""
    x = np.random.RandomState([rank, number]).randint(0, n_words, (8, 3)).astype(np.int32)
    return x, (x[:, 0] < n_words // 2).astype(np.int32)


def make_model():
    """Return a classifier of sequences of words."""
    np.random.seed(0)
    return L.Classifier(
        chainer.Sequential(L.EmbedID(500, 8), lambda x: F.sum(x, axis=1), L.Linear(8, 2))
    )


@pytest.mark.parametrize("make_optimizer", [optimizers.SGD, optimizers.Adam])
def test_training(comm, make_optimizer):
    """It trains as one process on the concatenated batches, also with accumulation."""
    for steps in (1, 2):
        model, want = make_model(), make_model()
        optimizer = create_multi_node_optimizer(
            make_optimizer(), comm, compression=compression.SparseRows(), accumulate_steps=steps
        ).setup(model)
        single = make_optimizer().setup(want)
        for number in range(4):
            optimizer.update(model, *words(comm.rank, number))
        for first in range(0, 4, steps):
            numbers = range(first, first + steps)
            parts = [words(rank, number) for rank in range(comm.size) for number in numbers]
            single.update(want, *map(np.concatenate, zip(*parts)))
        for (name, got), (_, expected) in zip(
            sorted(model.namedparams()), sorted(want.namedparams())
        ):
            np.testing.assert_allclose(
                got.array, expected.array, rtol=1e-4, atol=1e-5, err_msg=name
            )
        assert_equal_on_all_ranks(comm, {name: p.array for name, p in model.namedparams()})
