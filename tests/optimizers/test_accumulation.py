"""Gradients accumulated over several batches, against one process that has them in one batch."""

from __future__ import annotations

import contextlib
import copy
import itertools
from pathlib import Path

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import iterators, optimizer_hooks, optimizers, training
from hypothesis import given, settings
from hypothesis import strategies as st

from chainer_dist import (
    Checkpoint,
    Join,
    RankMismatchError,
    compression,
    create_communicator,
    create_multi_node_optimizer,
    create_multi_node_updater,
)
from chainer_dist.links import MultiNodeBatchNormalization

pytestmark = pytest.mark.usefixtures("float64")

BATCH = 4


@pytest.fixture
def comm(request):
    """Return a communicator that shares the update, unless another kind is asked for."""
    communicator = create_communicator(getattr(request, "param", "shared_memory"))
    yield communicator
    communicator.finalize()


both = pytest.mark.parametrize("comm", ["naive", "shared_memory"], indirect=True)


@pytest.fixture
def out(comm, tmp_path):
    """Return one folder for all ranks."""
    return Path(comm.bcast_obj(str(tmp_path)))


def make_model(seed=0, n_in=None, norm=None):
    """Return a classifier whose first layer is initialized by the first batch, and a layer unused."""
    np.random.seed(seed)
    layers = [L.Linear(n_in, 6), norm() if norm else F.tanh, L.Linear(6, 3)]
    model = L.Classifier(chainer.Sequential(*layers))
    with model.init_scope():
        model.unused = L.Linear(2, 2)
    return model


def batch(rank, number):
    """Return a batch of a rank."""
    rng = np.random.RandomState(100 * rank + number)
    return rng.rand(BATCH, 5), rng.randint(0, 3, BATCH)


def together(pairs):
    """Return several batches, by rank and number, as one."""
    return tuple(map(np.concatenate, zip(*(batch(*pair) for pair in pairs))))


def train_on_large_batches(updates, make_optimizer=optimizers.Adam, make=make_model):
    """Train in one process; each update is of the batches of the given ranks and numbers."""
    model = make()
    optimizer = make_optimizer().setup(model)
    for pairs in updates:
        optimizer.update(model, *together(pairs))
    return model


def everyone(comm, numbers):
    """Return ranks and numbers of the batches of all ranks."""
    return [(rank, number) for rank in range(comm.size) for number in numbers]


def assert_same(comm, model, want, rtol=1e-9):
    """The parameters are those of the other model, to the same bits on every rank."""
    pairs = zip(
        sorted(model.namedparams(include_uninit=False)),
        sorted(want.namedparams(include_uninit=False)),
    )
    for (name, got), (other, expected) in pairs:
        assert name == other
        np.testing.assert_allclose(got.array, expected.array, rtol=rtol, atol=1e-12, err_msg=name)
    mine = {name: p.array.tobytes() for name, p in model.namedparams(include_uninit=False)}
    assert comm.allgather_obj(mine) == [mine] * comm.size


def adam_with_hooks():
    """Return an optimizer class whose hooks would show if they saw less than the whole mean."""

    def make():
        optimizer = optimizers.Adam(0.1)
        setup = optimizer.setup

        def set_up(link):
            setup(link)
            optimizer.add_hook(optimizer_hooks.WeightDecay(0.1))
            optimizer.add_hook(optimizer_hooks.GradientClipping(0.3))
            return optimizer

        optimizer.setup = set_up
        return optimizer

    return make


@both
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("make_optimizer", [optimizers.MomentumSGD, adam_with_hooks()])
@pytest.mark.parametrize("given_loss", [True, False])
def test_equals_one_large_batch(comm, steps, make_optimizer, given_loss):
    """``update`` k times on b samples is one update on k * b samples; ``t`` and hooks count one."""
    model = make_model(comm.rank)
    optimizer = create_multi_node_optimizer(make_optimizer(), comm, accumulate_steps=steps)
    optimizer.setup(model)
    for number in range(4 * steps):
        if given_loss:
            optimizer.update(model, *batch(comm.rank, number))
        else:
            model.cleargrads()
            model(*batch(comm.rank, number)).backward()
            optimizer.update()
        assert optimizer.t == (number + 1) // steps
        assert optimizer.target is model
    updates = [everyone(comm, range(steps * n, steps * (n + 1))) for n in range(4)]
    if given_loss:  # otherwise ranks began with layers of their own
        assert_same(comm, model, train_on_large_batches(updates, make_optimizer))
    else:
        mine = {name: param.array.tobytes() for name, param in model.namedparams()}
        assert comm.allgather_obj(mine) == [mine] * comm.size
    if comm.name == "shared_memory":
        assert optimizer.sharded


