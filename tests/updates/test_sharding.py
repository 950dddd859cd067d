"""The sharded update, against the update that every rank does alone."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import re
from pathlib import Path

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import optimizer_hooks as hooks
from chainer import optimizers, serializers
from conftest import on_nodes
from hypothesis import example, given
from hypothesis import strategies as st

from chainer_dist import RankMismatchError, create_communicator, create_multi_node_optimizer
from chainer_dist.communicators.shared_memory import sums
from optimizer_cases import OPTIMIZERS

SHARDED = [name for name in OPTIMIZERS if name != "MSVAG"]

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture
def comm():
    """Return a communicator that shares memory."""
    communicator = create_communicator("shared_memory")
    yield communicator
    communicator.finalize()


def mlp():
    """Return a classifier of some blocks, the same each time and on every rank."""
    np.random.seed(3)
    return L.Classifier(
        chainer.Sequential(L.Linear(9, 40), F.relu, L.Linear(40, 31), F.relu, L.Linear(31, 4))
    )


def batch(comm, step, size=6):
    """Return a batch of this rank's own."""
    rng = np.random.RandomState([comm.rank, step])
    return rng.randn(size, 9).astype(np.float32), rng.randint(0, 4, size).astype(np.int32)


def prepared(comm, name="Adam", add=(), model=None, **options):
    """Return a multi-node optimizer that is set up, with hooks."""
    optimizer = create_multi_node_optimizer(getattr(optimizers, name)(), comm, **options)
    optimizer.setup(mlp() if model is None else model)
    for number, hook in enumerate(add):
        optimizer.add_hook(hook, name=f"{hook.name} {number}")
    return optimizer


def train(optimizer, steps=3, start=0):
    """Update a few times."""
    for step in range(start, start + steps):
        optimizer.update(optimizer.target, *batch(optimizer.communicator, step))
    return optimizer


def saved(*things):
    """Return what is saved of models and optimizers."""
    found = {}
    for number, thing in enumerate(things):
        serializer = serializers.DictionarySerializer()
        serializer.save(thing)
        found.update({f"{number}{key}": value for key, value in serializer.target.items()})
    return found


def assert_same(one, other, rtol=0.0):
    """Models and optimizer states are equal to the bit, or nearly."""
    ones, others = saved(one.target, one), saved(other.target, other)
    assert ones.keys() == others.keys()
    for key, value in ones.items():
        if rtol:
            np.testing.assert_allclose(value, others[key], rtol=rtol, atol=1e-6, err_msg=key)
        else:
            np.testing.assert_array_equal(value, others[key], err_msg=key)


def everywhere(comm, values):
    """Tell whether a dict of arrays or numbers is the same on all ranks, to the bit."""
    mine = [(key, np.asarray(value).tobytes()) for key, value in sorted(values.items())]
    return comm.allgather_obj(mine) == [mine] * comm.size


@pytest.mark.parametrize("share_parameters", [False, True])
@pytest.mark.parametrize("name", SHARDED)
def test_same_bits_as_the_replicated_update(comm, name, share_parameters):
    """Parameters and state are those of Chainer's own update, whatever the rule."""
    one = train(prepared(comm, name, share_parameters=share_parameters), 4)
    other = train(prepared(comm, name, sharded_update=False), 4)
    assert one.sharded
    assert not other.sharded
    assert_same(one, other)
    assert everywhere(comm, saved(one.target, one))


CLIP = hooks.GradientClipping(0.3)


@pytest.mark.parametrize(
    ("add", "rtol"),
    [
        ([hooks.WeightDecay(0.01)], 0),
        ([hooks.Lasso(0.01), hooks.GradientHardClipping(-0.01, 0.02)], 0),
        ([hooks.GradientClipping(1e3)], 0),
        ([hooks.GradientClipping(0.01)], 1e-5),
        ([hooks.WeightDecay(0.1), hooks.GradientClipping(0.3), hooks.Lasso(0.01)], 1e-5),
        ([CLIP, hooks.WeightDecay(0.1), CLIP], 1e-5),
    ],
)
@pytest.mark.parametrize("mean_grad", [False, True])
def test_known_hooks(comm, add, rtol, mean_grad):
    """Hooks see the average, slice by slice, in their order; a norm is that of all gradients."""
    one = train(prepared(comm, "MomentumSGD", add, mean_grad=mean_grad))
    other = train(prepared(comm, "MomentumSGD", add, sharded_update=False))
    assert one.sharded
    assert_same(one, other, rtol)
    if mean_grad:
        for param, expected in zip(one.target.params(), other.target.params()):
            np.testing.assert_allclose(param.grad, expected.grad, rtol=rtol or 1e-7, atol=1e-7)


class Decay(hooks.WeightDecay):
    """A hook of Chainer's under another name, with an attribute of its own."""

    name = "Decay"
    author = "somebody"


