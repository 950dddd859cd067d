"""Layers that get their shape in the first forward pass: one pass an update, and equal first values."""

from __future__ import annotations

import copy

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import optimizers

from chainer_dist import (
    MultiNodeChainList,
    RankMismatchError,
    create_communicator,
    create_multi_node_optimizer,
)

pytestmark = pytest.mark.usefixtures("float64")
SAMPLES = 12  # divides by 1, 2, 3 and 4 ranks

KINDS = [("naive", {}), ("shared_memory", {}), ("shared_memory", {"sharded_update": False})]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(map(str, kind)))
def wrap(request):
    """Return how to make an optimizer multi-node, for each way of updating."""
    name, options = request.param
    comm = create_communicator(name)

    def wrap(optimizer, **others):
        return create_multi_node_optimizer(optimizer, comm, **options, **others)

    wrap.comm = comm
    yield wrap
    comm.finalize()


def seeded(seed):
    """Return an initializer with numbers of its own, which cannot be pickled."""
    return lambda array: np.copyto(array, np.random.RandomState(seed).randn(*array.shape))


def whole(step):
    """Return the samples of all ranks."""
    return np.random.RandomState(100 + step).rand(SAMPLES, 5)


def part(step, comm):
    """Return those of this rank."""
    share = SAMPLES // comm.size
    return whole(step)[comm.rank * share :][:share]


def assert_equal(model, reference):
    """All parameters are those of another model."""
    wanted = dict(reference.namedparams())
    for name, param in model.namedparams():
        np.testing.assert_allclose(
            param.array, wanted[name].array, rtol=1e-9, atol=1e-12, err_msg=name
        )


def assert_equal_on_all_ranks(comm, model):
    """The ranks' parameters are the same to the bit."""
    mine = {name: param.array.tobytes() for name, param in model.namedparams()}
    assert comm.allgather_obj(mine) == [mine] * comm.size


MODELS = {
    "perceptron": lambda: chainer.Sequential(L.Linear(None, 7), F.tanh, L.Linear(None, 3)),
    "orthogonal": lambda: chainer.Sequential(
        L.Linear(None, 4, initialW=chainer.initializers.Orthogonal()), F.tanh, L.Linear(None, 3)
    ),
    "normalized": lambda: chainer.Sequential(
        L.Linear(None, 6), L.LayerNormalization(), F.tanh, L.Linear(None, 3)
    ),
    "recurrent": lambda: chainer.Sequential(L.LSTM(None, 4), L.Linear(None, 3)),
}


@pytest.mark.parametrize("by_hand", [False, True], ids=["lossfun", "by hand"])
@pytest.mark.parametrize("name", MODELS)
def test_trains_like_plain_chainer_of_the_same_seed(wrap, name, by_hand):
    """From rank 0's seed on, with the others' elsewhere: nothing of the reference comes from us."""

    def train(optimizer, data, seed):
        np.random.seed(seed)
        model = MODELS[name]()
        optimizer.setup(model)
        for step in range(3):
            for link in model.links():
                if isinstance(link, L.LSTM):
                    link.reset_state()
            x = data(step)
            if by_hand:
                loss = F.mean(model(x) ** 2)
                model.cleargrads()
                loss.backward()
                optimizer.update()
            else:
                optimizer.update(lambda x: F.mean(model(x) ** 2), x)
        return model

    model = train(wrap(optimizers.Adam()), lambda step: part(step, wrap.comm), wrap.comm.rank)
    assert_equal_on_all_ranks(wrap.comm, model)
    assert_equal(model, train(optimizers.Adam(), whole, 0))


def test_the_loss_function_is_called_once_an_update(wrap, tmp_path):
    """Whatever happens between updates: layers without a shape, new ones, others, a snapshot."""
    comm = wrap.comm
    np.random.seed(comm.rank)
    model = chainer.Sequential(L.Linear(None, 4), L.Linear(None, 4))
    optimizer = wrap(optimizers.Adam()).setup(model)
    calls = []

    def loss(step):
        calls.append(step)
        return F.mean(model(part(step, comm)) ** 2)

    path = str(comm.bcast_obj(tmp_path) / "optimizer.npz")
    for step in range(6):
        if step == 2:
            model.append(L.Linear(None, 4))
            optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.01))
        if step == 3:
            model[0].W.array = np.random.rand(4, 5)
        if step == 4 and comm.rank == 0:
            chainer.serializers.save_npz(path, optimizer)
        comm.mpi_comm.Barrier()
        if step == 4:
            chainer.serializers.load_npz(path, optimizer)
        optimizer.update(loss, step)
    assert calls == list(range(6))
    assert_equal_on_all_ranks(comm, model)


