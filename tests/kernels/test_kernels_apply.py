"""Applying functions: graphs, hooks and errors are those of Chainer's own method."""

from __future__ import annotations

import contextlib

import chainer
import chainer.functions as F
import numpy as np
import pytest
from chainer import memory_layouts

from chainer_dist import kernels
from chainer_dist.kernels.replacements import _replacements
from chainer_dist.kernels.variables import variable

# Nothing of it is collective.
pytestmark = pytest.mark.mpi_skip


class Returns(chainer.FunctionNode):
    """Returns what it was made with, and retains what it is told to."""

    def __init__(self, outputs, retained_inputs=(), retained_outputs=None, layouts=None):
        self.returned, self.layouts, self.calls = outputs, layouts, 0
        self.to_retain = retained_inputs, retained_outputs

    def forward(self, inputs):  # noqa: ARG002 - Chainer's signature
        """Return what the test wants."""
        self.calls += 1
        inputs_to_retain, outputs_to_retain = self.to_retain
        self.retain_inputs(inputs_to_retain)
        if outputs_to_retain is not None:
            self.retain_outputs(outputs_to_retain)
        if self.layouts is not None:
            self.output_layouts = self.layouts
        return self.returned


class Elementwise(Returns):
    """Does so as an elementwise function."""

    is_elementwise = True


class OldStyle(chainer.Function):
    """Is what Chainer has adapted since its third version."""

    def forward(self, inputs):
        """Return two arrays, and retain one of each side."""
        self.retain_inputs((1,))
        self.retain_outputs((0,))
        return inputs[0] * inputs[1], inputs[0]

    def backward(self, inputs, grads):  # noqa: ARG002 - Chainer's signature
        """Return one gradient."""
        return grads[0], None


class Typed(Returns):
    """Refuses matrices."""

    def check_type_forward(self, in_types):
        """Look at the first input."""
        chainer.utils.type_check.expect(in_types[0].ndim == 1)


def checking(name):
    """Return a function that has got a check of its own, which refuses everything."""
    function = Returns((X,))

    def refuse(given):
        raise ValueError(f"{name} got {len(given)}")

    setattr(function, name, refuse)
    return function


class Hook(chainer.FunctionHook):
    """Writes down what it was called for."""

    name = "test"

    def __init__(self):
        self.seen = []

    def forward_preprocess(self, function, in_data):
        """Write down a call before forward."""
        self.seen.append(("before", function.label, len(in_data)))

    def forward_postprocess(self, function, in_data):
        """Write down a call after forward."""
        self.seen.append(("after", function.label, len(in_data)))


class Late(chainer.FunctionHook):
    """Has nothing to do before forward, and sees what there is after it."""

    name = "late"

    def __init__(self):
        self.seen = []

    def forward_postprocess(self, function, in_data):
        """Write down a call, and what is known of the outputs."""
        known = function.output_layouts, function.inputs, getattr(function, "_output_count", None)
        self.seen.append((function.label, len(in_data), known))


class Failing(chainer.FunctionHook):
    """Raises an error after forward."""

    name = "failing"

    def __init__(self):
        self.seen = []

    def forward_postprocess(self, function, in_data):
        """Fail."""
        self.seen.append(len(in_data))
        raise ValueError(function.label)


HOOKS = {
    "early": [Hook],
    "late": [Late],
    "both": [Late, Hook, Late],
    "failing": [Late, Failing, Late],
    "replaced": [lambda: replaced(Late(), "forward_preprocess")],
}


def replaced(hook, name):
    """Return a hook one of whose methods is its own."""
    setattr(hook, name, lambda *given: hook.seen.append((name, len(given))))
    return hook


def described(array):
    """Return what can be compared of an array."""
    return None if array is None else (array.dtype, array.shape, array.tolist())


def node_of(node):
    """Return what can be compared of the node of a variable."""
    return node.rank, node.dtype, node.shape, node.requires_grad, described(node.data), node.name


def graph(function, inputs):
    """Return what applying a function has left, or its error, as something that can be compared."""
    try:
        made = function.apply(inputs)
    except Exception as error:  # noqa: BLE001 - whichever it is
        return type(error), str(error)
    node = function if isinstance(function, chainer.FunctionNode) else function.node
    left = [(described(y.raw_array), y.requires_grad, y.layout, node_of(y.node)) for y in made]
    left += [[y.creator_node is node for y in made], node._output_count, node.input_layouts]
    left += [node.output_layouts, type(made), getattr(function, "calls", None)]
    if node.inputs is not None:
        left += [
            [node_of(each) for each in node.inputs],
            [r() is y.node for r, y in zip(node.outputs, made)],
        ]
        left += [node.rank, node.lazy_grad_sum, type(node.inputs), type(node.outputs)]
        retained = node._retained_output_data
        left.append(None if retained is None else list(map(described, retained)))
    return left


