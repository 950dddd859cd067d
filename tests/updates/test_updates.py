"""What holds for every way to update, whichever there are: those of the package, and one of a test."""

from __future__ import annotations

import copy
import pickle

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import optimizers

from chainer_dist import create_communicator
from chainer_dist.optimizers.multi_node_optimizer import MultiNodeOptimizer
from chainer_dist.updates import UPDATES
from chainer_dist.updates.base import Update
from chainer_dist.updates.options import Options

LR = 0.25  # all numbers below are exact in float64
STEPS = 4

pytestmark = pytest.mark.usefixtures("float64")


class OneByOne(Update):
    """Averages and updates one parameter after the other. A way of a test's own, in one class."""

    name = "one by one"

    def apply(self, gradients):
        """See the base class."""
        gradients.parameters.fill_zeros()
        for param in gradients.parameters.params:
            self.context.comm.mean_arrays([param.grad])
        self.context.optimizer.update(None)


@pytest.fixture(params=[*UPDATES, OneByOne.name])
def kind(request, monkeypatch):
    """Return every way to update, and one that a test has added."""
    monkeypatch.setitem(UPDATES, OneByOne.name, OneByOne)
    return UPDATES[request.param]


@pytest.fixture
def comm():
    """Return a communicator on which every way is possible."""
    communicator = create_communicator("shared_memory")
    yield communicator
    communicator.finalize()


class Model(chainer.Chain):
    """A model whose gradients are its inputs, whatever its parameters are."""

    def __init__(self, seed):
        super().__init__()
        rng = np.random.RandomState(seed)
        with self.init_scope():
            self.a = chainer.Parameter(rng.randint(0, 9, (3, 4)).astype(np.float64))
            self.b = chainer.Parameter(rng.randint(0, 9, (5,)).astype(np.float64))

    def forward(self, a, b):
        """Return the loss."""
        return F.sum(self.a * a) + F.sum(self.b * b)


def batch(step, rank):
    """Return the gradients that a rank's batch has."""
    rng = np.random.RandomState(100 * step + rank)
    return rng.randint(-9, 9, (3, 4)) * 12.0, rng.randint(-9, 9, 5) * 12.0


def multi_node(kind, comm, model=None, **options):
    """Return an optimizer that updates in a way, and its model."""
    optimizer = MultiNodeOptimizer(
        optimizers.SGD(LR), comm, True, Options(kind=kind.name, **options)
    )
    return optimizer.setup(Model(comm.rank) if model is None else model)


def train(optimizer, steps, comm):
    """Update once with each batch of this rank."""
    for step in steps:
        optimizer.update(optimizer.target, *batch(step, comm.rank))


def expected(kind, comm, steps):
    """Compute parameters from rank 0's first ones and the mean of all batches that count by now."""
    model = Model(0)
    for step in range(steps - kind.updates_late):
        means = [np.mean(each, axis=0) for each in zip(*(batch(step, r) for r in range(comm.size)))]
        for param, mean in zip((model.a, model.b), means):
            param.array -= LR * mean
    return model


def assert_trained(optimizer, kind, comm, steps):
    """The parameters are those of a computation that knows nothing of updates."""
    want = expected(kind, comm, steps)
    for name in ("a", "b"):
        got = getattr(optimizer.target, name).array
        np.testing.assert_allclose(got, getattr(want, name).array, rtol=1e-13, err_msg=name)
    assert optimizer.t == steps - kind.updates_late


def test_names(kind):
    """Each is registered by its own name."""
    assert UPDATES[kind.name] is kind
    assert issubclass(kind, Update)
    assert kind.__doc__


def test_updates_by_the_mean(kind, comm):
    """Parameters change by the mean of the gradients, and equally on every rank."""
    optimizer = multi_node(kind, comm)
    train(optimizer, range(STEPS), comm)
    assert_trained(optimizer, kind, comm, STEPS)
    mine = [param.array.tobytes() for param in optimizer.target.params()]
    assert comm.allgather_obj(mine) == [mine] * comm.size


def test_gradients_that_are_missing(kind, comm):
    """A gradient that a rank does not have counts as zero."""
    optimizer = multi_node(kind, comm)
    for step in range(1 + kind.updates_late):
        optimizer.target.cleargrads()
        if comm.rank == 0:
            optimizer.target.a.grad = np.full((3, 4), 12.0 * (step + 1))
        optimizer.update()
    want = Model(0)
    np.testing.assert_allclose(optimizer.target.a.array, want.a.array - LR * 12 / comm.size)
    np.testing.assert_array_equal(optimizer.target.b.array, want.b.array)


def test_hooks_that_come_later(kind, comm):
    """It goes on when hooks are added between updates: it is chosen and prepared anew."""
    optimizer = multi_node(kind, comm)
    train(optimizer, range(2), comm)
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.0))
    train(optimizer, range(2, STEPS), comm)
    assert_trained(optimizer, kind, comm, STEPS)


