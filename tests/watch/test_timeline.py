"""Timelines: every rank's operations in one trace, and a table that adds up to the wall time."""

from __future__ import annotations

import json
import re
import sys
import threading
import time

import chainer
import numpy as np
import pytest

import chainer_dist
import mpi_job
from chainer_dist.collectives.operation import CATEGORIES, EXCHANGE, Kind, Operation
from chainer_dist.watch import timeline
from chainer_dist.watch.timeline import Part, _trace, table

STEPS, PAUSE = 3, 0.1


def shared_path(comm, tmp_path):
    """Return a file in rank 0's folder."""
    return comm.bcast_obj(str(tmp_path / "trace.json"))


def make_optimizer(comm):
    """Return an optimizer after its first update, and the model."""
    model = chainer.links.Linear(40, 30)
    optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.Adam(), comm)
    optimizer.setup(model)
    x = np.ones((2, 40), np.float32)
    optimizer.update(lambda: chainer.functions.sum(model(x)))
    return optimizer, lambda: chainer.functions.sum(model(x))


def load(path):
    """Return the trace and its complete events."""
    trace = json.loads(open(path, encoding="utf-8").read())  # noqa: PTH123, SIM115
    return trace, [event for event in trace["traceEvents"] if event["ph"] == "X"]


def record(comm, path, **options):
    """Record steps of which the last rank's forward takes long; say for how long, and from when to when."""
    optimizer, loss = make_optimizer(comm)

    def slow():
        if comm.rank == comm.size - 1:
            time.sleep(PAUSE)
        return loss()

    before = time.perf_counter()
    with timeline(path, comm, **options) as recording:
        started = time.perf_counter()
        for _ in range(STEPS):
            optimizer.update(slow)
        time.sleep(PAUSE)
        within = time.perf_counter() - started
    return recording, within, (before, time.perf_counter())


def test_seconds_add_up_to_wall_time(any_comm, tmp_path, capfd):
    """Each moment counts once, under what was done then: planted sleeps are where they belong."""
    recording, within, around = record(any_comm, shared_path(any_comm, tmp_path))
    seconds = recording.seconds
    assert set(seconds) == {*CATEGORIES, "other"}
    assert min(seconds.values()) >= 0
    assert sum(seconds.values()) == pytest.approx(recording.duration, abs=1e-9)
    assert within <= recording.duration <= around[1] - around[0]
    assert seconds["other"] >= PAUSE
    asleep = STEPS * PAUSE
    if any_comm.rank == any_comm.size - 1:
        assert seconds["forward"] >= asleep
    else:  # the others wait for it
        assert seconds["forward"] < asleep
        assert seconds["waiting"] + seconds["exchange"] > asleep * 0.8
    error = capfd.readouterr().err
    if any_comm.rank == 0:
        rows = [line.split() for line in error.splitlines()]
        assert rows[1] == ["rank", *CATEGORIES, "other"]
        assert [row[0] for row in rows[2:]] == [*map(str, range(any_comm.size)), "mean"]
        for row in rows[2:]:
            assert sum(map(float, row[1:])) == pytest.approx(100, abs=0.5)
        mine = [seconds[name] / recording.duration * 100 for name in (*CATEGORIES, "other")]
        assert [float(share) for share in rows[2][1:]] == pytest.approx(mine, abs=0.2)
    else:
        assert error == ""


def test_the_trace(any_comm, tmp_path):
    """All ranks' events, named and nested as Perfetto wants them, on one clock."""
    path = shared_path(any_comm, tmp_path)
    recording, _, around = record(any_comm, path)
    everyone = any_comm.allgather_obj(recording.seconds)
    began, ended = zip(*any_comm.allgather_obj(around))
    if any_comm.rank != 0:
        return
    trace, events = load(path)
    size = any_comm.size
    assert trace["displayTimeUnit"] == "ms"
    for event in trace["traceEvents"]:
        assert {"ph", "name", "pid", "tid"} <= set(event)
        assert event["ph"] in "XM"
    names = {
        event["pid"]: event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] == "process_name"
    }
    assert [name.partition(" (")[0] for name in names.values()] == [
        f"rank {r}" for r in range(size)
    ]
    assert {event["pid"] for event in events} == set(range(size))
    assert trace["otherData"]["seconds"] == everyone
    longest = (max(ended) - min(began)) * 1e6
    assert max(trace["otherData"]["duration"]) * 1e6 <= longest
    for event in events:
        assert event["cat"] in CATEGORIES
        assert event["dur"] >= 0
        assert 0 <= event["ts"] <= event["ts"] + event["dur"] <= longest
    for rank in range(size):
        own = [event for event in events if event["pid"] == rank]
        updates = [event for event in own if event["name"] == "update" and event["dur"] > 0]
        assert len([event for event in own if event["name"] == "forward"]) == STEPS
        assert_nested([event for event in own if event["tid"] == 0])
        packs = any(event["cat"] == "packing" for event in own)
        assert packs == (any_comm.name == "flat" or (any_comm.name == "shared_memory" and size > 1))
        # Times of outermost events are the wall time less what is in none.
        outer = sum(
            event["dur"]
            for event in updates
            if not any(
                other is not event and other["ts"] <= event["ts"] < other["ts"] + other["dur"]
                for other in updates
            )
        )
        inside = sum(value for key, value in everyone[rank].items() if key != "other")
        assert outer / 1e6 == pytest.approx(inside, abs=0.01)
    # Clocks agree: nobody leaves the comparison of parameters before the last has come to it.
    compared = [event for event in events if event["name"] == "comparison of parameters"]
    for step in range(STEPS):
        same = [[e for e in compared if e["pid"] == rank][step] for rank in range(size)]
        last = max(event["ts"] for event in same)
        assert min(event["ts"] + event["dur"] for event in same) > last - 1000


