"""Gradients averaged in fewer bytes, against the exact mean in NumPy."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import optimizers
from conftest import LAYOUTS, on_nodes
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import (
    Checkpoint,
    RankMismatchError,
    compression,
    create_communicator,
    create_multi_node_optimizer,
)
from chainer_dist.communicators.shared_memory import slots
from rounding import rounded_mean

WAYS = {
    "float16": compression.Float16,
    "bfloat16": compression.BFloat16,
    "int8": lambda: compression.Int8(block=16),
    "power_sgd": lambda: compression.PowerSGD(rank=2),
    "top_k": lambda: compression.TopK(density=0.1),
    "top_k_momentum": lambda: compression.TopK(0.1, warmup_updates=40, momentum=0.5),
}
# Others are tested with their defaults; SparseRows has tests of its own.
_tested = {compression.SparseRows, *(type(make()) for make in WAYS.values())}
for _name, _kind in vars(compression).items():
    _is_way = inspect.isclass(_kind) and issubclass(_kind, compression.Compression)
    if _is_way and not inspect.isabstract(_kind) and _kind not in _tested:
        WAYS[_name] = _kind
KEEPING = ["int8", "power_sgd", "top_k"]
ROUNDED = ["float16", "bfloat16"]
PRECISION = {"float16": 2**-10, "bfloat16": 2**-7, "int8": 0.02}
SHAPES = {"a": (7, 9), "b": (5,), "c": (3, 4, 6), "d": (), "e": (0, 2)}


@pytest.fixture(params=LAYOUTS)
def comm(request):
    """Return a communicator whose real ranks are taken to be on several nodes."""
    communicator = on_nodes("shared_memory", request.param)
    yield communicator
    communicator.finalize()


@pytest.fixture
def far_apart():
    """Return a communicator each of whose ranks is taken to be on a node of its own."""
    communicator = on_nodes("shared_memory", "a node each")
    yield communicator
    communicator.finalize()


def grads_of(rank, step=0, shapes=SHAPES, dtype=np.float32):
    """Return the gradients of a rank at a step."""
    rng = np.random.RandomState([rank, step])
    return {name: np.array(rng.randn(*shape), dtype) for name, shape in shapes.items()}


def exact(comm, step=0, **options):
    """Return the mean of all ranks' gradients in float64."""
    everyone = [grads_of(rank, step, **options) for rank in range(comm.size)]
    return {
        name: np.mean([grads[name].astype(np.float64) for grads in everyone], axis=0)
        for name in everyone[0]
    }


def assert_equal_on_all_ranks(comm, grads):
    """All ranks have the same bits."""
    mine = {name: grad.tobytes() for name, grad in grads.items()}
    assert comm.allgather_obj(mine) == [mine] * comm.size


@pytest.mark.parametrize("way", PRECISION)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_fewer_bits(comm, way, dtype):
    """Numbers are right to the precision of what was sent; on one node exactly."""
    grads = grads_of(comm.rank, dtype=dtype)
    WAYS[way]().mean(comm, grads)
    assert_equal_on_all_ranks(comm, grads)
    precision = max(PRECISION[way] if comm.inter_size > 1 else 1e-6, np.finfo(dtype).eps)
    for name, want in exact(comm, dtype=dtype).items():
        assert grads[name].dtype == dtype
        np.testing.assert_allclose(grads[name], want, atol=2 * precision, rtol=2 * precision)


@pytest.mark.parametrize("way", ROUNDED)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rounded_once_or_twice(comm, way, dtype, monkeypatch):
    """Sums are float32; each number is rounded on its way to another node, and nowhere else."""
    monkeypatch.setattr(slots, "BLOCK_BYTES", 256)
    shapes = {"a": (7, 50), "b": (1,), "c": (123,)}
    everyone = [grads_of(rank, shapes=shapes, dtype=dtype) for rank in range(comm.size)]
    grads = everyone[comm.rank]
    want = {
        name: rounded_mean(comm, way, [each[name] for each in everyone]).astype(dtype)
        for name in shapes
    }
    WAYS[way]().mean(comm, grads)
    for name, grad in grads.items():
        np.testing.assert_array_equal(grad, want[name], err_msg=name)