class DecayOfWeights(hooks.WeightDecay):
    """A hook of a program's own that says that it acts elementwise: biases are left out."""

    name = "DecayOfWeights"
    is_elementwise = True

    def __call__(self, rule, param):
        """Add to the gradient what depends on the rule, too."""
        if param.name == "W":
            param.grad += self.rate * rule.hyperparam.lr * (rule.t + 1) * param.array


def clip_softly(_, param):
    """A function can say so as well."""
    np.tanh(param.grad, out=param.grad)


clip_softly.name = "clip_softly"
clip_softly.call_for_each_param = True
clip_softly.is_elementwise = True


def hooks_by_their_old_names():
    """Return hooks of the names that Chainer had up to version 3."""
    with pytest.warns(DeprecationWarning, match="deprecated from v4"):
        return [
            chainer.optimizer.WeightDecay(0.1),
            chainer.optimizer.GradientClipping(0.3),
            chainer.optimizer.Lasso(0.01),
            chainer.optimizer.GradientHardClipping(-0.1, 0.1),
        ]


@pytest.mark.parametrize(
    ("make", "rtol"),
    [
        (hooks_by_their_old_names, 1e-5),
        (lambda: [Decay(0.1), clip_softly], 0),
        (lambda: [DecayOfWeights(0.1)], 0),
    ],
)
def test_hooks_that_act_elementwise(comm, make, rtol):
    """Hooks known by another name, derived from known ones, or that say so, keep the update sharded."""
    add = make()
    one = train(prepared(comm, "MomentumSGD", add))
    other = train(prepared(comm, "MomentumSGD", add, sharded_update=False))
    assert one.sharded
    assert_same(one, other, rtol)


def test_elementwise_hooks_of_one_parameter(comm):
    """Rules can have them, too."""
    trained = []
    for sharded in (None, False):
        optimizer = prepared(comm, "MomentumSGD", sharded_update=sharded)
        rule = next(optimizer.target.params()).update_rule
        rule.add_hook(DecayOfWeights(0.1))
        rule.add_hook(clip_softly)
        trained.append(train(optimizer))
    assert trained[0].sharded
    assert_same(*trained)


def test_hooks_of_one_parameter(comm):
    """Rules have hooks, hyperparameters and a switch of their own."""
    trained = []
    for sharded in (None, False):
        optimizer = prepared(comm, sharded_update=sharded)
        first, second, *_ = optimizer.target.params()
        first.update_rule.add_hook(hooks.WeightDecay(0.1))
        second.update_rule.hyperparam.alpha = 0.1
        train(optimizer, 2)
        second.update_rule.enabled = False
        train(optimizer, 2, 2)
        second.update_rule.enabled = True
        first.update_rule.hyperparam.beta1 = 0.5
        trained.append(train(optimizer, 2, 4))
    assert trained[0].sharded
    assert_same(*trained)


@given(
    shapes=st.lists(st.lists(st.integers(0, 12), max_size=3).map(tuple), min_size=1, max_size=7),
    dtypes=st.lists(st.sampled_from(["f2", "f4", "f8"]), min_size=7, max_size=7),
    clip=st.booleans(),
)
@example(shapes=[(3,), (), (2, 2)], dtypes=["f4"] * 7, clip=True)
def test_any_shapes_and_dtypes(comm, shapes, dtypes, clip):
    """Models of any parameters: empty and 0-dimensional, of several dtypes."""
    trained = []
    for sharded in (True, False):
        model = chainer.Link()
        rng = np.random.RandomState(0)
        with model.init_scope():
            for number, (shape, dtype) in enumerate(zip(shapes, dtypes)):
                array = np.asarray(rng.randn(*shape), dtype)
                setattr(model, f"p{number}", chainer.Parameter(array))
        optimizer = create_multi_node_optimizer(
            optimizers.MomentumSGD(), comm, sharded_update=sharded
        ).setup(model)
        if clip and sum(param.size for param in model.params()):
            optimizer.add_hook(hooks.GradientClipping(1e3))
        rng = np.random.RandomState(comm.rank)
        for _ in range(2):
            for param in model.params():
                param.grad = np.asarray(rng.randn(*param.shape), param.dtype)
            optimizer.update()
        trained.append(optimizer)
    assert_same(*trained)


def test_on_several_nodes(grouped):
    """Nodes of different numbers of ranks come to the same parameters and states."""
    one = train(prepared(grouped, "Adam", [hooks.WeightDecay(0.01)]))
    other = train(prepared(grouped, "Adam", [hooks.WeightDecay(0.01)], sharded_update=False))
    assert one.sharded
    assert_same(one, other)
    assert everywhere(grouped, saved(one.target, one))
    clipped = train(prepared(grouped, "Adam", [hooks.GradientClipping(0.01)]))
    other = train(prepared(grouped, "Adam", [hooks.GradientClipping(0.01)], sharded_update=False))
    assert_same(clipped, other, 1e-5)
    assert everywhere(grouped, saved(clipped.target, clipped))


