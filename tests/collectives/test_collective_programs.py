"""Random programs of collectives, against NumPy on all ranks' data at once and against ChainerMN.

A program is a list of operations that all ranks run on one communicator, one after the other. What a
rank puts in depends on its number and on that of the step, so every rank can work out by itself what
it has to get, and a message that is taken by another operation than its own shows.
"""

from __future__ import annotations

import functools
import operator
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

REDUCTIONS = ["sum", "mean", "max", "min", "prod"]


class Step(NamedTuple):
    """One operation of a program, the same on every rank."""

    operation: str
    dtype: np.dtype
    shape: tuple[int, ...]
    root: int
    number: int
    size: int  # of the communicator

    def array(self, rank, lane=0):
        """Return what a rank has; small whole numbers, so that sums and products are exact."""
        random = np.random.RandomState([self.number, rank, lane])
        return np.asarray(random.randint(-5, 5, self.shape)).astype(self.dtype)

    def arrays(self, rank):
        """Return an array for each rank, of shapes that differ."""
        return tuple(
            np.repeat(self.array(rank, to)[None], 1 + (rank + to) % 3, axis=0)
            for to in range(self.size)
        )

    def obj(self, rank, lane=0):
        """Return an object of some kind or other."""
        kind = (self.number + rank) % 4
        if kind == 0:
            return None
        if kind == 1:
            return {"rank": rank, "lane": lane, "array": self.array(rank, lane)}
        if kind == 2:
            return [f"{self.number}-{rank}-{lane}"] * lane
        return (self.array(rank, lane), Step)

    def addable(self, rank):
        """Return an object that has a sum, of the same kind on every rank."""
        return [rank + 0.5, [rank], f"{rank},", self.array(rank)][self.number % 4]

    def everyone(self, make):
        """Return what all ranks have."""
        return [make(rank) for rank in range(self.size)]

    def reduced(self, op, lane=0):
        """Return the reduction of all ranks' arrays by NumPy."""
        stack = np.stack(self.everyone(lambda rank: self.array(rank, lane)))
        kind = stack.dtype.kind
        if kind == "b" and op != "mean":
            return np.asarray(stack.any(axis=0) if op in ("sum", "max") else stack.all(axis=0))
        wide = {"f": np.float64, "c": np.complex128}.get(kind, np.int64)
        result = np.asarray(getattr(np, op)(stack.astype(wide), axis=0))
        return result if op == "mean" and kind in "biu" else result.astype(stack.dtype)


