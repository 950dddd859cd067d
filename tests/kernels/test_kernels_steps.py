"""Recurrent links that are called step by step, by kernels, against Chainer's own code in float32 and in float64."""

from __future__ import annotations

import copy
from typing import NamedTuple
from unittest import mock

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer.link_hooks import SpectralNormalization
from hypothesis import given, settings
from hypothesis import strategies as st

from chainer_dist import kernels
from chainer_dist.kernels import steps
from chainer_dist.optimizers.final_gradients import FinalGradients
from kernel_cases import ARRANGEMENTS, arrange, assert_close

# Nothing of it is collective.
pytestmark = [pytest.mark.mpi_skip, pytest.mark.usefixtures("one_thread")]

NAMES = ["numpy", "onednn"]
LINKS = {cls.__name__: cls for cls in (L.LSTM, L.StatelessLSTM, L.GRU, L.StatelessGRU)}
every_link = pytest.mark.parametrize("link", LINKS)
every_choice = pytest.mark.parametrize("name", NAMES)
both_stateful = pytest.mark.parametrize("link", ["LSTM", "GRU"])


class Case(NamedTuple):
    """A link, and what it is called with."""

    link: str
    size: int = 3
    units: int = 4
    batches: tuple[int, ...] = (3, 3, 3, 3)
    arrangement: str = "dense"
    needs_inputs: bool = True
    seed: int = 0

    def make(self, dtype=np.float32):
        """Return the link, with parameters that do not depend on the dtype."""
        link = LINKS[self.link](self.size, self.units)
        rng = np.random.RandomState(self.seed)
        for _, param in sorted(link.namedparams()):
            scale = 1 / np.sqrt(param.shape[-1])
            param.array = (rng.standard_normal(param.shape) * scale).astype("f").astype(dtype)
        link.cleargrads()
        return link

    def inputs(self, dtype=np.float32):
        """Return what is given at each time, as Variables, or arrays if they need no gradient."""
        rng = np.random.RandomState(self.seed + 1)
        arrays = [
            arrange(
                rng.standard_normal((batch, self.size)).astype("f").astype(dtype), self.arrangement
            )
            for batch in self.batches
        ]
        return [chainer.Variable(each) for each in arrays] if self.needs_inputs else arrays


class Runner:
    """Calls a link step by step, with its own state or with one that is kept here."""

    def __init__(self, link):
        self.link = link
        self.states = None

    def __call__(self, x):
        """Return the output."""
        if isinstance(self.link, (L.LSTM, L.StatefulGRU)):
            return self.link(x)
        if isinstance(self.link, L.StatelessLSTM):
            self.states = self.link(*(self.states or (None, None)), x)
            return self.states[1]
        if self.states is None:
            self.states = np.zeros((len(x), self.link.W.out_size), x.dtype)
        self.states = self.link(self.states, x)
        return self.states

    def state(self):
        """Return the state as a list of Variables."""
        if self.states is not None:
            return list(self.states) if isinstance(self.states, tuple) else [self.states]
        return [self.link.c, self.link.h] if isinstance(self.link, L.LSTM) else [self.link.h]


def loss_of(values, seed=7):
    """Return a loss in which each number has a weight of its own."""
    rng = np.random.RandomState(seed)
    return sum(F.sum(rng.standard_normal(v.shape).astype(v.dtype) * v * v) for v in values)


def outcome(case, name, dtype=np.float32):
    """Return all arrays that come of forward and backward."""
    link, xs = case.make(dtype), case.inputs(dtype)
    run = Runner(link)
    with kernels.use(name):
        ys = [run(x) for x in xs]
        loss_of([*ys, *run.state()]).backward()
    given_as = [x for x in xs if isinstance(x, chainer.Variable)]
    grads = [v.grad for v in (*given_as, *(p for _, p in sorted(link.namedparams())))]
    return [v.array for v in (*ys, *run.state())] + grads


def is_step(variable):
    """Tell whether a Variable comes from a kernel's step."""
    return type(variable.creator).__name__ in ("LSTMStep", "GRUStep")


cases = st.builds(
    Case,
    link=st.sampled_from(sorted(LINKS)),
    size=st.integers(1, 5),
    units=st.integers(1, 5),
    batches=st.integers(1, 4).flatmap(lambda n: st.integers(1, 5).map(lambda times: (n,) * times)),
    arrangement=st.sampled_from(ARRANGEMENTS),
    needs_inputs=st.booleans(),
    seed=st.integers(0, 1000),
)


