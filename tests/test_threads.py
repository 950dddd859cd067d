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


@given(
    affinities=st.lists(CORES, min_size=1, max_size=8),
    quota=st.none() | st.floats(0.1, 32),
)
def test_shares_do_not_exceed_the_cores(affinities, quota):
    """A rank has a thread at least; together they have no more than cores if that is possible."""
    shares = [_threads.fair_share(affinities, rank, quota) for rank in range(len(affinities))]
    assert min(shares) >= 1
    for share, cores in zip(shares, affinities):
        assert share <= len(cores)
    above_one = sum(share for share in shares if share > 1)
    assert above_one <= len(set().union(*affinities))
    assert quota is None or above_one <= quota


@given(cores=st.integers(1, 64), ranks=st.integers(1, 64), quota=st.integers(1, 64))
def test_ranks_that_are_not_pinned_share_evenly(cores, ranks, quota):
    """No whole core is left over that every rank could have had."""
    affinities = [range(cores)] * ranks
    assert _threads.fair_share(affinities, ranks - 1) == max(1, cores // ranks)
    assert _threads.fair_share(affinities, 0, quota) == max(1, min(cores, quota) // ranks)


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


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "400000 100000\n", "job/step/cpu.max": "200000 100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
    ],
)
def test_quota(tmp_path, files, quota):
    """Both versions of control groups are read, in a container and in a job of a batch system."""
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    own = tmp_path / "own"
    assert _threads.quota(tmp_path, own) == (quota if "job/step/cpu.max" not in files else 4)
    own.write_text("4:cpu:/\n0::/job/step\n")
    assert _threads.quota(tmp_path, own) == quota


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
        everyone = comm.allgather_obj(_threads.cores())
        share = _threads.fair_share(everyone, comm.rank, _threads.quota())
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


@pytest.mark.usefixtures("no_choice")
def test_fewer_ranks_get_no_more_threads(comm, monkeypatch):
    """The ranks that are not in a part still have their threads."""
    if comm.size == 1:
        return
    limit = _threads.limit_threads(comm.node_comm)
    monkeypatch.setattr(_threads, "cores", lambda: range(1000))
    assert _threads.limit_threads(comm.node_comm) == limit
    assert blas_threads() == {limit}


@pytest.mark.usefixtures("no_choice")
def test_the_user_decides_later(comm):
    """A variable that is changed after we set it is the user's again."""
    _threads.limit_threads(comm.node_comm)
    os.environ["OMP_NUM_THREADS"] = "3"
    assert _threads.limit_threads(comm.node_comm) is None
    assert os.environ["OMP_NUM_THREADS"] == "3"
