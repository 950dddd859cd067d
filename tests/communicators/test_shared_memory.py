"""What is particular to communicators that know nodes; the rest is tested with all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import RankMismatchError, create_communicator
from chainer_dist.communicators.shared_memory import between_nodes, slots, tuning
from chainer_dist.communicators.shared_memory.layout import Tuning, partition


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Let few elements take many blocks."""
    monkeypatch.setattr(slots, "BLOCK_BYTES", 512)


def values(rank, sizes, dtype):
    """Return arrays that differ between ranks."""
    rng = np.random.RandomState([rank, *sizes])
    return [rng.randn(size).astype(dtype) for size in sizes]


@given(
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=6),
    dtype=st.sampled_from([np.float16, np.float32, np.float64, np.complex64]),
)
def test_any_sizes_on_any_nodes(grouped_kinds, sizes, dtype):
    """Arrays that end anywhere in a block, over more blocks than there are slots."""
    arrays = values(grouped_kinds.rank, sizes, dtype)
    grouped_kinds.mean_arrays(arrays)
    everyone = [values(rank, sizes, dtype) for rank in range(grouped_kinds.size)]
    for got, same in zip(arrays, zip(*everyone)):
        want = np.mean([x.astype(np.complex128) for x in same], axis=0)
        np.testing.assert_allclose(got, want, rtol=1e-3 if dtype == np.float16 else 1e-5, atol=2e-3)
    mine = [x.tobytes() for x in arrays]
    assert grouped_kinds.allgather_obj(mine) == [mine] * grouped_kinds.size


@given(
    sizes=st.lists(st.integers(0, 40), max_size=8).map(tuple),
    capacity=st.integers(1, 20),
    reducers=st.integers(1, 3),
    whole=st.booleans(),
)
def test_blocks(sizes, capacity, reducers, whole):
    """They have each element once, in order, and if wanted no part of an array beside another one."""
    arrays = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]) if sizes else []
    found = partition(sizes, capacity, reducers, whole=whole)
    elements = []
    for block in found:
        views = [view for each in block.slices for view in each.views(arrays)]
        elements += np.concatenate(views).tolist()
        assert block.stop - block.start == sum(view.size for view in views) <= capacity
        beside = [number for number in block.arrays if sizes[number]]
        if whole and len(beside) > 1:
            assert block.stop - block.start == sum(sizes[number] for number in beside)
    assert elements == list(range(sum(sizes)))


@pytest.mark.parametrize("most", [1, 8], ids=["by MPI", "directly"])
def test_sums_between_nodes(grouped, monkeypatch, most):
    """Whoever sums up: from where the arrays are, in whatever order they are in memory."""
    monkeypatch.setattr(between_nodes, "MOST_NODES", most)
    sizes = [3, 1, 900, 5000, 2, 260]
    arrays = values(grouped.rank, sizes, np.float32)
    strided = np.zeros(1200, np.float32)
    arrays += [strided[::2], arrays[3].astype(np.float32).reshape(50, 100).T]
    arrays[-2][...] = arrays[3][:600]
    expected = [grouped.mpi_comm.allreduce(x.astype(np.float64)) / grouped.size for x in arrays]
    grouped.mean_arrays(arrays)
    for got, want in zip(arrays, expected):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert not strided[1::2].any()


def test_ranks_that_are_late(grouped):
    """A rank that comes late, or leaves early, finds what it needs, many times over."""
    for turn in range(12):
        if grouped.rank == turn % grouped.size:
            sum(range(200_000))
        x = np.full(1000, float(turn + grouped.rank))
        grouped.mean_arrays([x])
        assert (x == turn + (grouped.size - 1) / 2).all()


def test_same_bits_each_time(grouped):
    """The order of summation does not depend on which blocks are under way when."""
    results = []
    for turn in range(4):
        arrays = values(grouped.rank, [5000, 3, 7000], np.float32)
        if grouped.rank == turn % grouped.size:
            sum(range(100_000))
        grouped.mean_arrays(arrays)
        results.append([x.tobytes() for x in arrays])
    assert results == [results[0]] * 4


def test_memory_is_given_back():
    """Communicators that were used come and go; MPI has room for few windows at a time."""
    for turn in range(50):
        with create_communicator("shared_memory") as comm:
            x = np.full(10, float(comm.rank))
            comm.mean_arrays([x])
            assert (x == (comm.size - 1) / 2).all(), turn


def test_two_at_a_time():
    """Communicators have memory of their own."""
    with create_communicator("shared_memory") as one, create_communicator("shared_memory") as two:
        for turn in range(3):
            for comm in (one, two, one):
                x = np.full(20_000, float(comm.rank * turn))
                comm.mean_arrays([x])
                assert (x == turn * (comm.size - 1) / 2).all()


def test_the_same_array_twice(grouped):
    """An array that is there twice is averaged once."""
    x = np.arange(1500.0) + grouped.rank
    others = [np.ones(700), np.ones(900)]
    grouped.mean_arrays([x, others[0], x, others[1], x])
    np.testing.assert_allclose(x, np.arange(1500.0) + (grouped.size - 1) / 2)


def test_few_slots(grouped, monkeypatch):
    """On a node of very many ranks each has fewer blocks under way."""
    monkeypatch.setattr(slots, "_NODE_BYTES", 1)
    x = np.arange(5000.0) * (1 + grouped.rank)
    grouped.mean_arrays([x])
    np.testing.assert_allclose(x, np.arange(5000.0) * (1 + grouped.size) / 2)


def test_tuning(grouped, monkeypatch, capsys):
    """All ranks choose the same of what there is room for, say it once, and exchange as before."""
    monkeypatch.setattr(tuning, "_FEWEST_BYTES", 128)
    chosen = grouped.tune(5000)
    assert grouped.allgather_obj(chosen) == [chosen] * grouped.size
    assert chosen == grouped.transport.tuning
    assert chosen.block_bytes in {512, 256, 128}
    assert (chosen.in_flight > 0) == (grouped.inter_size > 1)
    said = capsys.readouterr().err
    assert ("tuned for 5,000 bytes" in said) == (grouped.rank == 0 and grouped.size > 1)
    for each in (chosen, Tuning(128, min(1, chosen.in_flight)), grouped.transport.most):
        grouped.transport.tuning = each
        x = np.arange(5000.0) + grouped.rank
        grouped.mean_arrays([x])
        np.testing.assert_allclose(x, np.arange(5000.0) + (grouped.size - 1) / 2)


def test_tuning_with_bad_sizes(grouped):
    """Every rank is told, and no exchange begins."""
    with pytest.raises(ValueError, match="nbytes is 0"):
        grouped.tune(0)
    if grouped.size > 1:
        with pytest.raises(RankMismatchError, match="rank 1: nbytes is 2, expected 1"):
            grouped.tune(1 + min(grouped.rank, 1))
