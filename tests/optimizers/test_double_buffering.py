"""Updates by the gradients of the step before, against the same in one process."""

from __future__ import annotations

import copy
import pickle
import threading

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import optimizers
from mpi4py import MPI

from chainer_dist import compression, create_communicator, create_multi_node_optimizer
from chainer_dist.collectives import operation
from chainer_dist.updates import delayed

BATCH = 12
STEPS = 5


pytestmark = pytest.mark.usefixtures("float64")


def make_model(seed):
    """Return a small classifier with a layer that is never used."""
    np.random.seed(seed)
    model = L.Classifier(chainer.Sequential(L.Linear(5, 7), F.tanh, L.Linear(7, 3)))
    with model.init_scope():
        model.unused = L.Linear(2, 2)
    return model


def batch(step):
    """Return the concatenated batch of a step."""
    rng = np.random.RandomState(step)
    return rng.rand(BATCH, 5), rng.randint(0, 3, BATCH)


def own(data, comm):
    """Return this rank's part of a batch."""
    share = BATCH // comm.size
    return tuple(x[comm.rank * share : (comm.rank + 1) * share] for x in data)


def train_stale(make_optimizer, steps=STEPS):
    """Train in one process by gradients that are one step old."""
    model = make_model(0)
    optimizer = make_optimizer().setup(model)
    stale = None
    for step in range(steps):
        model.cleargrads()
        model(*batch(step)).backward()
        fresh = {name: param.grad for name, param in model.namedparams()}
        if stale is not None:
            for name, param in model.namedparams():
                param.grad = stale[name]
            optimizer.update()
        stale = fresh
    return model


def assert_same(comm, model, want):
    """The parameters are those of the other model, to the same bits on every rank."""
    for (name, got), (_, expected) in zip(sorted(model.namedparams()), sorted(want.namedparams())):
        np.testing.assert_allclose(got.array, expected.array, rtol=1e-10, err_msg=name)
    mine = {name: param.array.tobytes() for name, param in model.namedparams()}
    assert comm.allgather_obj(mine) == [mine] * comm.size


@pytest.mark.parametrize("zero_fill", [True, False])
@pytest.mark.parametrize("make_optimizer", [optimizers.SGD, optimizers.Adam])
def test_trains_like_one_process(any_comm, make_optimizer, zero_fill):
    """Every update uses the mean gradients of the step before."""
    model = make_model(any_comm.rank)
    optimizer = create_multi_node_optimizer(
        make_optimizer(), any_comm, double_buffering=True, zero_fill=zero_fill
    ).setup(model)
    for step in range(STEPS):
        optimizer.update(model, *own(batch(step), any_comm))
    optimizer.wait()
    assert optimizer.t == STEPS - 1
    assert optimizer.sharded is False
    assert_same(any_comm, model, train_stale(make_optimizer))


def test_gradients_computed_by_hand(comm):
    """``update()`` without a loss takes the gradients that are there."""
    model = make_model(comm.rank)
    optimizer = create_multi_node_optimizer(optimizers.SGD(), comm, double_buffering=True)
    optimizer.setup(model)
    for step in range(STEPS):
        model.cleargrads()
        model(*own(batch(step), comm)).backward()
        optimizer.update()
    assert_same(comm, model, train_stale(optimizers.SGD))


def test_the_exchange_is_in_the_background(comm):
    """``update`` returns before the gradients of its own step are averaged."""
    model = make_model(0)
    optimizer = create_multi_node_optimizer(optimizers.SGD(), comm, double_buffering=True)
    optimizer.setup(model)
    optimizer.update(model, *own(batch(0), comm))  # starts the thread
    background = delayed.background(comm)
    averaging = background.comm.mean_arrays

    gate = threading.Event()

    def late(arrays):
        gate.wait()
        averaging(arrays)

    background.comm.mean_arrays = late
    try:
        optimizer.update(model, *own(batch(1), comm))
        assert not optimizer._state.plan.update._pending.done.done()
    finally:
        gate.set()
    optimizer.wait()
    assert optimizer._state.plan.update._pending.done.done()
    assert optimizer.t == 1


def test_a_snapshot_leaves_gradients_under_way_behind(comm):
    """After loading, the next update starts anew, on every rank alike."""
    model = make_model(comm.rank)
    optimizer = create_multi_node_optimizer(optimizers.SGD(), comm, double_buffering=True)
    optimizer.setup(model)
    for step in range(3):
        optimizer.update(model, *own(batch(step), comm))
    saved = chainer.serializers.DictionarySerializer()
    optimizer.serialize(saved)
    optimizer.serialize(chainer.serializers.NpzDeserializer(saved.target))
    before = {name: param.array.copy() for name, param in model.namedparams()}
    optimizer.update(model, *own(batch(3), comm))
    assert optimizer.t == 2
    for name, param in model.namedparams():
        np.testing.assert_array_equal(param.array, before[name])
    optimizer.update(model, *own(batch(4), comm))
    assert optimizer.t == 3


