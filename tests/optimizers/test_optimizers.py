"""Training on N ranks, against plain Chainer in one process on the concatenated batch."""

from __future__ import annotations

import copy
import pickle

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import optimizer_hooks as hooks
from chainer import optimizers

from chainer_dist import RankMismatchError, create_communicator, create_multi_node_optimizer
from optimizer_cases import OPTIMIZERS

HOOKS = {
    "WeightDecay": lambda: hooks.WeightDecay(0.01),
    "Lasso": lambda: hooks.Lasso(0.01),
    "GradientClipping": lambda: hooks.GradientClipping(0.05),
    "GradientHardClipping": lambda: hooks.GradientHardClipping(-0.01, 0.01),
    "GradientLARS": hooks.GradientLARS,
}
BATCH = 12  # divides by 1, 2, 3 and 4 ranks


pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(params=["naive", "shared_memory"])
def comm(request):
    """Return a communicator that updates every parameter on every rank, or one that shares."""
    communicator = create_communicator(request.param)
    yield communicator
    communicator.finalize()


def mlp(lazy=False):
    """Return a small classifier, its layers of unknown or of known input size."""
    return L.Classifier(
        chainer.Sequential(
            L.Linear(None if lazy else 5, 7), F.tanh, L.Linear(None if lazy else 7, 3)
        )
    )


def batch(step, dtype=np.float64):
    """Return the concatenated batch of a step."""
    rng = np.random.RandomState(1000 + step)
    return rng.rand(BATCH, 5).astype(dtype), rng.randint(0, 3, BATCH)


def shard(arrays, comm):
    """Return this rank's part of a batch."""
    share = BATCH // comm.size
    return tuple(x[comm.rank * share : (comm.rank + 1) * share] for x in arrays)


def values(model):
    """Return the parameters as a dict of float64 copies."""
    return {name: p.array.astype(np.float64) for name, p in sorted(model.namedparams())}


def assert_equal_on_all_ranks(comm, model):
    """The ranks' parameters are the same to the bit."""
    mine = {name: p.array.tobytes() for name, p in model.namedparams()}
    assert comm.allgather_obj(mine) == [mine] * comm.size


def assert_trains_like_one_process(
    comm, make_optimizer, make_model=mlp, steps=4, rtol=1e-9, loss=None, **options
):
    """Train by both ways from rank 0's seed, other ranks starting elsewhere, and compare."""
    results = []
    for distributed in (False, True):
        np.random.seed(comm.rank if distributed else 0)
        model = make_model()
        optimizer = make_optimizer()
        if distributed:
            optimizer = create_multi_node_optimizer(optimizer, comm, **options)
        optimizer.setup(model)
        for hook in getattr(make_optimizer, "hooks", ()):
            optimizer.add_hook(hook())
        for step in range(steps):
            data = shard(batch(step), comm) if distributed else batch(step)
            optimizer.update(model if loss is None else (lambda *a, m=model: loss(m, *a)), *data)
        assert optimizer.t == steps
        results.append(values(model))
    assert_equal_on_all_ranks(comm, model)
    want, got = results
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=rtol, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(any_comm, name):
    """No optimizer can tell N ranks from one process."""
    # SMORMS3 divides differences of almost equal numbers, which magnifies rounding.
    rtol = 1e-6 if name in ("SMORMS3", "MSVAG") else 1e-9
    assert_trains_like_one_process(any_comm, getattr(optimizers, name), rtol=rtol)


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_every_hook_sees_the_mean(comm, name):
    """Hooks run on the averaged gradient."""

    def make():
        return optimizers.MomentumSGD(0.1)

    make.hooks = [HOOKS[name]]
    assert_trains_like_one_process(comm, make)


def test_every_optimizer_and_hook_is_tested():
    """The lists above are complete."""
    rules = {
        name
        for name, value in vars(optimizers).items()
        if isinstance(value, type) and issubclass(value, chainer.GradientMethod)
    }
    assert rules == set(OPTIMIZERS)
    known = {name for name, value in vars(hooks).items() if isinstance(value, type)}
    assert known == {*HOOKS, "GradientNoise"}


