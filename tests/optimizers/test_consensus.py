"""Ranks whose updates would differ get an error that names what differs; ranks that are alike train on."""

from __future__ import annotations

import fractions
import functools
import io
import threading

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import optimizer_hooks as hooks
from chainer import optimizers
from conftest import on_nodes

from chainer_dist import (
    RankMismatchError,
    create_communicator,
    create_local_sgd_optimizer,
    create_multi_node_optimizer,
)
from chainer_dist.compression import Int8, PowerSGD, TopK
from chainer_dist.optimizers.descriptions import describe

pytestmark = pytest.mark.usefixtures("float64")
SAMPLES = 12  # divides by 1, 2, 3 and 4 ranks

WAYS = {
    "sharded": ("shared_memory", {}),
    "shared parameters": ("shared_memory", {"share_parameters": True}),
    "replicated": ("shared_memory", {"sharded_update": False}),
    "naive": ("naive", {}),
    "double buffering": ("naive", {"double_buffering": True}),
    "accumulated": ("shared_memory", {"accumulate_steps": 2}),
    "overlapped": ("nodes", {}),
    "overlapped, replicated": ("nodes", {"sharded_update": False}),
    "once per job": ("nodes", {"sharded_update": "job", "share_parameters": True}),
}


@pytest.fixture(params=WAYS)
def way(request):
    """Return a communicator, and the options of a way of updating."""
    name, options = WAYS[request.param]
    if name == "nodes":
        comm = on_nodes("shared_memory", "odd and even")
    else:
        comm = create_communicator(name)
    yield comm, options
    comm.finalize()


@pytest.fixture(params=[{}, {"sharded_update": False}], ids=["sharded", "replicated"])
def wrap(request):
    """Return how to make an optimizer multi-node, for two ways of updating that compare alike."""
    comm = create_communicator("shared_memory")
    yield functools.partial(create_multi_node_optimizer, communicator=comm, **request.param)
    comm.finalize()


def make_model():
    """Return the same small network on every rank."""
    rng = np.random.RandomState(1)
    return chainer.Sequential(
        L.Linear(5, 4, initialW=rng.randn(4, 5)), F.tanh, L.Linear(4, 2, initialW=rng.randn(2, 4))
    )


def whole(step):
    """Return all ranks' samples."""
    return np.random.RandomState(100 + step).rand(SAMPLES, 5)


def part(step, comm):
    """Return this rank's samples."""
    share = SAMPLES // comm.size
    return whole(step)[comm.rank * share :][:share]


def assert_equal_on_all_ranks(comm, model):
    """The ranks' parameters are the same to the bit."""
    mine = {name: param.array.tobytes() for name, param in model.namedparams()}
    assert comm.allgather_obj(mine) == [mine] * comm.size


class CountingHook:
    """Measures something on its own rank, and changes nothing."""

    name = "CountingHook"

    def __init__(self, comm):
        self.group = comm
        self.rank = comm.rank
        self.file = io.StringIO() if comm.rank == 0 else None
        self.label = f"rank {comm.rank}"
        self.data = np.full(2000, comm.rank)
        self.others = [self, comm.rank, None]
        self.calls = 0

    def __call__(self, optimizer):
        """Count what this rank has done."""
        self.calls += optimizer.t + self.rank


class Scaling:
    """A hook of a user's own, with a number."""

    name = "Scaling"

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, optimizer):
        """Multiply all gradients."""
        for param in optimizer.target.params():
            param.grad = param.grad * self.factor


def enclosing(rate):
    """Return a hook that is a function."""

    def decay(optimizer):
        for param in optimizer.target.params():
            param.grad = param.grad + rate * param.array

    return decay


def add_in_order(optimizer, *added):
    """Add several hooks."""
    for hook in added:
        optimizer.add_hook(hook)


