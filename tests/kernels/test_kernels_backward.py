"""Backward through a graph: gradients, the order of calls and errors are those of Chainer's own loop."""

from __future__ import annotations

import contextlib
import itertools
import math
import weakref

import chainer
import chainer.functions as F
import numpy as np
import pytest
from chainer import _backprop
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import kernels
from chainer_dist.kernels.replacements import _replacements

# Nothing of it is collective.
pytestmark = pytest.mark.mpi_skip

CALLS: list[object] = []


class Noted(chainer.FunctionNode):
    """Passes its inputs on, and returns what it was made with as gradients."""

    def __init__(self, name, gradients=None):
        self.name, self.gradients = name, gradients

    def forward(self, inputs):
        """Return copies."""
        return tuple(each.copy() for each in inputs)

    def backward(self, indexes, grad_outputs):
        """Write the call down."""
        CALLS.append(
            (self.name, indexes, [None if g is None else g.array.tolist() for g in grad_outputs])
        )
        if callable(self.gradients):
            return self.gradients(indexes, grad_outputs)
        return tuple(grad_outputs[i] for i in indexes)


class Accumulating(chainer.FunctionNode):
    """Adds its gradients to those that are there itself."""

    def forward(self, inputs):
        """Return the sum."""
        return (inputs[0] + inputs[1],)

    def backward_accumulate(self, indexes, grad_outputs, grad_inputs):
        """Write down what is there."""
        CALLS.append(
            ("accumulate", indexes, [None if g is None else g.array.tolist() for g in grad_inputs])
        )
        return tuple(grad_outputs[0] if g is None else grad_outputs[0] + g for g in grad_inputs)


class Hook(chainer.FunctionHook):
    """Writes down what backward calls it for."""

    name = "test"

    def backward_preprocess(self, function, in_data, out_grad):
        """Write down a call before a function."""
        self._note("before", function, in_data, out_grad)

    def backward_postprocess(self, function, in_data, out_grad):
        """Write down a call after a function."""
        self._note("after", function, in_data, out_grad)

    @staticmethod
    def _note(when, function, in_data, out_grad):
        CALLS.append(
            (
                when,
                function.label,
                *[
                    [None if a is None else a.tolist() for a in each]
                    for each in (in_data, out_grad)
                ],
            )
        )


def variables():
    """Return two leaves."""
    return [chainer.Variable(np.array(values, np.float32)) for values in ([1, 2, 3], [4, 5, 6])]


def noted(name, *inputs, gradients=None):
    """Apply a function that is written down, and return its first result."""
    return Noted(name, gradients).apply(inputs)[0]


def chain(x, y):
    """Return a loss of a chain."""
    return F.sum(noted("second", noted("first", x, y), y))


def diamond(x, y):
    """Return a loss to which two branches of different lengths lead."""
    root = noted("root", x, y)
    return F.sum(noted("a", root) * noted("c", noted("b", root)) + y)


def twice(x, y):
    """Return a loss of a function that got the same variable twice."""
    return F.sum(noted("twice", x, x) * y + x * x)


def unused(x, y):
    """Return a loss of one of two results."""
    first, _ = Noted("two").apply((x, y))
    return F.sum(first)


def second_only(x, y):
    """Return a loss of the second result, while the first is kept."""
    first, second = Noted("two").apply((x, y))
    loss = F.sum(second)
    loss.kept = first
    return loss


def accumulating(x, y):
    """Return a loss of a function that adds up gradients."""
    z = noted("z", x, y)
    return F.sum(Accumulating().apply((z, z))[0] + Accumulating().apply((z, y))[0])


def constant(x, y):
    """Return a loss that no gradient of y is wanted of."""
    return F.sum(noted("constant", x, y.array))


def with_gradients(gradients):
    """Return a function that makes a loss, with wrong gradients on the way."""

    def make(x, y):
        return F.sum(noted("after", noted("wrong", x, y, gradients=gradients)))

    return make


def fails(indexes, grad_outputs):
    """Fail."""
    raise RuntimeError(f"no gradient, {indexes}, {len(grad_outputs)}")


def adds_hook(_, grad_outputs):
    """Leave a hook behind, which is called after this function at the latest."""
    chainer.get_function_hooks()["left behind"] = Hook()
    return grad_outputs


def gradient(value):
    """Return a variable."""
    return chainer.Variable(value)