def test_gradients_computed_by_hand(comm):
    """They need not be cleared between the calls."""
    model = make_model(comm.rank, n_in=5)
    optimizer = create_multi_node_optimizer(optimizers.SGD(0.5), comm, accumulate_steps=3)
    optimizer.setup(model)
    for number in range(6):
        if number % 3 == 0:
            model.cleargrads()
        model(*batch(comm.rank, number)).backward()
        optimizer.update()
    updates = [everyone(comm, range(3)), everyone(comm, range(3, 6))]
    want = train_on_large_batches(
        updates, lambda: optimizers.SGD(0.5), lambda: make_model(0, n_in=5)
    )
    assert_same(comm, model, want)


@settings(max_examples=8)
@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_no_sync(comm, sizes):
    """Calls in the scope, and the first one outside, are one update, however many they are."""
    model = make_model(comm.rank, n_in=5)
    optimizer = create_multi_node_optimizer(optimizers.MomentumSGD(0.1), comm).setup(model)
    number, updates = 0, []
    for size in sizes:
        with optimizer.no_sync():
            for each in range(number, number + size - 1):
                optimizer.update(model, *batch(comm.rank, each))
        optimizer.update(model, *batch(comm.rank, number + size - 1))
        updates.append(everyone(comm, range(number, number + size)))
        number += size
    assert optimizer.t == len(sizes)
    make = optimizers.MomentumSGD
    assert_same(
        comm,
        model,
        train_on_large_batches(updates, lambda: make(0.1), lambda: make_model(0, n_in=5)),
    )


@both
def test_batches_before_the_last_are_local(comm):
    """Ranks talk once for four batches: as often as for one."""
    counts = {}
    for steps in (1, 4):
        model = make_model(comm.rank, n_in=5)
        optimizer = create_multi_node_optimizer(optimizers.SGD(), comm, accumulate_steps=steps)
        optimizer.setup(model)
        for number in range(2 * steps):  # what is chosen once is chosen
            optimizer.update(model, *batch(comm.rank, number))
        for number in range(steps):
            before = comm.operation_log.number
            optimizer.update(model, *batch(comm.rank, number))
            counts[steps, number] = comm.operation_log.number - before
    assert counts[1, 0] == counts[4, 3] > 0
    assert [counts[4, number] for number in range(3)] == [0, 0, 0]


class Branches(chainer.Chain):
    """Layers of which each batch uses some."""

    def __init__(self):
        """Create them; inputs are found out when first used."""
        super().__init__()
        with self.init_scope():
            self.layers = chainer.ChainList(*[L.Linear(None, 2) for _ in range(3)])

    def forward(self, x, used):
        """Return a loss."""
        return F.mean(sum(F.square(self.layers[number](x)) for number in used))


@both
@pytest.mark.parametrize("zero_fill", [True, False])
def test_layers_that_some_batches_use(comm, zero_fill):
    """A gradient that is missing counts as zero, and layers may appear in any batch of any rank."""
    uses = [{0}, {0, 1}, {0}] if zero_fill else [{0}, {0, 1}, {1}]
    if zero_fill and comm.rank == comm.size - 1:
        uses = [{0, 2}, {0}, {0}]
    np.random.seed(comm.rank)
    model = Branches()
    optimizer = create_multi_node_optimizer(
        optimizers.SGD(0.5), comm, zero_fill=zero_fill, accumulate_steps=3
    ).setup(model)
    xs = [[batch(rank, number)[0] for number in range(3)] for rank in range(comm.size)]
    for x, used in zip(xs[comm.rank], uses):
        optimizer.update(model, x, used)
    assert optimizer.t == 1
    first = copy.deepcopy(model)
    for x, used in zip(xs[comm.rank], uses):
        optimizer.update(model, x, used)
    first.cleargrads()
    loss = 0
    for own, used in zip(xs, comm.allgather_obj(uses)):
        loss += sum(first(x, used_now) for x, used_now in zip(own, used)) / 3 / comm.size
    loss.backward()
    for param in first.params():
        if param.grad is not None:
            param.array -= 0.5 * param.grad
    assert_same(comm, model, first)


