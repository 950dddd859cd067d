"""A function on all ranks, against Python's own map."""

from __future__ import annotations

import gc
import itertools
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mpi_job
from chainer_dist import FailedItem, FailedItemsError, RankMismatchError, pmap


class Unwell(Exception):  # noqa: N818 - what it is, not an error of ours
    """Of a class that needs more than a message."""

    def __init__(self, number, reason):
        super().__init__(number)
        self.reason = reason


def triple(x):
    """Return three times a number."""
    return 3 * x


def consume(results, seen):
    """Keep each result as it comes."""
    for result in results:
        seen.append(result)


def on_root(comm, items):
    """Return items on rank 0, None elsewhere."""
    return items if comm.rank == 0 else None


@given(
    n=st.integers(0, 40),
    chunksize=st.integers(1, 7),
    buffersize=st.none() | st.integers(1, 20),
    ordered=st.booleans(),
    everywhere=st.booleans(),
    is_generator=st.booleans(),
)
def test_it_is_map(comm, n, chunksize, buffersize, ordered, everywhere, is_generator):
    """Each item once, in order if wanted, on rank 0 or everywhere, whatever items are."""
    items = (x for x in range(n)) if is_generator else range(n)
    results = list(
        pmap(
            triple,
            on_root(comm, items),
            comm,
            chunksize=chunksize,
            buffersize=buffersize,
            ordered=ordered,
            everywhere=everywhere,
        )
    )
    if comm.rank > 0 and not everywhere:
        assert results == []
        return
    assert sorted(results) == list(map(triple, range(n)))
    if ordered:
        assert results == list(map(triple, range(n)))
    if everywhere:  # out of order, but in one order
        assert all(each == results for each in comm.allgather_obj(results))