def test_random_numbers_in_between_are_each_rank_s_own(wrap):
    """Dropout draws another mask on each rank, between two layers that draw the same weights."""
    comm = wrap.comm
    np.random.seed(comm.rank)
    model = chainer.Sequential(L.Linear(None, 50), F.dropout, L.Linear(None, 50), F.dropout)
    optimizer = wrap(optimizers.SGD(0.1)).setup(model)
    outputs = []

    def loss():
        outputs.append(model(np.ones((2, 5))).array)
        return F.mean(model(np.ones((2, 5))) ** 2)

    optimizer.update(loss)
    assert_equal_on_all_ranks(comm, model)
    kept = comm.allgather_obj(tuple((outputs[0] != 0).ravel()))
    assert len(set(kept)) == comm.size
    assert len(set(comm.allgather_obj(np.random.rand()))) == comm.size


def test_a_stateful_network_sees_each_batch_once(wrap):
    """A lazily sized LSTM ends in the state of one process."""

    def train(optimizer, data):
        np.random.seed(0)
        model = chainer.Sequential(L.LSTM(None, 4), L.Linear(4, 2))
        optimizer.setup(model)
        for step in range(3):
            optimizer.update(lambda x: F.mean(model(x) ** 2), data(step))
            model[0].h.unchain_backward()
            model[0].c.unchain_backward()
        return model

    model = train(wrap(optimizers.SGD(0.5)), lambda step: part(step, wrap.comm))
    reference = train(optimizers.SGD(0.5), whole)
    assert_equal(model, reference)
    share = SAMPLES // wrap.comm.size
    mine = slice(wrap.comm.rank * share, (wrap.comm.rank + 1) * share)
    np.testing.assert_allclose(model[0].h.array, reference[0].h.array[mine], rtol=1e-9)
    np.testing.assert_allclose(model[0].c.array, reference[0].c.array[mine], rtol=1e-9)


def test_running_statistics_count_the_first_batch_once(wrap):
    """Those of a batch normalization that gets its shape in the first forward pass."""
    model = chainer.Sequential(L.Linear(5, 4), L.BatchNormalization(axis=0))
    optimizer = wrap(optimizers.SGD(0.0)).setup(model)
    x = part(0, wrap.comm)
    optimizer.update(lambda: F.sum(model(x)))
    hidden = model[0](x).array
    np.testing.assert_allclose(model[1].avg_mean, 0.1 * hidden.mean(axis=0))