@pytest.mark.parametrize("way", ROUNDED)
def test_rounding_on_communicators_without_shared_memory(way):
    """One rank of each node sends then; the result is right to the precision of what was sent."""
    with create_communicator("flat") as comm:
        grads = grads_of(comm.rank)
        WAYS[way]().mean(comm, grads)
        assert_equal_on_all_ranks(comm, grads)
        for name, want in exact(comm).items():
            np.testing.assert_allclose(
                grads[name], want, atol=2 * PRECISION[way], rtol=2 * PRECISION[way]
            )


@given(
    high=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=20),
    low=st.sampled_from([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]),
)
def test_bfloat16_rounds_to_nearest(high, low):
    """Any float32 becomes the nearest number of 8 bits of precision, ties to even; NaN stays NaN."""
    values = np.array([[each << 16 | low for each in high]], np.uint32).view(np.float32)
    way = compression.BFloat16()
    got = way.decode(way.encode(values))
    assert got.dtype == np.float32
    assert (np.isnan(got) == np.isnan(values)).all()
    fine = np.isfinite(values) & (abs(values) >= np.finfo(np.float32).tiny)
    mantissa, exponent = np.frexp(values[fine].astype(np.float64))
    want = np.ldexp(np.rint(mantissa * 256) / 256, exponent)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got[fine], want.astype(np.float32))


@given(
    bits=st.lists(st.integers(0, 2**32 - 1), max_size=20),
    small=st.lists(st.floats(-(2**-13), 2**-13, width=32), min_size=1, max_size=20),
)
def test_float16_is_that_of_numpy(bits, small):
    """Any float32 becomes what NumPy makes of it, to the bit, and that is read as NumPy does."""
    way = compression.Float16()
    values = np.concatenate([np.array(bits, np.uint32).view(np.float32), np.float32(small)])
    with np.errstate(all="ignore"):
        want = values.astype(np.float16)
    got = way.encode(values[np.newaxis]).view(np.float16)[0]
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(got[numbers].view(np.uint16), want[numbers].view(np.uint16))
    assert np.isnan(got[~numbers]).all()


def test_all_of_float16():
    """Every number there is, and what lies between two, is rounded and read as NumPy does."""
    way = compression.Float16()
    halves = np.arange(1 << 16, dtype=np.uint16)[np.newaxis]
    halves = halves[:, ~np.isnan(halves.view(np.float16)[0])]
    want = halves.view(np.float16).astype(np.float32)
    got = way.decode(halves.view(np.uint8))
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
    finite = want[np.isfinite(want)].astype(np.float64)
    between = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)[np.newaxis]
    for values in (want, between, np.nextafter(between, np.float32(0))):
        code = way.encode(values).view(np.uint16)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(code, values.astype(np.float16).view(np.uint16))


@pytest.mark.parametrize("way", KEEPING)
def test_nothing_is_lost(far_apart, way):
    """What was exchanged, and what is kept, are together the sum of all gradients."""
    comm, steps = far_apart, 6
    keeping = WAYS[way]()
    exchanged = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(steps):
        grads = grads_of(comm.rank, step)
        keeping.mean(comm, grads)
        for name, grad in grads.items():
            exchanged[name] += grad
    # One more exchange of zeros only would bring some of the rest: none may be missing.
    for _ in range(400 if comm.size > 1 else 0):
        grads = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
        keeping.mean(comm, grads)
        for name, grad in grads.items():
            exchanged[name] += grad
    for name in SHAPES:
        want = sum(exact(comm, step)[name] for step in range(steps))
        np.testing.assert_allclose(exchanged[name], want, atol=5e-3, err_msg=f"{way} {name}")