def test_missing_gradients_are_an_error_without_zero_fill(comm):
    """One that a rank got from an earlier batch counts as there."""
    if comm.size == 1:
        pytest.skip("one rank lacks nothing that others have")
    model = Branches()
    model(np.zeros((1, 5)), {0, 1, 2})
    optimizer = create_multi_node_optimizer(
        optimizers.SGD(), comm, zero_fill=False, accumulate_steps=2
    ).setup(model)
    x = np.ones((2, 5))
    for used in [{0}, {1}] if comm.rank else [{1}, {0}]:
        optimizer.update(model, x, used)
    assert optimizer.t == 1
    optimizer.update(model, x, {0, 2} if comm.rank else {0})
    with pytest.raises(RankMismatchError, match=r"rank 1: the gradient of /layers/2/W is an array"):
        optimizer.update(model, x, {0})


@pytest.mark.filterwarnings("ignore:Non finite")
@pytest.mark.parametrize("dynamic", [False, True])
def test_loss_scaling(comm, dynamic):
    """Gradients are those without scaling; an overflow in one batch of one rank skips one update."""
    model = make_model(comm.rank, n_in=5)
    optimizer = create_multi_node_optimizer(optimizers.SGD(0.5), comm, accumulate_steps=3)
    optimizer.setup(model)
    if dynamic:
        optimizer.loss_scaling()
        optimizer._loss_scale = 1024.0
    else:
        optimizer.set_loss_scale(1024.0)
    for number in range(3):
        optimizer.update(model, *batch(comm.rank, number))
    want = train_on_large_batches(
        [everyone(comm, range(3))], lambda: optimizers.SGD(0.5), lambda: make_model(0, n_in=5)
    )
    assert_same(comm, model, want)
    if dynamic:
        assert optimizer._loss_scale == 2048.0  # Chainer doubles it until there is an overflow
        for number in range(3):
            x, t = batch(comm.rank, number)
            factor = np.inf if (comm.rank, number) == (comm.size - 1, 1) else 1.0
            with np.errstate(invalid="ignore"):
                optimizer.update(lambda x, t, factor=factor: model(x, t) * factor, x, t)
        assert optimizer.t == 2
        assert optimizer._loss_scale == 1024.0
        assert_same(comm, model, want)


def test_float16_is_summed_in_float32(comm):
    """The mean of many small gradients is that mean, which float16 sums would lose."""
    link = chainer.Link()
    with link.init_scope():
        link.w = chainer.Parameter(np.zeros(2, np.float16))
    optimizer = create_multi_node_optimizer(optimizers.SGD(1.0), comm, accumulate_steps=64)
    optimizer.setup(link)
    for number in range(64):
        link.w.grad = np.array([60000, 1 if number else 2048], np.float16)
        optimizer.update()
    np.testing.assert_allclose(link.w.array, [-60000, -(2048 + 63) / 64], rtol=1e-3)


@both
@settings(max_examples=10)
@given(
    counts=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    steps=st.integers(1, 3),
    zero_fill=st.booleans(),
)
def test_ranks_with_different_numbers_of_batches(comm, counts, steps, zero_fill):
    """Every batch weighs the same, whichever ranks have run out in the middle."""
    counts = counts[: comm.size]
    model = make_model(comm.rank, n_in=5)
    optimizer = create_multi_node_optimizer(
        optimizers.SGD(0.5), comm, zero_fill=zero_fill, accumulate_steps=steps
    ).setup(model)
    with Join(optimizer):
        for number in range(counts[comm.rank]):
            optimizer.update(model, *batch(comm.rank, number))
    assert optimizer.t == max(counts) // steps
    have = [
        [(rank, number) for rank, count in enumerate(counts) if number < count]
        for number in range(max(counts))
    ]
    # What is left over goes into the first update that is complete.
    rest = max(counts) % steps
    for number in range(10, 10 + steps - rest):
        optimizer.update(model, *batch(comm.rank, number))
        have.append(everyone(comm, [number]))
    updates = [[*itertools.chain(*have[n : n + steps])] for n in range(0, len(have), steps)]
    want = train_on_large_batches(
        updates, lambda: optimizers.SGD(0.5), lambda: make_model(0, n_in=5)
    )
    assert_same(comm, model, want)