def test_random_hooks_draw_the_same_on_every_rank(comm):
    """GradientNoise leaves the ranks equal, and the ranks' own random states their own."""
    np.random.seed(comm.rank)
    model = mlp()
    optimizer = create_multi_node_optimizer(optimizers.SGD(0.1), comm).setup(model)
    optimizer.add_hook(hooks.GradientNoise(1.0))
    before = values(model)
    for step in range(3):
        optimizer.update(model, *shard(batch(step), comm))
        assert_equal_on_all_ranks(comm, model)
    assert not np.array_equal(before["/predictor/0/W"], values(model)["/predictor/0/W"])
    draws = comm.allgather_obj(np.random.rand())
    assert len(set(draws)) == comm.size


@pytest.mark.parametrize("zero_fill", [True, False])
def test_lazily_initialized_layers(comm, zero_fill):
    """Weights drawn in the first forward pass become equal before anything is computed from them."""
    assert_trains_like_one_process(
        comm, optimizers.Adam, lambda: mlp(lazy=True), zero_fill=zero_fill
    )


def test_running_statistics_count_the_first_step_once(comm):
    """Batch statistics are updated once, also where a layer below gets its shape in that pass."""

    def make():
        return L.Classifier(chainer.Sequential(L.Linear(None, 4), L.BatchNormalization(4)))

    np.random.seed(comm.rank)
    model = make()
    optimizer = create_multi_node_optimizer(optimizers.SGD(0.0), comm).setup(model)
    x, t = shard(batch(0), comm)
    optimizer.update(model, x, t)
    hidden = model.predictor[0](x).array
    np.testing.assert_allclose(model.predictor[1].avg_mean, 0.1 * hidden.mean(axis=0))
    assert model.predictor[1].N == 0 or model.predictor[1].N is None


def test_a_link_added_later(comm):
    """All ranks notice new parameters together, and the update in which they do is right."""
    results = []
    for distributed in (False, True):
        np.random.seed(comm.rank if distributed else 0)
        model = chainer.Sequential(L.Linear(5, 4), F.tanh)
        optimizer = optimizers.Adam()
        if distributed:
            optimizer = create_multi_node_optimizer(optimizer, comm)
        optimizer.setup(model)

        def loss(x, t, model=model):
            return F.softmax_cross_entropy(model(x), t)

        for step in range(3):
            if step == 1:
                model.append(L.Linear(4, 3))
                for param in model[-1].params():
                    param.update_rule = optimizer.create_update_rule()
            optimizer.update(loss, *(shard(batch(step), comm) if distributed else batch(step)))
        results.append(values(model))
    assert_equal_on_all_ranks(comm, model)
    for name, want in results[0].items():
        np.testing.assert_allclose(results[1][name], want, rtol=1e-9, atol=1e-12)


def test_a_layer_that_only_one_rank_initializes(comm):
    """The other ranks get its shape and values from there, and count a zero gradient."""

    class Branching(chainer.Chain):
        def __init__(self):
            super().__init__()
            with self.init_scope():
                self.common = L.Linear(5, 3)
                self.extra = L.Linear(None, 3)

        def forward(self, x, t, use_extra):
            y = self.common(x) + (self.extra(x) if use_extra else 0)
            return F.softmax_cross_entropy(y, t)

    np.random.seed(comm.rank)
    model = Branching()
    optimizer = create_multi_node_optimizer(optimizers.SGD(0.1), comm).setup(model)
    last = comm.size - 1
    for step in range(2):
        optimizer.update(model, *shard(batch(step), comm), use_extra=comm.rank == last)
    assert model.extra.W.array.shape == (3, 5)
    assert_equal_on_all_ranks(comm, model)


