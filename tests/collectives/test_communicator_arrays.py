"""Arrays between ranks, against NumPy on all ranks' arrays at once."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from chainer_dist import RankMismatchError
from chainer_dist.collectives import reduction

DTYPES = [np.dtype(char) for char in "?bhilqBHILQefdgFDG"]
LAYOUTS = {
    "contiguous": lambda x: x,
    "fortran": lambda x: np.array(x, order="F"),
    "strided": lambda x: np.repeat(x, 2, axis=-1)[..., ::2] if x.ndim else x,
    "reversed": lambda x: x[::-1] if x.ndim else x,
    "swapped": lambda x: x.astype(x.dtype.newbyteorder("S")),
}
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


def array_of(rank: int, dtype: np.dtype, shape: tuple[int, ...], layout: str) -> np.ndarray:
    """Return small numbers that differ between ranks and are exact in every dtype."""
    count = int(np.prod(shape))
    x = ((np.arange(count) * 3 + rank) % 5).astype(dtype).reshape(shape)
    x = LAYOUTS[layout](x)
    x.flags.writeable = False
    return x


cases = given(dtype=st.sampled_from(DTYPES), shape=SHAPES, layout=st.sampled_from(sorted(LAYOUTS)))


def assert_same(got, expected):
    """Compare values, shape and dtype; a received array is new, native and writable."""
    assert got.dtype == expected.dtype.newbyteorder("=")
    assert got.shape == expected.shape
    np.testing.assert_array_equal(got, expected)
    assert got.flags.writeable


@cases
def test_gather_allgather_bcast(comm, dtype, shape, layout):
    """Every rank's array arrives unchanged, whatever its dtype, shape and layout."""
    x = array_of(comm.rank, dtype, shape, layout)
    expected = [array_of(rank, dtype, shape, layout) for rank in range(comm.size)]
    everyone = comm.allgather(x)
    assert isinstance(everyone, tuple)
    assert len(everyone) == comm.size
    for got, want in zip(everyone, expected):
        assert_same(got, want)
    root = comm.size - 1
    gathered = comm.gather(x, root)
    if comm.rank == root:
        for got, want in zip(gathered, expected):
            assert_same(got, want)
    else:
        assert gathered is None
    received = comm.bcast(x if comm.rank == root else None, root)
    if comm.rank == root:
        assert received is x
    else:
        assert_same(received, expected[root])


@cases
def test_alltoall_and_scatter(comm, dtype, shape, layout):
    """Rank i gets what each rank had for it; shapes may differ between pairs of ranks."""
    outgoing = [
        array_of(10 * comm.rank + to, dtype, (to, *shape), layout) for to in range(comm.size)
    ]
    incoming = comm.alltoall(tuple(outgoing))
    assert isinstance(incoming, tuple)
    for source, got in enumerate(incoming):
        assert_same(got, array_of(10 * source + comm.rank, dtype, (comm.rank, *shape), layout))
    rows = array_of(0, dtype, (comm.size, *shape), layout)
    assert_same(comm.scatter(rows if comm.rank == 0 else None), np.array(rows[comm.rank]))
    mine = comm.scatter(outgoing if comm.rank == comm.size - 1 else None, root=comm.size - 1)
    assert_same(
        mine, array_of(10 * (comm.size - 1) + comm.rank, dtype, (comm.rank, *shape), layout)
    )