@pytest.mark.parametrize("zero_fill", [True, False])
@pytest.mark.parametrize("way", KEEPING)
def test_nothing_is_lost_of_layers_used_now_and_then(far_apart, way, zero_fill):
    """What is kept of a gradient stays while the parameters that have one change, loss scaling or not."""
    comm, steps, scale = far_apart, 6, 8.0
    model = chainer.Link()
    with model.init_scope():
        for name, shape in SHAPES.items():
            setattr(model, name, chainer.Parameter(chainer.initializers.Zero(), shape))
    optimizer = create_multi_node_optimizer(
        optimizers.SGD(1.0), comm, zero_fill=zero_fill, compression=WAYS[way]()
    )
    optimizer.setup(model).set_loss_scale(scale)
    for step in range(steps + (100 if comm.size > 1 else 0)):
        model.cleargrads()
        for name, grad in grads_of(comm.rank, step).items():
            param = getattr(model, name)
            if step >= steps:  # zeros bring the rest
                param.grad = np.zeros_like(param.array)
            elif step % 2 or name in "bd":
                param.grad, param._loss_scale = np.asarray(grad * np.float32(scale)), scale
        optimizer.update()
    for name in SHAPES:
        used = [step for step in range(steps) if step % 2 or name in "bd"]
        want = -sum(exact(comm, step)[name] for step in used)
        got = getattr(model, name).array
        np.testing.assert_allclose(got, want, atol=5e-3, err_msg=f"{way} {name}")


def test_an_object_serves_one_optimizer(comm):
    """What it left out of the gradients of one optimizer would be added to another's, or be lost; a copy has its own."""
    for make in (compression.TopK, compression.PowerSGD, compression.Int8):
        way = make()
        optimizer = create_multi_node_optimizer(optimizers.SGD(), comm, compression=way)
        with pytest.raises(ValueError, match="another optimizer has this"):
            create_multi_node_optimizer(optimizers.SGD(), comm, compression=way)
        assert copy.deepcopy(optimizer).options.compression is not way
    for make in (compression.Float16, compression.BFloat16, compression.SparseRows):
        way = make()
        for _ in range(2):
            create_multi_node_optimizer(optimizers.SGD(), comm, compression=way)


@pytest.mark.parametrize("way", WAYS)
def test_another_model(far_apart, way):
    """Nothing that was left out of the gradients of one model is added to those of the next."""

    def train(optimizer):
        model = make_model()
        optimizer.setup(model)
        for step in range(3):
            x = np.random.RandomState(step).rand(4, 12).astype(np.float32)
            optimizer.update(model, x + far_apart.rank, np.array([0, 1, 0, 1], np.int32))
        return [each.array.tobytes() for each in model.params()]

    optimizer = create_multi_node_optimizer(optimizers.SGD(), far_apart, compression=WAYS[way]())
    assert train(optimizer) == train(optimizer)


@pytest.mark.parametrize("kind", ["shared_memory", "flat"])
@pytest.mark.parametrize("way", [*WAYS, "SparseRows"])
def test_an_update_without_any_gradient(way, kind):
    """It is one by zeros, as in Chainer."""
    comm = on_nodes(kind, "a node each")
    make = WAYS.get(way, compression.SparseRows)
    for model in (make_model(), chainer.Chain()):
        optimizer = create_multi_node_optimizer(optimizers.SGD(), comm, compression=make())
        optimizer.setup(model)
        before = [param.array.copy() for param in model.params()]
        for _ in range(2):
            model.cleargrads()
            optimizer.update()
        for param, want in zip(model.params(), before):
            np.testing.assert_array_equal(param.array, want)
    comm.finalize()


def everything(value):
    """Return a change of all gradients."""
    return lambda grad: np.asarray(grad * np.float32(value))


def one_number(value):
    """Return a change of one number of each gradient."""

    def change(grad):
        grad = grad.copy()
        grad.reshape(-1)[:1] = value
        return grad

    return change


