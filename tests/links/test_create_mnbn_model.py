"""Models whose batch normalization was made to span the ranks."""

from __future__ import annotations

import warnings

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import Sequential, link_hooks

from chainer_dist import create_communicator, create_multi_node_optimizer
from chainer_dist.links import MultiNodeBatchNormalization, create_mnbn_model


class Block(chainer.Chain):
    """Normalizes twice by one link, which it also keeps in a list."""

    def __init__(self, n):
        super().__init__()
        with self.init_scope():
            self.linear = L.Linear(None, n)
            self.bn = L.BatchNormalization(n)
        self.used = [self.bn, "other things"]

    def forward(self, x):
        """Compute in a way that needs each reference to be to the same link."""
        return F.tanh(self.used[0](self.bn(self.linear(x))))


def model(shared):
    """Return a model with batch normalization at every kind of place, one link at two of them."""
    return Sequential(
        Block(6),
        chainer.ChainList(L.BatchNormalization(axis=(0,), use_beta=False), shared)[0],
        F.relu,
        shared,
        Sequential(L.Linear(6, 6), shared, F.sigmoid, L.BatchNormalization(6)).repeat(2, "copy"),
        L.Linear(6, 3),
    )


def links_of(kind, link):
    """Return the links of exactly this class."""
    return [each for each in link.links() if type(each) is kind]


def initialized(build, x):
    """Return a model of float64 with all its parameters there, drawn from a seed."""
    with chainer.using_config("dtype", np.float64):
        np.random.seed(3)
        net = build()
        with chainer.using_config("train", False):
            net(x)
    return net


