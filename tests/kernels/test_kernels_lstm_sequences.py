"""LSTM of sequences of equal length by oneDNN's primitive, against Chainer's own code in float32 and in float64."""

from __future__ import annotations

from types import SimpleNamespace

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from chainer_dist import kernels
from chainer_dist.kernels import lstm, lstm_sequences
from kernel_cases import assert_close

# Nothing of it is collective.
pytestmark = pytest.mark.mpi_skip

every_link = pytest.mark.parametrize("cls", [L.NStepLSTM, L.NStepBiLSTM])
BATCH, TIMES, SIZE, UNITS, LAYERS = 8, 3, 5, 4, 2


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """Have the primitive chosen, as it is with two threads, whatever the test runs with."""
    monkeypatch.setattr(lstm, "n_threads", lambda: 2)


@pytest.fixture
def used(monkeypatch):
    """Return a list to which each call of the primitive adds its geometry."""
    geometries = []
    run = lstm_sequences.Sequences._run

    def noted(self):
        geometries.append(self._geometry)
        run(self)

    monkeypatch.setattr(lstm_sequences.Sequences, "_run", noted)
    return geometries


class Network:
    """A link, initial states and sequences, with the same values for each dtype."""

    def __init__(self, cls, dtype=np.float32, *, batch=BATCH, units=UNITS):
        rng = np.random.RandomState(0)

        def draw(shape):
            return rng.standard_normal(shape).astype(np.float32).astype(dtype)

        self.link = cls(LAYERS, SIZE, units, 0.0)
        for param in self.link.params():
            param.array = draw(param.shape)
        self.link.cleargrads()
        state = (LAYERS * self.link.direction, batch, units)
        self.states = [chainer.Variable(draw(state)) for _ in range(2)]
        self.xs = [chainer.Variable(draw((TIMES, SIZE))) for _ in range(batch)]
        self.variables = [*self.states, *self.xs, *self.link.params()]

    def loss(self, which, weights=(1, 1, 1)):
        """Return a loss in which outputs have weights: h, c and the sequences."""
        rng = np.random.RandomState(1)
        with kernels.use(which):
            h, c, ys = self.link(*self.states, self.xs)
            self.outputs = h, c, F.stack(ys)
            total = 0
            for weight, y in zip(weights, self.outputs):
                factors = rng.standard_normal(y.shape).astype(y.dtype)
                total += F.sum(factors * y * y) if weight else 0
        return total

    def outcome(self, which, weights=(1, 1, 1)):
        """Return the outputs and all gradients."""
        self.link.cleargrads()
        loss = self.loss(which, weights)
        with kernels.use(which):
            loss.backward()
        return [each.array for each in self.outputs] + [each.grad for each in self.variables]


@every_link
@pytest.mark.parametrize("weights", [(1, 1, 1), (0, 0, 1), (1, 0, 0), (0, 1, 0)])
def test_values(cls, weights, used):
    """Outputs and gradients are Chainer's, whichever outputs the loss depends on, and the primitive computes them."""
    network = Network(cls)
    got = network.outcome("onednn", weights)
    assert [each.is_reversed for each in used] == [False, True][: network.link.direction] * LAYERS
    assert all(each.dtype == np.float32 for each in got)
    assert all(param.grad.flags.c_contiguous for param in network.link.params())
    assert_close(got, Network(cls, np.float64).outcome("chainer", weights))


@pytest.mark.parametrize(
    ("which", "lengths"), [("numpy", [4] * 8), ("onednn", [4] * 7 + [3]), ("chainer", [4] * 8)]
)
def test_otherwise_numpy(which, lengths, used):
    """It is not used without oneDNN, nor for sequences of different lengths."""
    network = Network(L.NStepLSTM)
    xs = [np.ones((length, SIZE), np.float32) for length in lengths]
    with kernels.use(which):
        network.link(None, None, xs)
    assert not used


@pytest.mark.parametrize(
    ("threads", "avx512", "batch", "units", "expected"),
    [
        (2, False, 1, 4, True),
        (2, True, 1, 600, True),
        (1, False, 1, 4, False),
        (1, False, 2, 4, True),
        (1, False, 32, 512, True),
        (1, False, 33, 4, False),
        (1, False, 2, 513, False),
        (1, True, 1, 256, True),
        (1, True, 31, 257, False),
        (1, True, 32, 257, True),
    ],
)
@pytest.mark.parametrize("is_input", [False, True])
def test_sizes_for_onednn(threads, avx512, batch, units, expected, is_input, used, monkeypatch):
    """In one thread it depends on the instructions and the sizes whether oneDNN or NumPy computes."""
    monkeypatch.setattr(lstm, "n_threads", lambda: threads)
    monkeypatch.setattr(lstm, "library", lambda: SimpleNamespace(has_avx512=lambda: avx512))
    sizes = (units, 3) if is_input else (3, units)
    xs = [np.ones((1, sizes[0]), np.float32)] * batch
    L.NStepLSTM(1, *sizes, 0.0)(None, None, xs)
    assert len(used) == expected