class Branches(chainer.Chain):
    """A classifier with layers beside it that count for nothing unless they are named."""

    def __init__(self):
        super().__init__()
        np.random.seed(3)
        with self.init_scope():
            self.a = L.Linear(9, 500)
            self.b = L.Linear(9, 40)
            self.c = L.Linear(9, 500)
            self.d = L.Linear(40, 4)

    def forward(self, x, t, *, used=""):
        """Return the loss."""
        extra = sum((F.sum(getattr(self, name)(x)) for name in used), 0)
        return F.softmax_cross_entropy(self.d(F.relu(self.b(x))), t) + 1e-3 * extra


def exchanged(monkeypatch):
    """Return a list that gets the size of whatever is summed between nodes from now on."""
    sizes, begin = [], sums.direct_sum

    def count(peers, own, total, *, tag):
        sizes.append(total.size)
        return begin(peers, own, total, tag=tag)

    monkeypatch.setattr(sums, "direct_sum", count)
    return sizes


# Which layers are used, which are disabled from which step on, and how many are not sent in the last.
ABSENT = {
    "never used": (lambda _step, _rank: "", "", 0, 2),
    "used in some steps": (lambda step, _rank: "a" if step == 2 else "", "", 0, 2),
    "used on some ranks": (lambda _step, rank: "c" if rank == 0 else "", "", 0, 0),
    "disabled": (lambda _step, _rank: "ac", "ac", 0, 2),
    "disabled later": (lambda _step, _rank: "ac", "c", 3, 1),
}


@pytest.mark.parametrize("options", [{}, {"overlap": False}, {"mean_grad": True}], ids=str)
@pytest.mark.parametrize("case", ABSENT)
def test_gradients_that_nobody_has_or_wants(case, options, monkeypatch):
    """They are not sent, and parameters and state are those of the replicated update."""
    used, disabled, since, left_out = ABSENT[case]
    with on_nodes("shared_memory", "odd and even") as comm:
        trained = []
        for each in ({"sharded_update": False, "overlap": False}, options):
            optimizer = prepared(comm, "Adam", model=Branches(), **each)
            for step in range(5):
                for name in disabled if step == since else "":
                    getattr(optimizer.target, name).disable_update()
                with monkeypatch.context() as patch:
                    sizes = exchanged(patch)
                    optimizer.update(
                        optimizer.target, *batch(comm, step), used=used(step, comm.rank)
                    )
            trained.append(optimizer)
        assert trained[1].sharded
        assert_same(*trained)
        assert everywhere(comm, saved(optimizer.target, optimizer))
        nodes = comm.inter_size
        sent = sum(comm.allgather_obj(sum(sizes))) / nodes
    if disabled and "mean_grad" in options:  # then everybody wants to know
        left_out = 0
    size = sum(param.size for param in optimizer.target.params())
    least = size - 5000 * left_out
    # Of a layer of 5,000 numbers a part of a block of 256 is sent at each end.
    assert least <= sent <= least + 2 * 256 * left_out or nodes == 1


class Doubling(optimizers.SGD):
    """An optimizer with an update of its own."""

    def update(self, lossfun=None, *args, **kwds):
        """Update twice."""
        super().update(lossfun, *args, **kwds)
        super().update()


class NormedRule(optimizers.sgd.SGDRule):
    """A rule that looks at the whole parameter."""

    def update_core(self, param):
        """Make the parameter's norm 1."""
        super().update_core(param)
        param.array /= np.linalg.norm(param.array)


def with_post_hook(optimizer):
    """Add a hook that runs after the update."""
    optimizer.add_hook(hooks.WeightDecay(0.1), timing="post")


def with_own_rule(optimizer):
    """Give parameters a rule that is not Chainer's."""
    for param in optimizer.target.params():
        param.update_rule = NormedRule(optimizer.hyperparam)


def with_whole_hook(optimizer):
    """Add a hook that says that it acts elementwise, and is called with the optimizer."""

    def halve_all(whole):
        for param in whole.target.params():
            param.grad /= 2

    halve_all.is_elementwise = True
    optimizer.add_hook(halve_all)


class NormedDecay(hooks.WeightDecay):
    """A hook derived from a known one that looks at the whole parameter."""

    name = "NormedDecay"

    def __call__(self, rule, param):
        """Decay by the norm."""
        super().__call__(rule, param)
        param.grad *= np.linalg.norm(param.array)


def with_rule_hook(optimizer):
    """Give one parameter a hook of the user's."""
    rule = next(optimizer.target.params()).update_rule
    rule.add_hook(lambda _, param: param.grad.sum(), name="look")


def with_overlap(optimizer):
    """Let two parameters share memory."""
    both = np.zeros(100, np.float32)
    one, other = [param for param in optimizer.target.params() if param.ndim == 1][:2]
    one.array, other.array = both[: one.size], both[10 : 10 + other.size]


def with_fortran(optimizer):
    """Lay a parameter out in Fortran order."""
    param = next(param for param in optimizer.target.params() if param.ndim == 2)
    param.array = np.asfortranarray(param.array)


def with_own_update(optimizer):
    """Replace a parameter's update."""
    param = next(optimizer.target.params())
    param.update = lambda: param.update_rule.update(param)