DIFFERENCES = {
    "a hook": (
        lambda o, last: last and o.add_hook(hooks.WeightDecay(0.5)),
        "pre_update_hooks|hook WeightDecay",
    ),
    "a hook after the update": (
        lambda o, last: last and o.add_hook(Scaling(2), timing="post"),
        "post_update_hooks",
    ),
    "clipping": (
        lambda o, last: last and o.add_hook(hooks.GradientClipping(0.1)),
        "pre_update_hooks|GradientClipping",
    ),
    "the rate of a hook": (
        lambda o, last: o.add_hook(hooks.WeightDecay(0.5 if last else 0.1)),
        "rate",
    ),
    "the threshold of clipping": (
        lambda o, last: o.add_hook(hooks.GradientClipping(0.5 if last else 0.1)),
        "threshold",
    ),
    "a number of a user's hook": (lambda o, last: o.add_hook(Scaling(2 if last else 1)), "factor"),
    "the order of hooks": (
        lambda o, last: add_in_order(
            o, *[hooks.WeightDecay(0.5), hooks.GradientHardClipping(-1, 1)][:: -1 if last else 1]
        ),
        "pre_update_hooks",
    ),
    "what a function encloses": (
        lambda o, last: o.add_hook(enclosing(0.5 if last else 0.1)),
        "hook decay.*rate",
    ),
    "a hook of a rule": (
        lambda o, last: last and o.target[0].W.update_rule.add_hook(hooks.Lasso(0.1)),
        "the update rule of /0/W",
    ),
    "the rate of a hook of a rule": (
        lambda o, last: o.target[0].W.update_rule.add_hook(hooks.Lasso(0.2 if last else 0.1)),
        "the update rule of /0/W.*rate",
    ),
    "a frozen layer": (lambda o, last: last and o.target[0].disable_update(), "update of /0/W"),
    "no rule": (
        lambda o, last: last and setattr(o.target[0].W, "update_rule", None),
        "the update rule of /0/W",
    ),
    "another rule": (
        lambda o, last: (
            last
            and setattr(
                o.target[0].W, "update_rule", optimizers.adam.AdamRule(optimizers.Adam().hyperparam)
            )
        ),
        "the update rule of /0/W",
    ),
    "a hyperparameter": (lambda o, last: last and setattr(o, "lr", 0.5), r"optimizer\.lr"),
    "a hyperparameter of a rule": (
        lambda o, last: last and setattr(o.target[2].b.update_rule.hyperparam, "lr", 0.5),
        r"the update rule of /1/b\.lr",
    ),
    "a loss scale": (lambda o, last: last and o.loss_scaling(scale=8.0), "loss_scal"),
    "another loss scale": (
        lambda o, last: o.loss_scaling(scale=16.0 if last else 8.0),
        "loss_scal",
    ),
    "dynamic loss scaling": (lambda o, last: last and o.loss_scaling(), "loss_scal"),
    "the interval of loss scaling": (
        lambda o, last: o.loss_scaling(interval=10 if last else 20),
        "loss_scaling_multiplier",
    ),
    "updates in float32": (
        lambda o, last: last and o.target[0].W.update_rule.use_fp32_update(),
        "use_fp32_update",
    ),
    "the number of updates of a rule": (
        lambda o, last: last and setattr(o.target[0].W.update_rule, "t", 7),
        "number of updates of /0/W",
    ),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_what_differs_is_named_on_every_rank(wrap, what):
    """On the last rank only, from the first update on or amid training; nothing is updated."""
    comm = wrap.keywords["communicator"]
    change, match = DIFFERENCES[what]
    for n_updates in (0, 1):
        model = make_model()
        optimizer = wrap(optimizers.SGD(0.1)).setup(model)

        def loss(model=model):
            return F.mean(model(part(0, comm)) ** 2)

        for _ in range(n_updates):
            optimizer.update(loss)
        change(optimizer, comm.rank == comm.size - 1)
        if comm.size == 1:
            optimizer.update(loss)
            continue
        before = [param.array.copy() for param in model.params()]
        with pytest.raises(RankMismatchError, match=f"rank {comm.size - 1}.*({match})"):
            optimizer.update(loss)
        for param, array in zip(model.params(), before):
            np.testing.assert_array_equal(param.array, array)


OPTIONS = {
    "share_parameters": True,
    "mean_grad": True,
    "sharded_update": False,
    "zero_fill": False,
    "overlap": False,
    "double_buffering": True,
    "compression": Int8(),
}
NAMES = {"double_buffering": "the multi-node optimizer is DoubleBufferingOptimizer"}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_differ_are_named(option):
    """At set-up, before any rank waits for another that takes another way."""
    comm = create_communicator("shared_memory")
    options = {option: OPTIONS[option]} if comm.rank == comm.size - 1 else {}
    optimizer = create_multi_node_optimizer(optimizers.SGD(0.1), comm, **options)
    name = NAMES.get(option, f"the option {option} of")
    if comm.size > 1:
        with pytest.raises(RankMismatchError, match=f"^rank {comm.size - 1}: {name}"):
            optimizer.setup(make_model())
    comm.finalize()


class Schedule:
    """A hyperparameter that is an object, without a comparison or a repr of its own."""

    def __init__(self, comm, *numbers):
        self.comm = comm
        self.numbers = numbers
        self.calls = 0

    def __call__(self, t):
        """Return the number of an update."""
        self.calls += 1
        return self.numbers[t % len(self.numbers)]


ALIKE = {
    "a NumPy number": lambda o, comm: setattr(o, "lr", np.float64(0.1) if comm.rank else 0.1),
    "a float32 of a value that it has": lambda o, comm: setattr(
        o, "lr", np.float32(0.5) if comm.rank else 0.5
    ),
    "an integer": lambda o, comm: setattr(o, "lr", 1 if comm.rank else 1.0),
    "a boolean": lambda o, comm: setattr(o, "lr", np.bool_(1) if comm.rank else 1),
    "an array of one number": lambda o, comm: setattr(o, "lr", np.array(0.1) if comm.rank else 0.1),
    "a list": lambda o, comm: setattr(o.hyperparam, "betas", [0, 1] if comm.rank else (0.0, 1.0)),
    "a schedule": lambda o, comm: setattr(o.hyperparam, "schedule", Schedule(comm, 0.1, 0.2)),
    "a function": lambda o, comm: setattr(o.hyperparam, "schedule", lambda t: 0.1 * t * comm.size),
    "a partial function": lambda o, comm: setattr(
        o.hyperparam, "schedule", functools.partial(Schedule, comm, 3)
    ),
    "a bound method": lambda o, comm: setattr(o.hyperparam, "schedule", Schedule(comm, 2).__call__),
    "a hook with an integer": lambda o, comm: o.add_hook(
        hooks.WeightDecay(np.float64(1) if comm.rank else 1)
    ),
    "a hook that counts": lambda o, comm: o.add_hook(CountingHook(comm)),
    "a lock": lambda o, comm: setattr(o.hyperparam, "lock", comm and threading.Lock()),
}


@pytest.mark.parametrize("what", ALIKE)
def test_ranks_that_are_alike_train_on(wrap, what):
    """Equal values count as equal, whatever their type or address, and stay so while they are used."""
    comm = wrap.keywords["communicator"]
    model = make_model()
    optimizer = wrap(optimizers.SGD(0.1)).setup(model)
    ALIKE[what](optimizer, comm)
    for step in range(4):
        schedule = getattr(optimizer.hyperparam, "schedule", None)
        if isinstance(schedule, Schedule):
            optimizer.lr = schedule(step) + 0 * comm.rank
        optimizer.update(lambda step=step: F.mean(model(part(step, comm)) ** 2))
    assert_equal_on_all_ranks(comm, model)


def replace(model, optimizer, what, rank):
    """Put something else of the same shape in the place of the first layer's weights."""
    new = np.random.RandomState(50 + rank).randn(4, 5)
    if what == "array":
        model[0].W.array = new
        return
    with model[0].init_scope():
        model[0].W = L.Linear(5, 4, initialW=new).W if what == "layer" else chainer.Parameter(new)
    model[0].W.update_rule = optimizer.create_update_rule()


def train(optimizer, data, *, at_step_2=lambda _: None, repeat=1):
    """Train for four updates; return the model."""
    model = make_model()
    optimizer.setup(model)
    for step in range(4):
        if step == 2:
            at_step_2(model)
        for _ in range(repeat):
            optimizer.update(lambda step=step: F.mean(model(data(step)) ** 2))
    return model


@pytest.mark.parametrize(
    ("what", "who"),
    [
        ("layer", "all ranks"),
        ("parameter", "all ranks"),
        ("array", "all ranks"),
        ("array", "rank 0"),
        ("array", "the last rank"),
    ],
)
def test_what_is_replaced_becomes_that_of_rank_0(way, what, who):
    """Amid training, with other values on each rank: as in one process that replaces them by rank 0's."""
    comm, options = way
    ranks = {"all ranks": range(comm.size), "rank 0": [0], "the last rank": [comm.size - 1]}[who]
    optimizer = create_multi_node_optimizer(optimizers.SGD(0.1), comm, **options)

    def train_here():
        return train(
            optimizer,
            lambda step: part(step, comm),
            at_step_2=lambda model: (
                replace(model, optimizer, what, comm.rank) if comm.rank in ranks else None
            ),
            repeat=options.get("accumulate_steps", 1),
        )

    if len(ranks) < comm.size and "accumulate_steps" in options:
        # The first of the batches is computed by each rank alone, so that only some would compare.
        with pytest.raises(RankMismatchError, match="batches"):
            train_here()
        return
    model = train_here()
    assert_equal_on_all_ranks(comm, model)
    if "double_buffering" in options:
        return  # gradients are one update old, and those of what was replaced are lost
    plain = optimizers.SGD(0.1)
    reference = train(
        plain,
        whole,
        # What rank 0 has not replaced comes back.
        at_step_2=lambda model: replace(model, plain, what, 0) if 0 in ranks else None,
    )
    for param, want in zip(model.params(), reference.params()):
        np.testing.assert_allclose(param.array, want.array, rtol=1e-9)


@pytest.mark.parametrize("what", ["layer", "parameter"])
def test_a_parameter_that_one_rank_replaces_is_an_error(wrap, what):
    """Its rule begins anew, with a state that the other ranks' rules do not have."""
    comm = wrap.keywords["communicator"]
    if comm.size == 1:
        pytest.skip("needs two ranks")
    optimizer = wrap(optimizers.MomentumSGD(0.1))
    with pytest.raises(RankMismatchError, match=r"rank 1.*/0/W"):
        train(
            optimizer,
            lambda step: part(step, comm),
            at_step_2=lambda model: replace(model, optimizer, what, 0) if comm.rank == 0 else None,
        )


def test_arrays_that_are_replaced_alike_each_time(way):
    """As by users who clip weights: nothing is sent, and training is that of one process."""
    comm, options = way

    def train_clipped(optimizer, data):
        model = make_model()
        optimizer.setup(model)
        for step in range(4):
            optimizer.update(lambda step=step: F.mean(model(data(step)) ** 2))
            for param in model.params():
                param.array = np.clip(param.array, -0.5, 0.5)
        return model

    optimizer = create_multi_node_optimizer(optimizers.SGD(0.1), comm, **options)
    model = train_clipped(optimizer, lambda step: part(step, comm))
    assert_equal_on_all_ranks(comm, model)
    if {"double_buffering", "accumulate_steps"} & {*options}:
        return  # compared with ordinary updates of one process
    reference = train_clipped(optimizers.SGD(0.1), whole)
    for param, want in zip(model.params(), reference.params()):
        np.testing.assert_allclose(param.array, want.array, rtol=1e-9)


def test_replaced_before_a_backward_by_hand(way):
    """Other values than rank 0's are an error there, as the gradients exist; equal ones are not."""
    comm, options = way
    for differ in (False, True):
        model = make_model()
        optimizer = create_multi_node_optimizer(optimizers.SGD(0.1), comm, **options).setup(model)

        def update(step, model=model, optimizer=optimizer):
            for _ in range(optimizer.accumulate_steps):
                model.cleargrads()
                F.mean(model(part(step, comm)) ** 2).backward()
                optimizer.update()

        update(0)
        model[0].W.array = np.random.RandomState(comm.rank if differ else 0).randn(4, 5)
        if differ and comm.size > 1:
            with pytest.raises(RankMismatchError, match=r"rank 1: /0/W had other values"):
                update(1)
        update(2)
        assert_equal_on_all_ranks(comm, model)


def test_compressions_with_other_numbers_are_named(comm):
    """One rank would send factors or positions of another number than the others expect."""
    is_last = comm.rank == comm.size - 1
    for name, compression in (
        ("rank", PowerSGD(1 + is_last)),
        ("density", TopK(0.1 + is_last / 2)),
    ):
        optimizer = create_multi_node_optimizer(optimizers.SGD(0.1), comm, compression=compression)
        if comm.size > 1:
            with pytest.raises(RankMismatchError, match=f"compression.*{name}"):
                optimizer.setup(make_model())


@pytest.mark.parametrize("wrong", [Int8, "Int8", 8])
def test_what_is_no_compression_is_refused(comm, wrong):
    """Such as its class, at once and not in the first update."""
    with pytest.raises(TypeError, match=r"compression is .*expected an object such as"):
        create_multi_node_optimizer(optimizers.SGD(0.1), comm, compression=wrong)


def test_local_sgd_keeps_loss_scales_of_its_own(comm):
    """There a rank's scale follows its own gradients, and only whether it is dynamic is compared."""
    model = make_model()
    optimizer = create_local_sgd_optimizer(optimizers.SGD(0.1), comm, period=2).setup(model)
    optimizer.loss_scaling()
    for step in range(4):
        factor = np.inf if step == 2 and comm.rank == 0 else 1
        optimizer.update(lambda step=step, f=factor: F.mean(model(part(step, comm)) ** 2) * f)
    assert_equal_on_all_ranks(comm, model)


class Slots:
    """An object without a dict."""

    __slots__ = ("one", "other")

    def __init__(self, one, other):
        self.one, self.other = one, other


EQUAL = [
    [1, 1.0, np.float32(1), np.int8(1), np.array(1), fractions.Fraction(1), True, np.True_],
    [0.0, -0.0, 0, False],
    [float("nan"), np.nan, np.float32("nan")],
    [[1, 2], (1.0, 2), [np.int64(1), 2]],
    [{"a": 1, "b": 2}, {"b": 2.0, "a": 1}],
    [{1, 2}, frozenset([2.0, 1])],
    [np.arange(3), np.arange(3.0), np.arange(3, dtype=np.float32)],
    [Slots(1, 2), Slots(1.0, 2)],
    [functools.partial(max, 1), functools.partial(max, 1.0)],
]


def test_descriptions_tell_values_apart():
    """Equal values have one description, and no two of these lists share one."""
    found = [{describe(value) for value in values} for values in EQUAL]
    assert [len(each) for each in found] == [1] * len(EQUAL)
    assert len(set.union(*found)) == len(EQUAL)
    others = ["1", b"1", None, 1j, Slots(1, 3), Slots, [1, 3], max, np.float32(0.1), 0.1, 10**400]
    assert len({describe(value) for value in others} | set.union(*found)) == len(others) + len(
        found
    )


def test_descriptions_end():
    """Objects that hold themselves, or that cannot be pickled, have one."""
    endless = []
    endless.append(endless)
    assert describe(endless)
    assert "0x" not in describe([object(), iter([]), lambda: None, threading.Lock()])
