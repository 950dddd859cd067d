"""Ranks that update alone and average now and then, against the same ranks in one process."""

from __future__ import annotations

import copy
from pathlib import Path

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import optimizers
from hypothesis import given, settings
from hypothesis import strategies as st

from chainer_dist import Checkpoint, Join, RankMismatchError, create_local_sgd_optimizer

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def out(comm, tmp_path):
    """Return one folder for all ranks."""
    return Path(comm.bcast_obj(str(tmp_path)))


def make_model(seed=0, n_in=None):
    """Return a classifier, its first layer initialized by the first batch unless given."""
    np.random.seed(seed)
    return L.Classifier(chainer.Sequential(L.Linear(n_in, 6), F.tanh, L.Linear(6, 3)))


def batch(rank, number):
    """Return a batch of a rank."""
    rng = np.random.RandomState(100 * rank + number)
    return rng.rand(4, 5), rng.randint(0, 3, 4)


def params(model):
    """Return parameters in the order of their names."""
    return [param for _, param in sorted(model.namedparams())]


def average(arrays_of_ranks):
    """Make arrays of all simulated ranks their means."""
    for arrays in zip(*arrays_of_ranks):
        mean = sum(arrays) / len(arrays)
        for array in arrays:
            array[...] = mean


def simulate(size, steps, make_optimizer, period, warmup=0, average_state=False):
    """Return the models and optimizers of all ranks, trained in one process."""
    models = [make_model(0) for _ in range(size)]
    single = [make_optimizer().setup(model) for model in models]
    for step in range(steps):
        for rank, model in enumerate(models):
            loss = model(*batch(rank, step))
            model.cleargrads()
            loss.backward()
        if step == 0:  # the layers found out their shapes, and drew other numbers
            for model in models[1:]:
                model.copyparams(models[0])
                index = models.index(model)
                model.cleargrads()
                model(*batch(index, 0)).backward()
        if step < warmup:
            average([[param.grad for param in params(model)] for model in models])
        for optimizer in single:
            optimizer.update()
        if step >= warmup and (step + 1 - warmup) % period == 0:
            average([[param.array for param in params(model)] for model in models])
            if average_state:
                average(
                    [
                        [
                            value
                            for param in params(model)
                            for _, value in sorted(param.update_rule.state.items())
                        ]
                        for model in models
                    ]
                )
    return models