def with_link_twice(optimizer):
    """Register a link at two places."""
    optimizer.target.again = chainer.ChainList(
        next(optimizer.target.predictor.links(skipself=True))
    )
    with optimizer.target.init_scope():
        optimizer.target.twin = optimizer.target.predictor[0]


def with_array_of_rates(optimizer):
    """Give each element of a parameter a rate of its own."""
    param = next(param for param in optimizer.target.params() if param.ndim == 2)
    param.update_rule.hyperparam.lr = np.linspace(0.001, 0.1, param.size).reshape(param.shape)


def with_array_of_decays(optimizer):
    """Let the elements of a parameter decay in different ways."""
    param = next(param for param in optimizer.target.params() if param.ndim == 2)
    rates = np.linspace(0, 0.1, param.size).reshape(param.shape).astype(np.float32)
    param.update_rule.add_hook(hooks.WeightDecay(rates))


OBSTACLES = {
    "GradientNoise": ("SGD", [hooks.GradientNoise(0.01)], None),
    "GradientLARS": ("SGD", [hooks.GradientLARS()], None),
    "MSVAG": ("MSVAG", [], None),
    "NormedDecay": ("SGD", [NormedDecay(0.1)], None),
    "halve_all": ("SGD", [], with_whole_hook),
    "runs after": ("SGD", [], with_post_hook),
    "NormedRule": ("SGD", [], with_own_rule),
    "look": ("SGD", [], with_rule_hook),
    "shares memory": ("SGD", [], with_overlap),
    "C order": ("SGD", [], with_fortran),
    "own update": ("SGD", [], with_own_update),
    "registered twice": ("SGD", [], with_link_twice),
    "lr of .* is an array": ("SGD", [], with_array_of_rates),
    "rate of the hook WeightDecay of .* is an array": ("SGD", [], with_array_of_decays),
    "loss scaling": ("SGD", [], lambda optimizer: optimizer.loss_scaling()),
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_what_cannot_be_sharded_is_not(comm, reason, caplog):
    """Every rank updates everything then, and rank 0 says why, once."""
    name, add, change = OBSTACLES[reason]
    trained = []
    caplog.set_level(logging.INFO, "chainer_dist")
    for sharded in (None, False):
        optimizer = prepared(comm, name, add, sharded_update=sharded)
        if change:
            change(optimizer)
        trained.append(train(optimizer))
    assert trained[0].sharded is False
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (1 if comm.rank == 0 else 0), said
    assert all(re.search(reason, text) for text in said)
    if reason != "GradientNoise":
        assert_same(*trained)
    strict = prepared(comm, name, add, sharded_update=True)
    if change:
        change(strict)
    with pytest.raises(ValueError, match=reason):
        train(strict)


def test_debug_mode(comm):
    """All averages are looked at then, which takes all of them on each rank; later they are not."""
    optimizer = prepared(comm)
    with chainer.using_config("debug", True):
        assert train(optimizer).sharded is False
    assert train(optimizer, start=3).sharded is True
    assert_same(optimizer, train(prepared(comm, sharded_update=False), 6))


def test_half_precision_updated_in_single(comm):
    """What Chainer keeps in float32 beside the parameter is not shared."""
    model = chainer.Link()
    with model.init_scope():
        model.p = chainer.Parameter(np.ones(300, np.float16))
    actual = optimizers.MomentumSGD()
    actual.use_fp32_update()
    optimizer = create_multi_node_optimizer(actual, comm).setup(model)
    model.p.grad = np.full(300, comm.rank, np.float16)
    optimizer.update()
    assert optimizer.sharded is False
    np.testing.assert_allclose(model.p.array, 1 - 0.01 * (comm.size - 1) / 2, rtol=1e-3)


def test_one_rank_has_an_obstacle(comm):
    """All ranks choose the same, whoever has the reason."""
    optimizer = prepared(comm)
    if comm.rank == comm.size - 1:
        with_fortran(optimizer)
    train(optimizer)
    assert optimizer.sharded is False
    assert everywhere(comm, saved(optimizer.target, optimizer))


def test_other_communicators_do_not_shard():
    """Without shared memory there is nothing to share."""
    with create_communicator("naive") as comm:
        assert train(prepared(comm)).sharded is False
        with pytest.raises(ValueError, match="naive"):
            train(prepared(comm, sharded_update=True))


def test_switching_in_the_middle(comm):
    """State goes along when a hook makes the difference."""
    trained = []
    for sharded in (None, False):
        optimizer = prepared(comm, sharded_update=sharded)
        assert optimizer.sharded is None
        train(optimizer, 2)
        optimizer.add_hook(lambda opt: [param.grad for param in opt.target.params()], name="look")
        train(optimizer, 2, 2)
        assert optimizer.sharded is False
        optimizer.remove_hook("look")
        trained.append(train(optimizer, 2, 4))
    assert trained[0].sharded is True
    assert_same(*trained)


def test_a_rate_that_becomes_an_array(comm):
    """It is noticed in the step before which it was set."""
    trained = []
    for sharded in (None, False):
        optimizer = train(prepared(comm, "SGD", sharded_update=sharded), 2)
        with_array_of_rates(optimizer)
        trained.append(train(optimizer, 2, 2))
    assert trained[0].sharded is False
    assert_same(*trained)


def test_links_that_come_later(comm):
    """Layers without a shape yet, and layers that are added."""
    trained = []
    for sharded in (None, False):
        model = mlp()
        with model.init_scope():
            model.lazy = L.Linear(None, 5)
        optimizer = prepared(comm, model=model, sharded_update=sharded)
        train(optimizer, 2)
        model.lazy(np.ones((1, 3), np.float32))
        train(optimizer, 2, 2)
        with model.init_scope():
            model.late = L.Linear(4, 2)
        for param in model.late.params():
            param.update_rule = optimizer.create_update_rule()
        trained.append(train(optimizer, 2, 4))
    assert trained[0].sharded
    assert_same(*trained)


def test_one_gradient_of_two_parameters(comm):
    """Hooks change each parameter's gradient, whoever else has the array, and read-only ones too."""
    trained = []
    for sharded in (None, False):
        model = chainer.Link()
        with model.init_scope():
            model.a = chainer.Parameter(np.arange(6, dtype=np.float32))
            model.b = chainer.Parameter(np.ones(6, np.float32))
            model.c = chainer.Parameter(np.ones((4, 6), np.float32))
        optimizer = prepared(comm, "SGD", [hooks.WeightDecay(0.5)], model, sharded_update=sharded)
        for _ in range(2):
            both = np.arange(6, dtype=np.float32) + comm.rank
            model.a.grad = model.b.grad = both
            model.c.grad = np.broadcast_to(both, (4, 6))
            optimizer.update()
        trained.append(optimizer)
    assert trained[0].sharded
    assert_same(*trained)


def test_static_loss_scale(comm):
    """Gradients are divided by the loss scale, slice by slice, and decay is not."""
    trained = []
    for sharded in (None, False):
        optimizer = prepared(comm, "SGD", [hooks.WeightDecay(0.1)], sharded_update=sharded)
        optimizer.loss_scaling(scale=8.0)
        trained.append(train(optimizer))
    assert trained[0].sharded
    assert_same(*trained)


@pytest.mark.parametrize("share_parameters", [False, True])
def test_any_rank_saves_alone_and_chainer_goes_on(comm, tmp_path, share_parameters):
    """A snapshot is Chainer's own and complete, whichever rank wrote it."""
    optimizer = train(prepared(comm, share_parameters=share_parameters))
    saver = comm.size - 1
    folder = Path(comm.bcast_obj(str(tmp_path), root=saver))
    if comm.rank == saver:
        serializers.save_npz(folder / "model.npz", optimizer.target)
        serializers.save_npz(folder / "optimizer.npz", optimizer)
    comm.mpi_comm.Barrier()

    plain, model = optimizers.Adam(), mlp()
    plain.setup(model)
    serializers.load_npz(folder / "model.npz", model)
    serializers.load_npz(folder / "optimizer.npz", plain)
    data = [np.concatenate(each) for each in zip(*comm.allgather_obj(batch(comm, 3)))]
    plain.update(model, *data)

    resumed = prepared(comm)
    serializers.load_npz(folder / "model.npz", resumed.target)
    serializers.load_npz(folder / "optimizer.npz", resumed)
    train(resumed, 1, 3)
    train(optimizer, 1, 3)
    assert_same(optimizer, resumed)
    for key, value in saved(model, plain).items():
        got = saved(optimizer.target, optimizer)[key]
        np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-6, err_msg=key)
    serializers.load_npz(folder / "optimizer.npz", optimizer)  # in the middle
    serializers.load_npz(folder / "model.npz", optimizer.target)
    assert optimizer.t == 3
    assert_same(train(optimizer, 1, 3), resumed)