GRAPHS = {
    "chain": chain,
    "diamond": diamond,
    "twice": twice,
    "unused": unused,
    "second only": second_only,
    "accumulating": accumulating,
    "constant": constant,
    "none": with_gradients(lambda *_: (None, None)),
    "too few": with_gradients(lambda *_: ()),
    "too many": with_gradients(lambda *_: (gradient(np.ones(3, "f")),) * 3),
    "shape": with_gradients(lambda *_: (gradient(np.ones(4, "f")),) * 2),
    "dtype": with_gradients(lambda *_: (gradient(np.ones(3)),) * 2),
    "no variable": with_gradients(lambda *_: (np.ones(3, "f"),) * 2),
    "empty variable": with_gradients(lambda *_: (chainer.Variable(),) * 2),
    "fails": with_gradients(fails),
    "adds a hook": with_gradients(adds_hook),
}


def backward(loss):
    """Run backward as most do."""
    loss.backward()


def retaining(loss):
    """Keep the gradients of what is between, and say so."""
    loss.backward(retain_grad=True)
    node, kept = loss.creator_node, []
    while node is not None and node.inputs:
        variable = node.inputs[0].get_variable_or_none()
        kept.append(None if variable is None or variable.grad is None else variable.grad.tolist())
        node = node.inputs[0].creator_node
    CALLS.append(kept)


def scaled(loss):
    """Scale the loss."""
    loss.backward(loss_scale=8)


def twice_differentiable(loss):
    """Ask for a graph of gradients."""
    loss.backward(enable_double_backprop=True)


def from_two(loss):
    """Start from two variables at once, one of which leads to the other."""
    middle = F.identity(loss)
    middle.grad, loss.grad = np.float32(2), np.float32(3)
    chainer.backward([middle, loss])


def with_hook(loss):
    """Have a hook called."""
    with Hook():
        loss.backward()


def with_hook_of_one(loss):
    """Have a hook of the last function called, and a global one."""
    loss.creator_node.add_hook(Hook(), name="own")
    with Hook():
        loss.backward()


def adding(loss):
    """Run backward twice, so that gradients of leaves are added to those that are there."""
    loss.backward()
    loss.grad = None
    loss.backward()


RUNS = [
    backward,
    retaining,
    scaled,
    twice_differentiable,
    from_two,
    with_hook,
    with_hook_of_one,
    adding,
]
SETTINGS = [{}, {"lazy_grad_sum": True}, {"debug": True}]


def outcome(which, make, run, config):
    """Return gradients, calls, and the error if there is one, as something that can be compared."""
    CALLS.clear()
    leaves = variables()
    error = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(kernels.use(which))
        for setting in config.items():
            stack.enter_context(chainer.using_config(*setting))
        try:
            run(make(*leaves))
        except Exception as failure:  # noqa: BLE001 - whichever it is
            error = type(failure), str(failure).partition("Stacktrace")[0]
    chainer.get_function_hooks().pop("left behind", None)
    left = [
        (None if v.grad is None else (v.grad.dtype, v.grad.tolist()), v._loss_scale) for v in leaves
    ]
    left += [v.grad_var is not None and v.grad_var.creator_node is not None for v in leaves]
    return left, list(CALLS), error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", SETTINGS, ids=str)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("name", GRAPHS)
def test_loop(name, run, config):
    """Whatever is differentiated, and however, it is as by Chainer's loop."""
    want, got = (outcome(which, GRAPHS[name], run, config) for which in ("chainer", "numpy"))
    assert got == want
    assert got[1] or got[2]


def test_gradients_that_are_used_are_freed():
    """While the first function of a chain computes gradients, those of the results of the last are gone."""
    alive = []

    def count(_, grad_outputs):
        alive.append([reference() is not None for reference in references])
        return grad_outputs

    def keep(_, grad_outputs):
        made = gradient(grad_outputs[0].array * 2)
        references.append(weakref.ref(made))
        return (made,)

    references: list[weakref.ref[chainer.Variable]] = []
    x, _ = variables()
    with kernels.use("numpy"):
        h = noted("first", x, gradients=count)
        for name in ("second", "third", "fourth"):
            h = noted(name, h, gradients=keep)
        F.sum(h).backward()
    assert alive == [[False, False, True]]