BAD = {
    "all 1e12": everything(1e12),
    "all 1e20": everything(1e20),
    "one 1e20": one_number(1e20),
    "one 3e38": one_number(3e38),
    "one -inf": one_number(-np.inf),
    "one nan": one_number(np.nan),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("way", KEEPING)
@pytest.mark.parametrize(
    ("bad", "on"),
    [*((bad, "every rank") for bad in BAD), ("all 1e20", "one rank"), ("one 1e20", "one rank")],
)
def test_gradients_out_of_range_leave_nothing_behind(far_apart, way, bad, on):
    """What is exchanged in all other steps is the sum of all other gradients, as if there had been none such."""
    comm = far_apart
    if comm.size == 1:
        pytest.skip("nothing is kept on one node")
    keeping, n_steps, bad_step = WAYS[way](), 8, 3
    exchanged = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(n_steps + 30):
        grads = grads_of(comm.rank, step)
        if step >= n_steps:
            grads = {name: np.zeros_like(grad) for name, grad in grads.items()}
        if step == bad_step and (on == "every rank" or comm.rank == comm.size - 1):
            grads = {name: BAD[bad](grad) for name, grad in grads.items()}
        keeping.mean(comm, grads)
        if step != bad_step:
            for name, grad in grads.items():
                assert np.isfinite(grad).all()
                exchanged[name] += grad
    assert_equal_on_all_ranks(comm, grads)
    if bad == "all 1e12":  # small enough to be kept, and sent later
        assert all(abs(grad).max(initial=0) < 1e-3 for grad in grads.values())
        return
    # Of other gradients in that step, other ranks' or in other blocks, some is sent later.
    atol = 5 if on == "one rank" else 0.05 if way == "int8" else 5e-3
    for name in SHAPES:
        want = sum(exact(comm, step)[name] for step in range(n_steps) if step != bad_step)
        np.testing.assert_allclose(exchanged[name], want, atol=atol, err_msg=name)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("way", [way for way in WAYS if way not in KEEPING])
@pytest.mark.parametrize("bad", BAD)
def test_after_gradients_out_of_range(far_apart, way, bad):
    """Ranks stay equal, and later means are finite, and no larger than the gradients and what was left of them."""
    comm = far_apart
    changed, usual = WAYS[way](), WAYS[way]()
    for step in range(8):
        grads, others = grads_of(comm.rank, step), grads_of(comm.rank, step)
        if step == 2 and comm.rank == 0:
            grads = {name: BAD[bad](grad) for name, grad in grads.items()}
        changed.mean(comm, grads)
        if step == 2:
            continue
        usual.mean(comm, others)
        if step > 2 and bad != "all 1e12":
            for name, grad in grads.items():
                assert np.isfinite(grad).all()
                if way in ROUNDED:
                    np.testing.assert_array_equal(grad, others[name])
                else:
                    np.testing.assert_allclose(grad, others[name], atol=30)
    assert_equal_on_all_ranks(comm, grads)


def test_matrices_far_from_one(far_apart):
    """PowerSGD finds matrices that are tiny or huge as well as others, and others after them."""
    comm = far_apart
    rng = np.random.RandomState(0)
    matrix = rng.randn(20, 2) @ rng.randn(2, 30)
    for scales in ((1e-30, 1, 1e18), (1e30,), (1e6, 1)):
        way = compression.PowerSGD(rank=2)
        for scale in scales:
            for _ in range(12):
                grads = {"W": (matrix * scale).astype(np.float32)}
                way.mean(comm, grads)
            np.testing.assert_allclose(grads["W"], matrix * scale, atol=1e-3 * scale)


def test_what_nodes_keep_does_not_grow(far_apart):
    """What makes their gradients differ is sent as well, and not kept for ever."""
    comm = far_apart
    way = compression.PowerSGD(rank=2)
    own = grads_of(comm.rank, shapes={"W": (7, 9)})["W"]
    for _ in range(60):
        way.mean(comm, {"W": own.copy()})
    assert comm.size == 1 or abs(way._residual.arrays["W"]).max() < 15 * abs(own).max()


@pytest.mark.parametrize("way", ["power_sgd", "top_k"])
def test_nodes_weigh_as_much_as_they_have_ranks(comm, way):
    """What is exchanged exactly is the mean over ranks, not over nodes."""
    vector = {"b": np.full(7, float(comm.rank), np.float32)}
    (compression.TopK(1.0) if way == "top_k" else WAYS[way]()).mean(comm, vector)
    np.testing.assert_allclose(vector["b"], (comm.size - 1) / 2, rtol=1e-6)


def test_density_of_a_warm_up(far_apart):
    """It begins at a quarter, falls by one factor, and stays."""
    comm = far_apart
    if comm.size == 1:
        pytest.skip("one node sends nothing")
    way = compression.TopK(0.01, warmup_updates=4)
    sent = []
    for step in range(6):
        way.mean(comm, grads_of(comm.rank, step, shapes={"W": (1000, 10)}))
        sent.append(way.sent / 8 / (comm.size - 1) / 10000)
    want = [0.25 * 0.04 ** (step / 4) for step in range(4)] + [0.01, 0.01]
    np.testing.assert_allclose(sent, want, atol=1e-4)


def correct_momentum(comm, steps, density):
    """Return what deep gradient compression exchanges in each step, computed in one process."""
    velocity = np.zeros((comm.size, 40))
    left = np.zeros((comm.size, 40))
    for step in range(steps):
        total = np.zeros(40)
        for rank in range(comm.size):
            grad = grads_of(rank, step, shapes={"W": (40,)})["W"]
            velocity[rank] = 0.9 * velocity[rank] + grad
            left[rank] += velocity[rank]
            largest = np.argsort(-abs(left[rank]))[: round(40 * density)]
            total[largest] += left[rank, largest]
            left[rank, largest] = velocity[rank, largest] = 0
        yield total / comm.size


def test_momentum_correction(far_apart):
    """Momentum is summed up before numbers are chosen, and cleared for those that are sent."""
    comm = far_apart
    way = compression.TopK(0.25, momentum=0.9)
    if comm.size == 1:
        pytest.skip("one node sends nothing")
    for step, want in enumerate(correct_momentum(comm, 8, 0.25)):
        grads = grads_of(comm.rank, step, shapes={"W": (40,)})
        way.mean(comm, grads)
        np.testing.assert_allclose(grads["W"], want, rtol=1e-4, atol=1e-5)


def test_momentum_on_one_node():
    """SGD with it is MomentumSGD there, also after a snapshot of rank 0 was loaded on all ranks."""
    comm = on_nodes("shared_memory", "one node")
    models = [make_model(), make_model()]
    make = [lambda: optimizers.SGD(0.1), lambda: optimizers.MomentumSGD(0.1, 0.9)]
    ways = [compression.TopK(0.1, momentum=0.9), None]
    for model, new, way in zip(models, make, ways):
        optimizer = create_multi_node_optimizer(new(), comm, compression=way).setup(model)
        for step in range(3):
            optimizer.update(model, *batch(comm.rank, step))
        if way is not None:
            saved = chainer.serializers.DictionarySerializer()
            optimizer.serialize(saved)
            target = comm.bcast_obj(saved.target)
            optimizer = create_multi_node_optimizer(
                new(), comm, compression=compression.TopK(0.1, momentum=0.9)
            ).setup(model)
            optimizer.serialize(chainer.serializers.NpzDeserializer(target))
        for step in range(3, 6):
            optimizer.update(model, *batch(comm.rank, step))
    for (name, got), (_, want) in zip(*(sorted(model.namedparams()) for model in models)):
        np.testing.assert_allclose(got.array, want.array, rtol=1e-4, atol=1e-6, err_msg=name)
    assert_equal_on_all_ranks(comm, {name: p.array for name, p in models[0].namedparams()})
    comm.finalize()


@pytest.mark.parametrize("way", ["int8", "power_sgd", "top_k_momentum"])
def test_checkpoints_keep_what_every_rank_left_out(far_apart, way, tmp_path):
    """A run that is resumed is, to the bit, the one that was not interrupted."""
    comm = far_apart
    folder = Path(comm.bcast_obj(str(tmp_path)))
    runs = []
    for _ in range(2):
        model = make_model(comm.rank)
        optimizer = create_multi_node_optimizer(
            optimizers.SGD(0.1), comm, compression=WAYS[way]()
        ).setup(model)
        state = {"model": model, "optimizer": optimizer}
        with Checkpoint(comm, folder / "saved") as checkpoint:
            first = checkpoint.resume(state)
            for step in range(first, 6):
                if step == 3 and not first:
                    checkpoint.save(state, 3)
                optimizer.update(model, *batch(comm.rank, step))
        runs.append(model)
    assert first == 3
    for (name, got), (_, want) in zip(*(sorted(model.namedparams()) for model in runs)):
        np.testing.assert_array_equal(got.array, want.array, err_msg=name)


def test_what_a_rank_left_out_is_its_own(far_apart):
    """A snapshot of rank 0 brings back on rank 0 only what had been left out there."""
    comm = far_apart
    way = compression.TopK(0.5)
    way.mean(comm, {"b": np.arange(8, dtype=np.float32) + 1})
    saved = chainer.serializers.DictionarySerializer()
    way.serialize(saved, comm)
    loaded = compression.TopK(1.0)
    target = comm.bcast_obj(saved.target)
    loaded.serialize(chainer.serializers.NpzDeserializer(target), comm)
    rest = {"b": np.zeros(8, np.float32)}
    loaded.mean(comm, rest)
    want = [1, 2, 3, 4, 0, 0, 0, 0] if comm.size > 1 else [0] * 8
    np.testing.assert_allclose(rest["b"], np.array(want) / comm.size)


def test_matrices_of_low_rank_are_exact(far_apart):
    """PowerSGD finds a mean of that rank after few steps, and vectors at once."""
    comm = far_apart
    rng = np.random.RandomState(0)
    left, right = rng.randn(20, 2), rng.randn(2, 30)
    vector = rng.randn(8).astype(np.float32)
    way = compression.PowerSGD(rank=2)
    for _ in range(4):
        scale = 2 * (1 + comm.rank) / (1 + comm.size)  # the mean over ranks is 1
        grads = {"W": (left @ right * scale).astype(np.float32), "b": vector * np.float32(scale)}
        way.mean(comm, grads)
        np.testing.assert_allclose(grads["b"], vector, rtol=1e-5)
        way._residual.arrays.clear()  # of ranks that differ
    np.testing.assert_allclose(grads["W"], left @ right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_fewer_bytes(far_apart, way):
    """What is sent is as small as promised."""
    comm = far_apart
    if comm.size == 1:
        pytest.skip("one node sends nothing")
    shapes = {"W": (400, 300), "b": (400,)}
    grads = grads_of(comm.rank, shapes=shapes)
    sending = {**WAYS, "top_k": compression.TopK, "int8": compression.Int8}[way]()
    sending.mean(comm, grads)
    exact_bytes = sum(grad.nbytes for grad in grads.values()) * 2 * (comm.size - 1) / comm.size
    most = {"float16": 0.501, "bfloat16": 0.501, "int8": 0.27, "power_sgd": 0.02, "top_k": 0.05}
    most["top_k_momentum"] = 0.2501 * comm.size  # a quarter of all numbers, with their places
    assert 0 < sending.sent <= exact_bytes * most.get(way, 1)


def batch(rank, step):
    """Return a rank's batch."""
    rng = np.random.RandomState([rank, step])
    x = rng.randn(16, 12).astype(np.float32)
    return x, (x[:, 0] > x[:, 1]).astype(np.int32)


def make_model(seed=0):
    """Return a classifier."""
    np.random.seed(seed)
    return L.Classifier(chainer.Sequential(L.Linear(12, 24), F.relu, L.Linear(24, 2)))


@pytest.mark.parametrize("way", WAYS)
def test_training(far_apart, way):
    """It learns, ranks stay equal, and a resume goes on to the same bits."""
    comm = far_apart
    model = make_model(comm.rank)
    optimizer = create_multi_node_optimizer(optimizers.Adam(1e-2), comm, compression=WAYS[way]())
    optimizer.setup(model)
    saved = {}
    for step in range(80):
        if step == 75:
            for name, each in (("model", model), ("optimizer", optimizer)):
                serializer = chainer.serializers.DictionarySerializer()
                each.serialize(serializer)
                saved[name] = copy.deepcopy(serializer.target)
        optimizer.update(model, *batch(comm.rank, step))
    assert optimizer.sharded is (way in ROUNDED)
    grads = {name: param.array for name, param in model.namedparams()}
    assert_equal_on_all_ranks(comm, grads)
    with chainer.using_config("train", value=False):
        model(*batch(99, 0))
    assert float(model.accuracy.array) > 0.8

    other = make_model(7)
    resumed = create_multi_node_optimizer(optimizers.Adam(1e-2), comm, compression=WAYS[way]())
    resumed.setup(other)
    other.serialize(chainer.serializers.NpzDeserializer(saved["model"]))
    resumed.serialize(chainer.serializers.NpzDeserializer(saved["optimizer"]))
    for step in range(75, 80):
        resumed.update(other, *batch(comm.rank, step))
    for (name, got), (_, want) in zip(sorted(other.namedparams()), sorted(model.namedparams())):
        np.testing.assert_array_equal(got.array, want.array, err_msg=f"{way} {name}")


@pytest.mark.parametrize("ways", [(None, "power_sgd"), ("top_k", None), ("top_k", "int8")])
def test_snapshots_of_other_ways(comm, ways):
    """A snapshot can be resumed with compression, without, or with another one."""
    model = make_model()
    first, second = (
        create_multi_node_optimizer(optimizers.Adam(), comm, compression=way and WAYS[way]())
        for way in ways
    )
    first.setup(model).update(model, *batch(comm.rank, 0))
    saved = chainer.serializers.DictionarySerializer()
    first.serialize(saved)
    second.setup(model).serialize(chainer.serializers.NpzDeserializer(saved.target))
    second.update(model, *batch(comm.rank, 1))
    assert second.t == 2
    assert_equal_on_all_ranks(comm, {name: p.array for name, p in model.namedparams()})


def test_rounding_leaves_everything_else_as_it_is(comm, monkeypatch):
    """Sharded or not, during backward or after it, parameters are the same to the bit, on all ranks."""
    monkeypatch.setattr(slots, "BLOCK_BYTES", 256)
    several = comm.inter_size > 1
    found = []
    for options in (
        {},
        {"overlap": False},
        {"sharded_update": False},
        {"sharded_update": False, "overlap": False},
        {"mean_grad": True, "share_parameters": True},
    ):
        sending = compression.Float16()
        optimizer = create_multi_node_optimizer(
            optimizers.Adam(1e-2), comm, compression=sending, **options
        ).setup(make_model())
        for step in range(4):
            optimizer.update(optimizer.target, *batch(comm.rank, step))
        assert optimizer.sharded is options.get("sharded_update", True)
        assert optimizer.overlapped is (several and options.get("overlap", True))
        assert several == bool(max(comm.allgather_obj(sending.sent)))
        sent = sum(comm.allgather_obj(sending.sent))
        params = {name: param.array for name, param in optimizer.target.namedparams()}
        size = sum(array.size for array in params.values())
        assert sent == 2 * 2 * (comm.inter_size - 1) * size
        found.append({name: array.copy() for name, array in params.items()})
    assert_equal_on_all_ranks(comm, found[0])
    for other in found[1:]:
        for name, array in found[0].items():
            np.testing.assert_array_equal(other[name], array, err_msg=name)


def test_loss_scaling_saves_small_numbers(far_apart):
    """What float16 cannot hold comes through when it is multiplied by the loss scale."""
    comm = far_apart
    tiny, found = np.float32(1e-9), []
    for scale in (None, 65536.0):
        model = chainer.Link()
        with model.init_scope():
            model.p = chainer.Parameter(np.zeros(300, np.float32))
        optimizer = create_multi_node_optimizer(
            optimizers.SGD(1.0), comm, compression=compression.Float16()
        ).setup(model)
        if scale is not None:
            optimizer.loss_scaling(scale=scale)
        for _ in range(2):
            optimizer.update(lambda p: F.sum(p) * tiny, model.p)
        found.append(model.p.array[0])
    assert found[0] == (0 if comm.size > 1 else -2 * tiny)
    np.testing.assert_allclose(found[1], -2 * tiny, rtol=2e-3)


def test_ways_that_differ(far_apart):
    """All ranks raise, and none waits."""
    comm = far_apart
    if comm.size == 1:
        pytest.skip("needs two ranks")
    ways = [compression.Float16(), None, compression.Int8(), compression.BFloat16()]
    optimizer = create_multi_node_optimizer(optimizers.SGD(), comm, compression=ways[comm.rank])
    with pytest.raises(RankMismatchError, match=r"rank 1: the option compression .* None, .*Float"):
        optimizer.setup(make_model())


LINEAR = ["int8", "power_sgd", "top_k", "top_k_momentum"]


def train_scaled(comm, way, scales):
    """Return the parameters after steps with these loss scales; NaN stands for one that overflows."""
    optimizer = create_multi_node_optimizer(
        optimizers.SGD(0.1), comm, compression=WAYS[way]()
    ).setup(make_model())
    optimizer.loss_scaling()
    step = 0
    for scale in scales:
        x, t = batch(comm.rank, step)
        if np.isfinite(scale):
            optimizer._loss_scale = scale
            step += 1
        elif comm.rank == comm.size - 1:
            x = np.full_like(x, np.nan)
        with np.errstate(all="ignore"):
            optimizer.update(optimizer.target, x, t)
    return {name: param.array for name, param in sorted(optimizer.target.namedparams())}


@pytest.mark.parametrize("way", LINEAR)
@pytest.mark.parametrize("layout", ["one node", "a node each"])
def test_what_is_kept_follows_the_loss_scale(way, layout):
    """Training is the same whatever the scale, and however it changes."""
    with on_nodes("shared_memory", layout) as comm:
        got = train_scaled(comm, way, [1.0, 8.0, 0.5, 64.0, 2.0, 2.0])
        want = train_scaled(comm, way, [1.0] * 6)
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.filterwarnings("ignore:Non finite")
@pytest.mark.parametrize("way", LINEAR)
@pytest.mark.parametrize("layout", ["one node", "a node each"])
def test_a_step_that_overflows_leaves_nothing_behind(way, layout):
    """With dynamic loss scaling it is skipped; what is kept is as if it had not been."""
    with on_nodes("shared_memory", layout) as comm:
        got = train_scaled(comm, way, [2.0, 2.0, np.nan, 1.0, np.nan, np.nan, 4.0, 4.0])
        want = train_scaled(comm, way, [2.0, 2.0, 1.0, 4.0, 4.0])
    for name, array in want.items():
        assert np.isfinite(array).all()
        np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=1e-6, err_msg=name)


def test_copies(far_apart):
    """The copy of an optimizer keeps what was left out of its own."""
    comm = far_apart
    optimizer = create_multi_node_optimizer(
        optimizers.SGD(), comm, compression=compression.TopK(0.1)
    ).setup(make_model(comm.rank))
    optimizer.update(optimizer.target, *batch(comm.rank, 0))
    twin = copy.deepcopy(optimizer)
    for each in (optimizer, twin):
        each.update(each.target, *batch(comm.rank, 1))
    for (_, one), (_, other) in zip(
        sorted(optimizer.target.namedparams()), sorted(twin.target.namedparams())
    ):
        np.testing.assert_array_equal(one.array, other.array)


def test_what_does_not_go_together(comm):
    """A clear error, for numbers out of range too."""
    own_ways = {"sharded_update": "updates on every rank", "overlap": "in its own way"}
    for option, what in own_ways.items():
        with pytest.raises(ValueError, match=f"compression by Int8.*{what}.*leave {option} out"):
            create_multi_node_optimizer(
                optimizers.SGD(), comm, compression=compression.Int8(), **{option: True}
            )
    with pytest.raises(ValueError, match="exchanges gradients exactly"):
        create_multi_node_optimizer(
            optimizers.SGD(), comm, double_buffering=True, compression=compression.Float16()
        )
    for make in (
        lambda: compression.TopK(0),
        lambda: compression.TopK(1.5),
        lambda: compression.TopK(momentum=1),
        lambda: compression.TopK(warmup_updates=-1),
        lambda: compression.PowerSGD(0),
        lambda: compression.Int8(0),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()