def test_what_is_saved_stays(comm):
    """A writer that works in the background, while training goes on, writes one step's state."""
    optimizer = train(prepared(comm))
    early = saved(optimizer)
    state = {key: np.array(value) for key, value in early.items()}
    comm.mpi_comm.Barrier()
    train(optimizer, 2, 3)
    for key, value in state.items():
        np.testing.assert_array_equal(early[key], value, err_msg=key)


def test_state_cannot_be_changed_by_accident(comm):
    """What all ranks share is not for each of them to write."""
    optimizer = train(prepared(comm))
    if comm.size == 1:  # it is nobody else's
        optimizer.actual_optimizer.update()
        return
    with pytest.raises(ValueError, match="read-only"):
        next(optimizer.target.params()).update_rule.state["m"] *= 2
    with pytest.raises(ValueError, match="read-only"):
        optimizer.actual_optimizer.update()


def test_a_state_that_the_user_replaces(comm):
    """A rule's state is what the user makes it."""
    trained = []
    for sharded in (None, False):
        optimizer = train(prepared(comm, "MomentumSGD", sharded_update=sharded))
        for param in optimizer.target.params():
            param.update_rule.state["v"] = np.zeros_like(param.array)
        trained.append(train(optimizer, 2, 3))
    assert trained[0].sharded
    assert_same(*trained)