@pytest.mark.parametrize(("times", "size", "units"), [(1, 3, 4), (5, 70, 33), (2, 1, 1)])
def test_sizes(times, size, units, used):
    """Any sizes do."""
    link = L.NStepLSTM(1, size, units, 0.0)
    xs = np.random.RandomState(0).standard_normal((9, times, size)).astype(np.float32)

    def outcome(which):
        link.cleargrads()
        with kernels.use(which):
            h, c, ys = link(None, None, list(xs))
            F.sum(F.stack(ys) * h[0][:, None].array + c[0][:, None].array).backward()
        return [h.array, c.array, *(param.grad for param in link.params())]

    assert_close(outcome("onednn"), outcome("chainer"))
    assert len(used) == 1


@every_link
def test_gradients_of_gradients(cls):
    """Chainer's own functions compute them."""

    def outcome(which):
        network = Network(cls)
        with kernels.use(which):
            loss = network.loss(which)
            grads = chainer.grad([loss], network.variables, enable_double_backprop=True)
            sum(F.sum(each * each) for each in grads).backward()
        return [each.grad for each in network.variables]

    assert_close(outcome("onednn"), outcome("chainer"))


@every_link
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["x", "w"])
@pytest.mark.parametrize("units", [4, 16, 33])
def test_not_finite(cls, bad, place, units):
    """NaN and infinity are where Chainer has them, forward and backward."""

    def outcome(which):
        network = Network(cls, units=units)
        if place == "x":
            network.xs[1].array[1, 0] = bad
        else:
            network.link.ws[0][2].array[0, 0] = bad
        with np.errstate(all="ignore"):
            return network.outcome(which)

    for one, other in zip(outcome("onednn"), outcome("chainer")):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("units", [4, 16, 33])
def test_saturated_gates(units):
    """Values far beyond those that gates tell apart give what Chainer gives."""

    def outcome(which):
        network = Network(L.NStepLSTM, units=units)
        for x in network.xs:
            x.array *= 1e4
        return network.outcome(which)

    for one, other in zip(outcome("onednn"), outcome("chainer")):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_unusual_memory():
    """Arrays that are read-only, of Fortran order, unaligned, reversed or parts of others give the same."""
    want = Network(L.NStepLSTM).outcome("onednn")
    network = Network(L.NStepLSTM)
    for param in network.link.params():
        param.array = np.asfortranarray(param.array)
    for state in network.states:
        state.array = np.ascontiguousarray(state.array[::-1])[::-1]
    for number, x in enumerate(network.xs):
        wide = np.zeros((2 * TIMES, 2 * SIZE), np.float32)
        wide[::2, ::2] = x.array
        x.array = wide[::2, ::2]
        if number % 2:
            x.array = np.frombuffer(b"." + x.array.tobytes(), np.float32, offset=1)
            x.array = x.array.reshape(TIMES, SIZE)
    before = [each.array.copy() for each in network.variables]
    for each in network.variables:
        each.array.flags.writeable = False
    assert_close(network.outcome("onednn"), want)
    for old, each in zip(before, network.variables):
        np.testing.assert_array_equal(old, each.array)


@every_link
def test_repeatable(cls):
    """The same numbers come bit for bit, also when a graph is differentiated again."""
    network, other = Network(cls), Network(cls)
    first = network.outcome("onednn")
    for one, two in zip(first, other.outcome("onednn")):
        np.testing.assert_array_equal(one, two)
    loss = network.loss("onednn")
    for _ in range(2):
        network.link.cleargrads()
        for each in network.variables:
            each.cleargrad()
        loss.backward()
        for one, each in zip(first[3:], network.variables):
            np.testing.assert_array_equal(one, each.grad)


def test_gradients_lie_apart():
    """No two arrays of the outcome share memory, so that each may be changed in place."""
    got = Network(L.NStepLSTM).outcome("onednn")
    for i, one in enumerate(got):
        for other in got[i + 1 :]:
            assert not np.shares_memory(one, other)


def test_another_number_of_threads(used, monkeypatch):
    """Backward with another number of threads computes the forward values anew, for operations of that number."""
    want = Network(L.NStepLSTM).outcome("onednn")
    network = Network(L.NStepLSTM)
    loss = network.loss("onednn")
    monkeypatch.setattr(lstm_sequences, "n_threads", lambda: 0)
    used.clear()
    loss.backward()
    assert len(used) == LAYERS
    assert_close([each.grad for each in network.variables], want[3:])


def test_other_kernels_in_backward():
    """A graph that the primitive has begun can be differentiated after another choice."""
    want = Network(L.NStepLSTM).outcome("onednn")
    for which in ("numpy", "chainer"):
        network = Network(L.NStepLSTM)
        loss = network.loss("onednn")
        with kernels.use(which):
            loss.backward()
        assert_close([each.grad for each in network.variables], want[3:])
