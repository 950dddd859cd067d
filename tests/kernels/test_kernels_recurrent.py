"""Recurrent networks by kernels, against Chainer's own code in float32 and in float64."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
import threadpoolctl
from chainer.functions.rnn import n_step_rnn
from hypothesis import given, settings
from hypothesis import strategies as st

from chainer_dist import kernels
from chainer_dist.kernels import matrices, recurrent
from chainer_dist.optimizers.final_gradients import FinalGradients
from kernel_cases import assert_close

# Nothing of it is collective.
pytestmark = pytest.mark.mpi_skip

LINKS = {
    cls.__name__: cls
    for cls in (
        L.NStepLSTM,
        L.NStepBiLSTM,
        L.NStepGRU,
        L.NStepBiGRU,
        L.NStepRNNTanh,
        L.NStepBiRNNTanh,
        L.NStepRNNReLU,
        L.NStepBiRNNReLU,
    )
}
every_link = pytest.mark.parametrize("name", LINKS)


class Case(NamedTuple):
    """A network and what it is called with."""

    name: str
    layers: int = 2
    size: int = 3
    units: int = 4
    lengths: tuple[int, ...] = (2, 5, 1)
    dropout: float = 0.0
    has_states: bool = True
    # How much the loss depends on each of: last states, outputs.
    weights: tuple[float, float] = (1.0, 1.0)
    train: bool = True
    seed: int = 0

    def link(self, dtype=np.float32):
        """Return the link, with parameters that do not depend on the dtype."""
        link = LINKS[self.name](self.layers, self.size, self.units, self.dropout)
        rng = np.random.RandomState(self.seed)
        for param in link.params():
            param.array = rng.standard_normal(param.shape).astype(np.float32).astype(dtype)
        link.cleargrads()
        return link

    def inputs(self, dtype=np.float32):
        """Return initial states and sequences as variables."""
        rng = np.random.RandomState(self.seed + 1)
        directions = 2 if "Bi" in self.name else 1
        shape = (directions * self.layers, len(self.lengths), self.units)

        def draw(shape):
            return chainer.Variable(rng.standard_normal(shape).astype(np.float32).astype(dtype))

        number = 2 if "LSTM" in self.name else 1
        states = [draw(shape) if self.has_states else None for _ in range(number)]
        return states, [draw((length, self.size)) for length in self.lengths]


def loss_of(case, states, ys):
    """Return a loss in which each number has a weight of its own."""
    rng = np.random.RandomState(7)
    total = 0
    for weight, values in zip(case.weights, (states, ys)):
        for value in values:
            if weight:
                factors = rng.standard_normal(value.shape).astype(value.dtype)
                total += weight * F.sum(factors * value * value)
    return total


def outcome(case, which, dtype=np.float32, link=None):
    """Return all arrays that a forward and a backward pass of a link give, and how far random numbers went."""
    link = link or case.link(dtype)
    states, xs = case.inputs(dtype)
    np.random.seed(case.seed)
    with kernels.use(which), chainer.using_config("train", case.train):
        *last, ys = link(*states, xs)
        after = np.random.get_state()[1:3]
        loss_of(case, last, ys).backward()
    variables = [each for each in states if each is not None] + xs + list(link.params())
    assert len(ys) == len(xs)
    arrays = [each.array for each in (*last, *ys)] + [each.grad for each in variables]
    return arrays, after


def functions_of(variable):
    """Return the names of all functions that a variable comes from."""
    names, functions = set(), [variable.creator_node]
    seen = set()
    while functions:
        function = functions.pop()
        if function is not None and id(function) not in seen:
            seen.add(id(function))
            names.add(type(function).__name__)
            functions += [node.creator_node for node in function.inputs]
    return names


def layer_of(name):
    """Return which function stands for Chainer's."""
    kinds = {"LSTM": "LSTMLayer", "GRU": "GRULayer", "Tanh": "TanhLayer", "ReLU": "ReLULayer"}
    return next(layer for kind, layer in kinds.items() if kind in name)


cases = st.builds(
    Case,
    name=st.sampled_from(sorted(LINKS)),
    layers=st.integers(1, 3),
    size=st.integers(1, 4),
    units=st.integers(1, 5),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5).map(tuple),
    dropout=st.sampled_from([0.0, 0.5]),
    has_states=st.booleans(),
    weights=st.sampled_from([(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)]),
    train=st.booleans(),
    seed=st.integers(0, 1000),
)