class TestGradientsAfterTheUpdate:
    """``param.grad`` is each rank's own, or on request the average."""

    def test_it_is_the_gradient_of_this_rank(self, comm):
        """It may be read and changed without any other rank, or the next step, noticing."""
        trained = []
        for scale in (1, 1000):
            optimizer = prepared(comm)
            for step in range(3):
                train(optimizer, 1, step)
                for param in optimizer.target.params():
                    param.grad *= scale
            trained.append(optimizer)
        assert_same(*trained)
        model = mlp()
        train(prepared(comm, model=model), 1)
        alone = mlp()
        alone.cleargrads()
        alone(*batch(comm, 0)).backward()
        if comm.size > 1:
            for param, expected in zip(model.params(), alone.params()):
                np.testing.assert_allclose(param.grad, expected.grad, rtol=1e-5, atol=1e-7)

    def test_the_average_on_request(self, comm):
        """It is the same on all ranks, as hooks left it; shared, and so read-only."""
        optimizer = prepared(comm, "SGD", [hooks.WeightDecay(0.1)], mean_grad=True)
        other = prepared(comm, "SGD", [hooks.WeightDecay(0.1)], sharded_update=False)
        for step in range(3):
            train(optimizer, 1, step)
            train(other, 1, step)
            for param, expected in zip(optimizer.target.params(), other.target.params()):
                np.testing.assert_array_equal(param.grad, expected.grad)
        if comm.size > 1:
            with pytest.raises(ValueError, match="read-only"):
                next(optimizer.target.params()).grad[...] = 0
        own = [param.grad.copy() for param in optimizer.target.params()]
        optimizer.add_hook(lambda _: None, name="anything")
        optimizer.update()  # every rank has its own average again
        assert optimizer.sharded is False
        for param, expected in zip(optimizer.target.params(), own):
            param.grad *= 2
            assert (param.grad != 0).any() == (expected != 0).any()

    def test_zerograds(self, comm):
        """The old way to clear gradients works on averages too."""
        optimizer = prepared(comm, "SGD", mean_grad=True)
        with pytest.warns(DeprecationWarning, match="use_cleargrads"):
            optimizer.use_cleargrads(use=False)
        with pytest.warns(DeprecationWarning, match="zerograd"):
            train(optimizer)
        assert_same(optimizer, train(prepared(comm, "SGD", sharded_update=False)))

    @pytest.mark.parametrize("mean_grad", [False, True])
    def test_parameter_statistics(self, comm, tmp_path, mean_grad):
        """Chainer's extension reports what param.grad is said to be."""
        optimizer = prepared(comm, "SGD", mean_grad=mean_grad)
        data = list(zip(*batch(comm, 0, 24)))
        iterator = chainer.iterators.SerialIterator(data, 6, shuffle=False)
        updater = chainer.training.StandardUpdater(iterator, optimizer)
        trainer = chainer.training.Trainer(updater, (4, "iteration"), tmp_path)
        norm = {"norm": lambda array: float(np.linalg.norm(array))}
        trainer.extend(
            chainer.training.extensions.ParameterStatistics(
                optimizer.target, norm, prefix="p", trigger=(1, "iteration")
            )
        )
        seen = []
        trainer.extend(
            lambda trainer: seen.append(
                {key: float(value) for key, value in trainer.observation.items() if "grad" in key}
            ),
            trigger=(1, "iteration"),
            priority=chainer.training.PRIORITY_READER,
        )
        trainer.run()
        assert len(seen) == 4
        assert len(seen[0]) == 6
        assert all(everywhere(comm, each) for each in seen) == (mean_grad or comm.size == 1)
        model = mlp()
        model.cleargrads()
        model(*(np.array(each) for each in zip(*data[:6]))).backward()
        grads = [param.grad for _, param in sorted(model.namedparams())]
        if mean_grad:
            grads = [comm.allreduce(grad, "mean") for grad in grads]
        got = [value for _, value in sorted(seen[0].items())]
        np.testing.assert_allclose(got, [np.linalg.norm(grad) for grad in grads], rtol=1e-4)


def copy_deeply(model, _):
    """Change a deep copy, which is nobody else's."""
    copied = copy.deepcopy(model)
    for param in copied.params():
        param.array[...] = 7
        param.cleargrad()


def copy_with_shared_arrays(model, _):
    """Make a copy as Chainer's evaluators do."""
    for param, mine in zip(model.copy().params(), model.params()):
        assert param.array is mine.array


def load(model, folder):
    """Load other parameters on every rank."""
    serializers.save_npz(folder / "model.npz", mlp())
    serializers.load_npz(folder / "model.npz", model)


def replace(model, _):
    """Set new arrays."""
    for param in model.params():
        param.array = param.array * np.float32(0.5)