def test_first_update_is_not_lost(comm):
    """ChainerMN's first update only broadcast."""
    model = mlp()
    optimizer = create_multi_node_optimizer(optimizers.SGD(1.0), comm).setup(model)
    before = values(model)
    optimizer.update(model, *shard(batch(0), comm))
    assert optimizer.t == 1
    assert not np.array_equal(values(model)["/predictor/0/W"], before["/predictor/0/W"])


def test_parameters_of_rank_0_win(comm):
    """Setting up makes all ranks equal to rank 0, and so does the first update after rank 0 loads."""
    np.random.seed(comm.rank)
    model = mlp()
    mine = comm.bcast_obj(values(model))
    optimizer = create_multi_node_optimizer(optimizers.SGD(0.0), comm).setup(model)
    np.testing.assert_array_equal(values(model)["/predictor/0/W"], mine["/predictor/0/W"])
    if comm.rank == 0:
        model.predictor[0].W.array[...] = 42  # as load_npz does for a pretrained model
    optimizer.update(model, *shard(batch(0), comm))
    assert (model.predictor[0].W.array == 42).all()


def test_an_optimizer_that_is_set_up_already(comm):
    """It may be wrapped before or after setup."""
    np.random.seed(comm.rank)
    model = mlp()
    create_multi_node_optimizer(optimizers.SGD().setup(model), comm)
    assert_equal_on_all_ranks(comm, model)


def test_update_without_a_loss_function(comm):
    """A hand-written backward pass, then update(), gives the same training."""
    np.random.seed(comm.rank)
    model, reference = mlp(), None
    optimizer = create_multi_node_optimizer(optimizers.Adam(), comm).setup(model)
    reference = copy.deepcopy(model)
    plain = optimizers.Adam().setup(reference)
    for step in range(3):
        loss = model(*shard(batch(step), comm))
        model.cleargrads()
        loss.backward()
        optimizer.update()
        plain.update(reference, *batch(step))
    for name, want in values(reference).items():
        np.testing.assert_allclose(values(model)[name], want, rtol=1e-9, atol=1e-12)


def test_unused_parameters(comm):
    """With zero_fill a gradient that is None counts as zero; without, ranks must agree on it."""
    for zero_fill in (True, False):
        model = chainer.ChainList(L.Linear(5, 3), L.Linear(5, 3))
        optimizer = create_multi_node_optimizer(optimizers.SGD(1.0), comm, zero_fill=zero_fill)
        optimizer.setup(model)
        before = values(model)

        def loss(x, t, model=model):
            used = model[1] if comm.rank == comm.size - 1 else model[0]
            return F.softmax_cross_entropy(used(x), t)

        if zero_fill or comm.size == 1:
            optimizer.update(loss, *shard(batch(0), comm))
            assert_equal_on_all_ranks(comm, model)
            assert not np.array_equal(values(model)["/1/W"], before["/1/W"])
        else:
            with pytest.raises(RankMismatchError, match="the gradient of /0/W"):
                optimizer.update(loss, *shard(batch(0), comm))


def test_parameters_used_nowhere(comm):
    """A gradient that is None on every rank is zero-filled without an exchange."""
    model = chainer.ChainList(L.Linear(5, 3), L.Linear(5, 3))
    optimizer = create_multi_node_optimizer(optimizers.SGD(1.0), comm).setup(model)
    before = values(model)
    optimizer.update(lambda x, t: F.softmax_cross_entropy(model[0](x), t), *shard(batch(0), comm))
    np.testing.assert_array_equal(values(model)["/1/W"], before["/1/W"])
    assert not model[1].W.grad.any()


