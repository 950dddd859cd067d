"""Persistent values averaged over ranks, against NumPy in float64."""

from __future__ import annotations

import chainer
import chainer.links as L
import numpy as np
import pytest

from chainer_dist import RankMismatchError
from chainer_dist.extensions import AllreducePersistent

ARRAYS = {
    "half": lambda rank: np.arange(5, dtype=np.float16) * (rank + 1),
    "single": lambda rank: np.arange(6, dtype=np.float32).reshape(2, 3) + rank,
    "double": lambda rank: np.array(rank / 3),
    "fortran": lambda rank: np.asfortranarray(np.arange(6.0).reshape(2, 3) * rank),
    "strided": lambda rank: (np.arange(8.0) + rank)[::2],
    "empty": lambda _: np.zeros((0, 3), np.float32),
}


def link(values):
    """Return a link with persistent values, one level down."""
    child = chainer.Link()
    for name, value in values.items():
        child.add_persistent(name, value)
    return chainer.Chain(child=child)


def test_float_arrays_are_averaged_in_place(any_comm):
    """Arrays of any float dtype, shape and layout become the mean, each the array it was."""
    model = link({name: make(any_comm.rank) for name, make in ARRAYS.items()})
    before = {name: getattr(model.child, name) for name in ARRAYS}
    AllreducePersistent(model, any_comm)()
    for name, make in ARRAYS.items():
        everyone = [make(rank).astype(np.float64) for rank in range(any_comm.size)]
        got = getattr(model.child, name)
        assert got is before[name]
        assert got.dtype == make(0).dtype
        np.testing.assert_allclose(got, np.mean(everyone, axis=0), rtol=2 * np.finfo(got.dtype).eps)


def test_scalars_and_read_only_arrays_are_replaced(comm):
    """Floats that cannot be changed in place become the mean, of the type that they are."""
    frozen = np.full(3, comm.rank, np.float32)
    frozen.flags.writeable = False
    model = link({"a": 1.0 * comm.rank, "b": np.float16(comm.rank), "c": frozen})
    AllreducePersistent(model, comm)(None)
    mean = (comm.size - 1) / 2
    child = model.child
    assert (child.a, child.b) == (mean, mean)
    assert (type(child.a), type(child.b)) == (float, np.float16)
    assert child.c.tolist() == [mean] * 3


def test_everything_else_is_left_alone(comm):
    """Integers, bools, strings and None stay each rank's own (ChainerMN fails on integers)."""
    values = {
        "n": np.array([comm.rank, 7]),
        "scalar": np.int32(comm.rank),
        "count": comm.rank,
        "flag": comm.rank == 0,
        "text": f"rank {comm.rank}",
        "none": None,
    }
    model = link(dict(values))
    AllreducePersistent(model, comm)()
    for name, value in values.items():
        assert getattr(model.child, name) is value
    assert model.child.n.tolist() == [comm.rank, 7]
    AllreducePersistent(chainer.Link(), comm)()


def test_batch_normalization(comm):
    """Running statistics become those of all ranks; the count of batches stays."""
    model = chainer.Chain(bn=L.BatchNormalization(3))
    rows = np.random.RandomState(comm.rank).randn(5, 3).astype(np.float32)
    for _ in range(comm.rank + 1):
        model.bn(rows)
    means = comm.allgather_obj(model.bn.avg_mean.copy())
    variances = comm.allgather_obj(model.bn.avg_var.copy())
    before = model.bn.N
    AllreducePersistent(model, comm)()
    np.testing.assert_allclose(model.bn.avg_mean, np.mean(means, axis=0), rtol=1e-5)
    np.testing.assert_allclose(model.bn.avg_var, np.mean(variances, axis=0), rtol=1e-5)
    assert before == model.bn.N
    same = comm.bcast_obj(model.bn.avg_mean)
    np.testing.assert_array_equal(model.bn.avg_mean, same)


def test_what_differs_between_ranks_raises_on_all(comm):
    """Other names, shapes, dtypes or kinds on one rank are an error that names it."""
    if comm.size == 1:
        pytest.skip("one rank has nobody to differ from")
    last = comm.size - 1

    def model(usual, other):
        return link(other if comm.rank == last else usual)

    for usual, other, text in [
        ({"x": np.zeros(2)}, {"x": np.zeros(3)}, r"/child/x is \(3,\) float64, expected \(2,\)"),
        ({"x": np.zeros(2)}, {"x": np.zeros(2, "f")}, "/child/x is .* float32"),
        ({"x": np.zeros(2)}, {"x": None}, "/child/x is no float"),
        ({"x": 1.0}, {"y": 1.0}, "/child/x is missing"),
    ]:
        with pytest.raises(RankMismatchError, match=f"rank {last}: {text}"):
            AllreducePersistent(model(usual, other), comm)()
    AllreducePersistent(model({"n": np.array([1])}, {"n": None}), comm)()


def test_other_arrays_are_refused(comm):
    """Arrays of another library are an error on every rank, also where one rank has them."""

    class Array:
        shape, dtype = (2,), np.dtype(np.float32)

    with pytest.raises(TypeError, match=r"/child/x is a .*\.Array; .* call model.to_cpu\(\)"):
        AllreducePersistent(link({"x": Array()}), comm)()
    if comm.size > 1:
        value = Array() if comm.rank == 1 else np.zeros(2, np.float32)
        with pytest.raises(RankMismatchError, match=f"rank 1: /child/x is .* {Array.__module__}"):
            AllreducePersistent(link({"x": value}), comm)()


def test_before_evaluators_in_a_trainer():
    """By default it runs once an epoch, before evaluators read what it averages."""
    evaluator = chainer.training.extensions.Evaluator
    assert AllreducePersistent.trigger == (1, "epoch")
    assert AllreducePersistent.priority > evaluator.priority