def replace_by_views(model, _):
    """Set other arrays that view the same memory."""
    for param in model.params():
        param.array = param.array.reshape(param.shape)


def halve_in_place(model, _):
    """Read and write parameters."""
    for param in model.params():
        param.array *= np.float32(0.5)


def clip_in_place(model, _):
    """Write what depends on nothing but the parameters, as often as one likes."""
    for param in model.params():
        np.clip(param.array, -0.1, 0.1, out=param.array)


CHANGES = [
    copy_deeply,
    copy_with_shared_arrays,
    load,
    replace,
    replace_by_views,
    halve_in_place,
    clip_in_place,
]


def pickled(protocol):
    """Return a way of copying by pickle."""
    return lambda thing, _: pickle.loads(pickle.dumps(thing, protocol))


def out_of_band(thing, _):
    """Copy by pickle, with large buffers apart."""
    buffers = []
    data = pickle.dumps(thing, 5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[bytearray(each) for each in buffers])


def broadcast(thing, comm):
    """Copy to other ranks; rank 0 gets the thing itself."""
    received = comm.bcast_obj(thing)
    return received if comm.rank else copy.deepcopy(received)


COPIES = {
    "deepcopy": lambda thing, _: copy.deepcopy(thing),
    "link.copy": lambda thing, _: (
        thing.copy(mode="copy") if isinstance(thing, chainer.Link) else copy.deepcopy(thing)
    ),
    **{f"protocol {number}": pickled(number) for number in (2, pickle.HIGHEST_PROTOCOL)},
    "out of band": out_of_band,
    "bcast_obj": broadcast,
    "allgather_obj": lambda thing, comm: comm.allgather_obj(thing)[-1],
}


def arrays_in(thing):
    """Return the arrays of a model, an optimizer, an update rule or a state."""
    if isinstance(thing, np.ndarray):
        return [thing]
    if isinstance(thing, list):
        return thing
    if isinstance(thing, dict):
        return [array for _, array in sorted(thing.items())]
    if isinstance(thing, chainer.UpdateRule):
        return arrays_in(thing.state)
    if not isinstance(thing, chainer.Link):
        thing = thing.target
    found = []
    for _, param in sorted(thing.namedparams()):
        found += [param.array, param.grad, *arrays_in(param.update_rule)]
    return [array for array in found if array is not None]


def check_copy(original, copied):
    """A copy is equal, of ordinary arrays, and shares nothing."""
    ours, theirs = arrays_in(original), arrays_in(copied)
    assert len(ours) == len(theirs) > 0
    before = [array.copy() for array in ours]
    for mine, array in zip(ours, theirs):
        assert type(array) is np.ndarray
        assert not np.may_share_memory(mine, array)
        np.testing.assert_array_equal(mine, array)
        array[...] = 1
    for mine, array in zip(ours, before):
        np.testing.assert_array_equal(mine, array)


class TestWhatUsersDoBetweenUpdates:
    """Whatever every rank does to the model counts once."""

    @pytest.mark.parametrize("share_parameters", [False, True])
    @pytest.mark.parametrize("change", CHANGES)
    def test_changes_between_updates(self, comm, change, tmp_path, share_parameters):
        """The next update starts from them."""
        if share_parameters and change is halve_in_place and comm.size > 1:
            pytest.skip("on shared parameters each rank's change counts, as documented")
        trained = []
        for sharded in (None, False):
            optimizer = prepared(comm, sharded_update=sharded, share_parameters=share_parameters)
            for step in range(3):
                train(optimizer, 1, step)
                comm.mpi_comm.Barrier()
                change(optimizer.target, tmp_path)
                comm.mpi_comm.Barrier()
            trained.append(train(optimizer, 1, 3))
        assert trained[0].sharded
        assert_same(*trained)

    def test_copies_see_the_updates(self, comm):
        """A copy that shares arrays, made before training, is as good as the model."""
        model = mlp()
        twin = model.copy()
        train(prepared(comm, model=model))
        for param, mine in zip(twin.params(), model.params()):
            assert param.array is mine.array

    def test_copies_of_the_optimizer(self, comm):
        """A deep copy goes on by itself; a pickle has all of the state."""
        optimizer = train(prepared(comm))
        twin = copy.deepcopy(optimizer)
        train(optimizer, 2, 3)
        train(twin, 2, 3)
        assert twin.sharded
        assert_same(optimizer, twin)
        revived = pickle.loads(pickle.dumps(optimizer))
        assert_same(optimizer, revived)
        revived.communicator = comm
        train(optimizer, 1, 5)
        assert_same(optimizer, train(revived, 1, 5))

    @pytest.mark.parametrize(
        "options",
        [{}, {"share_parameters": True, "mean_grad": True}],
        ids=str,
    )
    @pytest.mark.parametrize("way", COPIES)
    def test_copies_have_arrays_of_their_own(self, comm, way, options):
        """However a copy is made, it is equal, and can be written without the original noticing."""
        optimizer, other = (train(prepared(comm, **options)) for _ in range(2))
        if not options:  # gradients are each rank's own
            optimizer.target.cleargrads()
        for original in (optimizer, optimizer.target, optimizer.actual_optimizer):
            check_copy(original, COPIES[way](original, comm))
        assert_same(train(optimizer, 1, 3), train(other, 1, 3))

    @pytest.mark.parametrize("way", COPIES)
    def test_copies_of_what_is_read_only(self, comm, way):
        """Update rules, their state, and single arrays are copied so as well."""
        optimizer = train(prepared(comm, mean_grad=True))
        param = next(optimizer.target.params())
        rule = param.update_rule
        for original in (rule, rule.state, [*rule.state.values()], rule.state["m"], param.grad):
            check_copy(original, COPIES[way](original, comm))
        for original in (rule.state["m"], param.grad):
            for array in (original.copy(), original + 1, original * original, np.array(original)):
                assert type(array) is np.ndarray
                assert array.flags.writeable
            assert type(original[0, 0]) is type(original.sum()) is np.float32

    def test_setting_up_again(self, comm):
        """Another setup starts anew."""
        optimizer = train(prepared(comm))
        optimizer.setup(mlp())
        assert_same(train(optimizer), train(prepared(comm, sharded_update=False)))


