"""Gradients exchanged during backward, against the exchange after it and against one process."""

from __future__ import annotations

import sys

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from conftest import on_nodes

import mpi_job
from chainer_dist import Join, RankMismatchError, create_communicator, create_multi_node_optimizer
from chainer_dist.compression import Int8

LAYOUTS = ["one node", "a node each", "odd and even", "one and the rest"]
WAYS = [{}, {"sharded_update": False}, {"mean_grad": True, "share_parameters": True}]

pytestmark = pytest.mark.usefixtures("small_blocks")


class Net(chainer.Chain):
    """A classifier with a layer that is used twice."""

    def __init__(self, dtype=np.float32):
        super().__init__()
        np.random.seed(3)
        with chainer.using_config("dtype", dtype), self.init_scope():
            self.first = L.Linear(9, 40)
            self.twice = L.Linear(40, 40)
            self.last = L.Linear(40, 4)
            self.unused = L.Linear(3, 3)

    def forward(self, x, t):
        """Return the loss."""
        y = F.tanh(self.first(x))
        y = F.relu(self.twice(F.relu(self.twice(y))))
        return F.softmax_cross_entropy(self.last(y), t)


def batch(rank, step, dtype=np.float32):
    """Return a batch of a rank's own."""
    rng = np.random.RandomState([rank, step])
    return rng.randn(6, 9).astype(dtype), rng.randint(0, 4, 6).astype(np.int32)


def prepared(comm, actual=None, model=None, **options):
    """Return a multi-node optimizer that is set up."""
    actual = chainer.optimizers.Adam(alpha=0.01) if actual is None else actual
    optimizer = create_multi_node_optimizer(actual, comm, **options)
    return optimizer.setup(Net() if model is None else model)


def train(optimizer, steps=4, dtype=np.float32):
    """Update a few times; return in which of the updates exchange and backward overlapped."""
    overlapped = []
    for step in range(steps):
        data = batch(optimizer.communicator.rank, step, dtype)
        optimizer.update(optimizer.target, *data)
        overlapped.append(optimizer.overlapped)
    return overlapped


def arrays(optimizer):
    """Return parameters and state by name."""
    found = {}
    for name, param in sorted(optimizer.target.namedparams()):
        found[name] = param.array.copy()
        for key, value in (param.update_rule.state or {}).items():
            found[f"{name} {key}"] = np.array(value)
    return found


def assert_equal(ones, others, *, exactly=True):
    """Compare what :func:`arrays` returned."""
    assert ones.keys() == others.keys()
    for name, one in ones.items():
        if exactly:
            np.testing.assert_array_equal(one, others[name], err_msg=name)
        else:
            np.testing.assert_allclose(one, others[name], rtol=1e-5, atol=1e-6, err_msg=name)