@settings(max_examples=100)
@given(cases, st.sampled_from(NAMES), st.sampled_from([1, 5, 1024]))
def test_sequences(case, name, rows):
    """Outputs, states and all gradients are Chainer's, however many steps are multiplied together."""
    with mock.patch.object(steps, "_ROWS", rows):
        got = outcome(case, name)
    assert all(each is None or each.dtype == np.float32 for each in got)
    assert_close(got, outcome(case, "chainer"))
    assert_close(got, outcome(case, "chainer", np.float64))


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=6).map(lambda n: sorted(n, reverse=True)),
    st.sampled_from(NAMES),
)
def test_batches_that_shrink(batches, name):
    """Sequences of LSTM that end keep their state."""
    case = Case("LSTM", batches=tuple(batches))
    assert_close(outcome(case, name), outcome(case, "chainer", np.float64))


@every_link
@every_choice
@pytest.mark.parametrize("batch", [1, 7, 30])
def test_many_units(link, name, batch):
    """Products that are large enough for oneDNN are right."""
    case = Case(link, size=150, units=300, batches=(batch,) * 4)
    assert_close(outcome(case, name), outcome(case, "chainer", np.float64))


@every_link
def test_are_used(link):
    """Steps with a state are kernels, those of a sequence with the same parameters in the graph; not so when they are off."""
    for name, used in (("numpy", True), ("chainer", False)):
        case = Case(link)
        run = Runner(case.make())
        with kernels.use(name):
            ys = [run(x) for x in case.inputs()]
        assert [is_step(y) for y in ys[1:]] == [used] * 3
    with kernels.use("numpy"):
        run = Runner(case.make())
        ys = [run(x) for x in case.inputs()]
    first, *others = ({id(node) for node in y.creator.inputs[-2:]} for y in ys[1:])
    assert all(each == first for each in others)


@both_stateful
@every_choice
@pytest.mark.parametrize("unchain", ["loss", "state", "set", "no"])
def test_truncated_backpropagation(link, name, unchain):
    """Parameters are updated in place between windows, however the graph is cut, if it is."""

    def train(name, dtype):
        case = Case(link)
        model, optimizer = case.make(dtype), chainer.optimizers.SGD(0.05)
        optimizer.setup(model)
        losses = []
        with kernels.use(name):
            for window in range(4):
                xs = case._replace(seed=window).inputs(dtype)
                loss = loss_of([model(x) for x in xs])
                model.cleargrads()
                loss.backward()
                state = Runner(model).state()
                if unchain == "loss":
                    loss.unchain_backward()
                elif unchain == "state":
                    for each in state:
                        each.unchain_backward()
                elif unchain == "set":
                    model.set_state(*(chainer.Variable(each.array) for each in state))
                optimizer.update()
                losses.append(loss.array)
        return [*losses, *(param.array for _, param in sorted(model.namedparams()))]

    assert_close(train(name, np.float32), train("chainer", np.float64))


@both_stateful
@every_choice
def test_a_window_that_slides(link, name):
    """Cutting off old steps leaves the gradients of those that were made since."""

    def gradients(name, dtype):
        case = Case(link, batches=(3,) * 8)
        model = case.make(dtype)
        found = []
        with kernels.use(name):
            ys = []
            for x in case.inputs(dtype):
                ys.append(model(x))
                model.cleargrads()
                loss_of(ys[-1:]).backward()
                found += [param.grad for _, param in sorted(model.namedparams())]
                if len(ys) > 3:
                    ys[-4].unchain_backward()
        return found

    assert_close(gradients(name, np.float32), gradients("chainer", np.float64))


@every_link
@every_choice
@pytest.mark.parametrize("in_place", [True, False])
def test_parameters_that_change_amid_a_sequence(link, name, in_place):
    """New numbers, in place or in other arrays, count from the next step on."""

    def run_all(name, dtype):
        case = Case(link)
        model, xs = case.make(dtype), case.inputs(dtype)
        run = Runner(model)
        params = [param for _, param in sorted(model.namedparams())]
        with kernels.use(name):
            ys = [run(x) for x in xs]
            for param in params:
                if in_place:
                    param.array[...] *= 2
                else:
                    param.array = param.array * 2
            ys += [run(x) for x in xs]
            # Steps from before the change are differentiated by parameters that they were not computed with,
            # and other arrays are no longer those of the graph.
            loss_of(ys if in_place else ys[-1:]).backward()
        gradients = [each.grad for each in params] if in_place else []
        return [*(y.array for y in ys), *gradients]

    assert_close(run_all(name, np.float32), run_all("chainer", np.float64))