def test_copies_exchange_on_their_own(comm):
    """A deep copy and its original go on side by side; a pickled one has no exchange under way."""
    model = make_model(comm.rank)
    optimizer = create_multi_node_optimizer(optimizers.SGD(), comm, double_buffering=True)
    optimizer.setup(model)
    optimizer.update(model, *own(batch(0), comm))
    twin = copy.deepcopy(optimizer)
    for step in range(1, STEPS):
        optimizer.update(model, *own(batch(step), comm))
        twin.update(twin.target, *own(batch(step), comm))
    assert_same(comm, model, train_stale(optimizers.SGD))
    assert (twin.t, optimizer.t) == (STEPS - 2, STEPS - 1)
    assert pickle.loads(pickle.dumps(optimizer))._state.plan.chosen is None


def dynamic(optimizer, step):
    """Scale dynamically: doubled at each update at first."""
    if step == 0:
        optimizer.loss_scaling()


def static(optimizer, step):
    """Set another scale at each step."""
    optimizer.set_loss_scale([16.0, 2.0, 0.25, 8.0, 8.0][step % 5])


def on_and_off(optimizer, step):
    """Scale every second step."""
    optimizer._loss_scale = 64.0 if step % 2 else None


@pytest.mark.parametrize("change", [dynamic, static, on_and_off])
def test_each_gradient_has_its_own_loss_scale(comm, change):
    """It is divided by the one that it was computed with; hooks know that one, too."""
    hook = chainer.optimizer_hooks.WeightDecay(0.1)
    model = make_model(0)
    momentum = optimizers.MomentumSGD(0.1)
    optimizer = create_multi_node_optimizer(momentum, comm, double_buffering=True)
    optimizer.setup(model)

    optimizer.add_hook(hook)
    for step in range(8):
        change(optimizer, step)
        optimizer.update(model, *own(batch(step), comm))

    class WithHook(optimizers.MomentumSGD):
        def setup(self, link):
            super().setup(link)
            self.add_hook(hook)
            return self

    assert_same(comm, model, train_stale(lambda: WithHook(0.1), 8))


@pytest.mark.filterwarnings("ignore:Non finite")
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_overflow_is_that_of_the_stale_gradient(comm, bad):
    """The update by a gradient that is not finite is left out, and no other; then the scale is halved."""
    model = make_model(0)
    optimizer = create_multi_node_optimizer(optimizers.SGD(), comm, double_buffering=True)
    optimizer.setup(model).loss_scaling()
    scales, skipped = [], []
    for step in range(7):
        x, t = own(batch(step), comm)
        if step == 3 and comm.rank == comm.size - 1:
            x = np.full_like(x, bad)
        before = model.predictor[0].W.array.copy()
        with np.errstate(all="ignore"):
            optimizer.update(model, x, t)
        skipped.append(np.array_equal(before, model.predictor[0].W.array))
        scales.append(optimizer._loss_scale)
    assert skipped == [True, False, False, False, True, False, False]
    assert scales[:5] == [1, 2, 4, 8, 4]

    want, plain, stale = make_model(0), optimizers.SGD(), None
    plain.setup(want)
    for step in range(7):
        want.cleargrads()
        want(*batch(step)).backward()
        fresh = [param.grad for param in want.params()]
        if stale is not None:
            for param, grad in zip(want.params(), stale):
                param.grad = grad
            plain.update()
        stale = None if step == 3 else fresh
    assert_same(comm, model, want)


@pytest.mark.parametrize("way", ["double_buffering", "compression"])
@pytest.mark.parametrize("kind", ["naive", "shared_memory"])
def test_many_optimizers_in_one_process(kind, way, monkeypatch):
    """They share what MPI has few of, in any order; a communicator gives it back with itself."""
    options = {
        "double_buffering": lambda: {"double_buffering": True},
        "compression": lambda: {"compression": compression.SparseRows()},
    }[way]
    made = []
    monkeypatch.setattr(operation, "creation_hooks", [*operation.creation_hooks, made.append])
    x = np.ones((1, 2), np.float32)
    threads = threading.active_count()
    with create_communicator(kind) as comm:
        kept = []
        for _ in range(4):
            model = L.Linear(2, 1, nobias=True, initialW=0)
            optimizer = create_multi_node_optimizer(optimizers.SGD(1), comm, **options())
            kept = [*kept[-1:], optimizer.setup(model)]
            for each in kept:
                each.update(lambda target=each.target: F.sum(target(x)))
        assert [each._mpi_comm is None for each in made] == [False, False]
        assert (kept[0].target.W.array < 0).all()
    assert all(each._mpi_comm is None for each in made)
    assert threading.active_count() <= threads


def test_what_does_not_go_together(comm, monkeypatch):
    """A sharded update, or an MPI without threads, is refused with a reason."""
    with pytest.raises(ValueError, match="leave sharded_update out"):
        create_multi_node_optimizer(optimizers.SGD(), comm, True, sharded_update=True)
    monkeypatch.setattr(MPI, "Query_thread", lambda: MPI.THREAD_SERIALIZED)
    with pytest.raises(ValueError, match="THREAD_MULTIPLE"):
        create_multi_node_optimizer(optimizers.SGD(), comm, double_buffering=True)
