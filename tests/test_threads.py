"""Threads of BLAS are shared out among the ranks of a machine."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest
import threadpoolctl
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import _threads, create_communicator

CORES = st.sets(st.integers(0, 15), min_size=1)


@given(affinities=st.lists(CORES, min_size=1, max_size=8))
def test_shares_do_not_exceed_the_cores(affinities):
    """A rank has a thread at least; together they have no more than cores if that is possible."""
    shares = [_threads.fair_share(affinities, rank) for rank in range(len(affinities))]
    assert min(shares) >= 1
    for share, cores in zip(shares, affinities):
        assert share <= len(cores)
    above_one = sum(share for share in shares if share > 1)
    assert above_one <= len(set().union(*affinities))


@pytest.mark.parametrize(
    ("affinities", "shares"),
    [
        ([range(8)] * 2, [4, 4]),
        ([range(8)] * 3, [2, 2, 2]),
        ([range(2)] * 4, [1, 1, 1, 1]),
        ([{0}, {1}], [1, 1]),
        ([{0, 1, 2, 3}, {4, 5, 6, 7}], [4, 4]),
        ([range(4), {0, 1}], [3, 1]),
        ([range(16)], [16]),
    ],
)
def test_shares(affinities, shares):
    """Ranks that are pinned share nothing; ranks that are not share evenly."""
    assert [_threads.fair_share(affinities, rank) for rank in range(len(affinities))] == shares


@pytest.fixture
def no_choice(monkeypatch):
    """Forget what the test runner or the user set, and put everything back afterwards."""
    for name in _threads.VARIABLES:
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setattr(_threads, "_set_by_us", {})
    before = {pool["filepath"]: pool["num_threads"] for pool in threadpoolctl.threadpool_info()}
    yield
    for pool in threadpoolctl.ThreadpoolController().lib_controllers:
        pool.set_num_threads(before.get(pool.filepath, 1))


def blas_threads():
    """Return the thread counts of the BLAS libraries that are loaded."""
    np.ones((2, 2)) @ np.ones((2, 2))
    return {p["num_threads"] for p in threadpoolctl.threadpool_info() if p["user_api"] == "blas"}


@pytest.mark.usefixtures("no_choice")
def test_creating_a_communicator_limits_threads():
    """With several ranks each has its share; a rank alone on its machine keeps what it had."""
    before = blas_threads()
    with create_communicator("naive") as comm:
        if comm.size == 1:
            assert blas_threads() == before
            assert "OMP_NUM_THREADS" not in os.environ
            return
        everyone = comm.allgather_obj(_threads._cores())
        share = _threads.fair_share(everyone, comm.rank)
        assert blas_threads() == {share}
        assert {os.environ[name] for name in _threads.VARIABLES} == {str(share)}
        # A second communicator does not take our own setting for the user's.
        assert _threads.limit_threads(comm.node_comm) == share
        pairs = Counter(core for cores in everyone for core in cores)
        assert sum(comm.allgather_obj(share)) <= max(len(pairs), comm.size)


@pytest.mark.usefixtures("no_choice")
@pytest.mark.parametrize("name", _threads.VARIABLES)
def test_the_user_decides(comm, monkeypatch, name):
    """A variable set on any rank of the machine leaves all ranks alone."""
    before = blas_threads()
    if comm.rank == comm.size - 1:
        monkeypatch.setenv(name, "7")
    assert _threads.limit_threads(comm.node_comm) is None
    assert blas_threads() == before