@cases
def test_send_recv(comm, dtype, shape, layout):
    """Arrays and tuples go around the ring of ranks."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    x = array_of(comm.rank, dtype, shape, layout)
    want = array_of(left, dtype, shape, layout)
    if comm.size == 1:
        return
    comm.send(x, right, 1)
    comm.send([x, x[None]], right, 2)
    assert_same(comm.recv(left, 1), want)
    pair = comm.recv(left, 2)
    assert isinstance(pair, tuple)
    assert_same(pair[0], want)
    assert_same(pair[1], np.array(want[None]))


def reference(stack: np.ndarray, op: str) -> np.ndarray:
    """Reduce with NumPy along the first axis, in float64 and rounded once for float16."""
    if stack.dtype == bool and op != "mean":
        return stack.any(0) if op in ("sum", "max") else stack.all(0)
    wide = stack.astype(np.float64) if stack.dtype == np.float16 else stack
    result = np.asarray(getattr(np, op)(wide, axis=0))
    return result.astype(np.float64 if op == "mean" and stack.dtype.kind in "biu" else stack.dtype)


@given(
    dtype=st.sampled_from(DTYPES),
    shape=SHAPES,
    layout=st.sampled_from(sorted(LAYOUTS)),
    op=st.sampled_from(reduction.OPS),
)
def test_allreduce(comm, dtype, shape, layout, op):
    """Every reduction of every dtype is NumPy's, in a new array of the documented dtype."""
    if dtype.kind == "c" and op in ("max", "min"):
        return
    x = array_of(comm.rank, dtype, shape, layout)
    stack = np.stack([array_of(rank, dtype, shape, layout) for rank in range(comm.size)])
    got = comm.allreduce(x, op)
    want = reference(stack, op)
    assert got.dtype == want.dtype.newbyteorder("=")
    assert got.shape == shape
    assert got.flags.writeable
    if op == "mean":
        np.testing.assert_allclose(got, want, rtol=4 * np.finfo(want.dtype).eps)
    else:
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(x, array_of(comm.rank, dtype, shape, layout))


def test_allreduce_sums_by_default(comm):
    """ChainerMN's allreduce has no op: it sums."""
    np.testing.assert_array_equal(comm.allreduce(np.full(3, 2.0)), np.full(3, 2.0 * comm.size))


@pytest.mark.parametrize("dtype", "efdg")
@pytest.mark.parametrize("op", ["max", "min"])
def test_nan_wins_in_max_and_min(comm, dtype, op):
    """A NaN on any one rank is in the result of every rank, as with NumPy."""
    for rank in range(comm.size):
        x = np.array([1.0 + comm.rank, np.nan if comm.rank == rank else 0.0], dtype)
        got = comm.allreduce(x, op)
        assert got[0] == (comm.size if op == "max" else 1.0)
        assert np.isnan(got[1])


def test_float16_is_summed_in_float32(comm):
    """2048 + 1 is lost in float16 arithmetic; summing in float32 rounds once, at the end."""
    x = np.array([2048.0 if comm.rank == 0 else 1.0], np.float16)
    want = np.float16(2048.0 + (comm.size - 1))
    assert comm.allreduce(x)[0] == want


@pytest.mark.parametrize("op", ["sum", "max", "mean"])
def test_allreduce_in_pieces(comm, monkeypatch, op):
    """An array longer than one MPI count is reduced in pieces, to the same result."""
    monkeypatch.setattr(reduction, "MAX_COUNT", 7)
    x = np.arange(31, dtype=np.float32).reshape(1, 31) + comm.rank
    stack = np.stack([np.arange(31, dtype=np.float32)[None] + rank for rank in range(comm.size)])
    np.testing.assert_allclose(comm.allreduce(x, op), getattr(np, op)(stack, axis=0), rtol=1e-6)


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        ([1.0, 2.0], TypeError),
        (None, TypeError),
        (np.array(["a"]), TypeError),
        (np.array([None]), TypeError),
        (np.zeros(2, "M8[s]"), TypeError),
    ],
)
@pytest.mark.parametrize("operation", ["allgather", "alltoall", "bcast", "scatter", "gather"])
def test_bad_input_of_one_rank_raises_on_all(comm, bad, kind, operation):
    """The rank that is wrong is named everywhere, and the communicator still works afterwards."""
    wrong = comm.size - 1
    good = np.zeros(2)
    argument = bad if comm.rank == wrong else good
    if operation == "alltoall":
        argument = [argument] * comm.size
    elif operation == "scatter":
        argument = [bad] * comm.size
    calls = {
        "allgather": lambda: comm.allgather(argument),
        "alltoall": lambda: comm.alltoall(argument),
        "bcast": lambda: comm.bcast(argument, wrong),
        "scatter": lambda: comm.scatter(argument, wrong),
        "gather": lambda: comm.gather(argument, wrong),
    }
    with pytest.raises(kind, match=f"rank {wrong}" if comm.size > 1 else operation):
        calls[operation]()
    np.testing.assert_array_equal(comm.allreduce(np.ones(1)), [comm.size])