@settings(max_examples=150, deadline=None)
@given(cases)
def test_links(case):
    """Outputs, gradients of everything and the use of random numbers are Chainer's."""
    got, random = outcome(case, "numpy")
    want, random_of_chainer = outcome(case, "chainer")
    assert all(each.dtype == np.float32 for each in got)
    assert_close(got, want)
    np.testing.assert_equal(random, random_of_chainer)
    exact, _ = outcome(case, "chainer", np.float64)
    assert_close(got, exact)


@every_link
@pytest.mark.parametrize("lengths", [(9,), (7, 7, 7, 7), (1, 1), (12, 3, 8, 8, 1)])
@pytest.mark.parametrize("which", ["numpy", "onednn"])
def test_many_units(name, lengths, which, monkeypatch):
    """Products that are cut into blocks, and one that is not, are right, and so are those by oneDNN."""
    monkeypatch.setattr(matrices, "_FEW", 0)
    case = Case(name, layers=1, size=70, units=384, lengths=lengths, seed=3)
    link = case.link()
    for param in link.params():
        param.array *= 0.05
    got, _ = outcome(case, which, link=link)
    double = case.link(np.float64)
    double.copyparams(link)
    want, _ = outcome(case, "chainer", np.float64, double)
    assert_close(got, want)


@every_link
def test_are_used(name):
    """The functions in the graph are the kernels, for links and for functions; Chainer's when they are off."""
    case = Case(name)
    states, xs = case.inputs()
    for which, expected in (("numpy", True), ("chainer", False)):
        with kernels.use(which):
            ys = case.link()(*states, xs)[-1]
        assert (layer_of(name) in functions_of(ys[0])) == expected


def by_function(case, xs, states, which, params):
    """Call the function that a link calls, with all sequences transposed before."""
    link = case.link()
    activation = {"Tanh": "tanh", "ReLU": "relu"}.get(case.name[-4:])
    function = {
        "NStepLSTM": F.n_step_lstm,
        "NStepBiLSTM": F.n_step_bilstm,
        "NStepGRU": F.n_step_gru,
        "NStepBiGRU": F.n_step_bigru,
    }.get(case.name, F.n_step_birnn if "Bi" in case.name else F.n_step_rnn)
    more = {} if activation is None else {"activation": activation}
    per_layer = 2 * link.n_weights
    groups = [params[i : i + per_layer] for i in range(0, len(params), per_layer)]
    ws, bs = [each[::2] for each in groups], [each[1::2] for each in groups]
    np.random.seed(0)
    with kernels.use(which):
        return function(case.layers, case.dropout, *states, ws, bs, xs, **more)


def arguments_by_time(case, batches):
    """Return states, sequences, those by time, and parameters in the order of weight and bias, as variables."""
    states, sequences = case.inputs()
    rng = np.random.RandomState(5)

    def draw(shape):
        return chainer.Variable(rng.standard_normal(shape).astype(np.float32))

    link = case.link()
    xs = [draw((batch, case.size)) for batch in batches]
    params = [
        draw(param.shape) for w, b in zip(link.ws, link.bs) for pair in zip(w, b) for param in pair
    ]
    return states, sequences, xs, params


@every_link
@pytest.mark.parametrize("batches", [(3, 3, 3), (4, 2, 1, 1), (1,), (5,)])
@pytest.mark.parametrize("more", [0, 2])
def test_functions(name, batches, more):
    """Chainer's functions of sequences by time; there may be states of sequences that have no values."""
    case = Case(name, dropout=0.3, lengths=(1,) * (batches[0] + more))
    found = []
    for which in ("numpy", "chainer"):
        states, _, xs, ordered = arguments_by_time(case, batches)
        *last, ys = by_function(case, xs, states, which, ordered)
        assert (layer_of(name) in functions_of(ys[0])) == (which == "numpy")
        loss_of(case, last, ys).backward()
        found.append([v.array for v in (*last, *ys)] + [v.grad for v in (*states, *xs, *ordered)])
    assert_close(*found)