def assert_close(model, want):
    """The parameters are those of the other model."""
    for got, expected in zip(params(model), params(want)):
        np.testing.assert_allclose(got.array, expected.array, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("average_state", [False, True])
@pytest.mark.parametrize("make_optimizer", [optimizers.MomentumSGD, optimizers.Adam])
@pytest.mark.parametrize(("period", "warmup"), [(1, 0), (3, 0), (2, 3)])
def test_equals_the_simulation(any_comm, make_optimizer, period, warmup, average_state):
    """Each rank's model is its own between averagings, and the mean after them."""
    model = make_model(any_comm.rank)
    optimizer = create_local_sgd_optimizer(
        make_optimizer(),
        any_comm,
        period=period,
        warmup_updates=warmup,
        average_state=average_state,
    ).setup(model)
    steps = 8
    for step in range(steps):
        optimizer.update(model, *batch(any_comm.rank, step))
    assert optimizer.t == steps
    options = {"period": period, "warmup": warmup, "average_state": average_state}
    want = simulate(any_comm.size, steps, make_optimizer, **options)
    # Layers were initialized by rank 0, whose random state the simulation began with.
    assert_close(model, want[any_comm.rank])
    mine = [param.array.tobytes() for param in params(model)]
    same = len({tuple(each) for each in any_comm.allgather_obj(mine)}) == 1
    assert same is (any_comm.size == 1 or (steps - warmup) % period == 0)


@settings(max_examples=8)
@given(data=st.data())
def test_average_at_any_time(comm, data):
    """Averaging by hand is an averaging more, and moves none of the others."""
    by_hand = data.draw(st.sets(st.integers(1, 6)))
    model = make_model(comm.rank, 5)
    optimizer = create_local_sgd_optimizer(optimizers.SGD(0.5), comm, period=4).setup(model)
    models = [make_model(0, 5) for _ in range(comm.size)]
    singles = [optimizers.SGD(0.5).setup(each) for each in models]
    for step in range(6):
        optimizer.update(model, *batch(comm.rank, step))
        for rank, single in enumerate(singles):
            single.update(models[rank], *batch(rank, step))
        if step + 1 in by_hand:
            optimizer.average()
        if step + 1 in by_hand or step + 1 == 4:
            average([[param.array for param in params(each)] for each in models])
    assert_close(model, models[comm.rank])


def test_ranks_talk_once_a_period(comm):
    """Updates within a period are local."""
    model = make_model(comm.rank, 5)
    optimizer = create_local_sgd_optimizer(optimizers.SGD(), comm, period=3).setup(model)
    counts = []
    for step in range(9):
        before = comm.operation_log.number
        optimizer.update(model, *batch(comm.rank, step))
        counts.append(comm.operation_log.number > before)
    assert counts[3:] == [False, False, True, False, False, True]


def test_accumulation(comm):
    """Batches in no_sync are averaged on the rank before its update."""
    model = make_model(comm.rank, 5)
    optimizer = create_local_sgd_optimizer(optimizers.SGD(0.5), comm, period=2).setup(model)
    models = [make_model(0, 5) for _ in range(comm.size)]
    for update in range(2):
        with optimizer.no_sync():
            optimizer.update(model, *batch(comm.rank, 2 * update))
        optimizer.update(model, *batch(comm.rank, 2 * update + 1))
        for rank, each in enumerate(models):
            pairs = zip(batch(rank, 2 * update), batch(rank, 2 * update + 1))
            optimizers.SGD(0.5).setup(each).update(each, *map(np.concatenate, pairs))
    assert optimizer.t == 2
    average([[param.array for param in params(each)] for each in models])
    assert_close(model, models[comm.rank])


def test_master_copies_are_averaged(comm):
    """float16 parameters follow the mean of their float32 copies."""
    link = chainer.Link()
    with link.init_scope():
        link.w = chainer.Parameter(np.ones(3, np.float16))
    actual = optimizers.SGD(1.0)
    actual.use_fp32_update()
    optimizer = create_local_sgd_optimizer(actual, comm, period=2).setup(link)
    step = 2.0**-14  # lost if it were added to float16 ones
    for _ in range(16):
        link.w.grad = np.full(3, -step * (comm.rank + 1), np.float16)
        optimizer.update()
    want = 1 + 16 * step * (comm.size + 1) / 2
    np.testing.assert_allclose(link.w.update_rule._fp32_param.array, want, rtol=1e-6)
    np.testing.assert_allclose(link.w.array, want, rtol=2**-11)


@pytest.mark.filterwarnings("ignore:Non finite number")
@pytest.mark.parametrize("average_state", [False, True])
@pytest.mark.parametrize("overflows_at", [0, 2])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_overflows_on_one_rank(comm, average_state, overflows_at, dtype):
    """It makes one update fewer than the others, and is averaged with them, also if that was to be the first."""
    link = chainer.Link()
    with link.init_scope():
        link.w = chainer.Parameter(np.ones(3, dtype))
    actual = optimizers.MomentumSGD(0.125, 0.5)
    actual.use_fp32_update()
    actual.loss_scaling(interval=1)  # powers of 2
    optimizer = create_local_sgd_optimizer(actual, comm, period=1, average_state=average_state)
    optimizer.setup(link)
    last = comm.size - 1
    want, momentum = np.ones(comm.size), np.zeros(comm.size)
    for step in range(5):
        overflows = step == overflows_at
        for rank in range(comm.size - overflows):
            momentum[rank] = 0.5 * momentum[rank] - 0.125 * (rank + step + 1)
            want[rank] += momentum[rank]
        want[:] = want.mean()
        if average_state:
            momentum[:] = momentum.mean()
        scale = np.inf if overflows and comm.rank == last else actual._loss_scale
        link.w.grad = np.full(3, scale * (comm.rank + step + 1), dtype)
        link.w._loss_scale = actual._loss_scale
        optimizer.update()
        wide = link.w if dtype == np.float32 else link.w.update_rule._fp32_param
        got = np.ones(3) if wide is None else wide.array  # a single rank has not begun
        np.testing.assert_allclose(got, want[0], rtol=1e-5)
        np.testing.assert_allclose(link.w.array, want[0], rtol=2**-9)
    counts = comm.allgather_obj(link.w.update_rule.t)
    assert counts[last] == (5 if average_state and comm.size > 1 else 4)


def test_layers_that_appear_later(comm):
    """They are made equal; what ranks have learned since the last averaging stays theirs."""
    np.random.seed(comm.rank)
    model = chainer.Chain()
    with model.init_scope():
        model.a = L.Linear(5, 2)
        model.b = L.Linear(None, 2)
    optimizer = create_local_sgd_optimizer(optimizers.SGD(0.5), comm, period=9).setup(model)

    def loss(x, *, both):
        return F.sum(F.square(model.a(x) + (model.b(x) if both else 0)))

    for number in range(2):
        optimizer.update(lambda x: loss(x, both=False), batch(comm.rank, number)[0])
    before = [model.a.W.array.copy(), model.a.b.array.copy()]
    x = batch(comm.rank, 2)[0] * 0
    optimizer.update(lambda x: 0 * loss(x, both=True), x)
    np.testing.assert_array_equal(model.a.W.array, before[0])
    np.testing.assert_array_equal(model.a.b.array, before[1])
    if comm.size > 1:
        firsts = comm.allgather_obj(before[0].tobytes())
        assert len(set(firsts)) == comm.size
    assert len(set(comm.allgather_obj(model.b.W.array.tobytes()))) == 1


def test_resume_in_the_middle_of_a_period(comm, out):
    """Each rank goes on with its own model and state, to the bit."""
    make = {"period": 4, "average_state": True}
    model = make_model(comm.rank)
    optimizer = create_local_sgd_optimizer(optimizers.Adam(), comm, **make).setup(model)
    state = {"model": model, "optimizer": optimizer}
    with Checkpoint(comm, out / "saved") as checkpoint:
        for step in range(10):
            if step == 6:
                checkpoint.save(state, step)
            optimizer.update(model, *batch(comm.rank, step))
    other = make_model(77)
    resumed = create_local_sgd_optimizer(optimizers.Adam(), comm, **make).setup(other)
    with Checkpoint(comm, out / "saved") as checkpoint:
        assert checkpoint.resume({"model": other, "optimizer": resumed}) == 6
    for step in range(6, 10):
        resumed.update(other, *batch(comm.rank, step))
    assert resumed.t == 10
    for got, want in zip(params(other), params(model)):
        np.testing.assert_array_equal(got.array, want.array)


@pytest.mark.filterwarnings("ignore:the checkpoint")
@pytest.mark.parametrize("averaged", [True, False])
def test_resume_on_another_number_of_ranks(comm, out, averaged):
    """It goes on where the models were equal, and says why where they were not."""
    if comm.size == 1:
        pytest.skip("one rank has no other number of ranks within")
    model = make_model(comm.rank, 5)
    optimizer = create_local_sgd_optimizer(optimizers.SGD(), comm, period=5).setup(model)
    for step in range(3):
        optimizer.update(model, *batch(comm.rank, step))
    if averaged:
        optimizer.average()
    with Checkpoint(comm, out / "saved") as checkpoint:
        checkpoint.save({"model": model, "optimizer": optimizer}, 3)
    alone = comm.split(comm.rank, 0)
    (out / f"alone{comm.rank}").symlink_to(out / "saved")
    other = make_model(77, 5)
    resumed = create_local_sgd_optimizer(optimizers.SGD(), alone, period=5).setup(other)
    with Checkpoint(alone, out / f"alone{comm.rank}") as checkpoint:
        if averaged:
            assert checkpoint.resume({"model": other, "optimizer": resumed}) == 3
            assert_close(other, model)
        else:
            with pytest.raises(RuntimeError, match="local SGD optimizer"):
                checkpoint.resume({"model": other, "optimizer": resumed})
    alone.finalize()
    comm.mpi_comm.Barrier()


def test_ranks_that_differ(comm):
    """All ranks raise one error, which names the option."""
    for options in ({"period": 0}, {"period": 1, "warmup_updates": -1}):
        with pytest.raises(ValueError, match="expected"):
            create_local_sgd_optimizer(optimizers.SGD(), comm, **options)
    model = make_model(0, 5)
    optimizer = create_local_sgd_optimizer(optimizers.SGD(), comm, period=2 + comm.rank)
    optimizer.setup(model)
    for name, value in (("period", 0), ("warmup_updates", -1)):
        with pytest.raises(ValueError, match=f"{name} is {value}, expected"):
            setattr(optimizer, name, value)
    with pytest.raises(ValueError, match="no optimizers that update on each rank alone"):
        Join(optimizer)
    if comm.size == 1:
        pytest.skip("one rank agrees with itself")
    with pytest.raises(RankMismatchError, match="rank 1: period is 3, expected 2 as on rank 0"):
        optimizer.update(model, *batch(0, 0))
    optimizer.period = 2
    optimizer.update(model, *batch(0, 0))
    optimizer.lr = 1 + comm.rank
    with pytest.raises(RankMismatchError, match=r"rank 1: optimizer\.lr is 2, expected 1"):
        optimizer.update(model, *batch(0, 1))


def test_copies(comm):
    """A deep copy goes on as the optimizer does."""
    model = make_model(comm.rank, 5)
    optimizer = create_local_sgd_optimizer(optimizers.Adam(), comm, period=3).setup(model)
    optimizer.update(model, *batch(comm.rank, 0))
    twin = copy.deepcopy(optimizer)
    assert twin.period == 3
    for step in (1, 2):
        for each in (optimizer, twin):
            each.update(each.target, *batch(comm.rank, step))
    for one, other in zip(params(model), params(twin.target)):
        np.testing.assert_array_equal(one.array, other.array)