@every_link
@every_choice
def test_gradients_of_gradients(link, name):
    """The gradient of the norm of gradients is Chainer's."""

    def second(name, dtype):
        case = Case(link, seed=2)
        model, xs = case.make(dtype), case.inputs(dtype)
        params = [param for _, param in sorted(model.namedparams())]
        run = Runner(model)
        if link == "StatelessGRU":  # Chainer fails where one of its states needs no gradient
            run.states = F.repeat(xs[0][:, :1], case.units, 1)
        with kernels.use(name):
            loss = loss_of([run(x * F.sum(xs[0])) for x in xs])
            gs = chainer.grad([loss], [*xs, *params], enable_double_backprop=True)
            sum(F.sum(g * g) for g in gs).backward()
        return [g.array for g in gs] + [each.grad for each in (*xs, *params)]

    want, got = second("chainer", np.float64), second(name, np.float32)
    largest = [np.abs(each).max() for each in want]
    assert min(largest) > 0
    assert_close(*([each / m for each, m in zip(arrays, largest)] for arrays in (got, want)))


@every_link
def test_gradients_of_some(link):
    """Of some inputs or parameters alone the gradients are the same."""

    def gradients(name, choose):
        case = Case(link)
        model, xs = case.make(), case.inputs()
        chosen = choose(xs, [param for _, param in sorted(model.namedparams())])
        run = Runner(model)
        with kernels.use(name):
            loss = loss_of([run(x) for x in xs])
            return [each.array for each in chainer.grad([loss], chosen)]

    for choose in (
        lambda xs, _: xs[:1],
        lambda xs, _: xs[1::2],
        lambda _, params: params[:1],
        lambda _, params: params[1::2],
        lambda xs, params: [params[-1], xs[-1]],
    ):
        assert_close(gradients("numpy", choose), gradients("chainer", choose))


@every_link
def test_one_step(link):
    """A sequence of one step has gradients of what Chainer computes with, and none of others."""
    case = Case(link, batches=(3,))
    assert_close(outcome(case, "numpy"), outcome(case, "chainer"))


@every_link
def test_steps_that_branch(link):
    """A state that two steps go on from has the gradients of both."""

    def gradients(name, dtype):
        case = Case(link)
        model, xs = case.make(dtype), case.inputs(dtype)
        run = Runner(model)
        with kernels.use(name):
            ys = [run(x) for x in xs[:2]]
            state = run.state()
            ys.append(run(xs[2]))
            if run.states is None:
                model.set_state(*state)
            else:
                run.states = tuple(state) if len(state) > 1 else state[0]
            ys.append(run(xs[3]))
            loss_of(ys).backward()
        return [v.grad for v in (*xs, *(param for _, param in sorted(model.namedparams())))]

    assert_close(gradients("numpy", np.float32), gradients("chainer", np.float64))


@every_link
def test_backward_twice(link):
    """A graph may be differentiated again, and gradients add up."""
    case = Case(link)
    model = case.make()
    run = Runner(model)
    params = [param for _, param in sorted(model.namedparams())]
    with kernels.use("numpy"):
        loss = loss_of([run(x) for x in case.inputs()])
        loss.backward()
        first = [param.grad.copy() for param in params]
        loss.backward()
    for one, param in zip(first, params):
        np.testing.assert_allclose(2 * one, param.grad, 1e-6)


@every_link
@pytest.mark.parametrize("lazy", [False, True])
def test_gradients_lie_apart(link, lazy):
    """No two gradients share memory, so that each may be changed in place."""
    with chainer.using_config("lazy_grad_sum", lazy):
        got = [each for each in outcome(Case(link), "numpy") if each is not None]
        assert_close(got, [each for each in outcome(Case(link), "chainer") if each is not None])
    states = len(got) - len(Case(link).inputs()) - len(list(Case(link).make().params()))
    for i, one in enumerate(got[states:]):
        assert one.flags.writeable
        for other in got[states:][i + 1 :]:
            assert not np.shares_memory(one, other)


@every_link
@every_choice
def test_repeatable(link, name):
    """The same numbers come bit for bit."""
    case = Case(link, size=100, units=200, batches=(8,) * 5)
    for one, other in zip(outcome(case, name), outcome(case, name)):
        np.testing.assert_array_equal(one, other)


@every_link
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(link, bad):
    """NaN and infinity are where Chainer has them, forward and backward."""

    def run_all(name):
        case = Case(link)
        model, xs = case.make(), case.inputs()
        xs[1].array[2, 0] = bad
        run = Runner(model)
        with kernels.use(name), np.errstate(all="ignore"):
            ys = [run(x) for x in xs]
            loss_of(ys).backward()
        return [y.array for y in ys] + [x.grad for x in xs]

    for one, other in zip(run_all("numpy"), run_all("chainer")):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@every_link