@every_link
@pytest.mark.parametrize("of_last", [False, True])
def test_gradients_of_gradients(name, of_last):
    """The gradient of the norm of gradients is Chainer's, where inputs depend on each other too."""
    case = Case(name, layers=2, weights=(1.0, 0.5) if not of_last else (1.0, 0.0), seed=2)

    def second(which, dtype):
        link = case.link(dtype)
        states, xs = case.inputs(dtype)
        inputs = [*states, *xs, *link.params()]
        with kernels.use(which):
            doubled = [x * F.sum(xs[0]) for x in xs]
            *last, ys = link(*states, doubled)
            loss = loss_of(case, last, ys)
            gs = chainer.grad([loss], inputs, enable_double_backprop=True)
            sum(F.sum(g * g) for g in gs).backward()
        return [g.array for g in gs] + [each.grad for each in inputs]

    got, want = second("numpy", np.float32), second("chainer", np.float64)
    largest = [np.abs(each).max() for each in want]
    assert min(largest) > 0
    assert_close(*([each / m for each, m in zip(arrays, largest)] for arrays in (got, want)))


@every_link
def test_gradients_of_some(name):
    """Inputs without gradients have none, and those of the others do not change."""
    case = Case(name, lengths=(1, 1, 1))
    found = []
    for which, without in (("numpy", True), ("chainer", False)):
        states, _, xs, params = arguments_by_time(case, (3, 2, 2))
        variables = [*states, *xs, *params]
        places = set(range(1, len(variables), 3)) | {len(states)}
        given_as = [v.array if without and i in places else v for i, v in enumerate(variables)]
        n, m = len(states), len(states) + len(xs)
        *last, ys = by_function(case, given_as[n:m], given_as[:n], which, given_as[m:])
        assert (layer_of(name) in functions_of(ys[0])) == (which == "numpy")
        loss_of(case, last, ys).backward()
        grads = [v.grad for v in variables]
        assert all((grads[i] is None) == without for i in places)
        found.append([grads[i] for i in range(len(variables)) if i not in places])
    assert_close(*found)


@every_link
def test_some_outputs(name):
    """A loss of one sequence's outputs has the gradients that it has with the others times zero."""
    case = Case(name)

    def grads(which, factors):
        link = case.link()
        states, xs = case.inputs()
        with kernels.use(which):
            ys = link(*states, xs)[-1]
            sum(
                factor * F.sum(y * y) for y, factor in zip(ys, factors) if factor is not None
            ).backward()
        return [v.grad for v in (*states, *xs, *link.params())]

    assert_close(grads("numpy", (None, 1, None)), grads("chainer", (0, 1, 0)))


@every_link
def test_gradients_lie_apart(name):
    """No two gradients share memory, so that each may be changed in place."""
    case = Case(name)
    got, _ = outcome(case, "numpy")
    for i, one in enumerate(got):
        for other in got[i + 1 :]:
            assert not np.shares_memory(one, other)


@every_link
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(name, bad):
    """NaN and infinity are where Chainer has them, forward and backward."""
    case = Case(name, layers=1)

    def run(which):
        link = case.link()
        states, xs = case.inputs()
        xs[1].array[2, 0] = bad
        with kernels.use(which), np.errstate(all="ignore"):
            *last, ys = link(*states, xs)
            loss_of(case, last, ys).backward()
        return [v.array for v in (*last, *ys)] + [v.grad for v in (*states, *xs)]

    for one, other in zip(run("numpy"), run("chainer")):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@every_link
def test_unusual_memory(name):
    """Arrays that are read-only, of Fortran order, reversed or parts of others give the same."""
    case = Case(name)
    want, _ = outcome(case, "chainer")
    link = case.link()
    states, xs = case.inputs()
    variables = [*states, *xs, *link.params()]
    for param in list(link.params())[1::2]:
        param.array = np.asfortranarray(param.array)
    for state in states:
        state.array = np.ascontiguousarray(state.array[::-1])[::-1]
    for x in xs:
        wide = np.zeros((2 * len(x), 2 * case.size), np.float32)
        wide[::2, ::2] = x.array
        x.array = wide[::2, ::2]
    before = [v.array.copy() for v in variables]
    for variable in variables:
        variable.array.flags.writeable = False
    with kernels.use("numpy"):
        *last, ys = link(*states, xs)
        assert layer_of(name) in functions_of(ys[0])
        loss_of(case, last, ys).backward()
    assert_close([v.array for v in (*last, *ys)] + [v.grad for v in variables], want)
    for old, variable in zip(before, variables):
        np.testing.assert_array_equal(old, variable.array)


