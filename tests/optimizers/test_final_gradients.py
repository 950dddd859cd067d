"""Gradients reported during backward, against what Chainer leaves in ``param.grad`` after it."""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from chainer_dist.optimizers.final_gradients import FinalGradients

# Nothing of it is collective.
pytestmark = pytest.mark.mpi_skip


def make_params(**shapes):
    """Return a link with a random parameter for each name."""
    rng = np.random.RandomState(0)
    model = chainer.Link()
    with model.init_scope():
        for name, shape in shapes.items():
            setattr(model, name, chainer.Parameter(rng.randn(*shape).astype(np.float32)))
    return model


def watched(loss, params, loss_scale=None):
    """Run backward; return numbers in the order of reports, and how often there were polls."""
    seen, polls = {}, []

    def report(number, grad):
        assert number not in seen
        assert params[number].grad is None  # it is not over yet
        seen[number] = (grad, grad.copy())

    FinalGradients(loss, params).backward(report, lambda: polls.append(1), loss_scale)
    for number, (grad, copy) in seen.items():
        assert params[number].grad is grad
        np.testing.assert_array_equal(grad, copy)
    assert not chainer.get_function_hooks()
    return list(seen), len(polls)


def assert_same_as_chainer(make_loss, params, loss_scale=None):
    """Compare with backward as it is; return numbers in the order of reports."""
    for p in params:
        p.cleargrad()
    make_loss().backward(loss_scale=loss_scale)
    want = [None if p.grad is None else p.grad.copy() for p in params]
    for p in params:
        p.cleargrad()
    order, polls = watched(make_loss(), params, loss_scale)
    assert polls
    for p, each in zip(params, want):
        if each is None:
            assert p.grad is None
        else:
            np.testing.assert_array_equal(p.grad, each)
            assert p._loss_scale == loss_scale
    return order


def test_last_layers_come_first():
    """The order is that in which backward comes to the layers."""
    layers = [L.Linear(3, 4), L.Linear(4, 5), L.Linear(5, 2)]
    params = [param for layer in layers for param in (layer.W, layer.b)]

    def loss():
        y = np.ones((6, 3), np.float32)
        for layer in layers:
            y = F.relu(layer(y))
        return F.sum(y)

    order = assert_same_as_chainer(loss, params)
    assert [number // 2 for number in order] == [2, 2, 1, 1, 0, 0]


@pytest.mark.parametrize("loss_scale", [None, 8.0])
def test_a_parameter_used_many_times(loss_scale):
    """What is used at every step of a recurrent net is final with its first step."""
    model = make_params(w=(4, 4), u=(4, 4), last=(4, 1))
    x = np.random.RandomState(1).randn(5, 3, 4).astype(np.float32)

    def loss():
        h = chainer.Variable(np.zeros((3, 4), np.float32))
        for step in x:
            h = F.tanh(F.matmul(h, model.w) + F.matmul(step, model.u))
        return F.sum(F.matmul(h, model.last))

    order = assert_same_as_chainer(loss, [model.w, model.u, model.last], loss_scale)
    assert order[0] == 2
    assert sorted(order) == [0, 1, 2]


def test_twice_in_one_function():
    """A function that takes a parameter twice contributes once."""
    model = make_params(a=(3, 3), b=(3, 3))
    params = [model.a, model.b]
    assert sorted(assert_same_as_chainer(lambda: F.sum(model.a * model.a + model.b), params)) == [
        0,
        1,
    ]
    assert assert_same_as_chainer(lambda: F.sum(F.concat([model.a, model.b, model.a])), params)


def test_what_the_loss_does_not_come_from():
    """Unused, frozen and cut off parameters, and those that a function returns None for."""
    model = make_params(used=(3,), unused=(3,), cut=(3,), frozen=(3,), none=(3,))

    class NoGrad(chainer.FunctionNode):
        def forward(self, inputs):
            return (inputs[0] + inputs[1],)

        def backward(self, _, grads):
            return grads[0], None

    def loss():
        y = model.used + model.cut.array + (model.frozen * 2).array
        return F.sum(NoGrad().apply((y, model.none * 3))[0])

    params = [model.used, model.unused, model.cut, model.frozen, model.none]
    assert assert_same_as_chainer(loss, params) == [0]
    assert FinalGradients(loss(), params).reached == (0, 4)


def test_gradients_that_were_there():
    """Backward adds to gradients that are there, here as in Chainer."""
    model = make_params(a=(3,), b=(3,))
    params = [model.a, model.b]
    for _ in range(2):
        for p in params:
            p.zerograd()
        seen = {}
        final = FinalGradients(F.sum(model.a * 2), params)
        final.backward(lambda number, grad: seen.update({number: grad}), lambda: None)  # noqa: B023
        np.testing.assert_array_equal(seen[0], [2, 2, 2])
        np.testing.assert_array_equal(model.b.grad, [0, 0, 0])


def test_gradients_of_gradients():
    """A penalty on gradients is part of the graph like anything else."""
    model = make_params(w=(4, 4), v=(4, 4))
    x = chainer.Variable(np.ones((2, 4), np.float32))

    def loss():
        y = F.tanh(F.matmul(F.tanh(F.matmul(x, model.w)), model.v))
        (gx,) = chainer.grad([y], [x], enable_double_backprop=True)
        return F.sum(gx**2) + F.sum(y)

    assert sorted(assert_same_as_chainer(loss, [model.w, model.v])) == [0, 1]


def test_backward_within_backward():
    """A function that computes its inside anew in backward does not disturb what is outside."""
    model = make_params(w=(4, 4), v=(4, 4))
    x = chainer.Variable(np.ones((2, 4), np.float32))

    def loss():
        h = F.forget(lambda x, w: F.tanh(F.matmul(x, w)), F.matmul(x, model.v), model.w)
        return F.sum(h)

    assert assert_same_as_chainer(loss, [model.w, model.v]) == [0, 1]


def test_errors_leave_nothing_behind():
    """After an exception Chainer's backward is as it was."""
    from chainer import _backprop_utils

    model, table = make_params(w=(3,)), _backprop_utils.GradTable

    class Fails(chainer.FunctionNode):
        def forward(self, inputs):
            return (inputs[0],)

        def backward(self, *_):
            raise ArithmeticError("no")

    loss = F.sum(Fails().apply((model.w,))[0])
    with pytest.raises(ArithmeticError):
        FinalGradients(loss, [model.w]).backward(lambda *_: None, lambda: None)
    assert not chainer.get_function_hooks()
    assert _backprop_utils.GradTable is table


def test_losses_that_cannot_be_watched():
    """Only Chainer's own backward is known."""

    class Own(chainer.Variable):
        def backward(self, *args, **kwds):
            pass

    array = np.zeros((), np.float32)
    assert FinalGradients.can_watch(chainer.Variable(array))
    assert not FinalGradients.can_watch(Own(array))
    assert not FinalGradients.can_watch(array)
