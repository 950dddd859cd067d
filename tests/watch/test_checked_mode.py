"""Checked mode: ranks that do different things learn it at once, all in the same words."""

from __future__ import annotations

import functools

import chainer
import numpy as np
import pytest

import chainer_dist
import chainer_dist.watch
from chainer_dist import RankMismatchError
from chainer_dist.errors import NonFiniteGradientError


@pytest.fixture
def checked(comm, monkeypatch):
    """Return a checked communicator, which only the last rank has asked for."""
    monkeypatch.setenv("CHAINER_DIST_CHECKED", str(int(comm.rank == comm.size - 1)))
    with chainer_dist.create_communicator("naive") as communicator:
        yield communicator


@pytest.fixture
def any_checked(any_comm, monkeypatch):
    """Return a checked communicator of each kind."""
    monkeypatch.setenv("CHAINER_DIST_CHECKED", "1")
    with chainer_dist.create_communicator(any_comm.name) as communicator:
        yield communicator


def only_with_others(comm):
    """Skip on one rank."""
    if comm.size == 1:
        pytest.skip("one rank agrees with itself")


def x(rows=2):
    """Return an array."""
    return np.zeros((rows, 3), np.float32)


# What rank 1 does, what the others do, and how both are called.
DIFFERENT = {
    "operation": (
        lambda comm: comm.allgather(x()),
        lambda comm: comm.allgather_obj(1),
        "allgather()",
        "allgather_obj()",
    ),
    "root": (
        lambda comm: comm.gather(x(), root=1),
        lambda comm: comm.gather(x(), root=0),
        "gather(root=1)",
        "gather(root=0)",
    ),
    "shape": (
        lambda comm: comm.allreduce(x(3)),
        lambda comm: comm.allreduce(x()),
        "allreduce(x=(3, 3) float32, op='sum')",
        "allreduce(x=(2, 3) float32, op='sum')",
    ),
    "number of arrays": (
        lambda comm: comm.mean_arrays([x()]),
        lambda comm: comm.mean_arrays([]),
        "mean_arrays(arrays=[(2, 3) float32])",
        "mean_arrays(arrays=[])",
    ),
    "dtype": (
        lambda comm: comm.mean_arrays([x(), x().astype(np.float64)]),
        lambda comm: comm.mean_arrays([x(), x()]),
        "mean_arrays(arrays=[(2, 3) float32, (2, 3) float64])",
        "mean_arrays(arrays=[(2, 3) float32, (2, 3) float32])",
    ),
    "option": (
        lambda comm: comm.multi_node_mean_grad(chainer.Link(), zero_fill=True),
        lambda comm: comm.multi_node_mean_grad(chainer.Link()),
        "multi_node_mean_grad(zero_fill=True)",
        "multi_node_mean_grad(zero_fill=False)",
    ),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_ranks_that_differ(checked, kind):
    """Every rank raises the same, and names rank, operation and both source lines."""
    only_with_others(checked)
    one, other, its_text, text = DIFFERENT[kind]
    number = checked.operation_log.number + 1
    with pytest.raises(RankMismatchError) as caught:
        one(checked) if checked.rank == 1 else other(checked)
    message = str(caught.value)
    # A source line is that of the lambda, in this file.
    start = f"rank 1: operation {number} is {its_text}, at {__file__}:"
    assert message.startswith(start)
    assert f" in <lambda>; expected {text}, at {__file__}:" in message
    assert message.endswith(f"operation {number} as on rank 0")
    # Nothing is left over, and the communicator goes on.
    assert set(checked.allgather_obj(message)) == {message}


def test_a_rank_that_skips_one(checked):
    """It is found at its next collective, which is another one or later on another line."""
    only_with_others(checked)
    last = checked.size - 1

    def program():
        if checked.rank != last:
            checked.bcast_obj(1)
        checked.gather_obj(2)

    with pytest.raises(RankMismatchError, match=rf"rank {last}: operation \d+ is gather_obj"):
        program()


def test_the_lowest_rank_that_differs(checked):
    """Ranks that call the same from different lines are not blamed."""
    if checked.size < 3:
        pytest.skip("needs a rank that agrees with rank 0 from another line")
    calls = [
        lambda: checked.allgather_obj(1),
        lambda: checked.allgather_obj(1),
        lambda: checked.allreduce_obj(1),
        lambda: checked.allgather_obj(1),
    ]
    with pytest.raises(RankMismatchError, match=r"^rank 2: operation"):
        calls[checked.rank]()


def test_what_may_differ(checked):
    """Shapes and dtypes of what is gathered, and objects, differ between ranks as before."""
    rank, size = checked.rank, checked.size
    shapes = [each.shape for each in checked.allgather(np.zeros(rank, np.int32))]
    assert shapes == [(each,) for each in range(size)]
    assert checked.allgather_obj([rank] * rank) == [[each] * each for each in range(size)]
    assert checked.bcast(x() if rank == 0 else None).shape == (2, 3)
    gathered = checked.gather(np.zeros((rank, 2)))
    assert (gathered is None) == (rank != 0)


def test_splits_are_checked_too(checked):
    """A communicator made from a checked one is."""
    only_with_others(checked)
    part = checked.split(0, checked.rank)
    with pytest.raises(RankMismatchError, match="rank 1: operation 1 is bcast_obj"):
        part.bcast_obj(1) if part.rank == 1 else part.gather_obj(1)
    part.finalize()


def test_off_by_default(comm):
    """Nothing is compared, and NaN is averaged like any number."""
    assert comm.operation_log.check is None
    model = chainer.links.Linear(2, 2)
    model.W.grad = np.full((2, 2), np.nan, np.float32)
    model.b.grad = np.zeros(2, np.float32)
    comm.multi_node_mean_grad(model)
    assert np.isnan(model.W.grad).all()


def linear():
    """Return a model whose gradients are what its input is."""
    with chainer.using_config("dtype", np.float32):
        return chainer.links.Linear(3, 2)


VALUES = {
    "NaN": ([np.nan, 1, np.nan], "2 NaN and 0 infinite"),
    "infinity": ([0, -np.inf, np.nan], "1 NaN and 1 infinite"),
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_that_are_not_finite(checked, kind):
    """Every rank learns which rank has them, and of which parameter, before they are averaged."""
    values, counts = VALUES[kind]
    last = checked.size - 1
    model = linear()
    model.W.grad = np.ones((2, 3), np.float32)
    model.b.grad = np.ones(2, np.float32)
    if checked.rank == last:
        model.W.grad[1] = values
    wanted = f"^rank {last}: the gradient of /W has {counts} of 6 values"
    if checked.size == 1:
        wanted = wanted.replace("rank 0: ", "")
    with pytest.raises(NonFiniteGradientError, match=wanted):
        checked.multi_node_mean_grad(model)
    assert (model.b.grad == 1).all()
    if checked.rank != last:
        assert (model.W.grad == 1).all()


@pytest.mark.parametrize("options", [{}, {"sharded_update": False}, {"zero_fill": False}])
def test_an_update_with_values_that_are_not_finite(any_checked, options):
    """No parameter of any rank changes, and training can go on with other data."""
    checked = any_checked
    optimizer = chainer_dist.create_multi_node_optimizer(
        chainer.optimizers.MomentumSGD(lr=0.1), checked, **options
    )
    model = linear()
    optimizer.setup(model)
    good, bad = np.ones((1, 3), np.float32), np.full((1, 3), np.inf, np.float32)

    def loss(data):
        return chainer.functions.sum(model(data))

    optimizer.update(loss, good)
    before = model.W.array.copy()
    with pytest.raises(NonFiniteGradientError, match="/W has 0 NaN and 6 infinite of 6 values"):
        optimizer.update(loss, bad if checked.rank == 0 else good)
    np.testing.assert_array_equal(model.W.array, before)
    optimizer.update(loss, good)
    assert np.isfinite(model.W.array).all()
    assert (model.W.array != before).all()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_loss_scaling(checked, kind):
    """Dynamic scaling skips such an update and lowers the scale itself; a fixed one is checked."""
    optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.SGD(), checked)
    model = linear()
    optimizer.setup(model)
    if kind == "dynamic":
        optimizer.loss_scaling(interval=10)
    else:
        optimizer.loss_scaling(scale=2.0)
    data = np.full((1, 3), np.inf if checked.rank == 0 else 1, np.float32)

    def update():
        optimizer.update(lambda: chainer.functions.sum(model(data)))

    if kind == "static":
        with pytest.raises(NonFiniteGradientError):
            update()
        return
    before = model.W.array.copy()
    with pytest.warns(UserWarning, match="Non finite number"):
        update()
    np.testing.assert_array_equal(model.W.array, before)


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("CHAINER_DIST_CHECKED", "yes"),
        ("CHAINER_DIST_STALL_WARN", "-1"),
        ("CHAINER_DIST_STALL_ABORT", "soon"),
    ],
)
def test_what_the_environment_cannot_say(comm, monkeypatch, variable, text):
    """Every rank raises, though one alone has it, and names it."""
    only_with_others(comm)
    if comm.rank == 1:
        monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=f"rank 1: {variable} is {text!r}, expected"):
        chainer_dist.create_communicator()


def test_one_rank_ends_the_communicator(comm, monkeypatch):
    """Also where ranks compare through shared memory, as they do after the first exchange."""
    only_with_others(comm)
    monkeypatch.setenv("CHAINER_DIST_CHECKED", "1")
    communicator = chainer_dist.create_communicator("shared_memory")
    communicator.mean_arrays([x()])
    act = communicator.finalize if comm.rank == 1 else functools.partial(communicator.bcast_obj, 1)
    with pytest.raises(RankMismatchError, match=r"rank 1: operation \d+ is finalize\(\)"):
        act()
    communicator.finalize()