@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_dtypes(link, dtype):
    """What is not of float32 Chainer computes, to the bit."""
    with np.errstate(all="ignore"):
        found = [outcome(Case(link), name, dtype) for name in ("numpy", "chainer")]
    for one, other in zip(*found):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


@every_link
def test_without_a_graph(link):
    """Without backward there is no graph, and the outputs are the same."""
    with chainer.no_backprop_mode(), kernels.use("numpy"):
        run = Runner(Case(link).make())
        ys = [run(x) for x in Case(link).inputs()]
    assert all(y.creator is None for y in (*ys, *run.state()))
    want = outcome(Case(link), "chainer")
    assert_close([y.array for y in ys], want[: len(ys)])


@both_stateful
def test_hooks_of_links_see_the_layers(link):
    """Where a hook listens to layers, or changes their parameters, Chainer computes."""

    class Calls(chainer.LinkHook):
        name = "calls"

        def __init__(self):
            self.called = []

        def forward_postprocess(self, args):
            self.called.append(type(args.link).__name__)

    def run_all(name, hook):
        model = Case(link).make()
        layer = model.lateral if link == "LSTM" else model.U_z
        if hook is None:
            np.random.seed(0)
            layer.add_hook(SpectralNormalization())
            layer.W.array *= 3
        run = Runner(model)
        with kernels.use(name):
            ys = [run(x) for x in Case(link).inputs()]
            loss_of(ys).backward()
        return [y.array for y in ys] + [param.grad for _, param in sorted(model.namedparams())]

    assert_close(run_all("numpy", None), run_all("chainer", None))
    found = []
    for name in ("numpy", "chainer"):
        with Calls() as hook:
            run_all(name, hook)
        found.append(hook.called)
    assert found[0] == found[1]
    assert "Linear" in found[0]


@both_stateful
def test_copies_amid_a_sequence(link):
    """A copy of a link goes on by itself."""
    case = Case(link)
    model, xs = case.make(), case.inputs()
    with kernels.use("numpy"):
        for x in xs[:2]:
            model(x)
        other = copy.deepcopy(model)
        for _, param in sorted(other.namedparams()):
            param.array[...] *= 2
        found = [each(xs[2]).array for each in (model, other)]
    with kernels.use("chainer"):
        fresh = case.make()
        for x in xs[:2]:
            fresh(x)
        doubled = copy.deepcopy(fresh)
        for _, param in sorted(doubled.namedparams()):
            param.array[...] *= 2
        assert_close(found, [each(xs[2]).array for each in (fresh, doubled)])


@both_stateful
def test_wrong_arguments(link):
    """What Chainer refuses it refuses still, by the same kind of error."""
    for make_wrong in (
        lambda model: model(np.ones((3, 9), np.float32)),
        lambda model: model(np.ones((7, 3), np.float32)),
        lambda model: model(np.ones((3, 3), np.float64)),
        lambda model: model(None),
    ):
        errors = []
        for name in ("numpy", "chainer"):
            model = Case(link).make()
            with kernels.use(name):
                model(Case(link).inputs()[0])
                with pytest.raises(Exception) as raised:  # noqa: PT011
                    make_wrong(model)
            errors.append(raised.type)
        assert errors[0] is errors[1]


@both_stateful
def test_inputs_of_more_dimensions(link):
    """Chainer flattens them."""
    xs = [np.random.RandomState(i).standard_normal((2, 3, 1)).astype("f") for i in range(3)]
    found = []
    for name in ("numpy", "chainer"):
        model = Case(link).make()
        with kernels.use(name):
            found.append([model(x).array for x in xs])
    assert_close(*found)


@both_stateful
def test_final_gradients(link):
    """Each gradient is reported once, and is what the parameter has afterwards."""
    case = Case(link)
    model = case.make()
    params = list(model.params())
    seen = {}
    with kernels.use("numpy"):
        loss = loss_of([model(x) for x in case.inputs()])
        FinalGradients(loss, params).backward(seen.setdefault, lambda: None)
    assert sorted(seen) == list(range(len(params)))
    for i, param in enumerate(params):
        assert param.grad is seen[i]


@both_stateful
def test_graphs_are_freed(link):
    """Cutting the graph frees the steps, without help of the collector of cycles."""
    import gc
    import weakref

    case = Case(link)
    model = case.make()
    gc.disable()
    try:
        with kernels.use("numpy"):
            ys = [model(x) for x in case.inputs()]
            loss = loss_of(ys)
            loss.backward()
            nodes = [weakref.ref(y.creator_node) for y in ys[1:]]
            assert all(is_step(y) for y in ys[1:])
            loss.unchain_backward()
            del ys, loss
        assert [node() for node in nodes] == [None] * 3
    finally:
        gc.enable()
