"""What goes wrong on one rank while blocks are exchanged is raised on every rank, and nothing is left behind."""

from __future__ import annotations

import contextlib
import time

import chainer
import numpy as np
import pytest
from chainer import links as L

import chainer_dist
from chainer_dist.collectives import operation
from chainer_dist.communicators.shared_memory.exchange import Exchange, mean_to
from chainer_dist.communicators.shared_memory.slots import PACKED, REDUCED, Slots


class TwoDtypes(chainer.Chain):
    """Parameters of two dtypes, so that there are two exchanges one after the other."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.a = L.Linear(30, 40, initialW=np.ones((40, 30), np.float32))
            self.b = chainer.Parameter(np.ones(2000))


class Failing:
    """A hook that raises for parameters of float64, once, if told so."""

    name = "Failing"
    call_for_each_param = True
    is_elementwise = True
    fails = False

    def __call__(self, rule, param):
        """Raise, or do nothing."""
        del rule
        if self.fails and param.dtype == np.float64:
            self.fails = False
            raise ArithmeticError("this hook fails")


class Slow(operation.Observer):
    """Keeps a rank for a while after it has copied a block."""

    def left(self, done, end):
        """Sleep."""
        del end
        if done.kind is operation.UNPACK:
            time.sleep(0.2)


@contextlib.contextmanager
def slow(is_slow):
    """Let this rank be slow after each block, if told so."""
    watcher = Slow()
    if is_slow:
        operation.observers.append(watcher)
    try:
        yield
    finally:
        if is_slow:
            operation.observers.remove(watcher)


def prepared(comm, **options):
    """Return a model, an optimizer that clips its gradients, and a hook that is called after that."""
    model, hook = TwoDtypes(), Failing()
    optimizer = chainer_dist.create_multi_node_optimizer(
        chainer.optimizers.SGD(1.0), comm, sharded_update=True, **options
    ).setup(model)
    optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(1e9))
    optimizer.add_hook(hook)
    return model, optimizer, hook


def step(model, optimizer):
    """Update with gradients of ones."""
    model.cleargrads()
    for param in model.params():
        param.grad = np.ones_like(param.array)
    optimizer.update()


def grouped_texts(comm, error):
    """Return how many different texts the ranks have."""
    return len(set(comm.allgather_obj(str(error))))


def fail_in_the_second_exchange(comm, failing, **options):
    """Raise in a hook on one rank, while others are late with the exchange before; then go on."""
    model, optimizer, hook = prepared(comm, **options)
    for _ in range(3):
        step(model, optimizer)
    hook.fails = comm.rank == failing
    with (
        slow(comm.rank != failing),
        pytest.raises(ArithmeticError, match="this hook fails") as info,
    ):
        step(model, optimizer)
    if comm.size > 1:
        assert f"rank {failing}: " in str(info.value)
        assert grouped_texts(comm, info.value) == 1
    comm.mpi_comm.Barrier()
    x = np.arange(5000.0) + comm.rank
    comm.mean_arrays([x])
    np.testing.assert_allclose(x, np.arange(5000.0) + (comm.size - 1) / 2)


@pytest.mark.parametrize("options", [{"share_parameters": False}, {}], ids=str)
@pytest.mark.parametrize("number", [0, -1], ids=["first node", "last node"])
def test_in_the_second_exchange(grouped, number, options):
    """A rank that is still in the exchange before takes no notice until it comes to that one."""
    leaders = grouped.allgather_obj((grouped.intra_rank, grouped.rank))
    failing = [rank for of_node, rank in leaders if of_node == 0][number]
    fail_in_the_second_exchange(grouped, failing, **options)


class Broken:
    """Arrays of which some cannot be read, or written, on one rank."""

    def __init__(self, arrays, is_broken):
        self.arrays, self.is_broken = arrays, is_broken

    def __getitem__(self, which):
        """Raise, or return some of the arrays."""
        if self.is_broken:
            raise OSError("this memory is broken")
        return self.arrays[which]


@pytest.mark.parametrize("is_last", [False, True], ids=["first", "last"])
def test_while_blocks_are_packed(grouped, small_blocks, is_last):
    """Blocks go on, all ranks raise, and the next exchange is as if nothing had been."""
    del small_blocks
    failing = grouped.size - 1 if is_last else 0
    arrays = [np.full(3000, float(grouped.rank))]
    transport = grouped.transport
    layout = transport.layout([3000], arrays[0].dtype)
    sources = Broken(arrays, grouped.rank == failing)
    for _ in range(2):
        exchange = Exchange(layout, arrays[0].dtype, sources, mean_to(layout, arrays), arrays)
        with pytest.raises(OSError, match="this memory is broken"):
            transport.run(exchange)
    arrays[0][...] = grouped.rank
    grouped.mean_arrays(arrays)
    assert (arrays[0] == (grouped.size - 1) / 2).all()


def test_stamps_in_checked_mode(comm, monkeypatch):
    """A slot that has another block than its counter says is found, on every rank, whatever rank reads it."""
    monkeypatch.setenv("CHAINER_DIST_CHECKED", "1")
    stamp = Slots.stamp
    with chainer_dist.create_communicator("shared_memory") as checked:
        x = np.full(5000, float(comm.rank))
        for stage in (PACKED, REDUCED) if comm.size > 1 else ():

            def late(slots, at, number, stage=stage):
                if at != stage or comm.rank != comm.size - 1:
                    stamp(slots, at, number)

            monkeypatch.setattr(Slots, "stamp", late)
            with pytest.raises(
                RuntimeError, match=f"slot of rank {comm.size - 1} has block -1 where"
            ):
                checked.mean_arrays([x])
            monkeypatch.setattr(Slots, "stamp", stamp)
        x[...] = comm.rank
        for _ in range(20):
            checked.mean_arrays([x])
        assert (x == (comm.size - 1) / 2).all()