def test_training_as_on_one_process(comm):
    """A whole model's parameters and statistics after some steps are those of one process."""
    rng = np.random.RandomState(0)
    xs, ts = rng.randn(4, 5 * comm.size, 4), rng.randn(4, 5 * comm.size, 3)
    plain = initialized(lambda: model(L.BatchNormalization(6)), xs[0])
    net = create_mnbn_model(plain, comm)
    alone = chainer.optimizers.MomentumSGD(0.1).setup(plain)
    together = create_multi_node_optimizer(chainer.optimizers.MomentumSGD(0.1), comm).setup(net)
    for x, t in zip(xs, ts):
        alone.update(lambda x, t: F.mean_squared_error(plain(x), t), x, t)
        own = slice(comm.rank * 5, comm.rank * 5 + 5)
        together.update(lambda x, t: F.mean_squared_error(net(x), t), x[own], t[own])
    want = dict(plain.namedparams())
    for name, param in net.namedparams():
        np.testing.assert_allclose(param.array, want[name].array, rtol=1e-8, atol=1e-10)
    pairs = zip(links_of(L.BatchNormalization, plain), links_of(MultiNodeBatchNormalization, net))
    for old, new in pairs:
        np.testing.assert_allclose(new.avg_mean, old.avg_mean, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(new.avg_var, old.avg_var, rtol=1e-8)
    with chainer.using_config("train", False):
        np.testing.assert_allclose(net(xs[0]).array, plain(xs[0]).array, rtol=1e-8)


def test_every_link_is_replaced_once(comm):
    """What was one link, however often it is referred to, is one link in the copy."""
    shared = L.BatchNormalization(6)
    old = model(shared)
    new = create_mnbn_model(old, comm)
    assert not links_of(L.BatchNormalization, new)
    replaced = links_of(MultiNodeBatchNormalization, new)
    assert len(replaced) == len(links_of(L.BatchNormalization, old))
    assert len(set(map(id, replaced))) == len(set(map(id, links_of(L.BatchNormalization, old))))
    assert all(link.comm is comm for link in replaced)
    assert new[0].used[0] is new[0].bn
    assert new[0].used[1] == "other things"
    assert new[0].bn.name == "bn"
    assert new[2] is F.relu
    assert [type(each) for each in new] == [
        MultiNodeBatchNormalization if type(each) is L.BatchNormalization else type(each)
        for each in old
    ]
    names = [name for name, _ in old.namedparams()]
    assert [name for name, _ in new.namedparams()] == names


def test_children_of_a_chain_list(comm):
    """Positions and names stay."""
    links = chainer.ChainList(L.Linear(2), L.BatchNormalization(2), chainer.ChainList())
    links[2].append(L.BatchNormalization(3))
    new = create_mnbn_model(links, comm)
    assert type(new[1]) is type(new[2][0]) is MultiNodeBatchNormalization
    assert [link.name for link in new] == ["0", "1", "2"]
    assert new[2][0].gamma.shape == (3,)


def test_the_original_stays_as_it_is(comm):
    """Nothing is shared with it, neither arrays nor links."""
    old = Sequential(L.Linear(3, 4), L.BatchNormalization(4))
    new = create_mnbn_model(old, comm)
    for param in new.params():
        param.array[...] = 7
    new[1].avg_mean[...] = 7
    new[1].N = 7
    assert type(old[1]) is L.BatchNormalization
    assert old[1].N == 0
    for array in [*(param.array for param in old.params()), old[1].avg_mean]:
        assert not (array == 7).any()


def test_everything_is_kept(comm):
    """Options, state, update rules, hooks and attributes of a link are those it had."""
    old = L.BatchNormalization(
        (2, 3), decay=0.5, eps=0.25, dtype=np.float16, use_beta=False, axis=(0, 2)
    )
    x = np.random.RandomState(0).randn(4, 2, 3, 3).astype(np.float16)
    old.axis = (0, 3)
    old.name = "first"
    old(x, finetune=True)
    old.gamma.array[...] = np.arange(6).reshape(2, 3)
    chainer.optimizers.SGD().setup(old)
    old.gamma.update_rule.hyperparam.lr = 0.125
    old.gamma.update_rule.enabled = False
    old.add_hook(link_hooks.TimerHook())
    old.remark = ["anything"]
    new = create_mnbn_model(old, comm)
    assert type(new) is MultiNodeBatchNormalization
    assert (new.axis, new.decay, new.eps, new.N, new.name) == ((0, 3), 0.5, 0.25, 1, "first")
    assert new.beta is None
    assert new.device == old.device
    assert [type(hook) for hook in new.local_link_hooks.values()] == [link_hooks.TimerHook]
    assert new.remark == ["anything"]
    assert new.remark is not old.remark
    assert new.gamma.update_rule.hyperparam.lr == 0.125
    assert not new.gamma.update_rule.enabled
    for name in ("avg_mean", "avg_var"):
        assert getattr(new, name).dtype == np.float16
        np.testing.assert_array_equal(getattr(new, name), getattr(old, name))
    np.testing.assert_array_equal(new.gamma.array, old.gamma.array)
    np.testing.assert_allclose(new(x).array, old(x).array, rtol=1e-2, atol=1e-2)


def test_axis_is_kept(comm):
    """The statistics are over the axes that the original had, lazily initialized or not."""
    x = np.random.RandomState(0).randn(4, 2, 3).astype(np.float32)
    for size in (None, 3):
        old = L.BatchNormalization(size, axis=(0, 1), initial_gamma=2, initial_avg_mean=5)
        new = create_mnbn_model(old, comm)
        assert (new.avg_mean is None) == (size is None)
        np.testing.assert_allclose(new(x).array, old(x).array, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(new.avg_mean, old.avg_mean, rtol=1e-5)
        np.testing.assert_array_equal(new.gamma.array, [2, 2, 2])


class Renamed(L.BatchNormalization):
    """Computes what its base class does."""


class Own(L.BatchNormalization):
    """Computes something else."""

    def forward(self, x):
        """Return the input."""
        return x


def test_subclasses(comm):
    """Those that compute as their base class does are replaced; of others the user is told."""
    net = Sequential(Renamed(2), Own(2), L.BatchRenormalization(2), L.GroupNormalization(1))
    with pytest.warns(UserWarning, match="forward") as caught:
        new = create_mnbn_model(net, comm)
    told = sorted(str(each.message).split(" with ")[0][3:] for each in caught)
    assert told == ["is a BatchRenormalization", "is a Own"]
    expected = [MultiNodeBatchNormalization, Own, L.BatchRenormalization, L.GroupNormalization]
    assert [type(link) for link in new] == expected


def test_links_that_span_ranks_already(comm):
    """They keep their communicator."""
    with create_communicator("naive") as other:
        net = Sequential(MultiNodeBatchNormalization(2, other), L.BatchNormalization(2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            new = create_mnbn_model(net, comm)
        assert new[0].comm is other
        assert new[0] is not net[0]
        assert new[1].comm is comm


def test_models_without_batch_normalization(comm):
    """They are copied."""
    link = L.Linear(2, 3)
    new = create_mnbn_model(link, comm)
    assert new is not link
    np.testing.assert_array_equal(new.W.array, link.W.array)


@pytest.mark.parametrize("name", ["nccl", "tcp"])
def test_communication_backends(comm, name):
    """Others than auto and mpi are refused, whatever is in the model."""
    with pytest.raises(ValueError, match=f"communication_backend is .*{name}"):
        create_mnbn_model(L.Linear(2, 3), comm, name)