def always_after_the_first(comm, steps=4):
    """Return which updates overlap: none of the first, by which the order is found."""
    return [False, *[comm.size > 1] * (steps - 1)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_same_bits_as_after_backward(layout, options):
    """Parameters, state and mean gradients are those of the exchange after backward."""
    with on_nodes("shared_memory", layout) as comm:
        results = []
        for overlap in (True, False):
            optimizer = prepared(comm, overlap=overlap, **options)
            assert train(optimizer) == (always_after_the_first(comm) if overlap else [False] * 4)
            results.append(arrays(optimizer))
            if options.get("mean_grad"):
                grads = {name: param.grad for name, param in optimizer.target.namedparams()}
                results[-1].update({f"grad {name}": grads[name].copy() for name in grads})
        assert_equal(*results)
        mine = {name: array.tobytes() for name, array in results[0].items()}
        assert comm.allgather_obj(mine) == [mine] * comm.size


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_one_process_with_all_data(nodes, options):
    """Training gives what one process computes from all ranks' batches."""
    optimizer = prepared(nodes, model=Net(np.float64), overlap=True, **options)
    train(optimizer, dtype=np.float64)
    alone = chainer.optimizers.Adam(alpha=0.01).setup(Net(np.float64))
    for step in range(4):
        data = [batch(rank, step, np.float64) for rank in range(nodes.size)]
        alone.update(alone.target, *map(np.concatenate, zip(*data)))
    for name, param in alone.target.namedparams():
        if "unused" not in name:
            got = dict(optimizer.target.namedparams())[name].array
            np.testing.assert_allclose(got, param.array, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("hook", "arguments"),
    [
        (chainer.optimizer_hooks.WeightDecay, [0.1]),
        (chainer.optimizer_hooks.GradientClipping, [0.01]),
        (chainer.optimizer_hooks.GradientNoise, [0.1]),
        (chainer.optimizer_hooks.GradientLARS, []),
    ],
    ids=["elementwise", "norm", "random", "whole parameters"],
)
def test_hooks_see_the_mean(nodes, hook, arguments):
    """Hooks of all kinds run after the exchange, on means."""
    results = []
    for overlap in (True, False):
        optimizer = prepared(nodes, overlap=overlap)
        optimizer.add_hook(hook(*arguments))
        np.random.seed(nodes.rank)
        train(optimizer)
        assert optimizer.overlapped == (overlap and nodes.size > 1)
        results.append(arrays(optimizer))
    first = nodes.bcast_obj(results[0])
    assert_equal(first, results[0])
    if hook is not chainer.optimizer_hooks.GradientNoise:
        # The norm of all gradients is summed up in the order of the exchange.
        assert_equal(*results, exactly=hook is not chainer.optimizer_hooks.GradientClipping)


def test_by_default_between_nodes_only():
    """On one node gradients are exchanged after backward, on several during it; False means never."""
    for layout in LAYOUTS:
        with on_nodes("shared_memory", layout) as comm:
            optimizer = prepared(comm)
            train(optimizer, 2)
            assert optimizer.overlapped == (comm.inter_size > 1)
            optimizer = prepared(comm, overlap=False)
            train(optimizer, 2)
            assert not optimizer.overlapped


class Sometimes(chainer.Chain):
    """Takes one layer or another, or passes nothing back to one, by a number that is the input."""

    def __init__(self):
        super().__init__()
        np.random.seed(4)
        with self.init_scope():
            self.a, self.b, self.c = L.Linear(4, 400), L.Linear(4, 400), L.Linear(400, 1)

    def forward(self, number):
        """Return the loss."""
        x = np.ones((2, 4), np.float32)
        y = (self.a if number % 2 == 0 else self.b)(x)
        y = y + (_Cut().apply((self.b.W, self.c.W))[0] if number > 3 else 0)
        return F.sum(F.tanh(self.c(y)) ** 2)


class _Cut(chainer.FunctionNode):
    """A sum that has no gradient."""

    def forward(self, inputs):
        return (np.full((2, 400), inputs[0].sum() + inputs[1].sum(), np.float32),)

    def backward(self, *_):
        return None, None


@pytest.mark.parametrize("options", [{}, {"sharded_update": False}], ids=str)
@pytest.mark.parametrize(
    "numbers",
    [
        lambda step, _: step // 3,  # a graph for some time
        lambda step, _: step,  # another each time
        lambda step, rank: step * rank,  # another on each rank
        lambda step, rank: 2 * step + (rank == 0),  # gradients that are None on some
    ],
    ids=["for some time", "by step", "by rank", "by step and rank"],
)
def test_graphs_that_change(nodes, options, numbers):
    """Whatever a loss comes from at a step, on a rank: the result is that of the plain exchange."""
    results = []
    for overlap in (True, False):
        optimizer = prepared(nodes, model=Sometimes(), overlap=overlap, **options)
        grads = []
        for step in range(6):
            optimizer.update(optimizer.target, numbers(step, nodes.rank))
            grads += [None if p.grad is None else p.grad.copy() for p in optimizer.target.params()]
        results.append((arrays(optimizer), grads))
    assert_equal(results[0][0], results[1][0])
    for one, other in zip(results[0][1], results[1][1]):
        np.testing.assert_array_equal(one, other)


def test_gradients_of_some_ranks_only(nodes):
    """Without zero_fill all ranks raise, naming the parameter, and can go on."""
    optimizer = prepared(nodes, model=Sometimes(), overlap=True, zero_fill=False)
    for step in range(3):
        optimizer.update(optimizer.target, 0)
        assert optimizer.overlapped == (step > 0 and nodes.size > 1)
    if nodes.size > 1:
        with pytest.raises(RankMismatchError, match=r"rank 1: the gradient of /a/W is None"):
            optimizer.update(optimizer.target, nodes.rank)
    optimizer.update(optimizer.target, 0)
    mine = {name: array.tobytes() for name, array in arrays(optimizer).items()}
    assert nodes.allgather_obj(mine) == [mine] * nodes.size


@pytest.mark.parametrize("options", [{}, {"sharded_update": False}], ids=str)
def test_gradients_that_nobody_may_write(nodes, options):
    """Backward may hand one array to several parameters and to other functions."""

    def loss(model, x):
        y = model.a + model.b + x  # one gradient for both
        return F.sum(F.matmul(F.reshape(y, (20, 30)), F.reshape(model.a, (30, 20))) ** 2)

    results = []
    for overlap in (True, False):
        model = chainer.Link()
        with model.init_scope():
            model.a = chainer.Parameter(np.linspace(0, 1, 600).astype(np.float32))
            model.b = chainer.Parameter(np.linspace(1, 2, 600).astype(np.float32))
        optimizer = prepared(nodes, chainer.optimizers.SGD(1e-6), model, overlap=overlap, **options)
        for step in range(3):
            optimizer.update(loss, model, np.float32(step + nodes.rank))
        assert optimizer.overlapped == (overlap and nodes.size > 1)
        results.append(arrays(optimizer))
    assert_equal(*results)


class _Doubles(chainer.FunctionNode):
    """Doubles the gradient in place, which others have, too."""

    def forward(self, inputs):
        return (inputs[0].copy(),)

    def backward(self, _, grads):
        grads[0].array[...] *= 2
        return grads


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_that_change_on_their_way(layout):
    """A function that breaks Chainer's rules may spoil a gradient, but ranks stay equal."""

    def loss(model, x):
        return F.sum((model.b + _Doubles().apply((model.a * x,))[0]) ** 2)

    with on_nodes("shared_memory", layout) as comm:
        model = chainer.Link()
        with model.init_scope():
            model.a, model.b = (chainer.Parameter(np.ones(600, np.float32)) for _ in range(2))
        optimizer = prepared(comm, chainer.optimizers.SGD(1e-3), model, overlap=True)
        for step in range(3):
            optimizer.update(loss, model, np.float32(step + comm.rank))
        assert optimizer.overlapped == (comm.size > 1)
        mine = {name: array.tobytes() for name, array in arrays(optimizer).items()}
        assert comm.allgather_obj(mine) == [mine] * comm.size


@pytest.mark.parametrize("dtypes", [(np.float32, np.float64), (np.float16, np.float32)], ids=str)
@pytest.mark.parametrize("options", [{}, {"sharded_update": False}], ids=str)
def test_several_dtypes(nodes, dtypes, options):
    """Each dtype is exchanged on its own, float16 in float32."""

    def loss(model, x):
        y = F.sum(F.cast(model.a * model.a, dtypes[1]) * model.b * x)
        return F.cast(y, np.float32)

    results = []
    for overlap in (True, False):
        model = chainer.Link()
        with model.init_scope():
            model.a = chainer.Parameter(np.linspace(0, 1, 3000).astype(dtypes[0]))
            model.b = chainer.Parameter(np.linspace(1, 2, 3000).astype(dtypes[1]))
        optimizer = prepared(nodes, chainer.optimizers.SGD(1e-3), model, overlap=overlap, **options)
        for step in range(3):
            optimizer.update(loss, model, dtypes[1](step + nodes.rank))
        assert optimizer.overlapped == (overlap and nodes.size > 1)
        results.append(arrays(optimizer))
    assert_equal(*results)


@pytest.mark.filterwarnings("ignore:Non finite")
def test_dynamic_loss_scaling(nodes):
    """A step that overflows is skipped on all ranks, also if it did on one."""
    results = []
    for overlap in (True, False):
        actual = chainer.optimizers.SGD(0.01)
        actual.loss_scaling(interval=2)
        optimizer = prepared(nodes, actual, overlap=overlap)
        for step in range(4):
            x, t = batch(nodes.rank, step)
            if step == 2 and nodes.rank == nodes.size - 1:
                x[0, 0] = np.nan
            with np.errstate(all="ignore"):
                optimizer.update(optimizer.target, x, t)
        assert optimizer.overlapped == (overlap and nodes.size > 1)
        results.append({**arrays(optimizer), "scale": np.array(actual._loss_scale)})
    assert_equal(*results)
    assert all(np.isfinite(array).all() for array in results[0].values())


def test_updates_that_cannot_overlap(nodes):
    """Gradients that are there already, on all ranks or one, and losses of another kind, are fine."""
    results = []
    for overlap in (True, False):
        optimizer = prepared(nodes, overlap=overlap)
        model = optimizer.target
        train(optimizer, 2)
        for ranks in (range(nodes.size), [nodes.size - 1]):
            data = batch(nodes.rank, 7)
            if nodes.rank in ranks:
                model.cleargrads()
                model(*data).backward()
                optimizer.update()
            else:
                optimizer.update(model, *data)
            assert not optimizer.overlapped
        train(optimizer, 1)
        assert optimizer.overlapped == (overlap and nodes.size > 1)

        class Loss:
            def __init__(self, variable):
                self.backward = variable.backward

        optimizer.update(lambda *data: Loss(model(*data)), *batch(nodes.rank, 8))  # noqa: B023
        assert not optimizer.overlapped
        results.append(arrays(optimizer))
    assert_equal(*results)


def test_loss_functions_that_run_backward(nodes):
    """What a loss function does to gradients does not count, here as in Chainer."""
    results = []
    for overlap in (True, False):
        optimizer = prepared(nodes, overlap=overlap)

        def lossfun(*data, model=optimizer.target):
            model(*data).backward()
            loss = model(*data)
            x = chainer.Variable(data[0])
            y = F.tanh(model.first(x))
            (gx,) = chainer.grad([y], [x], enable_double_backprop=True)
            return loss + F.sum(gx**2)

        for step in range(3):
            optimizer.update(lossfun, *batch(nodes.rank, step))
        assert optimizer.overlapped == (overlap and nodes.size > 1)
        results.append(arrays(optimizer))
    assert_equal(*results)


def test_join_does_not_overlap(nodes):
    """Ranks that have run out of data take part, exchanging after backward."""
    optimizer = prepared(nodes, overlap=True)
    with Join(optimizer):
        for step in range(1 + nodes.rank):
            optimizer.update(optimizer.target, *batch(nodes.rank, step))
            assert not optimizer.overlapped
    train(optimizer, 2)
    assert optimizer.overlapped == (nodes.size > 1)


def test_loading_and_copies(nodes, tmp_path):
    """After a snapshot was loaded, or in a copy, the order is found anew."""
    optimizer = prepared(nodes, overlap=True)
    train(optimizer)
    path = tmp_path / "optimizer.npz"
    chainer.serializers.save_npz(path, optimizer)
    other = prepared(nodes, overlap=True)
    train(other)
    chainer.serializers.load_npz(path, other)
    assert train(other, 3) == [False, *[nodes.size > 1] * 2]
    assert_equal(arrays(other), nodes.bcast_obj(arrays(other)))


def test_options_that_exclude_it(nodes):
    """Overlap with what has an exchange of its own, or another communicator, is refused."""
    for options in ({"double_buffering": True}, {"compression": Int8()}):
        with pytest.raises(ValueError, match=next(iter(options))):
            prepared(nodes, overlap=True, **options)
    with create_communicator("naive") as comm:
        with pytest.raises(ValueError, match=r"shared_memory.*naive"):
            prepared(comm, overlap=True)
        assert train(prepared(comm), 2) == [False, False]


def test_option_that_differs(nodes):
    """Ranks must agree on it."""
    if nodes.size == 1:
        pytest.skip("needs two ranks")
    with pytest.raises(RankMismatchError, match="rank 1: the option overlap"):
        prepared(nodes, overlap=nodes.rank == 0)


def test_communicator_used_during_backward(nodes):
    """The memory is busy then; an error says so."""
    if nodes.size == 1:
        pytest.skip("needs two ranks")

    class Exchanges(chainer.FunctionNode):
        def forward(self, inputs):
            return (inputs[0],)

        def backward(self, _, grads):
            nodes.mean_arrays([np.ones(3)])
            return grads

    optimizer = prepared(nodes, overlap=True)
    train(optimizer, 2)
    lossfun = lambda *data: Exchanges().apply((optimizer.target(*data),))[0]  # noqa: E731
    with pytest.raises(RuntimeError, match="during backward"):
        optimizer.update(lossfun, *batch(nodes.rank, 0))


FAILING = """
import chainer, chainer.functions as F, chainer.links as L, numpy as np
import chainer_dist

comm = chainer_dist.create_communicator()
layers = chainer.Sequential(*[L.Linear(300, 300) for _ in range(6)])
optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.SGD(), comm, overlap=True)
optimizer.setup(layers)

class Fails(chainer.FunctionNode):
    def forward(self, inputs):
        return (inputs[0],)

    def backward(self, _, grads):
        if step == 2 and comm.rank == 1:
            raise ArithmeticError("no gradient here")
        return grads

def lossfun(x):
    for number, layer in enumerate(layers):
        x = layer(x)
        if number == 2:
            x = Fails().apply((x,))[0]
    return F.sum(x)

for step in range(4):
    optimizer.update(lossfun, np.ones((2, 300), np.float32))
    assert optimizer.overlapped == (step > 0)
"""


@pytest.mark.mpi_skip  # it starts a job of its own
@pytest.mark.parametrize("nodes", ["1", "2"])
def test_an_error_in_backward_ends_the_job(nodes):
    """A rank that fails in backward leaves nobody waiting in the exchange."""
    env = mpi_job.environment(MPIR_CVAR_NUM_CLIQUES=nodes)
    job = mpi_job.run([sys.executable, "-c", FAILING], 2, timeout=60, env=env)
    assert job.status not in (0, None), job.output
    assert "ArithmeticError: no gradient here" in job.output
    assert "AssertionError" not in job.output
