"""Small parameters are updated by one call of their rule, to the bits of a call for each."""

from __future__ import annotations

import functools

import chainer
import numpy as np
import pytest
from chainer import optimizer_hooks as hooks
from chainer import optimizers
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import create_communicator, create_multi_node_optimizer
from optimizer_cases import OPTIMIZERS


@pytest.fixture
def comm():
    """Return a communicator that shares memory."""
    communicator = create_communicator("shared_memory")
    yield communicator
    communicator.finalize()


def make_model(shapes, dtype="f4"):
    """Return a model of parameters of these shapes, the same each time."""
    rng = np.random.RandomState(5)
    model = chainer.Link()
    with model.init_scope():
        for number, shape in enumerate(shapes):
            array = np.asarray(rng.randn(*shape), dtype)
            setattr(model, f"p{number:02}", chainer.Parameter(array))
    return model


def step(optimizer, number):
    """Update by gradients of this rank's own."""
    rng = np.random.RandomState([optimizer.communicator.rank, number])
    for param in optimizer.target.params():
        param.grad = np.asarray(rng.randn(*param.shape), param.dtype)
    optimizer.update()


def values(optimizer):
    """Return all parameters and their state, as bytes."""
    found = []
    for name, param in sorted(optimizer.target.namedparams()):
        state = param.update_rule.state or {}
        found.append((name, param.array.tobytes(), param.update_rule.t))
        found += [(name, key, np.asarray(state[key]).tobytes()) for key in sorted(state)]
    return found


class DecayOfFirst(hooks.WeightDecay):
    """A hook that acts elementwise, but not on all parameters."""

    name = "DecayOfFirst"
    is_elementwise = True

    def __call__(self, rule, param):
        """Look at the parameter's name."""
        if param.name == "p00":
            super().__call__(rule, param)


HOOKS = {
    "none": [],
    "known": [hooks.WeightDecay(0.1), hooks.GradientHardClipping(-0.5, 0.5), hooks.Lasso(0.01)],
    "of names": [DecayOfFirst(0.1)],
    "clipping": [hooks.WeightDecay(0.1), hooks.GradientClipping(1e4), hooks.Lasso(0.01)],
}
CHANGES = {
    "none": lambda _: None,
    "hyperparameter": lambda rule: setattr(rule.hyperparam, "eps", 1e-3),
    "count": lambda rule: setattr(rule, "t", 7),
    "disabled": lambda rule: setattr(rule, "enabled", False),
    "hook": lambda rule: rule.add_hook(hooks.WeightDecay(0.2)),
}


@given(
    shapes=st.lists(
        st.lists(st.integers(0, 9), max_size=3).map(tuple) | st.just((9000,)),
        min_size=1,
        max_size=9,
    ),
    name=st.sampled_from([each for each in OPTIMIZERS if each != "MSVAG"]),
    dtype=st.sampled_from(["f2", "f4", "f8"]),
    hook=st.sampled_from(list(HOOKS)),
    change=st.sampled_from(list(CHANGES)),
    which=st.integers(0, 8),
    options=st.sampled_from([{}, {"mean_grad": True}, {"share_parameters": True}]),
)
def test_same_bits(comm, shapes, name, dtype, hook, change, which, options):
    """Whatever the rule, hooks, and what one of the parameters has of its own, from the second update on."""
    if dtype == "f2" and name not in {"SGD", "MomentumSGD", "NesterovAG"}:
        dtype = "f4"  # eps of other rules is too small for half precision
    optimizers_ = []
    for sharded in (True, False):
        optimizer = create_multi_node_optimizer(
            getattr(optimizers, name)(),
            comm,
            sharded_update=sharded,
            **(options if sharded else {}),
        ).setup(make_model(shapes, dtype))
        for number, each in enumerate(HOOKS[hook]):
            optimizer.add_hook(each, name=f"{number}")
        step(optimizer, 0)
        params = [*optimizer.target.params()]
        CHANGES[change](params[which % len(params)].update_rule)
        for number in (1, 2):
            step(optimizer, number)
        optimizers_.append(optimizer)
    assert values(optimizers_[0]) == values(optimizers_[1])
    if options.get("mean_grad"):
        for one, other in zip(*(each.target.params() for each in optimizers_)):
            np.testing.assert_array_equal(one.grad, other.grad)


def test_a_call_for_many(comm, monkeypatch):
    """A rule is called once for small parameters, once for each large one, and for each that differs."""
    called = []
    core = optimizers.adam.AdamRule.update_core_cpu
    monkeypatch.setattr(
        optimizers.adam.AdamRule,
        "update_core_cpu",
        lambda rule, param: (called.append(param.size), core(rule, param)),
    )
    optimizer = create_multi_node_optimizer(optimizers.Adam(), comm, sharded_update=True)
    optimizer.setup(make_model([(8,)] * 40))
    for number in range(2):
        step(optimizer, number)
    assert len(called) == 2
    assert comm.allreduce_obj(sum(called)) == 2 * 320
    called.clear()
    next(iter(optimizer.target.params())).update_rule.hyperparam.eps = 0.1
    step(optimizer, 2)
    # The first rank has its slice of the first parameter, and so a call for each of its own.
    assert len(called) == (-(-40 // comm.size) if comm.rank == 0 else 1)


def test_rules_with_methods_of_their_own(comm):
    """Each parameter is updated by the method that its own rule has been given."""

    def scaled(factor, param):
        param.array -= factor * param.grad

    found = []
    for sharded in (True, False):
        optimizer = create_multi_node_optimizer(optimizers.SGD(), comm, sharded_update=sharded)
        optimizer.setup(make_model([(4,)] * 3))
        for number, param in enumerate(optimizer.target.params()):
            rule = param.update_rule
            rule.update_core_cpu = functools.partial(scaled, np.float32(number))
        step(optimizer, 0)
        found.append(values(optimizer))
    assert found[0] == found[1]


def test_a_gradient_stays_readable(comm):
    """On one rank gradients are as hooks have left them, as Chainer has it."""
    if comm.size > 1:
        pytest.skip("on several ranks gradients are shared out")
    optimizer = create_multi_node_optimizer(optimizers.SGD(), comm).setup(make_model([(4,)] * 3))
    optimizer.add_hook(hooks.GradientHardClipping(-0.1, 0.1))
    step(optimizer, 0)
    for param in optimizer.target.params():
        assert np.abs(param.grad).max() <= np.float32(0.1)