def test_standing_by_in_no_sync(comm):
    """A rank without batches follows the others, which put updates off."""
    counts = [4, 0, 4, 2][: comm.size]
    model = make_model(comm.rank, n_in=5)
    optimizer = create_multi_node_optimizer(optimizers.SGD(0.5), comm).setup(model)
    with Join(optimizer):
        for number in range(counts[comm.rank]):
            postponed = optimizer.no_sync() if number % 2 == 0 else contextlib.nullcontext()
            with postponed:
                optimizer.update(model, *batch(comm.rank, number))
    updates = [
        [(rank, n) for rank, count in enumerate(counts) for n in (2 * u, 2 * u + 1) if n < count]
        for u in range(2)
    ]
    want = train_on_large_batches(
        updates, lambda: optimizers.SGD(0.5), lambda: make_model(0, n_in=5)
    )
    assert_same(comm, model, want)


def test_batch_normalization_of_a_rank_that_stands_by(comm):
    """It repeats its batch for the others' statistics, and none of its gradients counts twice."""
    counts = [3, 1, 4, 2][: comm.size]
    model = make_model(comm.rank, norm=lambda: MultiNodeBatchNormalization(6, comm))
    optimizer = create_multi_node_optimizer(optimizers.SGD(0.5), comm, accumulate_steps=2)
    optimizer.setup(model)
    with Join(optimizer):
        for number in range(counts[comm.rank]):
            optimizer.update(model, *batch(comm.rank, number))
    # The same in one process: each batch of all ranks is normalized by itself.
    want = make_model(0, norm=lambda: L.BatchNormalization(6))
    single = optimizers.SGD(0.5).setup(want)
    for first in range(0, max(counts) - 1, 2):
        pairs = [[(r, n) for r, c in enumerate(counts) if n < c] for n in (first, first + 1)]
        total = sum(map(len, pairs))
        losses = [want(*together(each)) * (len(each) / total) for each in pairs]
        want.cleargrads()
        sum(losses).backward()
        single.update()
    assert optimizer.t == max(counts) // 2
    assert_same(comm, model, want)


def make_trainer(comm, steps, stop, seed=0):
    """Return a trainer with dropout and a shuffled order, which a resume has to go on with."""
    np.random.seed(10 * seed + comm.rank)
    model = L.Classifier(chainer.Sequential(L.Linear(None, 6), F.tanh, F.dropout, L.Linear(6, 3)))
    optimizer = create_multi_node_optimizer(optimizers.Adam(0.1), comm, accumulate_steps=steps)
    optimizer.setup(model)
    data = list(zip(*together([(comm.rank, number) for number in range(5)])))
    updater = training.StandardUpdater(iterators.SerialIterator(data, BATCH), optimizer)
    return training.Trainer(updater, (stop, "iteration"), out="result")


def test_resume_in_the_middle(comm, out, monkeypatch):
    """A run resumed between two batches of an update is, to the bit, the one not interrupted."""
    monkeypatch.chdir(out)
    whole = make_trainer(comm, 3, 8)
    whole.run()
    for stop, seed in ((4, 0), (5, 1)):
        trainer = make_trainer(comm, 3, stop, seed=seed)
        checkpoint = Checkpoint(comm, out / "saved")
        trainer.extend(checkpoint, trigger=(1, "iteration"))
        assert checkpoint.resume(trainer) == (0 if stop == 4 else 4)
        trainer.run()
    resumed = make_trainer(comm, 3, 8, seed=2)
    assert Checkpoint(comm, out / "saved").resume(resumed) == 5
    resumed.run()
    got, want = (each.updater.get_optimizer("main") for each in (resumed, whole))
    assert got.t == want.t == 2
    for each in (got, want):  # two of the eight batches are under way, and the same ones
        with chainer.using_config("train", value=False):
            each.update(each.target, *batch(comm.rank, 8))
        assert each.t == 3
    for (name, one), (_, other) in zip(
        sorted(got.target.namedparams()), sorted(want.target.namedparams())
    ):
        np.testing.assert_array_equal(one.array, other.array, err_msg=name)