@every_link
def test_repeatable(name):
    """The same numbers come bit for bit."""
    case = Case(name, size=40, units=64, lengths=(7, 3, 12, 12), dropout=0.2)
    for one, other in zip(outcome(case, "numpy")[0], outcome(case, "numpy")[0]):
        np.testing.assert_array_equal(one, other)


@every_link
def test_backward_twice(name):
    """A graph may be differentiated again."""
    case = Case(name)
    link = case.link()
    states, xs = case.inputs()
    with kernels.use("numpy"):
        *last, ys = link(*states, xs)
        loss = loss_of(case, last, ys)
        loss.backward()
        first = [param.grad.copy() for param in link.params()]
        link.cleargrads()
        loss.backward()
    for one, param in zip(first, link.params()):
        np.testing.assert_array_equal(one, param.grad)


@every_link
@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_dtypes(name, dtype):
    """What is not of float32 Chainer computes, to the bit."""
    case = Case(name)
    found = []
    for which in ("numpy", "chainer"):
        link = case.link(dtype)
        states, xs = case.inputs(dtype)
        variables = [*states, *xs, *link.params()]
        with kernels.use(which), np.errstate(all="ignore"):
            *last, ys = link(*states, xs)
            assert layer_of(name) not in functions_of(ys[0])
            loss_of(case, last, ys).backward()
        found.append([v.array for v in (*last, *ys)] + [v.grad for v in variables])
    for one, other in zip(*found):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


@every_link
def test_mixed_dtypes(name):
    """Sequences of several dtypes are taken as that of the longest, as in Chainer."""
    case = Case(name)
    found = []
    for which in ("numpy", "chainer"):
        link = case.link()
        states, xs = case.inputs()
        xs[2] = chainer.Variable(xs[2].array.astype(np.float64))
        with kernels.use(which):
            *last, ys = link(*states, xs)
        found.append([v.array for v in (*last, *ys)])
    assert_close(*found)
    assert [each.dtype for each in found[0]] == [each.dtype for each in found[1]]


@every_link
@pytest.mark.parametrize("what", ["size", "weights", "states", "growing", "layers"])
def test_wrong_arguments(name, what):
    """What Chainer refuses it refuses still, by the same kind of error."""
    case = Case(name)
    errors = []
    for which in ("numpy", "chainer"):
        link = case.link()
        states, xs = case.inputs()
        if what == "size":
            xs = [x.array[:, 1:] for x in xs]
        elif what == "weights":
            list(link.params())[-1].array = np.zeros((2, 2), np.float32)
        elif what == "states":
            states[0] = chainer.Variable(states[0].array[:, :-1])
        elif what == "layers":
            link = LINKS[name](0, case.size, case.units, 0.0)
        with kernels.use(which), pytest.raises(Exception) as raised:  # noqa: PT011, PT012
            if what == "growing":
                xs = [xs[0].array[:1], xs[0].array[:2]]
                params = list(link.params())
                states = [state.array[:, :1] for state in states]
                by_function(case, xs, states, which, params)
            else:
                link(*states, xs)
        errors.append(raised.type)
    assert errors[0] is errors[1]


def test_a_step_of_the_users_own():
    """A subclass that computes in another way does so."""

    class Own(L.NStepLSTM):
        def rnn(self, *args: Any) -> Any:
            h, c, ys = super().rnn(*args)
            return h, c, [y * 2 for y in ys]

    xs = [np.ones((3, 2), np.float32)]
    with kernels.use("numpy"):
        link = Own(1, 2, 2, 0.0)
        want = L.NStepLSTM.forward(link, None, None, xs)[2][0].array
        plain = L.NStepLSTM(1, 2, 2, 0.0)
        plain.copyparams(link)
        np.testing.assert_array_equal(want, 2 * plain(None, None, xs)[2][0].array)