def ring(comm, send, receive):
    """Let every rank send to its right and receive from its left."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    if comm.rank % 2:
        received = receive(left)
        send(right)
        return received
    send(right)
    return receive(left)


def send_recv(comm, step):
    """Send two arrays around the ring."""
    mine, tag = (step.array(comm.rank), step.array(comm.rank, 1)), step.number
    return ring(comm, lambda to: comm.send(mine, to, tag), lambda source: comm.recv(source, tag))


def send_recv_obj(comm, step):
    """Send an object around the ring."""
    return ring(comm, lambda to: comm.send_obj(step.obj(comm.rank), to), comm.recv_obj)


def mean_arrays(comm, step):
    """Average three arrays, one of them in Fortran order."""
    arrays = [step.array(comm.rank, lane) for lane in range(3)]
    arrays[1] = np.array(arrays[1], order="F")
    comm.mean_arrays(arrays)
    return arrays


def on_root(value, rank, step):
    """Return a value on root, None elsewhere."""
    return value if rank == step.root else None


class Operation(NamedTuple):
    """How to run an operation, and what each rank gets."""

    run: Any  # comm, step -> result
    truth: Any  # rank, step -> result
    chainermn: bool = False  # whether ChainerMN has it
    kinds: str = "biufc"  # of dtypes


OPERATIONS = {
    "bcast": Operation(
        lambda comm, s: comm.bcast(on_root(s.array(comm.rank), comm.rank, s), root=s.root),
        lambda _, s: s.array(s.root),
        chainermn=True,
    ),
    "gather": Operation(
        lambda comm, s: comm.gather(s.array(comm.rank), s.root),
        lambda rank, s: on_root(tuple(s.everyone(s.array)), rank, s),
        chainermn=True,
    ),
    "gather of unequal shapes": Operation(
        lambda comm, s: comm.gather(s.arrays(comm.rank)[0], s.root),
        lambda rank, s: on_root(tuple(s.everyone(lambda r: s.arrays(r)[0])), rank, s),
        chainermn=True,
    ),
    "allgather": Operation(
        lambda comm, s: comm.allgather(s.arrays(comm.rank)[0]),
        lambda _, s: tuple(s.everyone(lambda r: s.arrays(r)[0])),
        chainermn=True,
    ),
    "alltoall": Operation(
        lambda comm, s: comm.alltoall(s.arrays(comm.rank)),
        lambda rank, s: tuple(s.everyone(lambda r: s.arrays(r)[rank])),
        chainermn=True,
    ),
    "scatter": Operation(
        lambda comm, s: comm.scatter(on_root(s.arrays(s.root), comm.rank, s), s.root),
        lambda rank, s: s.arrays(s.root)[rank],
        chainermn=True,
    ),
    "scatter of rows": Operation(
        lambda comm, s: comm.scatter(np.stack(s.everyone(s.array)), s.root),
        lambda rank, s: s.array(rank),
        chainermn=True,
    ),
    "allreduce": Operation(
        lambda comm, s: comm.allreduce(s.array(comm.rank)),
        lambda _, s: s.reduced("sum"),
        chainermn=True,
    ),
    **{
        f"allreduce by {op}": Operation(
            lambda comm, s, op=op: comm.allreduce(s.array(comm.rank), op),
            lambda _, s, op=op: s.reduced(op),
            kinds="biuf" if op in ("max", "min") else "biufc",
        )
        for op in REDUCTIONS
    },
    "send and recv": Operation(
        send_recv,
        lambda rank, s: tuple(s.array((rank - 1) % s.size, lane) for lane in range(2)),
        chainermn=True,
    ),
    "mean_arrays": Operation(
        mean_arrays, lambda _, s: [s.reduced("mean", lane) for lane in range(3)], kinds="f"
    ),
    "send_obj and recv_obj": Operation(send_recv_obj, lambda rank, s: s.obj((rank - 1) % s.size)),
    "bcast_obj": Operation(
        lambda comm, s: comm.bcast_obj(on_root(s.obj(s.root), comm.rank, s), root=s.root),
        lambda _, s: s.obj(s.root),
    ),
    "gather_obj": Operation(
        lambda comm, s: comm.gather_obj(s.obj(comm.rank), s.root),
        lambda rank, s: on_root(s.everyone(s.obj), rank, s),
    ),
    "allgather_obj": Operation(
        lambda comm, s: comm.allgather_obj(s.obj(comm.rank)),
        lambda _, s: s.everyone(s.obj),
    ),
    "scatter_obj": Operation(
        lambda comm, s: comm.scatter_obj(
            on_root(s.everyone(lambda r: s.obj(s.root, r)), comm.rank, s), s.root
        ),
        lambda rank, s: s.obj(s.root, rank),
    ),
    "allreduce_obj": Operation(
        lambda comm, s: comm.allreduce_obj(s.addable(comm.rank)),
        lambda _, s: functools.reduce(operator.add, s.everyone(s.addable)),
    ),
}
PAIRS = {"send and recv", "send_obj and recv_obj"}  # one rank has nobody to send to


@st.composite
def programs(draw, size, operations, dtypes, min_dims=0):
    """Draw a program for so many ranks."""
    program, shapes = [], hnp.array_shapes(min_dims=min_dims, max_dims=3, min_side=0, max_side=4)
    for number in range(draw(st.integers(2, 7))):
        name = draw(st.sampled_from([it for it in operations if size > 1 or it not in PAIRS]))
        fitting = [it for it in map(np.dtype, dtypes) if it.kind in OPERATIONS[name].kinds]
        dtype, shape = draw(st.sampled_from(fitting)), draw(shapes)
        program.append(Step(name, dtype, shape, draw(st.integers(0, size - 1)), number, size))
    return program


def assert_same(got, want, step):
    """Compare results of any structure: types, dtypes, shapes and values."""
    assert type(got) is type(want)
    if isinstance(want, (tuple, list)):
        assert len(got) == len(want)
        for one, other in zip(got, want):
            assert_same(one, other, step)
    elif isinstance(want, dict):
        assert got.keys() == want.keys()
        for key in want:
            assert_same(got[key], want[key], step)
    elif isinstance(want, np.ndarray):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        rounding = 0 if "mean" not in step.operation else 4 * np.finfo(want.dtype).eps
        np.testing.assert_allclose(got, want, rtol=rounding, atol=0)
    else:
        assert got == want


@settings(max_examples=8)
@given(data=st.data())
def test_programs_give_what_numpy_gives(any_comm, data):
    """Whatever operations follow one another, every rank gets its own result of each."""
    program = data.draw(programs(any_comm.size, list(OPERATIONS), "?bhilqBHILQefdFD"))
    results = [OPERATIONS[step.operation].run(any_comm, step) for step in program]
    for step, got in zip(program, results):
        assert_same(got, OPERATIONS[step.operation].truth(any_comm.rank, step), step)


@settings(max_examples=12)
@given(data=st.data())
def test_programs_give_what_chainermn_gives(comm, data):
    """ChainerMN's naive gives the same on contiguous float32 and float64, which have an axis."""
    chainermn = pytest.importorskip("chainermn")
    theirs = chainermn.create_communicator("naive", comm.mpi_comm)
    operations = [name for name, each in OPERATIONS.items() if each.chainermn]
    for step in data.draw(programs(comm.size, operations, "fd", min_dims=1)):
        run = OPERATIONS[step.operation].run
        ours = run(comm, step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # experimental, it says
            assert_same(ours, run(theirs, step), step)


def test_every_operation_at_least_once(any_comm):
    """One after the other, with the last rank as root, whatever Hypothesis has drawn."""
    size = any_comm.size
    for number, (name, operation) in enumerate(OPERATIONS.items()):
        if size > 1 or name not in PAIRS:
            step = Step(name, np.dtype(np.float32), (2, 3), size - 1, number, size)
            assert_same(operation.run(any_comm, step), operation.truth(any_comm.rank, step), step)