def assert_nested(events):
    """Fail unless of two events one is within the other, or they are apart."""
    open_until = []
    for event in sorted(events, key=lambda each: (each["ts"], -each["dur"])):
        end = event["ts"] + event["dur"]
        while open_until and open_until[-1] <= event["ts"] + 0.01:
            open_until.pop()
        assert not open_until or end <= open_until[-1] + 0.01
        open_until.append(end)


def test_the_same_number_everywhere(comm, tmp_path):
    """Collectives carry their number, by which one is found on all ranks."""
    path = shared_path(comm, tmp_path)
    with timeline(path, comm):
        number = comm.operation_log.number
        comm.allreduce(np.zeros((3, 4), np.float32), op="max")
        comm.bcast_obj("x")
    if comm.rank == 0:
        _, events = load(path)
        outer = [(e["pid"], e["name"], e["args"].get("operation")) for e in events if e["args"]]
        for rank in range(comm.size):
            own = [(name, found) for pid, name, found in outer if pid == rank]
            assert own[0] == ("allreduce(x=(3, 4) float32, op='max')", number + 1)
            assert own[1] == ("bcast_obj(obj='x')", number + 2)


def test_only_so_many_events(comm, tmp_path, capfd):
    """What is beyond the limit is in the table all the same, and that it is missing is said."""
    path = shared_path(comm, tmp_path)
    recording, *_ = record(comm, path, max_events=5)
    assert recording.seconds["forward"] > 0
    said = capfd.readouterr().err
    if comm.rank == 0:
        trace, events = load(path)
        assert len(events) == 5 * comm.size
        assert min(trace["otherData"]["dropped"]) > 0
        assert f"lacks the last {sum(trace['otherData']['dropped'])} operations" in said


def test_other_threads(comm, tmp_path, capfd):
    """They have a track of their own, and are not in the main thread's wall time."""
    path = shared_path(comm, tmp_path)

    def work():
        with Operation(Kind("in the background", EXCHANGE)):
            time.sleep(PAUSE)

    with timeline(path, comm) as recording:
        thread = threading.Thread(target=work, name="helper")
        thread.start()
        thread.join()
    assert recording.seconds["exchange"] == 0
    if comm.rank == 0:
        _, events = load(path)
        assert {(e["name"], e["tid"]) for e in events} == {("in the background", 1)}
        assert re.search(r"in other threads, exchange: 0\.[1-9]", capfd.readouterr().err)


def test_a_folder_that_is_not_there(comm, tmp_path):
    """Every rank raises before anything is recorded."""
    path = comm.bcast_obj(str(tmp_path / "missing" / "trace.json"))
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing"), timeline(path, comm):
        raise AssertionError


@pytest.mark.parametrize("name", [".", "trace.json", "/"])
def test_a_folder_in_the_place_of_the_file(comm, tmp_path, monkeypatch, name):
    """Every rank raises before anything is recorded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace.json").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder, and no file"), timeline(name, comm):
        raise AssertionError


def test_an_error_at_the_end_of_one_rank(comm, tmp_path, monkeypatch):
    """Whatever it is, all ranks raise it."""

    def fail(*_):
        raise ArithmeticError("no table")

    monkeypatch.setattr(sys.modules[timeline.__module__], "table", fail)
    path = tmp_path / "trace.json"
    with pytest.raises(ArithmeticError, match="no table"), timeline(path, comm):
        comm.allgather_obj(1)


def test_a_file_that_cannot_be_written(comm, tmp_path):
    """Every rank raises at the end, and what was there before stays."""
    path = tmp_path / "trace.json"
    with pytest.raises(OSError, match="the timeline cannot be written"), timeline(path, comm):
        path.mkdir()  # a folder cannot be replaced by a file
    assert [each.name for each in tmp_path.iterdir()] == ["trace.json"]


def test_an_exception_within(comm, tmp_path, capfd):
    """It passes, nobody waits for anybody, nothing is written, and that is said."""
    path = tmp_path / "trace.json"
    path.write_text("before", encoding="utf-8")

    def fail():
        with timeline(path, comm):
            comm.allgather_obj(1)
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fail()
    assert path.read_text(encoding="utf-8") == "before"
    assert f"no timeline is written, as rank {comm.rank} has failed" in capfd.readouterr().err
    comm.allgather_obj(1)


@pytest.mark.mpi_skip
def test_clocks_that_differ(tmp_path):
    """Ranks whose clocks are hours apart, and drift, are brought together."""
    path = tmp_path / "trace.json"
    code = f"""