@given(
    bad=st.sets(st.integers(0, 29)),
    chunksize=st.integers(1, 5),
    ordered=st.booleans(),
    everywhere=st.booleans(),
)
def test_an_item_that_fails_costs_no_other(comm, bad, chunksize, ordered, everywhere):
    """All other results are there; failures stand in their places, and are raised at the end."""

    def function(x):
        if x in bad:
            raise Unwell(x, "bad") if x % 3 else SystemExit(x)
        return triple(x)

    options = {"chunksize": chunksize, "ordered": ordered, "everywhere": everywhere}
    got = list(pmap(function, range(30), comm, on_error="return", **options))
    gets = comm.rank == 0 or everywhere
    failed = [x for x in got if isinstance(x, FailedItem)]
    if gets:
        assert {x.index for x in failed} == bad
        assert sorted(x for x in got if x not in failed) == [
            triple(x) for x in range(30) if x not in bad
        ]
        for each in failed:
            assert 0 <= each.rank < comm.size
            kind = "Unwell" if each.index % 3 else "SystemExit"
            assert f"{kind}: {each.index} (at {__file__}:" in each.error
    if gets and ordered:
        assert [x.index if isinstance(x, FailedItem) else x // 3 for x in got] == list(range(30))

    seen = []
    if not bad:
        list(pmap(function, range(30), comm, **options))
        return
    with pytest.raises(FailedItemsError, match=f"^{len(bad)} of the items failed:") as caught:
        consume(pmap(function, range(30), comm, **options), seen)
    assert [x.index for x in caught.value.failures] == sorted(bad)
    assert len(set(comm.allgather_obj(str(caught.value)))) == 1
    if everywhere:
        assert len(caught.value.results) == 30
    else:
        assert caught.value.results is None
        assert len(seen) == (30 if comm.rank == 0 else 0)  # list() would have lost them


def test_errors_have_pickles(comm):
    """What was raised can be sent on and raised again, with what it carries."""
    error = FailedItemsError([FailedItem(2, 0, "early"), FailedItem(4, 1, "late")], ["x"])
    again = comm.bcast_obj(error)
    assert [each.index for each in again.failures] == [2, 4]
    assert again.results == ["x"]
    assert "item 2 failed on rank 0: early" in str(again) == str(error)
    many = FailedItemsError([FailedItem(i, 0, "") for i in range(9)])
    assert str(many).endswith("and 4 more")


def test_all_ranks_work(comm):
    """Rank 0 deals out and works as well; nobody does everything while others can."""
    barrier = comm.split(0, comm.rank)
    n = 5 * comm.size

    def function(x):
        # Every rank has to be in its first item before any rank can leave it.
        if first:
            first.pop()
            barrier.mpi_comm.Barrier()
        return x, comm.rank

    first = [True]
    results = list(pmap(function, range(n), comm))
    if comm.rank == 0:
        assert [x for x, _ in results] == list(range(n))
        assert {rank for _, rank in results} == set(range(comm.size))
    barrier.finalize()


def test_uneven_items_are_balanced(comm):
    """While one rank is kept by a long item, the others do all the rest."""
    if comm.size == 1:
        pytest.skip("there is nobody to balance with")
    private = comm.split(0, comm.rank)

    def function(x):
        # The first item is rank 1's; it ends when rank 0 has taken 40 more.
        return private.recv_obj(0) if x < 0 else comm.rank

    def items():
        yield -1
        for x in range(50):
            if x == 40:
                private.send_obj("released", 1)
            yield x

    results = list(pmap(function, on_root(comm, items()), comm))
    if comm.rank == 0:
        assert results[0] == "released"
        assert results[1:41].count(1) <= 1  # what it had in reserve
    private.finalize()


def test_closures_and_what_cannot_be_pickled(comm):
    """The function may be anything; an item or a result that cannot travel fails alone."""
    lock = threading.Lock()
    offset = [10]

    def function(x):
        with lock:
            return (lambda: x) if isinstance(x, int) and x % 5 == 0 else (x, offset[0])

    got = list(pmap(function, range(20), comm, chunksize=3, on_error="return", everywhere=True))
    for x, each in enumerate(got):
        if x % 5:
            assert each == (x, 10)
        elif comm.size > 1:
            assert each.index == x
            assert "lambda" in each.error
        else:
            assert each() == x

    items = [1, threading.Lock(), 2, Untransportable(), 3]
    got = list(pmap(type, on_root(comm, items), comm, on_error="return", chunksize=1))
    if comm.rank == 0:
        names = [x.error if isinstance(x, FailedItem) else x.__name__ for x in got]
        assert names[0] == names[2] == names[4] == "int"
        assert names[1] == "lock" or "pickle" in names[1]
        assert names[3] == "Untransportable" or "no way in" in names[3]


def no_way_in():
    """Fail when it is unpickled."""
    raise ValueError("no way in")


class Untransportable:
    """Can be pickled, and not unpickled."""

    def __reduce__(self):
        return no_way_in, ()


def test_results_that_other_ranks_cannot_unpickle(comm):
    """All ranks raise what those have met, and none waits."""
    if comm.size == 1:
        pytest.skip("nothing is unpickled")

    def function(_):
        return Untransportable() if comm.rank == 0 else 1

    with pytest.raises(ValueError, match="rank 1: no way in"):
        list(pmap(function, range(comm.size), comm, chunksize=1, everywhere=True))
    assert comm.allgather_obj(comm.rank) == list(range(comm.size))


def test_large_items_and_results(comm):
    """Several megabytes go both ways at once, and nobody waits for ever for the other to receive."""
    arrays = [np.full(400_000 + i, i, np.float64) for i in range(6 * comm.size)]
    results = pmap(lambda x: np.concatenate([x, x]), on_root(comm, arrays), comm)
    for x, y in zip(arrays, results):
        np.testing.assert_array_equal(y, np.concatenate([x, x]))


def test_generators_without_end(comm):
    """Items are taken only so far ahead of the results; closing early frees all ranks."""
    taken = []

    def endless():
        for x in itertools.count():
            taken.append(x)
            yield x

    for buffersize in (4, 12):
        taken.clear()
        results = pmap(triple, on_root(comm, endless()), comm, buffersize=buffersize, chunksize=2)
        for number, result in enumerate(itertools.islice(results, 30)):
            assert result == 3 * number
            assert len(taken) <= number + 1 + buffersize + 2
        assert taken == [] if comm.rank else len(taken) >= 30
        if comm.rank == 0:
            results.close()
        assert comm.allgather_obj(comm.rank) == list(range(comm.size))

    for result in pmap(triple, on_root(comm, endless()), comm):
        assert result == 0
        break  # nobody holds it any more
    gc.collect()
    assert comm.allgather_obj(comm.rank) == list(range(comm.size))


UNFINISHED = """
import chainer_dist
comm = chainer_dist.create_communicator()
results = chainer_dist.pmap(abs, range(-1000, 0) if comm.rank == 0 else None, comm)
print(next(results, "none"))
"""


@pytest.mark.mpi_skip
@pytest.mark.parametrize("timeline", [False, True])
def test_results_that_are_left_at_the_end(tmp_path, timeline):
    """Rank 0 ends with them in its hands, and the job ends, too."""
    more = {"CHAINER_DIST_TIMELINE": str(tmp_path / "trace.json")} if timeline else {}
    command = [sys.executable, "-c", UNFINISHED]
    job = mpi_job.run(command, 3, timeout=60, env=mpi_job.environment(**more))
    assert job.status == 0, job.output
    assert job.output.count("none") == 2
    assert [path.name for path in tmp_path.iterdir()] == [*["trace.json"] * timeline]


def test_errors_of_the_items(comm):
    """What items raise is raised on every rank, after the results before it."""

    class Local(Exception):  # noqa: N818 - cannot be pickled
        pass

    def items(kind):
        yield from range(5)
        raise kind("out of items")

    where = "^rank 0: out of items" if comm.size > 1 else "^out of items"
    for everywhere in (False, True):
        with pytest.raises(ArithmeticError, match=where):
            list(pmap(triple, items(ArithmeticError), comm, chunksize=3, everywhere=everywhere))
    seen = []
    where = "^rank 0: Local: out of items" if comm.rank else "out of items"
    with pytest.raises(Exception, match=where):
        consume(pmap(triple, items(Local), comm, chunksize=3), seen)
    assert seen == ([0, 3, 6, 9, 12] if comm.rank == 0 else [])


def test_one_at_a_time(comm):
    """A second one on the same communicator, before the end of the first, is an error, not a stall."""
    outer = pmap(triple, range(6), comm)
    if comm.rank == 0:
        with pytest.raises(RuntimeError, match="has not come to the end of another pmap"):
            pmap(triple, range(3), comm)
        assert list(outer) == [0, 3, 6, 9, 12, 15]
    assert list(pmap(triple, range(3), comm, everywhere=True)) == [0, 3, 6]


def test_wrong_arguments_are_errors_on_all(comm):
    """Whatever is wrong on one rank, every rank says so."""
    last = comm.size - 1
    for options, kind, text in (
        ({"chunksize": 0}, ValueError, "chunksize is 0, expected 1 or more"),
        ({"chunksize": "x"}, TypeError, "chunksize is 'x'"),
        ({"buffersize": -1}, ValueError, "buffersize is -1"),
        ({"on_error": "ignore"}, ValueError, "on_error is 'ignore', expected 'raise' or 'return'"),
    ):
        with pytest.raises(kind, match=text):
            pmap(triple, range(3), comm, **(options if comm.rank == last else {}))
    with pytest.raises(TypeError, match="not iterable"):
        pmap(triple, None, comm)
    if comm.size > 1:
        with pytest.raises(RankMismatchError, match="rank 1: ordered is False, expected True"):
            pmap(triple, range(3), comm, ordered=comm.rank != 1)


def test_progress(comm, capsys, monkeypatch):
    """Rank 0 alone shows a bar, with the number of items where that is known."""
    pytest.importorskip("tqdm")
    for items, text in ((range(7), "7/7"), (iter(range(7)), "7item")):
        assert list(pmap(triple, items, comm, progress=True, everywhere=True)) == [
            0, 3, 6, 9, 12, 15, 18
        ]  # fmt: skip
        shown = capsys.readouterr().err
        assert (text in shown) == (comm.rank == 0)
    if comm.rank == 0:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        pmap(triple, range(3), comm, progress=True)


STALL = """
import time, chainer_dist
comm = chainer_dist.create_communicator("naive")
def function(x):
    if comm.rank == 0:
        time.sleep(1.5)
    return x
print(list(chainer_dist.pmap(function, range(2) if comm.rank == 0 else None, comm)))
"""


@pytest.mark.mpi_skip
def test_who_waits_is_watched():
    """The report of a stall says that a rank waits for rank 0, and where that is."""
    env = mpi_job.environment(CHAINER_DIST_STALL_WARN="0.4")
    job = mpi_job.run([sys.executable, "-c", STALL], 2, timeout=60, env=env)
    assert job.status == 0, job.output
    assert "[0, 1]" in job.output
    assert "rank 1 in recv_obj(source=0" in job.output
    assert "in function" in job.output


DEATH = """
import os, chainer_dist
comm = chainer_dist.create_communicator("naive")
def function(x):
    if x == 3:
        {death}
    return x
print(list(chainer_dist.pmap(function, range(8), comm)))
"""


@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    "death",
    ["raise KeyboardInterrupt", pytest.param("os.kill(os.getpid(), 9)", marks=pytest.mark.faults)],
)
def test_a_rank_that_dies_ends_the_job(death):
    """Nobody waits for it."""
    job = mpi_job.run([sys.executable, "-c", DEATH.format(death=death)], 2, timeout=60)
    assert job.status not in {0, None}, job.output
