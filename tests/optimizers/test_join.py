"""Ranks with different numbers of batches, against one process that knows all of them."""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import iterators, optimizers, training
from chainer.training import extensions
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import (
    Join,
    RankMismatchError,
    create_communicator,
    create_multi_node_evaluator,
    create_multi_node_optimizer,
    create_multi_node_updater,
)
from chainer_dist.links import MultiNodeBatchNormalization

COUNTS = [3, 1, 4, 0]  # batches of ranks 0 to 3


pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(params=["naive", "shared_memory"])
def comm(request):
    """Return a communicator that updates every parameter on every rank, or one that shares."""
    communicator = create_communicator(request.param)
    yield communicator
    communicator.finalize()


def make_model(seed=0, norm=None, n_in=None):
    """Return a small classifier, its first layer initialized by the first batch unless given."""
    np.random.seed(seed)
    layers = [L.Linear(n_in, 6), norm() if norm else F.tanh, L.Linear(6, 3)]
    return L.Classifier(chainer.Sequential(*layers))


def batch(rank, step):
    """Return the batch of a rank at a step."""
    rng = np.random.RandomState(100 * rank + step)
    return rng.rand(4, 5), rng.randint(0, 3, 4)


def assert_same(comm, model, want):
    """The parameters are those of the other model, to the same bits on every rank."""
    for (name, got), (_, expected) in zip(sorted(model.namedparams()), sorted(want.namedparams())):
        np.testing.assert_allclose(got.array, expected.array, rtol=1e-9, atol=1e-12, err_msg=name)
    mine = {name: param.array.tobytes() for name, param in model.namedparams()}
    assert comm.allgather_obj(mine) == [mine] * comm.size


def train_knowing_all(counts, make_optimizer, make=make_model):
    """Train in one process on the batches of all ranks that still have one."""
    model = make()
    optimizer = make_optimizer().setup(model)
    for step in range(max(counts)):
        parts = [batch(rank, step) for rank, count in enumerate(counts) if step < count]
        optimizer.update(model, *map(np.concatenate, zip(*parts)))
    return model


@pytest.mark.parametrize("zero_fill", [True, False])
@pytest.mark.parametrize("make_optimizer", [optimizers.SGD, optimizers.Adam])
def test_the_mean_is_over_ranks_that_contribute(comm, make_optimizer, zero_fill):
    """Ranks that have finished count no more, and end with the same parameters."""
    model = make_model(comm.rank)
    optimizer = create_multi_node_optimizer(make_optimizer(), comm, zero_fill=zero_fill)
    optimizer.setup(model)
    with Join(optimizer):
        for step in range(COUNTS[comm.rank]):
            optimizer.update(model, *batch(comm.rank, step))
    counts = COUNTS[: comm.size]
    assert optimizer.t == max(counts)
    assert_same(comm, model, train_knowing_all(counts, make_optimizer))
    optimizer.update(model, *batch(0, 9))  # again an ordinary one
    assert optimizer.t == max(counts) + 1


@pytest.mark.parametrize("zero_fill", [True, False])
def test_loss_scaling_on_a_rank_without_a_batch(comm, zero_fill):
    """It divides the mean of the others' gradients by the loss scale that it has never seen itself."""
    model = make_model(comm.rank, n_in=5)
    optimizer = create_multi_node_optimizer(optimizers.SGD(0.5), comm, zero_fill=zero_fill)
    optimizer.setup(model).set_loss_scale(64.0)
    with Join(optimizer):
        for step in range(3 if comm.rank == 0 else 0):
            optimizer.update(model, *batch(0, step))
    want = train_knowing_all([3], lambda: optimizers.SGD(0.5), lambda: make_model(n_in=5))
    assert_same(comm, model, want)