def test_model_parallel_group_sees_labels_of_its_own_batch(comm):
    """Layers on two ranks, an optimizer for each over a group of its own: features and labels fit."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    group = comm.split(comm.rank, 0)
    model = MultiNodeChainList(comm)
    if comm.rank == 0:
        model.add_link(L.Linear(1, 1, initialW=1), rank_in=None, rank_out=1)
    elif comm.rank == 1:
        model.add_link(L.Linear(None, 1, initialW=1), rank_in=0, rank_out=None)
    seen = []
    if comm.rank < 2:
        optimizer = create_multi_node_optimizer(optimizers.SGD(0.0), group).setup(model)

    def loss(number):
        y = model(np.full((1, 1), number, np.float64)) if comm.rank == 0 else model()
        if comm.rank == 1:
            seen.append((float(y.array.item()), number))
        return F.sum(y)

    for number in range(3):
        if comm.rank < 2:
            optimizer.update(loss, number)
        else:
            model()
    assert seen == ([(0.0, 0), (1.0, 1), (2.0, 2)] if comm.rank == 1 else [])
    group.finalize()


@pytest.mark.parametrize("by_hand", [False, True], ids=["lossfun", "by hand"])
def test_initializers_with_other_numbers_on_each_rank_are_an_error(wrap, by_hand):
    """They are told before any gradient of theirs is used, and training can go on."""
    comm = wrap.comm
    model = chainer.Sequential(L.Linear(None, 8, initialW=seeded(comm.rank)), F.tanh)
    optimizer = wrap(optimizers.SGD(0.1)).setup(model)

    def update(step):
        if by_hand:
            model.cleargrads()
            F.mean(model(part(step, comm)) ** 2).backward()
            optimizer.update()
        else:
            optimizer.update(lambda: F.mean(model(part(step, comm)) ** 2))

    if comm.size > 1:
        with pytest.raises(RankMismatchError, match="rank 1: /0/W had other values than on rank 0"):
            update(0)
        assert optimizer.t == 0
    else:
        update(0)
        model[0].W.array[...] = np.random.RandomState(0).randn(8, 5)
        model[0].b.array[...] = 0
    reference = chainer.Sequential(L.Linear(5, 8, initialW=seeded(0)), F.tanh)
    plain = optimizers.SGD(0.1).setup(reference)
    for step in range(1, 3):
        update(step)
        plain.update(lambda step=step: F.mean(reference(whole(step)) ** 2))
    assert_equal_on_all_ranks(comm, model)
    assert_equal(model, reference)


def test_a_layer_that_ranks_come_to_one_after_the_other(wrap):
    """One rank uses it in the first update, one in the second, all in the third."""
    comm = wrap.comm

    class Branching(chainer.Chain):
        def __init__(self):
            super().__init__()
            with self.init_scope():
                self.common = L.Linear(None, 3)
                self.extra = L.Linear(None, 3)
                self.later = L.Linear(None, 3)

        def forward(self, x, extra, later):
            y = self.common(x)
            return F.mean(
                (y + (self.extra(x) if extra else 0) + (self.later(x) if later else 0)) ** 2
            )

    np.random.seed(comm.rank)
    model = Branching()
    optimizer = wrap(optimizers.MomentumSGD(0.1)).setup(model)
    for step in range(4):
        extra = step >= 2 or comm.rank == step % comm.size
        optimizer.update(model, part(step, comm), extra=extra, later=step == 3)
        assert (model.later.W.array is not None) == (step == 3)
    assert_equal_on_all_ranks(comm, model)
    drawn = model.extra.W.array.std(), model.later.W.array.std()
    assert min(drawn) > 0  # and not the zeros of an array that was only allocated


def test_accumulated_batches_of_layers_without_a_shape(wrap):
    """Each of an update's batches is computed once, by parameters that are equal."""
    comm = wrap.comm

    def train(optimizer, batches, seed):
        np.random.seed(seed)
        model = MODELS["perceptron"]()
        optimizer.setup(model)
        for x in batches:
            optimizer.update(lambda x=x: F.mean(model(x) ** 2))
        return model

    mine = [part(step, comm) for step in range(4)]
    model = train(wrap(optimizers.Adam(), accumulate_steps=2), mine, comm.rank)
    both = [np.concatenate([whole(step), whole(step + 1)]) for step in (0, 2)]
    assert_equal(model, train(optimizers.Adam(), both, 0))


def test_copies_draw_numbers_of_their_own(comm):
    """A copy of a layer without a shape does not move the original's numbers on."""
    np.random.seed(comm.rank)
    model = chainer.Sequential(L.Linear(None, 4))
    optimizer = create_multi_node_optimizer(optimizers.SGD(0.1), comm).setup(model)
    for twin in (copy.deepcopy(model), model.copy("init"), model.copy("copy")):
        if comm.rank == 0:
            twin(part(0, comm))
    optimizer.update(lambda: F.mean(model(part(0, comm)) ** 2))
    assert_equal_on_all_ranks(comm, model)


def test_two_models_draw_in_turn(comm):
    """Two optimizers over one communicator: as in one process, from one sequence."""

    def train(wrap, seed, data):
        np.random.seed(seed)
        models = MODELS["perceptron"](), MODELS["perceptron"]()
        pair = [wrap(optimizers.SGD(0.1)).setup(model) for model in models]
        for step in range(2):
            x = data(step)
            losses = [F.mean(model(x) ** 2) for model in models]
            for model, loss, optimizer in zip(models, losses, pair):
                model.cleargrads()
                loss.backward()
                optimizer.update()
        return models

    mine = train(
        lambda optimizer: create_multi_node_optimizer(optimizer, comm),
        comm.rank,
        lambda step: part(step, comm),
    )
    for model, reference in zip(mine, train(lambda optimizer: optimizer, 0, whole)):
        assert_equal(model, reference)