def test_parameters_once_per_node(comm):
    """On request every rank's parameters are the same memory."""
    optimizer = train(prepared(comm, share_parameters=True))
    first = next(optimizer.target.params())
    comm.mpi_comm.Barrier()
    if comm.rank == 0:
        first.array[...] = 5
    comm.mpi_comm.Barrier()
    assert (first.array == 5).all()
    comm.mpi_comm.Barrier()
    optimizer.add_hook(lambda _: None, name="anything")
    train(optimizer)  # and its own on each rank, once they are not shared out any more
    comm.mpi_comm.Barrier()
    if comm.rank == 0:
        first.array[...] = 6
    comm.mpi_comm.Barrier()
    assert (first.array == 6).all() == (comm.rank == 0)


def test_hyperparameters_that_differ(comm):
    """Ranks that would drift apart are told."""
    optimizer = prepared(comm)
    train(optimizer, 1)
    optimizer.alpha = 0.1 * (1 + comm.rank)
    if comm.size == 1:
        train(optimizer, 1, 1)
    else:
        with pytest.raises(RankMismatchError, match=r"rank 1: optimizer.alpha is 0.2"):
            train(optimizer, 1, 1)
        optimizer.alpha = 0.1
        next(optimizer.target.params()).update_rule.hyperparam.eps = 1e-3 * (1 + comm.rank)
        with pytest.raises(RankMismatchError, match=r"rank 1: the update rule of /.*eps"):
            train(optimizer, 1, 1)


def test_a_rule_that_fails_on_one_rank(comm, monkeypatch):
    """Every rank raises what one of them has met, whatever its class, and nobody waits."""

    class LocalError(FloatingPointError):
        pass

    class LocalExit(SystemExit):
        pass

    optimizer = train(prepared(comm, "SGD"))
    for error, kind in (
        (FloatingPointError("too large"), FloatingPointError),
        (LocalError("too large"), FloatingPointError),
        (LocalExit("too large"), SystemExit),
    ):
        with monkeypatch.context() as patch:
            if comm.rank == comm.size - 1:

                def fail(*_, error=error):
                    raise error

                patch.setattr(optimizers.sgd.SGDRule, "update_core_cpu", fail)
            with pytest.raises(kind, match="too large"):
                train(optimizer)
    train(optimizer)
    assert everywhere(comm, saved(optimizer.target))


def test_a_state_that_only_some_ranks_have(comm):
    """A snapshot that was loaded on one rank is found out, not mixed."""
    optimizer = prepared(comm)
    if comm.rank == 0:
        for param in optimizer.target.params():
            param.update_rule._state = {
                "m": np.ones_like(param.array),
                "v": np.ones_like(param.array),
            }
    if comm.size == 1:
        train(optimizer)
    else:
        with pytest.raises(
            RankMismatchError, match=r"rank 1: the state of /.* is not there .*expected m, v"
        ):
            train(optimizer)


def rule_of(param):
    """Return a parameter's update rule."""
    return param.update_rule


def test_memory_is_given_back():
    """Models, optimizers and communicators come and go."""

    def mapped():
        gc.collect()
        return Path("/proc/self/maps").read_text().count("memfd:chainer_dist")

    if not Path("/proc/self/maps").exists():
        return
    before = mapped()
    with create_communicator("shared_memory") as comm:
        for turn in range(20):
            train(prepared(comm, share_parameters=turn % 2 == 0), 1)
        kept = train(prepared(comm, mean_grad=True))
    gc.collect()
    # The memory outlives the communicator for as long as it is used.
    assert all((rule.state["v"] >= 0).all() for rule in map(rule_of, kept.target.params()))
    assert saved(kept)["0predictor/0/W/t"] == 3
    kept.target.cleargrads()
    del kept, comm
    assert mapped() <= before