@pytest.mark.filterwarnings("ignore:the checkpoint")
def test_resume_in_the_middle_on_fewer_ranks(comm, out):
    """What other numbers of ranks had accumulated goes into the mean, each batch as any other."""
    model = make_model(comm.rank, n_in=5)
    optimizer = create_multi_node_optimizer(optimizers.SGD(0.5), comm, accumulate_steps=3)
    optimizer.setup(model)
    for number in range(5):
        optimizer.update(model, *batch(comm.rank, number))
    with Checkpoint(comm, out / "saved") as checkpoint:
        checkpoint.save({"optimizer": optimizer, "model": model}, 5)
    for_all = out / f"alone{comm.rank}"
    alone = comm.split(comm.rank, 0)
    other = make_model(7, n_in=5)
    resumed = create_multi_node_optimizer(optimizers.SGD(0.5), alone, accumulate_steps=3)
    resumed.setup(other)
    for_all.symlink_to(out / "saved")
    with Checkpoint(alone, for_all) as checkpoint:
        assert checkpoint.resume({"optimizer": resumed, "model": other}) == 5
    resumed.update(other, *batch(0, 5))
    updates = [everyone(comm, range(3)), [*everyone(comm, [3, 4]), (0, 5)]]
    want = train_on_large_batches(
        updates, lambda: optimizers.SGD(0.5), lambda: make_model(0, n_in=5)
    )
    assert resumed.t == 2
    assert_same(alone, other, want)
    alone.finalize()
    comm.mpi_comm.Barrier()


@both
@pytest.mark.parametrize("zero_fill", [True, False])
def test_resume_with_loss_scaling(comm, out, zero_fill):
    """Gradients from before it are divided by their loss scale, also of layers that no batch after it uses."""

    def make():
        np.random.seed(0)
        model = Branches()
        model(np.zeros((1, 5)), {0, 1, 2})
        optimizer = create_multi_node_optimizer(
            optimizers.SGD(0.5), comm, zero_fill=zero_fill, accumulate_steps=2
        )
        optimizer.setup(model).set_loss_scale(64.0)
        return {"model": model, "optimizer": optimizer}

    whole, resumed = make(), make()
    xs = [batch(comm.rank, number)[0] for number in range(2)]
    whole["optimizer"].update(whole["model"], xs[0], {0, 1})
    with Checkpoint(comm, out / "saved") as checkpoint:
        checkpoint.save(whole, 1)
        assert checkpoint.resume(resumed) == 1
    for each in (whole, resumed):
        each["optimizer"].update(each["model"], xs[1], {0, 2})
    assert_same(comm, resumed["model"], whole["model"])
    want = make()["model"]
    want.cleargrads()
    loss = sum(
        want(batch(rank, number)[0], used)
        for rank in range(comm.size)
        for number, used in enumerate([{0, 1}, {0, 2}])
    )
    (loss / (2 * comm.size)).backward()
    for param in want.params():
        param.array -= 0.5 * param.grad
    assert_same(comm, resumed["model"], want)


def test_snapshots_begin_anew(comm):
    """Chainer's snapshot is that of the last update; loaded, it drops what was accumulated."""
    model = make_model(comm.rank, n_in=5)
    optimizer = create_multi_node_optimizer(optimizers.SGD(0.5), comm, accumulate_steps=2)
    optimizer.setup(model)
    for number in range(3):
        optimizer.update(model, *batch(comm.rank, number))
    saved = chainer.serializers.DictionarySerializer()
    optimizer.serialize(saved)
    optimizer.serialize(chainer.serializers.NpzDeserializer(saved.target))
    for number in range(4, 6):
        optimizer.update(model, *batch(comm.rank, number))
    assert optimizer.t == 2
    updates = [everyone(comm, numbers) for numbers in ([0, 1], [4, 5])]
    want = train_on_large_batches(
        updates, lambda: optimizers.SGD(0.5), lambda: make_model(0, n_in=5)
    )
    assert_same(comm, model, want)