def test_a_step_that_is_no_function():
    """Chainer's loop over steps takes any callable."""

    def step(factor, x, h, c, w, b):
        return F.tanh(F.linear(x, w[0], b[0]) * factor + F.linear(h, w[1], b[1])), c

    w, b = np.eye(2, dtype="f"), np.ones(2, "f")
    xs = [np.ones((3, 2), np.float32), np.ones((1, 2), np.float32)]
    found = []
    for which in ("numpy", "chainer"):
        with kernels.use(which):
            h = chainer.Variable(np.zeros((1, 3, 2), np.float32))
            states = [1, 0.0, h, None, [[w, w]], [[b, b]], xs, False]
            found.append(n_step_rnn.n_step_rnn_impl(functools.partial(step, 2.0), *states)[0].array)
    np.testing.assert_array_equal(*found)


def test_weights_that_are_shared():
    """A parameter that several layers have gets the gradients of all."""
    found = []
    for which in ("numpy", "chainer"):
        link = Case("NStepLSTM", size=4).link()
        link.ws[1], link.bs[1] = link.ws[0], link.bs[0]
        link.ws[0][5] = link.ws[0][4]
        _, xs = Case("NStepLSTM", size=4).inputs()
        with kernels.use(which):
            *last, ys = link(None, None, xs)
            loss_of(Case("NStepLSTM"), last, ys).backward()
        found.append([param.grad for param in (*link.ws[0], *link.bs[0], *xs)])
    assert_close(*found)


@pytest.mark.parametrize("name", ["NStepLSTM", "NStepBiGRU"])
def test_final_gradients(name):
    """Each gradient is reported once, and is what the parameter has afterwards."""
    case = Case(name)
    link = case.link()
    states, xs = case.inputs()
    params = list(link.params())
    with kernels.use("numpy"):
        *last, ys = link(*states, xs)
        seen = {}
        watched = FinalGradients(loss_of(case, last, ys), params)
        watched.backward(seen.setdefault, lambda: None)
    assert sorted(seen) == list(range(len(params)))
    for i, param in enumerate(params):
        assert param.grad is seen[i]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5).map(lambda n: sorted(n, reverse=True)),
    st.sampled_from([np.float32, np.float64, np.int32]),
    st.sampled_from([(), (3,), (2, 2)]),
)
def test_transpose_sequence(lengths, dtype, unit):
    """Sequences by time are Chainer's, of any dtype and shape."""
    rng = np.random.RandomState(0)
    xs = [rng.randint(0, 9, (length, *unit)).astype(dtype) for length in lengths]
    with kernels.use("numpy"):
        got = F.transpose_sequence(xs)
    with kernels.use("chainer"):
        want = F.transpose_sequence(xs)
    assert len(got) == len(want)
    for one, other in zip(got, want):
        np.testing.assert_array_equal(one.array, other.array)
        assert one.dtype == other.dtype


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("size", "columns", "rows"), [(3, 5, 2), (300, 512, 9), (256, 37, 200)])
def test_product(size, columns, rows, threads):
    """The product in blocks, or by the threads of oneDNN, is the product."""
    with threadpoolctl.threadpool_limits(threads), kernels.use("onednn"):
        _check_product(size, columns, rows)


def test_products_by_several_threads_are_not_by_openblas(monkeypatch):
    """OpenBLAS's threads would keep the cores from oneDNN's for a while, after each of many products."""

    def refuse(*_, **__):
        raise AssertionError("NumPy multiplied")

    with threadpoolctl.threadpool_limits(2), kernels.use("onednn"):
        monkeypatch.setattr(recurrent.np, "matmul", refuse)
        _check_product(300, 512, 9)


def _check_product(size, columns, rows):
    rng = np.random.RandomState(0)
    matrices = rng.standard_normal((3, size, columns)).astype(np.float32)
    values = rng.standard_normal((3, rows, size)).astype(np.float32)
    product = recurrent.Product(matrices, rows, slice(1, 2))
    matrices[1] /= 2
    out = np.empty((3, rows, columns), np.float32)
    product.of_each(values, out)
    np.testing.assert_allclose(out, values @ matrices, rtol=1e-4, atol=1e-3)
    product.of_all(values[0, 1:], out[:, 1:])
    np.testing.assert_allclose(out[:, 1:], values[0, 1:] @ matrices, rtol=1e-4, atol=1e-3)