@pytest.mark.parametrize("operation", ["allgather", "allreduce", "alltoall", "bcast"])
def test_what_is_proposed_for_other_dtypes_is_there(comm, operation):
    """The method for objects, where there is one."""
    wrong = np.array([None])
    with pytest.raises(TypeError, match="arrays, got object") as caught:
        getattr(comm, operation)([wrong] * comm.size if operation == "alltoall" else wrong)
    for name in re.findall(r"\w+_obj", str(caught.value)):
        assert hasattr(comm, name)


@pytest.mark.parametrize("operation", ["alltoall", "scatter"])
def test_wrong_number_of_arrays(comm, operation):
    """One array too many is an error on every rank."""
    with pytest.raises(ValueError, match=f"{operation} takes {comm.size} arrays"):
        getattr(comm, operation)([np.zeros(1)] * (comm.size + 1))
    with pytest.raises(ValueError, match="0-dimensional"):
        getattr(comm, operation)(np.zeros(()))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    "mine",
    [
        lambda rank: (np.zeros((2, 3 + rank), "f"), "sum"),
        lambda rank: (np.zeros((2, 3), "f" if rank == 0 else "d"), "sum"),
        lambda rank: (np.zeros((2, 3), "f"), "sum" if rank == 0 else "max"),
        lambda rank: (np.zeros((2, 3), "f") if rank == 0 else None, "sum"),
    ],
    ids=["shape", "dtype", "op", "no array"],
)
def test_allreduce_of_different_arguments(comm, mine):
    """Ranks that do not agree all get the same error, naming the rank."""
    if comm.size < 2:
        pytest.skip("needs two ranks to differ")
    with pytest.raises(RankMismatchError, match="rank 1: the argument of allreduce is"):
        comm.allreduce(*mine(comm.rank))


def test_allreduce_of_wrong_arguments(comm):
    """What is wrong in the same way on every rank says what is wrong."""
    with pytest.raises(ValueError, match="op is one of sum, mean"):
        comm.allreduce(np.zeros(1), "median")
    with pytest.raises(TypeError, match="no order"):
        comm.allreduce(np.zeros(1, "D"), "max")


def test_mean_arrays(any_comm):
    """Every communicator averages arrays of mixed dtype and layout in place."""
    rank, size = any_comm.rank, any_comm.size
    rng = np.random.RandomState(0)
    values = [rng.rand(size, *shape) for shape in [(3, 4), (), (0, 2), (5,), (2, 3, 4), (7, 6)]]
    dtypes = [np.float32, np.float64, np.float32, np.float16, np.float32, np.float64]
    arrays = [value[rank].astype(dtype) for value, dtype in zip(values, dtypes)]
    arrays[4] = np.asfortranarray(arrays[4])
    arrays[5] = np.repeat(arrays[5], 2, axis=1)[:, ::2]
    if rank % 2:  # layouts may differ between ranks
        arrays[0] = np.asfortranarray(arrays[0])
    for _ in range(2):  # buffers are kept from call to call
        means = [array[...] for array in arrays]
        any_comm.mean_arrays(means)
        for got, value, dtype in zip(means, values, dtypes):
            want = value.astype(dtype).astype(np.float64).mean(axis=0)
            np.testing.assert_allclose(got, want, rtol=4 * np.finfo(dtype).eps)
            assert got.dtype == dtype
        values = [np.broadcast_to(mean, value.shape) for mean, value in zip(means, values)]


def test_mean_arrays_is_repeatable(any_comm):
    """The same input gives the same bits, call after call and on every rank."""
    x = np.random.RandomState(any_comm.rank).rand(1000).astype(np.float32)
    results = []
    for _ in range(3):
        y = x.copy()
        any_comm.mean_arrays([y])
        results.append(y.tobytes())
    assert len(set(results)) == 1
    assert len(set(any_comm.allgather_obj(results[0]))) == 1