def test_is_in_place():
    """The loop that these tests are about is Chainer's in the place of the kernel, and the other way about."""
    (replaced,) = (each for each in _replacements if each.attribute == "_backprop_to_all")
    with kernels.use("chainer"):
        assert _backprop._backprop_to_all is replaced.original
    with kernels.use("numpy"):
        assert _backprop._backprop_to_all is replaced.kernel


def assert_gradients_like_chainer(array, function):
    """Compare the gradients of a function of an array, and those of their squares, with Chainer's, bit by bit.

    Args:
        array: The array.
        function: Called with a variable of it; returns a number as a variable.
    """
    results = []
    for which in ("chainer", "numpy"):
        x = chainer.Variable(array)
        with kernels.use(which):
            y = function(x)
            (gx,) = chainer.grad([y], [x], enable_double_backprop=True)
            y.backward()
            first = x.grad
            x.cleargrad()
            F.sum(gx * gx).backward()
        results.append((first, gx.array, x.grad))
    for want, got in zip(*results):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


@given(
    st.sampled_from([(2, 3, 4), (4, 1, 6), (24, 1, 1), (0, 3, 2)]),
    st.permutations(range(3)),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.booleans(),
)
def test_views(shape, axes, are_negative, is_flat):
    """Gradients of transposed and reshaped arrays, and gradients of those, are Chainer's."""
    axes = [axis - 3 if is_negative else axis for axis, is_negative in zip(axes, are_negative)]
    array, factors = np.random.RandomState(0).standard_normal((2, *shape)).astype("f")

    def function(x):
        y = F.transpose(F.transpose(x, axes))
        y = F.reshape(y, (-1,) if is_flat and x.size else (x.size, 1))
        return F.sum(y * y * factors.reshape(y.shape))

    assert_gradients_like_chainer(array, function)


@given(
    st.sampled_from([(2, 3, 4), (4, 1, 6), (1, 5), (3,), (0, 3, 2), (3, 2, 0)]),
    st.integers(-3, 2),
    st.integers(0, 5),
    st.sampled_from([np.float32, np.float64, np.float16]),
    st.sampled_from(["used", "some", "twice", "none"]),
)
def test_separate(shape, axis, order, dtype, use):
    """Gradients of separated arrays, and gradients of those, are Chainer's, for any memory order and unused parts."""
    axis %= len(shape)
    if not shape[axis]:
        return
    axes = list(itertools.permutations(range(len(shape))))[order % math.factorial(len(shape))]
    base = np.random.RandomState(0).standard_normal([shape[i] for i in axes]).astype(dtype)

    def function(x):
        parts = F.separate(x, axis - len(shape) * (order % 2))
        used = {"some": parts[1:], "twice": parts * 2, "none": ()}.get(use, parts)
        return sum((F.sum(part * part * part) * i for i, part in enumerate(used)), F.sum(x * x))

    assert_gradients_like_chainer(base[..., ::-1].transpose(np.argsort(axes)), function)


def test_gradients_of_separated_arrays_need_no_copies():
    """They lie as the array did, so that gradients of a transposition and reshaping before it are views."""
    x = chainer.Variable(np.zeros((5, 12), "f"))
    gxs = []

    class Noting(chainer.FunctionHook):
        name = "noting"

        def backward_preprocess(self, function, in_data, out_grad):  # noqa: ARG002 - Chainer's
            gxs.append(out_grad[0])

    with kernels.use("numpy"), Noting():
        parts = F.separate(F.transpose(F.reshape(x, (5, 3, 4)), (1, 2, 0)))
        y = F.stack(parts)
        gy = y.grad = np.arange(60, dtype="f").reshape(3, 4, 5)
        y.backward()
    assert np.shares_memory(gxs[-1], x.grad)
    np.testing.assert_array_equal(x.grad, gy.transpose(2, 0, 1).reshape(5, 12))


def test_gradients_of_views_apply_nothing():
    """The gradient of a view is a view, for which no function is applied."""
    applied = []

    class Applied(chainer.FunctionHook):
        name = "applied"

        def forward_preprocess(self, function, in_data):  # noqa: ARG002 - Chainer's signature
            applied.append(function.label)

    x = chainer.Variable(np.ones((2, 3), "f"))
    with kernels.use("numpy"):
        y = F.transpose(F.reshape(x, (3, 2)), (1, 0))
        _, second = F.separate(y)
        second.grad = np.ones(3, "f")
        with Applied():
            second.backward()
    assert not applied
    np.testing.assert_array_equal(x.grad, [[0, 1, 0], [1, 0, 1]])