def test_double_buffering(comm):
    """Each update uses the mean of the accumulation before."""
    model = make_model(comm.rank, n_in=5)
    optimizer = create_multi_node_optimizer(
        optimizers.SGD(0.5), comm, double_buffering=True, accumulate_steps=2
    ).setup(model)
    for number in range(6):
        optimizer.update(model, *batch(comm.rank, number))
    optimizer.wait()
    assert optimizer.t == 2
    want = make_model(0, n_in=5)
    stale = None
    for first in (0, 2, 4):
        want.cleargrads()
        want(*together(everyone(comm, [first, first + 1]))).backward()
        fresh = [param.grad for param in want.params()]
        for param, grad in zip(want.params(), stale or []):
            param.array -= 0 if grad is None else 0.5 * grad
        stale = fresh
    assert_same(comm, model, want)


def test_compression_counts_updates(comm):
    """What is compressed, and what is left out, is the mean over the batches."""
    calls = []

    class Counting(compression.Float16):
        def mean(self, comm, grads):
            calls.append(len(grads))
            comm.mean_arrays(list(grads.values()))

    model = make_model(comm.rank, n_in=5)
    optimizer = create_multi_node_optimizer(
        optimizers.SGD(0.5), comm, compression=Counting(), accumulate_steps=3
    ).setup(model)
    for number in range(6):
        optimizer.update(model, *batch(comm.rank, number))
    assert len(calls) == 2
    updates = [everyone(comm, range(3)), everyone(comm, range(3, 6))]
    want = train_on_large_batches(
        updates, lambda: optimizers.SGD(0.5), lambda: make_model(0, n_in=5)
    )
    assert_same(comm, model, want)


@pytest.mark.parametrize("share_parameters", [True, False])
def test_mean_grad_and_shared_parameters(share_parameters):
    """Memory that ranks share is neither written nor added up between updates."""
    comm = create_communicator("shared_memory")
    model = make_model(comm.rank, n_in=5)
    optimizer = create_multi_node_optimizer(
        optimizers.Adam(),
        comm,
        accumulate_steps=2,
        mean_grad=True,
        share_parameters=share_parameters,
    ).setup(model)
    for number in range(6):
        optimizer.update(model, *batch(comm.rank, number))
    updates = [everyone(comm, [n, n + 1]) for n in (0, 2, 4)]
    want = train_on_large_batches(updates, make=lambda: make_model(0, n_in=5))
    assert_same(comm, model, want)
    for (name, got), (_, expected) in zip(sorted(model.namedparams()), sorted(want.namedparams())):
        if expected.grad is not None:
            np.testing.assert_allclose(got.grad, expected.grad, rtol=1e-9, err_msg=name)
    comm.mpi_comm.Barrier()
    comm.finalize()


def test_trainer_with_uneven_data(comm, tmp_path, monkeypatch):
    """An updater for parts of different lengths counts calls; the optimizer counts updates."""
    monkeypatch.chdir(tmp_path)
    counts = [4, 2, 3, 1][: comm.size]
    model = make_model(comm.rank, n_in=5)
    optimizer = create_multi_node_optimizer(optimizers.SGD(0.5), comm, accumulate_steps=2)
    optimizer.setup(model)
    data = list(zip(*together([(comm.rank, number) for number in range(counts[comm.rank])])))
    batches = iterators.SerialIterator(data, BATCH, shuffle=False)
    updater = create_multi_node_updater(training.StandardUpdater(batches, optimizer), comm)
    trainer = training.Trainer(updater, (1, "epoch"))
    trainer.run()
    assert (updater.iteration, optimizer.t) == (4, 2)
    updates = [
        [(rank, n) for rank, count in enumerate(counts) for n in pair if n < count]
        for pair in ((0, 1), (2, 3))
    ]
    want = train_on_large_batches(
        updates, lambda: optimizers.SGD(0.5), lambda: make_model(0, n_in=5)
    )
    assert_same(comm, model, want)