def test_tied_frozen_and_transposed_parameters(comm):
    """Shared weights count once, frozen ones stay, non-contiguous gradients are averaged."""

    class Odd(chainer.Chain):
        def __init__(self):
            super().__init__()
            with self.init_scope():
                self.encode = L.Linear(5, 4, nobias=True)
                self.frozen = L.Linear(5, 5)
                self.decode = L.Linear(4, 3)
                self.tied = self.encode.W

    def make():
        model = Odd()
        model.encode.W.array = np.asfortranarray(model.encode.W.array)
        return model

    def loss(model, x, t):
        model.frozen.disable_update()
        hidden = model.encode(model.frozen(x))
        back = F.matmul(hidden, F.transpose(F.transpose(model.tied)))
        return F.softmax_cross_entropy(model.decode(hidden), t) + F.mean(back**2)

    assert_trains_like_one_process(comm, optimizers.Adam, make, loss=loss)


def test_two_optimizers(comm):
    """A generator and a discriminator, updated in turn from one graph, as in a GAN."""
    results = []
    for distributed in (False, True):
        np.random.seed(comm.rank if distributed else 0)
        gen, dis = L.Linear(5, 5), L.Linear(5, 1)
        opts = []
        for model in (gen, dis):
            opt = optimizers.Adam()
            if distributed:
                opt = create_multi_node_optimizer(opt, comm)
            opts.append(opt.setup(model))
        for step in range(3):
            x, _ = shard(batch(step), comm) if distributed else batch(step)
            fake = gen(x)
            y_fake, y_real = dis(fake), dis(x)
            opts[0].update(lambda y=y_fake: F.mean(F.softplus(-y)))
            opts[1].update(
                lambda real=y_real, y=y_fake: F.mean(F.softplus(-real)) + F.mean(F.softplus(y))
            )
        results.append({**values(gen), **{"dis" + k: v for k, v in values(dis).items()}})
        if distributed:
            assert_equal_on_all_ranks(comm, gen)
            assert_equal_on_all_ranks(comm, dis)
    for name, want in results[0].items():
        np.testing.assert_allclose(results[1][name], want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dynamic", [True, False])
def test_loss_scaling_in_float16(comm, dynamic):
    """Ranks stay equal to the bit under loss scaling, also where one does not use a parameter."""
    with chainer.using_config("dtype", np.float16):
        np.random.seed(comm.rank)
        model = chainer.ChainList(L.Linear(5, 3), L.Linear(5, 3))
        actual = optimizers.MomentumSGD(0.1)
        actual.use_fp32_update()
        optimizer = create_multi_node_optimizer(actual, comm).setup(model)
        optimizer.add_hook(hooks.WeightDecay(0.01))
        optimizer.loss_scaling(**({"interval": 2} if dynamic else {"scale": 64}))

        def loss(x, t):
            y = model[0](x)
            if comm.rank == 0:
                y += model[1](x)
            return F.softmax_cross_entropy(y, t)

        before = values(model)
        for step in range(4):
            optimizer.update(loss, *shard(batch(step, np.float16), comm))
            assert_equal_on_all_ranks(comm, model)
        assert model[0].W.array.dtype == np.float16
        for name, value in values(model).items():
            assert np.isfinite(value).all()
            assert np.abs(value - before[name]).max() < 1, name


def test_dynamic_loss_scale_is_halved_on_all_ranks(comm):
    """An overflow on one rank skips the update and halves the scale on every rank."""
    model = mlp()
    optimizer = create_multi_node_optimizer(optimizers.SGD(), comm).setup(model)
    optimizer.loss_scaling()
    optimizer.update(model, *shard(batch(0), comm))
    assert optimizer._loss_scale == 2
    before = values(model)
    x, t = shard(batch(1), comm)
    if comm.rank == comm.size - 1:
        x = np.full_like(x, np.nan)
    with pytest.warns(UserWarning, match="Non finite"):
        optimizer.update(model, x, t)
    assert optimizer._loss_scale == 1
    np.testing.assert_array_equal(values(model)["/predictor/0/W"], before["/predictor/0/W"])


def test_snapshots_are_those_of_plain_chainer(comm, tmp_path):
    """What rank 0 saves, plain Chainer loads, and the other way round; training goes on alike."""
    path = tmp_path / "optimizer.npz"
    np.random.seed(0)
    model = mlp()
    optimizer = create_multi_node_optimizer(optimizers.Adam(), comm).setup(model)
    for step in range(2):
        optimizer.update(model, *shard(batch(step), comm))
    chainer.serializers.save_npz(path, optimizer)
    twin = copy.deepcopy(model)
    plain = optimizers.Adam().setup(twin)
    chainer.serializers.load_npz(path, plain)
    resumed_model = copy.deepcopy(model)
    resumed = create_multi_node_optimizer(optimizers.Adam(), comm).setup(resumed_model)
    chainer.serializers.load_npz(path, resumed)
    for step in range(2, 4):
        optimizer.update(model, *shard(batch(step), comm))
        resumed.update(resumed_model, *shard(batch(step), comm))
        plain.update(twin, *batch(step))
    assert resumed.t == plain.t == optimizer.t == 4
    for name, want in values(model).items():
        np.testing.assert_array_equal(values(resumed_model)[name], want)
        np.testing.assert_allclose(values(twin)[name], want, rtol=1e-9, atol=1e-12)


def test_loading_a_snapshot_in_the_middle(comm, tmp_path):
    """Going back to an earlier snapshot is noticed by all ranks and loses no update."""
    model = mlp()
    optimizer = create_multi_node_optimizer(optimizers.Adam(), comm).setup(model)
    optimizer.update(model, *shard(batch(0), comm))
    chainer.serializers.save_npz(tmp_path / "model.npz", model)
    chainer.serializers.save_npz(tmp_path / "optimizer.npz", optimizer)
    for step in range(1, 3):
        optimizer.update(model, *shard(batch(step), comm))
    want = values(model)
    chainer.serializers.load_npz(tmp_path / "model.npz", model)
    chainer.serializers.load_npz(tmp_path / "optimizer.npz", optimizer)
    for step in range(1, 3):
        optimizer.update(model, *shard(batch(step), comm))
    for name, value in want.items():
        np.testing.assert_array_equal(values(model)[name], value)


def test_a_snapshot_loaded_by_one_rank_only(comm):
    """Optimizer states that differ would move the ranks apart, so all ranks are told."""
    model = mlp()
    optimizer = create_multi_node_optimizer(optimizers.Adam(), comm).setup(model)
    optimizer.update(model, *shard(batch(0), comm))
    if comm.rank == 0:
        optimizer.t = 100
    if comm.size == 1:
        optimizer.update(model, *shard(batch(0), comm))
    else:
        with pytest.raises(RankMismatchError, match=r"rank 1: optimizer\.t .* expected 100"):
            optimizer.update(model, *shard(batch(0), comm))


@pytest.mark.parametrize("what", ["shape", "dtype", "missing", "extra"])
def test_models_that_differ(comm, what):
    """Every rank raises one error that names the rank and the parameter."""
    if comm.size == 1:
        return
    odd = comm.rank == 1
    model = chainer.Chain()
    dtype = np.float32 if odd and what == "dtype" else np.float64
    with model.init_scope():
        with chainer.using_config("dtype", dtype):
            model.l1 = L.Linear(5, 4 if odd and what == "shape" else 3)
        if not (odd and what == "missing"):
            model.l2 = L.Linear(3, 3)
        if odd and what == "extra":
            model.l3 = L.Linear(3, 3)
    match = {
        "shape": r"rank 1: /l1/W is \(4, 5\) float64, expected \(3, 5\) float64 as on rank 0",
        "dtype": r"rank 1: /l1/W is \(3, 5\) float32, expected \(3, 5\) float64 as on rank 0",
        "missing": r"rank 1: /l2/W is missing, it is \(3, 3\) float64 on rank 0",
        "extra": r"rank 1: /l3/W is \(3, 3\) float64, rank 0 has no /l3/W",
    }[what]
    with pytest.raises(RankMismatchError, match=match):
        create_multi_node_optimizer(optimizers.SGD(), comm).setup(model)


class Foreign:
    """An array of a device that is not the CPU's, as far as can be told without one."""

    shape = (2, 5)
    dtype = np.dtype(np.float64)
    size = 10


@pytest.mark.parametrize("everywhere", [False, True])
def test_parameters_that_are_no_numpy_arrays(comm, everywhere):
    """Every rank is told, in the middle of training too."""
    model = chainer.Link()
    with model.init_scope():
        model.w = chainer.Parameter(np.zeros((2, 5)))
    optimizer = create_multi_node_optimizer(optimizers.SGD(), comm).setup(model)
    for _ in range(2):
        model.w.grad = np.ones((2, 5))
        optimizer.update()
    if everywhere or comm.rank == comm.size - 1:
        model.w._data[0] = Foreign()
    if everywhere or comm.size == 1:
        with pytest.raises(TypeError, match=r"/w is a test_optimizers.Foreign.*to_cpu"):
            optimizer.update()
    else:
        with pytest.raises(RankMismatchError, match=r"rank \d: /w is .*Foreign"):
            optimizer.update()


def test_attributes_are_those_of_the_wrapped_optimizer(comm):
    """Reading, setting, hooks, epochs and extensions reach the optimizer inside."""
    actual = optimizers.Adam(alpha=0.5)
    optimizer = create_multi_node_optimizer(actual, comm)
    model = mlp()
    assert optimizer.setup(model) is optimizer
    assert optimizer.actual_optimizer is actual
    assert optimizer.communicator is comm
    assert optimizer.target is model
    optimizer.alpha = 0.25
    assert actual.hyperparam.alpha == 0.25
    optimizer.new_epoch()
    assert actual.epoch == 1
    optimizer.add_hook(hooks.WeightDecay(0.1))
    optimizer.remove_hook("WeightDecay")
    assert "alpha" in dir(optimizer)
    with pytest.raises(AttributeError):
        _ = optimizer.nonsense


def test_copies_and_pickles(comm):
    """A deep copy trains on; a pickle trains on once it is given a communicator."""
    model = mlp()
    optimizer = create_multi_node_optimizer(optimizers.Adam(), comm).setup(model)
    optimizer.update(model, *shard(batch(0), comm))
    twin = copy.deepcopy(optimizer)
    assert twin.communicator is comm
    assert twin.target is not model
    thawed = pickle.loads(pickle.dumps(optimizer))
    with pytest.raises(RuntimeError, match=r"assign one: optimizer\.communicator"):
        thawed.update(thawed.target, *shard(batch(1), comm))
    thawed.communicator = comm
    for each in (optimizer, twin, thawed):
        each.update(each.target, *shard(batch(1), comm))
    for other in (twin, thawed):
        assert other.t == 2
        for name, want in values(model).items():
            np.testing.assert_array_equal(values(other.target)[name], want)
    assert copy.copy(optimizer).target is model


def test_trainer_with_updater_and_shift(comm, tmp_path):
    """The standard updater, trainer and hyperparameter extensions take it as an optimizer."""
    model = mlp()
    optimizer = create_multi_node_optimizer(optimizers.SGD(1.0), comm).setup(model)
    dataset = chainer.datasets.TupleDataset(*batch(0))
    iterator = chainer.iterators.SerialIterator(dataset, 4, shuffle=False)
    updater = chainer.training.updaters.StandardUpdater(iterator, optimizer)
    trainer = chainer.training.Trainer(updater, (2, "epoch"), out=str(tmp_path))
    shift = chainer.training.extensions.ExponentialShift("lr", 0.5, optimizer=optimizer)
    trainer.extend(shift, trigger=(1, "epoch"))
    trainer.run()
    assert optimizer.epoch == 2
    assert optimizer.lr == 0.25
    assert_equal_on_all_ranks(comm, model)