X = np.arange(4, dtype=np.float32)
Y = np.ones((2, 3))
CASES = {
    "one": lambda: Returns((X,)),
    "several": lambda: Returns((X, Y), (0, 1), (1, 0)),
    "retained output": lambda: Returns((X, Y), (1,), (1,)),
    "retained nothing": lambda: Returns((X,), (), ()),
    "integers": lambda: Returns((X.astype(int),)),
    "none": lambda: Returns((X, None), (0,), (0,)),
    "no output": lambda: Returns(()),
    "array": lambda: Returns(X),
    "list": lambda: Returns([X]),
    "scalar": lambda: Returns((np.float32(1),)),
    "number": lambda: Returns((1.5,), (0,)),
    "masked": lambda: Returns((np.ma.masked_array(X),)),
    "elementwise": lambda: Elementwise((X, X + 1)),
    "shapes differ": lambda: Elementwise((X, Y)),
    "layout": lambda: Returns(
        (Y[..., None, None],), (), None, (memory_layouts.CUDNN_CHANNEL_LAST_X,)
    ),
    "old style": OldStyle,
    "typed": lambda: Typed((X,)),
    "check of its own": lambda: checking("check_type_forward"),
    "check of layouts of its own": lambda: checking("check_layout_forward"),
    "retained what is not there": lambda: Returns((X,), (7,), (7,)),
}
INPUTS = {
    "variables": lambda: (chainer.Variable(X), chainer.Variable(X + 1, name="second")),
    "array": lambda: (X, chainer.Parameter(X)),
    "no gradients": lambda: [X, X],
    "deep": lambda: (F.identity(chainer.Variable(X)), F.relu(F.identity(chainer.Variable(X)))),
    "twice": lambda: (chainer.Variable(X),) * 2,
    "not initialized": lambda: (chainer.Parameter(), chainer.Variable(X)),
    "matrix": lambda: (chainer.Variable(Y), chainer.Variable(Y)),
    "number": lambda: (chainer.Variable(X), 1.5),
    "layout": lambda: (
        chainer.Variable(np.ones((1, 2, 2, 1), "f"), layout=memory_layouts.CUDNN_CHANNEL_LAST_X),
        chainer.Variable(X),
    ),
    "nothing": lambda: (),
}
SETTINGS = [
    {},
    {"enable_backprop": False},
    {"type_check": False},
    {"lazy_grad_sum": True},
    {"debug": True},
]


@pytest.mark.parametrize("config", SETTINGS, ids=str)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("case", CASES)
def test_graph(case, inputs, config):
    """Outputs, their nodes, what is retained and errors are Chainer's."""
    left = []
    for which in ("chainer", "numpy"):
        with contextlib.ExitStack() as stack:
            stack.enter_context(kernels.use(which))
            for setting in config.items():
                stack.enter_context(chainer.using_config(*setting))
            left.append(graph(CASES[case](), INPUTS[inputs]()))
    assert repr(left[0]) == repr(left[1])


@pytest.mark.parametrize("kinds", HOOKS)
@pytest.mark.parametrize("is_local", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_hooks(case, is_local, kinds):
    """Hooks are called as Chainer calls them, of one function or of all, whatever that returns."""
    left = []
    for which in ("chainer", "numpy"):
        function, hooks = CASES[case](), [kind() for kind in HOOKS[kinds]]
        node = function if isinstance(function, chainer.FunctionNode) else function.node
        with contextlib.ExitStack() as stack:
            stack.enter_context(kernels.use(which))
            for number, hook in enumerate(hooks):
                if is_local:
                    node.add_hook(hook, str(number))
                else:
                    hook.name = str(number)
                    stack.enter_context(hook)
            left.append((graph(function, (X, chainer.Variable(X))), [hook.seen for hook in hooks]))
    assert repr(left[0]) == repr(left[1])


@pytest.mark.parametrize("requires_grad", [False, True])
def test_variable(requires_grad):
    """A variable that is made in the short way has all that Chainer's has, in it and in its node."""
    made, chainers = variable(Y, requires_grad=requires_grad), chainer.Variable(Y)
    for mine, own in ((made, chainers), (made.node, chainers.node)):
        assert type(mine) is type(own)
        assert vars(mine).keys() == vars(own).keys()
    assert made.array is Y
    assert made.node.get_variable() is made
    assert (made.requires_grad, made.node.requires_grad) == (requires_grad, requires_grad)
    for name in ("shape", "dtype", "name", "layout", "grad_var", "device", "rank", "creator"):
        assert getattr(made, name) == getattr(chainers, name)
    assert (made.node.shape, made.node.dtype) == (Y.shape, Y.dtype)


def test_is_called_once():
    """A function that returns something else than arrays of NumPy is not called again for that."""
    function = Returns((X, None))
    with kernels.use("numpy"):
        function.apply((X,))
    assert function.calls == 1
    assert "forward" not in vars(function)


def test_is_in_place():
    """The method that these tests are about is Chainer's in the place of the kernel, and the other way about."""
    (replaced,) = (each for each in _replacements if each.attribute == "apply")
    with kernels.use("chainer"):
        assert chainer.FunctionNode.apply is replaced.original
    with kernels.use("numpy"):
        assert chainer.FunctionNode.apply is replaced.kernel