@both
def test_ranks_that_differ(comm):
    """All ranks raise one error that names the rank and what it has, and none waits."""
    with pytest.raises(ValueError, match="accumulate_steps is 0, expected 1 or more"):
        create_multi_node_optimizer(optimizers.SGD(), comm, accumulate_steps=0)
    optimizer = create_multi_node_optimizer(optimizers.SGD(), comm, accumulate_steps=2)
    for wrong, kind in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(kind):
            optimizer.accumulate_steps = wrong
    assert optimizer.accumulate_steps == 2
    if comm.size == 1:
        pytest.skip("one rank agrees with itself")
    last = comm.size - 1
    model = make_model(0, n_in=5)
    steps = 2 + (comm.rank == last)
    optimizer = create_multi_node_optimizer(optimizers.SGD(), comm, accumulate_steps=steps)
    optimizer.setup(model)
    with pytest.raises(RankMismatchError, match=f"rank {last}: accumulate_steps is 3, expected 2"):
        optimizer.update(model, *batch(0, 0))
    optimizer.accumulate_steps = 2
    for number in range(2):
        optimizer.update(model, *batch(0, number))
    assert optimizer.t == 1
    optimizer.accumulate_steps = 1
    if comm.rank == last:
        with optimizer.no_sync():
            optimizer.update(model, *batch(0, 0))
    with pytest.raises(RankMismatchError, match=rf"rank {last}: the number of batches .* is 1"):
        optimizer.update(model, *batch(0, 1))


def test_links_added_in_the_middle(comm):
    """They are made equal, and what was accumulated before stays."""
    model = make_model(comm.rank, n_in=5)
    optimizer = create_multi_node_optimizer(optimizers.SGD(0.5), comm, accumulate_steps=2)
    optimizer.setup(model)
    optimizer.update(model, *batch(comm.rank, 0))
    with model.init_scope():
        model.added = L.Linear(5, 1)
    model.added.W.update_rule = optimizer.create_update_rule()
    model.added.b.update_rule = optimizer.create_update_rule()
    twin = make_model(0, n_in=5)
    with twin.init_scope():
        twin.added = L.Linear(5, 1)
    twin.added.W.array[...] = comm.bcast(model.added.W.array)

    def loss(net, x, t):
        return net(x, t) + F.mean(net.added(x))

    optimizer.update(lambda x, t: loss(model, x, t), *batch(comm.rank, 1))
    single = optimizers.SGD(0.5).setup(twin)
    single.update(
        lambda: (
            (twin(*together(everyone(comm, [0]))) + loss(twin, *together(everyone(comm, [1])))) / 2
        )
    )
    assert_same(comm, model, twin)


def test_copies(comm):
    """The deep copy of an optimizer goes on with what it had accumulated, apart from it."""
    model = make_model(comm.rank, n_in=5)
    optimizer = create_multi_node_optimizer(optimizers.SGD(0.5), comm, accumulate_steps=2)
    optimizer.setup(model)
    optimizer.update(model, *batch(comm.rank, 0))
    twin = copy.deepcopy(optimizer)
    optimizer.update(model, *batch(comm.rank, 1))
    twin.update(twin.target, *batch(comm.rank, 1))
    for (name, one), (_, other) in zip(
        sorted(model.namedparams()), sorted(twin.target.namedparams())
    ):
        np.testing.assert_array_equal(one.array, other.array, err_msg=name)


@both
def test_gradients_of_different_parameters(comm):
    """One batch has a gradient of one parameter, the next of another one, read-only and of another shape."""
    model = chainer.Link()
    with model.init_scope():
        model.a, model.b = chainer.Parameter(np.ones(2)), chainer.Parameter(np.ones((3, 2)))
    optimizer = create_multi_node_optimizer(optimizers.SGD(1.0), comm, accumulate_steps=2)
    optimizer.setup(model)
    optimizer.update(lambda: F.sum(model.a * model.a))
    optimizer.update(lambda: F.sum(model.b))
    np.testing.assert_allclose(model.a.array, np.zeros(2))
    np.testing.assert_allclose(model.b.array, np.full((3, 2), 0.5))