def test_arrays_that_are_replaced(kind, comm):
    """New arrays of equal values, put in on every rank, are updated like the old ones."""
    optimizer = multi_node(kind, comm)
    train(optimizer, range(2), comm)
    for param in optimizer.target.params():
        param.array = param.array.copy()
    before = [param.array.copy() for param in optimizer.target.params()]
    train(optimizer, range(2, STEPS), comm)
    if not kind.updates_late:
        assert_trained(optimizer, kind, comm, STEPS)
        return
    # Gradients that were under way were of arrays that are no more, and are forgotten.
    values = [param.array.tobytes() for param in optimizer.target.params()]
    assert comm.allgather_obj(values) == [values] * comm.size
    assert values != [array.tobytes() for array in before]


def test_accumulates(kind, comm):
    """Two calls make one update, by the mean of their batches."""
    optimizer = multi_node(kind, comm, accumulate_steps=2)
    train(optimizer, [0, 0, 1, 1, 2, 2, 3, 3], comm)
    assert_trained(optimizer, kind, comm, 4)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))]
)
def test_copies(kind, comm, copied):
    """A copy goes on from where the first one is, and neither changes the other."""
    optimizer = multi_node(kind, comm)
    train(optimizer, range(1 + kind.updates_late), comm)
    twin = copied(optimizer)
    twin.communicator = comm
    before = [param.array.copy() for param in twin.target.params()]
    train(optimizer, range(1 + kind.updates_late, STEPS), comm)
    for array, param in zip(before, twin.target.params()):
        np.testing.assert_array_equal(array, param.array)
    assert_trained(optimizer, kind, comm, STEPS)
    first = STEPS - kind.updates_late
    train(twin, range(1, first + kind.updates_late), comm)
    assert twin.t == optimizer.t
    if not kind.updates_late:
        assert_trained(twin, kind, comm, STEPS)


def test_snapshots(kind, comm, tmp_path):
    """Rank 0's snapshot, loaded on every rank, goes on as the optimizer that was saved."""
    optimizer = multi_node(kind, comm)
    train(optimizer, range(2 + kind.updates_late), comm)
    path = comm.bcast_obj(str(tmp_path))
    if comm.rank == 0:
        for name, target in (("model", optimizer.target), ("optimizer", optimizer)):
            chainer.serializers.save_npz(f"{path}/{name}", target)
    comm.mpi_comm.Barrier()
    other = multi_node(kind, comm, Model(comm.rank + 7))
    for name, target in (("model", other.target), ("optimizer", other)):
        chainer.serializers.load_npz(f"{path}/{name}", target)
    assert other.t == 2
    train(other, range(2, STEPS + kind.updates_late), comm)
    assert other.t == STEPS
    if not kind.updates_late:
        assert_trained(other, kind, comm, STEPS)


def test_nothing_is_set_on_the_wrapped_optimizer(kind, comm):
    """What a multi-node optimizer keeps, it keeps itself."""
    optimizer = multi_node(kind, comm)
    train(optimizer, range(2), comm)
    plain = optimizers.SGD(LR).setup(Model(0))
    plain.update(plain.target, *batch(0, 0))
    assert vars(optimizer.actual_optimizer).keys() <= vars(plain).keys()


def test_options_that_differ(kind, comm):
    """Ranks that are given other options raise an error before they would wait for one another."""
    if comm.size == 1:
        pytest.skip("one rank agrees with itself")
    other = {"mean_grad": comm.rank == 1}
    with pytest.raises(ValueError, match="rank 1: the option mean_grad"):
        multi_node(kind, comm, **other)


def test_nothing_is_left_to_release(kind, comm):
    """After loading, parameters and gradients are arrays that each rank can write to."""
    optimizer = multi_node(kind, comm, share_parameters=True)
    train(optimizer, range(2), comm)
    optimizer.setup(optimizer.target)
    for param in optimizer.target.params():
        param.array[...] = comm.rank
    assert all((param.array == comm.rank).all() for param in optimizer.target.params())


def test_obstacles_are_told(comm, monkeypatch):
    """An update that is wanted, and cannot be made, is refused on every rank, with the reason."""

    class Refused(OneByOne):
        """An update that rank 0 has something against."""

        name = "refused"

        @classmethod
        def obstacle(cls, context, parameters):
            """See the base class."""
            del parameters
            return "it is a test" if context.comm.rank == 0 else None

    monkeypatch.setitem(UPDATES, Refused.name, Refused)
    optimizer = multi_node(Refused, comm, L.Linear(2, 2))
    optimizer.target.zerograds()
    with pytest.raises(ValueError, match="the update cannot be refused: it is a test"):
        optimizer.update()