import time
from mpi4py import MPI
rank = MPI.COMM_WORLD.rank
real = time.perf_counter
time.perf_counter = lambda: real() * (1 + rank) + 5000 * rank
import chainer_dist
from chainer_dist.collectives.group import Group
Group.inter_rank = property(lambda comm: comm.rank)  # only other nodes have other clocks
from chainer_dist.watch import timeline
comm = chainer_dist.create_communicator("naive")
with timeline({str(path)!r}, comm):
    for _ in range(20):
        time.sleep(0.02)
        comm.mpi_comm.Barrier()
        comm.allgather_obj(1)
"""
    job = mpi_job.run([sys.executable, "-c", code], 2, timeout=60)
    assert job.status == 0, job.output
    _, events = load(path)
    gathered = [event for event in events if event["name"].startswith("allgather_obj")]
    begun = [[e["ts"] for e in gathered if e["pid"] == rank] for rank in range(2)]
    gaps = [abs(one - other) for one, other in zip(*begun)]
    assert len(gaps) == 20
    # Without the second comparison those at the end would be 0.4 seconds apart.
    assert sorted(gaps[-5:])[2] < 100_000, gaps


@pytest.mark.mpi_skip
@pytest.mark.parametrize("ranks", [None, 2, 3])
def test_a_whole_job(ranks, tmp_path):
    """From the environment: from the first communicator to the end, whatever was finalized."""
    code = """
import time, chainer_dist, chainer_dist.watch
from mpi4py import MPI
part = chainer_dist.create_communicator("naive", MPI.COMM_SELF)
with chainer_dist.create_communicator("naive") as comm:
    comm.allgather_obj("first")
    time.sleep(0.1)
with chainer_dist.create_communicator("naive") as comm:
    comm.allgather_obj("second")
"""
    path = tmp_path / "trace.json"
    env = mpi_job.environment(CHAINER_DIST_TIMELINE=str(path))
    job = mpi_job.run([sys.executable, "-c", code], ranks, timeout=60, env=env)
    assert job.status == 0, job.output
    assert job.output.count("where the time goes") == 1, job.output
    _, events = load(path)
    for rank in range(ranks or 1):
        names = [event["name"] for event in events if event["pid"] == rank]
        assert "allgather_obj(obj='first')" in names
        assert "allgather_obj(obj='second')" in names
    assert [each.name for each in tmp_path.iterdir()] == ["trace.json"]


@pytest.mark.mpi_skip
def test_a_job_that_fails(tmp_path):
    """It ends as it would without a timeline."""
    code = """
import chainer_dist, chainer_dist.watch
comm = chainer_dist.create_communicator("naive")
if comm.rank == 1:
    raise ValueError("boom")
comm.allgather_obj(1)
"""
    env = mpi_job.environment(CHAINER_DIST_TIMELINE=str(tmp_path / "trace.json"))
    job = mpi_job.run([sys.executable, "-c", code], 2, timeout=60, env=env)
    assert job.status == 1, job.output
    assert "ValueError: boom" in job.output
    assert not list(tmp_path.iterdir())


@pytest.mark.mpi_skip
def test_many_ranks(tmp_path):
    """A table of a thousand ranks is of three lines; the trace has all of them."""
    zeros = dict.fromkeys(CATEGORIES, 0.0)
    parts = [
        Part("h", 10.0, {**zeros, "forward": 2.0, "other": 8.0}, zeros, [], 0, {1: "main"})
        for _ in range(999)
    ]
    parts.append(
        Part("h", 10.0, {**zeros, "forward": 7.0, "other": 3.0}, zeros, [], 0, {1: "main"})
    )
    rows = [line.split() for line in table(parts, tmp_path).splitlines()[2:]]
    assert [row[0] for row in rows] == ["least", "most", "mean"]
    assert [row[1] for row in rows] == ["20.0", "70.0", "20.1"]
    assert len(json.loads("".join(_trace(parts)))["otherData"]["duration"]) == 1000