@given(counts=st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_any_numbers_of_batches(comm, counts):
    """Whoever finishes first, and if nobody has a batch at all."""
    counts = counts[: comm.size]
    model = make_model(comm.rank)
    optimizer = create_multi_node_optimizer(optimizers.SGD(), comm).setup(model)
    with Join(optimizer):
        for step in range(counts[comm.rank]):
            model.cleargrads()
            model(*batch(comm.rank, step)).backward()
            optimizer.update()
    assert optimizer.t == max(counts)
    if optimizer.t:
        mine = {name: param.array.tobytes() for name, param in model.namedparams()}
        assert comm.allgather_obj(mine) == [mine] * comm.size


def test_batch_normalization_counts_the_others_only(comm):
    """Statistics, gradients and running averages are those of the batches that are still new."""
    counts = [3, 1, 4, 2][: comm.size]
    model = make_model(comm.rank, lambda: MultiNodeBatchNormalization(6, comm))
    optimizer = create_multi_node_optimizer(optimizers.SGD(0.5), comm).setup(model)
    observation = {}
    reporter = chainer.Reporter()
    reporter.add_observer("model", model)
    with reporter.scope(observation), Join(optimizer):
        for step in range(counts[comm.rank]):
            optimizer.update(model, *batch(comm.rank, step))
        last = dict(observation)
    assert set(last) == {"model/loss", "model/accuracy"}
    assert observation == last  # what is repeated is not reported
    want = train_knowing_all(
        counts, lambda: optimizers.SGD(0.5), lambda: make_model(0, lambda: L.BatchNormalization(6))
    )
    assert_same(comm, model, want)
    for name in ("avg_mean", "avg_var"):
        got, expected = (getattr(each.predictor[1], name) for each in (model, want))
        np.testing.assert_allclose(got, expected, rtol=1e-9)


def train_joined(comm, updates, *joined):
    """Update with batches of the given numbers, and stand by."""
    with Join(*joined):
        for optimizer, number in updates:
            optimizer.update(optimizer.target, *batch(comm.rank, number))


def test_batch_normalization_needs_a_batch(comm):
    """A rank that has nothing to repeat is named on every rank."""
    if comm.size == 1:
        pytest.skip("one rank waits for nobody")
    model = make_model(0, lambda: MultiNodeBatchNormalization(6, comm))
    optimizer = create_multi_node_optimizer(optimizers.SGD(), comm).setup(model)
    numbers = [] if comm.rank == 1 else [0]
    with pytest.raises(RuntimeError, match="rank 1 stands by without a batch"):
        train_joined(comm, [(optimizer, number) for number in numbers], optimizer)


def test_a_loss_computed_before_the_update(comm):
    """Batch normalization outside of an update is an error at once, not a hang in the end."""
    model = make_model(0, lambda: MultiNodeBatchNormalization(6, comm))
    optimizer = create_multi_node_optimizer(optimizers.SGD(), comm).setup(model)
    with pytest.raises(RuntimeError, match=r"optimizer.update\(lossfun"), Join(optimizer):
        model(*batch(comm.rank, 0))
    model(*batch(comm.rank, 0))  # again allowed


def test_two_optimizers(comm):
    """Ranks that stand by take part in the updates of each, in the others' order."""
    models = [make_model(comm.rank, n_in=5), make_model(comm.rank, n_in=5)]
    pair = [
        create_multi_node_optimizer(kind(), comm).setup(model)
        for kind, model in zip((optimizers.SGD, optimizers.Adam), models)
    ]
    counts = [2, 3, 0, 1][: comm.size]
    with Join(*pair):
        for step in range(counts[comm.rank]):
            for optimizer, model in zip(pair, models):
                optimizer.update(model, *batch(comm.rank, step))
    for kind, model in zip((optimizers.SGD, optimizers.Adam), models):
        assert_same(comm, model, train_knowing_all(counts, kind, lambda: make_model(n_in=5)))


def test_different_updates_are_an_error(comm):
    """Ranks that update different optimizers all hear of it."""
    if comm.size == 1:
        pytest.skip("takes ranks that differ")
    models = [make_model(), make_model()]
    pair = [create_multi_node_optimizer(optimizers.SGD(), comm).setup(m) for m in models]
    number = 1 if comm.rank == comm.size - 1 else 0
    with pytest.raises(RankMismatchError, match="the update is that of optimizer 1"):
        train_joined(comm, [(pair[number], 0)], *pair)
    assert [optimizer.join for optimizer in pair] == [None, None]


def test_what_cannot_join(comm):
    """Plain optimizers, optimizers of different communicators, and joining twice."""
    optimizer = create_multi_node_optimizer(optimizers.SGD(), comm)
    with pytest.raises(ValueError, match="at least one"):
        Join()
    with pytest.raises(ValueError, match="create_multi_node_optimizer, got <chainer"):
        Join(optimizers.SGD())
    with create_communicator("naive") as other:
        foreign = create_multi_node_optimizer(optimizers.SGD(), other)
    with pytest.raises(ValueError, match="one and the same communicator"):
        Join(optimizer, foreign)
    with pytest.raises(ValueError, match="set the optimizers up"):
        Join(optimizer).__enter__()
    optimizer.setup(make_model())
    with Join(optimizer), pytest.raises(ValueError, match="joined already"):
        Join(optimizer).__enter__()


def rows(rank, sizes):
    """Return a rank's dataset."""
    rng = np.random.RandomState(rank)
    size = sizes[rank]
    return chainer.datasets.TupleDataset(rng.rand(size, 5), rng.randint(0, 3, size))


def make_trainer(comm, sizes, folder, seed=None):
    """Return a trainer over a rank's dataset that notes what happens at which iteration."""
    model = make_model(comm.rank if seed is None else seed)
    optimizer = create_multi_node_optimizer(optimizers.SGD(), comm).setup(model)
    iterator = iterators.SerialIterator(rows(comm.rank, sizes), 4, shuffle=False)
    updater = training.updaters.StandardUpdater(iterator, optimizer)
    updater = create_multi_node_updater(updater, comm)
    trainer = training.Trainer(updater, (2, "epoch"), out=folder)
    trainer.happened = []

    def half(trainer):
        trainer.happened.append((trainer.updater.iteration, trainer.updater.epoch_detail))

    trainer.extend(half, trigger=(0.5, "epoch"))
    test = iterators.SerialIterator(rows(comm.rank, sizes), 4, repeat=False, shuffle=False)
    trainer.extend(create_multi_node_evaluator(extensions.Evaluator(test, model), comm))
    trainer.extend(extensions.LogReport())
    return trainer


@pytest.mark.parametrize("sizes", [[12, 8, 3, 17], [5, 0, 9, 1]])
def test_epochs_of_a_trainer_end_together(comm, sizes, tmp_path):
    """Every rank goes through its data once an epoch; extensions run at the same iterations."""
    trainer = make_trainer(comm, sizes, str(tmp_path))
    trainer.run()
    longest = max(sizes[: comm.size])
    updater = trainer.updater
    # As often as SerialIterator, which fills a batch up with samples of the next epoch.
    assert updater.iteration == -(-2 * longest // 4)
    assert (updater.epoch, updater.is_new_epoch) == (2, True)
    assert updater.get_optimizer("main").t == updater.iteration
    assert comm.allgather_obj(trainer.happened) == [trainer.happened] * comm.size
    assert trainer.happened[-1] == (updater.iteration, 2.0)
    score = trainer.observation["validation/main/loss"]
    assert comm.allgather_obj(score) == [score] * comm.size
    mine = {
        name: p.array.tobytes() for name, p in updater.get_optimizer("main").target.namedparams()
    }
    assert comm.allgather_obj(mine) == [mine] * comm.size


def test_a_trainer_resumes_in_the_middle_of_an_epoch(comm, tmp_path):
    """A snapshot taken while some ranks stand by goes on as if nothing had happened."""
    sizes = [12, 3, 17, 6]
    whole = make_trainer(comm, sizes, str(tmp_path))
    whole.run()
    first = make_trainer(comm, sizes, str(tmp_path))
    for _ in range(2):
        first.updater.update()
    saved = chainer.serializers.DictionarySerializer()
    first.updater.serialize(saved)
    second = make_trainer(comm, sizes, str(tmp_path), seed=77)
    second.updater.update()  # initializes layers
    second.updater.serialize(chainer.serializers.NpzDeserializer(saved.target))
    while second.updater.epoch < 2:
        second.updater.update()
    assert second.updater.iteration == whole.updater.iteration
    models = [each.updater.get_optimizer("main").target for each in (second, whole)]
    assert_same(comm, *models)


def test_attributes_of_the_updater_can_be_set(comm, tmp_path):
    """Such as another loss amid training; they are the wrapped updater's."""
    updater = make_trainer(comm, [8] * comm.size, str(tmp_path)).updater
    updater.update()
    called = []
    updater.loss_func = lambda *args: (
        called.append(1) or updater.get_optimizer("main").target(*args)
    )
    updater.iteration = 7
    updater.update()
    assert (called, updater.iteration) == ([1], 8)
    assert updater.actual_updater.iteration == 8


def test_no_data_at_all(comm):
    """Nobody waits for ranks that will never have a batch."""
    iterator = iterators.SerialIterator([], 4)
    optimizer = create_multi_node_optimizer(optimizers.SGD(), comm).setup(make_model())
    updater = training.updaters.StandardUpdater(iterator, optimizer)
    with pytest.raises(ValueError, match="no rank has any data"):
        create_multi_node_updater(updater, comm)
