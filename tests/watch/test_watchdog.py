"""The watchdog: planted stalls, whose reports name who is missing, and what is done instead."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import time

import pytest

import mpi_job
from chainer_dist import _connections
from chainer_dist.watch import hosts, inquiry, report
from chainer_dist.watch import listener as listeners
from chainer_dist.watch.address import Address, describe_self, process_state
from chainer_dist.watch.inquiry import Silence
from chainer_dist.watch.listener import REQUEST_BYTES, Listener
from chainer_dist.watch.settings import Settings, from_environment

HEADER = """
import ctypes, itertools, os, signal, subprocess, sys, threading, time
import chainer, chainer_dist, chainer_dist.watch
import numpy as np
from chainer_dist.collectives.operation import Kind, Operation
comm = chainer_dist.create_communicator({kind!r})
last = comm.size - 1
def culprit():
    {statement}
comm.allgather_obj(0)
"""

ENDING = "ending the job, stalled for"


def run(code, ranks, statement="pass", kind="naive", **environment):
    """Run a script on some ranks, with short limits."""
    code = HEADER.format(statement=statement, kind=kind) + code
    environment.setdefault("CHAINER_DIST_STALL_WARN", "0.4")
    env = mpi_job.environment(**environment)
    return mpi_job.run([sys.executable, "-c", code], ranks, timeout=60, env=env)


def stacks_of(output, rank):
    """Return the stacks that are shown for a rank alone."""
    return re.findall(rf"Stacks of rank {rank}:\n((?:  .*\n)*)", output)


# What the last rank does instead of an allreduce, for ever, and what is said of it.
FOR_EVER = {
    "finished": ("sys.exit(0)", r"listens no more: it has left the script, or ended"),
    "stopped": (
        "os.kill(os.getpid(), signal.SIGSTOP)",
        r"does not answer: its process is stopped \(by SIGSTOP, Ctrl-Z or a debugger\)",
    ),
    "native code": (
        "sum(itertools.repeat(0))",
        r"does not answer: it is in native code that holds Python's lock; its stacks follow",
    ),
    "another collective": (
        "comm.bcast_obj('x')",
        r"is in another operation 2: bcast_obj\(obj='x'\), at <string>:\d+ in culprit",
    ),
    "another before": (
        # One that ends without the others, as no collective of MPI has to wait for all ranks.
        "with Operation(Kind('alone', 'exchange'), comm): pass\n    time.sleep(1000)",
        r"has done another operation 2, alone; now in no collective, at <string>:\d+ in culprit",
    ),
}


@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    ("kind", "ranks"),
    [*zip(FOR_EVER, [2, 3, 4, 3, 2])],
)
def test_a_stall_that_does_not_end(kind, ranks):
    """It is reported once, by rank 0, naming the culprit; then the limit ends the job."""
    statement, said = FOR_EVER[kind]
    code = "if comm.rank == last:\n culprit()\ncomm.allreduce(np.zeros((3, 4), np.float32))"
    # It may be waited for a second for a process that does not answer.
    job = run(code, ranks, statement, CHAINER_DIST_STALL_ABORT="0.6")
    last = ranks - 1
    assert job.status not in {0, None}, job.output
    where = f"operation 2 of the naive communicator of {ranks} ranks, which waits for rank {last}\n"
    heads = re.findall(r"chainer_dist: stalled for [\d.]+ s: (rank \d) in (.*\n)", job.output)
    assert ("rank 0", f"allreduce(x=(3, 4) float32), {where}") in heads, job.output
    assert {head[0] for head in heads} == {"rank 0"}, job.output
    assert re.search(rf"  rank {last} \(pid \d+ on .*\): {said}", job.output), job.output
    assert f"{ENDING} 0.6 s (CHAINER_DIST_STALL_ABORT): rank 0 in allreduce" in job.output
    assert re.search(r"  ranks? 0(-\d)?: has come, at <string>:\d+ in <module>", job.output)
    if kind == "native code":  # printed by the rank itself, without Python's help
        assert 'File "<string>", line 9 in culprit' in job.output, job.output
    if kind == "another collective":
        assert "in bcast_obj" in stacks_of(job.output, last)[0]


@pytest.mark.mpi_skip
def test_stacks_that_are_asked_for():
    """A rank that is late is shown with its stacks."""
    code = "if comm.rank == last:\n culprit()\ncomm.allreduce(np.zeros((3, 4), np.float32))"
    job = run(code, 2, "time.sleep(1.5)", CHAINER_DIST_STALL_STACKS="1")
    assert job.status == 0, job.output
    assert "in culprit" in stacks_of(job.output, 1)[0]


SEQUENCE = """
from chainer_dist import functions as F
step = 0
def wait(seconds=1.0):
    global step
    step += 1
    comm.bcast_obj(0)  # so that ranks begin together
    return time.monotonic() + seconds
def spinning(until):
    while time.monotonic() < until:
        pass
def sleeping(until):
    time.sleep(max(0, until - time.monotonic()))
def forward(until):
    if comm.rank == last:
        sleeping(until)
    return model(np.ones((1, 3), np.float32))

until = wait()
if comm.rank == last:
    sleeping(until)
comm.allgather_obj(0)

until = wait()
if comm.rank == last:
    spinning(until)
comm.gather(np.zeros(3), root=0)

until = wait()
if comm.rank == last:
    sleeping(until)
    comm.send_obj("late", 0)
elif comm.rank == 0:
    comm.recv_obj(last)

model = chainer.Sequential(chainer.links.Linear(3, 1), chainer.functions.sum)
optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.SGD(), comm).setup(model)
optimizer.update(lambda: forward(0))
until = wait()
optimizer.update(forward, until)

part = comm.split(comm.rank // 2 * 2 == last // 2 * 2, comm.rank)
until = wait()
if comm.rank == last:
    sleeping(until)
part.allreduce_obj(1)

until = wait()
child = os.fork()
if child == 0:
    time.sleep(0.1)
    os._exit(0)
os.waitpid(child, 0)
if comm.rank == last:
    time.sleep(1)
comm.alltoall([np.zeros(1)] * comm.size)
comm.finalize()
print("fine", flush=True)
"""


@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    "ranks", [2, *(pytest.param(ranks, marks=pytest.mark.faults) for ranks in (3, 4))]
)
def test_stalls_that_end(ranks):
    """Each is reported with what the late rank does, and once more when it is over; all go on."""
    job = run(SEQUENCE, ranks)
    assert job.status == 0, job.output
    assert job.output.count("fine") == ranks, job.output
    assert ENDING not in job.output
    last = ranks - 1
    of = f"of the naive communicator of {ranks} ranks"
    late = rf"  rank {last} \(pid \d+ on .*\): has not come \(its last is operation \d+\); now "
    for said in [
        rf"rank 0 in allgather_obj\(obj=0\), operation 3 {of}, which waits for rank {last}\n",
        late + r"in no collective, at <string>:\d+ in sleeping\n",
        rf"rank 0 in gather\(x=\(3,\) float64\), operation 5 {of}, which waits for rank {last}\n",
        late + r"in no collective, at <string>:\d+ in spinning\n",
        rf"rank 0 in recv_obj\(source={last}\) {of}, which waits for rank {last}\n",
        rf"rank 0 in comparison of gradients, operation \d+ {of}, which waits for rank {last}\n",
        late + r"in no collective but in forward, at <string>:\d+ in sleeping\n",
        r"over after [\d.]+ s: rank 0 in allgather_obj\(obj=0\), operation 3 ",
    ]:
        assert re.search(said, job.output), f"{said}\n{job.output}"
    assert "Stacks of" not in job.output  # nothing but late
    reports = re.findall(r"chainer_dist: stalled for .*\n((?:  .*\n)*)", job.output)
    assert max(report.count("\n") for report in reports) <= ranks
    if ranks != 3:  # otherwise the last rank's part has no other
        partner = ranks - 2
        said = (
            r"stalled for [\d.]+ s: rank 0 in allreduce_obj\(obj=1\), operation 1 of the naive "
            r"communicator of 2 ranks, which waits for rank 1\n"
        )
        assert re.search(said, job.output), job.output
        name = "" if partner == 0 else f"rank {last} of the job, "
        assert f"  rank 1 ({name}pid" in job.output


@pytest.mark.mpi_skip
def test_functions_links_and_data():
    """What does not go through a communicator's methods is watched all the same."""
    code = """
import chainer_dist.functions as F
x = chainer.Variable(np.ones((4, 3), np.float32))
bn = chainer_dist.links.MultiNodeBatchNormalization(3, comm)
bn(x)
def receive():
    return F.send(x, comm, 0) if comm.rank == last else F.recv(comm, last)
for work in (lambda: F.allreduce(comm, x), lambda: bn(x), receive):
    comm.allgather_obj(0)
    if comm.rank == last:
        time.sleep(1)
    work()
print("fine", flush=True)
"""
    job = run(code, 2)
    assert job.output.count("fine") == 2, job.output
    for what in (
        r"agreement, operation \d+",
        r"batch normalization\(.*\), operation \d+",
        r"take\(.*\)",
    ):
        said = rf"rank 0 in {what} of the naive communicator of 2 ranks, which waits for rank 1\n"
        assert re.search(said, job.output), f"{said}\n{job.output}"


@pytest.mark.mpi_skip
def test_a_rank_within_the_update():
    """Waiting in shared memory names the rank whose blocks are missing, and its line."""
    code = """
model = chainer.links.Linear(3, 2)
optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.SGD(), comm).setup(model)
loss = lambda: chainer.functions.sum(model(np.ones((1, 3), np.float32)))
optimizer.update(loss)
if comm.rank == last:
    layout = optimizer._state.plan.chosen.prepared.layout
    chunk = next(each for group in layout.groups for some in group.slices for each in some.updates)
    update = chunk.update
    chunk.update = lambda hooks: (time.sleep(1.2), update(hooks))
optimizer.update(loss)
"""
    job = run(code, 2, kind="shared_memory")
    assert job.status == 0, job.output
    said = r"ranks? 0.*: has come, at <string>:\d+ in <module> \(waiting for rank 1\)"
    assert re.search(said, job.output), job.output
    said = r"rank 1 \(pid \d+ on \S+\): has come, at <string>:\d+ in <lambda> \(update\)"
    assert re.search(said, job.output), job.output
    assert re.search(r"rank 0 in .*, which waits for rank 1\n", job.output), job.output


@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    ("environment", "aborts"),
    [
        ({}, False),
        ({"CHAINER_DIST_STALL_ABORT": "0.5"}, True),
    ],
    ids=["off", "abort only"],
)
def test_limits(environment, aborts):
    """The limit for the end works alone; with neither there is no thread."""
    code = """
if "CHAINER_DIST_STALL_ABORT" not in os.environ:
    assert threading.active_count() == 1, threading.enumerate()
if comm.rank == last:
    time.sleep(1.5)
comm.allgather_obj(0)
print("fine", flush=True)
"""
    job = run(code, 2, CHAINER_DIST_STALL_WARN="0", **environment)
    assert (ENDING in job.output) == aborts, job.output
    assert (job.status != 0) == aborts
    assert ("stalled" in job.output) == aborts
    assert (job.output.count("fine") == 2) != aborts


@pytest.mark.mpi_skip
def test_several_nodes_and_ranks_that_are_not_watched():
    """Ranks of other nodes are asked over the network; who does not listen is said not to.

    Where the nodes are one machine, they listen on its loopback and nowhere else.
    """
    code = """
os.environ.pop("CHAINER_DIST_STALL_WARN")
if comm.rank == 1:
    os.environ["CHAINER_DIST_STALL_WARN"] = "0"
late = chainer_dist.create_communicator("naive")
mine = comm.operation_log.peers[comm.rank]
listening = set()
for line in open("/proc/net/tcp").read().splitlines()[1:]:
    _, where, _, state, *_ = line.split()
    if state == "0A" and int(where.partition(":")[2], 16) in (mine.port, mine.open_port):
        listening.add(where)
assert listening == {f"0100007F:{mine.port:04X}"}, (listening, mine)
if comm.rank == last:
    time.sleep(1.2)
comm.allgather_obj(0)
print(f"{comm.inter_size} nodes", [each is not None for each in comm.operation_log.peers], flush=True)
print([bool(each and each.open_port) for each in late.operation_log.peers], flush=True)
"""
    job = run(code, 3, MPIR_CVAR_NUM_CLIQUES="2")
    assert job.status == 0, job.output
    assert "which waits for rank 2\n" in job.output
    if "2 nodes" in job.output:  # only MPICH pretends
        assert job.output.count("[True, False, True]") == 3, job.output
    assert re.search(r"in no collective, at <string>:\d+ in <module>", job.output)


@pytest.mark.mpi_skip
def test_a_job_that_was_suspended():
    """A whole job that stood still, as batch systems do, is not reported, let alone ended."""
    code = """
print("here", os.getpid(), flush=True)
if comm.rank == 0:
    pids = comm.gather_obj(os.getpid())
    # From outside: stop all ranks while the others wait for rank 0, and let them go on later.
    script = f"sleep 0.2; kill -STOP {pids}; sleep 3; kill -CONT {pids}".replace("[", "").replace("]", "").replace(",", "")
    process = subprocess.Popen(["sh", "-c", script])
    process.wait()
else:
    comm.gather_obj(os.getpid())
comm.allgather_obj(0)
print("fine", flush=True)
"""
    job = run(code, 2, CHAINER_DIST_STALL_WARN="2", CHAINER_DIST_STALL_ABORT="2")
    assert job.status == 0, job.output
    assert job.output.count("fine") == 2
    assert "stalled" not in job.output


def neighbours(comm):
    """Return the ranks beside this one."""
    return [rank for rank in range(comm.size) if rank != comm.rank]


def test_ranks_answer(comm):
    """Each answers each what it does, without the help of its main thread, which is busy here."""
    if comm.size == 1:
        pytest.skip("there is nobody to ask")
    log = comm.operation_log
    comm.allgather_obj(None)  # from here on all ranks are in this test
    number = log.number
    for rank in neighbours(comm):
        found = inquiry.ask(log.peers[rank], log.identity, 20, near=True, full=True)
        assert not isinstance(found, Silence), found
        assert found["knows"]
        assert found["number"] in (number, number + 1)  # it may be done
        assert "test_ranks_answer" in found["stacks"] or found["number"] > number
        # Not written out here, as stacks show this line, too.
        assert report.OWN_THREADS not in found["stacks"]
        brief = inquiry.ask(log.peers[rank], log.identity, 20, near=True, full=False)
        assert "stacks" not in brief
        other = inquiry.ask(log.peers[rank], "0" * 32, 20, near=True, full=False)
        assert not other["knows"]
    comm.allgather_obj(None)
    assert len(set(comm.allgather_obj(log.identity))) == 1


def test_strangers_get_no_answer(comm):
    """Who does not know the token, or says something else, is told nothing."""
    if comm.size == 1:
        pytest.skip("there is nobody to ask")
    peer = comm.operation_log.peers[neighbours(comm)[0]]
    identity = comm.operation_log.identity
    other = peer._replace(secret=comm.operation_log.peers[comm.rank].secret)
    found = inquiry.ask(other, identity, 20, near=True, full=True)
    assert isinstance(found, Silence)
    assert not found.is_reason
    for words in (b"0" * 200, b"\xff" * 200, b"GET / HTTP/1.1\r\n\r\n" + b" " * 200):
        with socket.create_connection(("127.0.0.1", peer.port), 20) as stranger:
            challenge = stranger.recv(1000)
            assert len(challenge) == 32
            stranger.sendall(words)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1000) == b""
    assert inquiry.ask(peer, identity, 20, near=True, full=False)["knows"]
    comm.allgather_obj(None)


def test_strangers_hold_nobody_up(comm):
    """However many connect and say nothing, ranks are asked and answered, and the watchdog looks."""
    if comm.size == 1:
        pytest.skip("there is nobody to ask")
    log = comm.operation_log
    for rank in neighbours(comm):
        strangers = [
            socket.create_connection(("127.0.0.1", log.peers[rank].port), 20)
            for _ in range(listeners._MOST_GUESTS + 20)
        ]
        for _ in range(3):
            found = inquiry.ask(log.peers[rank], log.identity, 20, near=True, full=True)
            assert not isinstance(found, Silence), found
        for each in strangers:
            each.close()
    comm.allgather_obj(None)


@pytest.mark.mpi_skip
def test_a_stall_is_reported_while_strangers_are_connected():
    """Neither strangers who say next to nothing, nor ones who come all the time, keep a report from coming."""
    code = """
for rank in range(comm.size):
    if rank == comm.rank:
        continue
    def bother(pause, port=comm.operation_log.peers[rank].port):
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    for _ in range(200 if pause else 1):
                        time.sleep(pause)
                        stranger.sendall(b".")
            except OSError:
                pass
    import socket
    for pause in (0.5, 0.5, 0.5, 0):
        threading.Thread(target=bother, args=[pause], daemon=True).start()
time.sleep(0.2)
if comm.rank == last:
    culprit()
comm.allreduce(np.zeros(2))
"""
    job = run(code, 2, "time.sleep(1000)", CHAINER_DIST_STALL_ABORT="3")
    assert job.status not in {0, None}, job.output
    assert "which waits for rank 1\n" in job.output, job.output
    assert re.search(r"rank 1 \(pid \d+ on .*\): has not come .* in culprit", job.output), (
        job.output
    )
    assert f"{ENDING} 3 s" in job.output


@pytest.fixture
def listener():
    """Return a listener of this process that serves in a thread, and what it answers, to be changed."""
    answers = {"answer": lambda: {"fine": True}}
    listening = Listener(lambda _identity, _full: answers["answer"]())
    ended = threading.Event()

    def serve():
        while not ended.is_set():
            listening.serve(5)

    thread = threading.Thread(target=serve)
    thread.start()
    yield listening, answers
    ended.set()
    listening.wake()
    thread.join()
    listening.close()


@pytest.mark.mpi_skip
def test_who_is_turned_away_asks_again(listener, monkeypatch):
    """On a busy node it may take long to introduce oneself, and strangers take the room: nobody has left."""
    listening, _ = listener
    address = describe_self(listening, 0, 0, "here", 0)
    monkeypatch.setattr(listening._reception, "_seconds", 0.5)
    meet, pauses = inquiry.introduce, [1.5]

    def introduce_slowly(*args):
        time.sleep(pauses.pop() if pauses else 0)
        # Somebody comes, and the one who was too slow is found out.
        socket.create_connection(("127.0.0.1", address.port), 20).close()
        meet(*args)

    monkeypatch.setattr(inquiry, "introduce", introduce_slowly)
    assert inquiry.ask(address, "0" * 32, 20, near=True, full=False) == {"fine": True}
    assert pauses == []


@pytest.mark.mpi_skip
def test_slow_strangers_are_turned_away(listener, monkeypatch):
    """The time is that of the whole, not one for each byte."""
    listening, _ = listener
    monkeypatch.setattr(listening._reception, "_seconds", 1.0)
    with socket.create_connection(("127.0.0.1", listening.port), 20) as stranger:
        sent, deadline = 0, time.monotonic() + 20
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < deadline:
                stranger.sendall(b".")
                sent += 1
                time.sleep(0.2)
        assert 0 < sent < 60


@pytest.mark.mpi_skip
def test_who_answers_in_a_ranks_place():
    """Learns neither the secret nor a proof that another connection takes, and is not believed."""
    secret = b"s" * 32
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            for _ in range(2):
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(20)
                    connection.sendall(b"c" * 32)
                    heard.append(_connections.receive(connection, 64, time.monotonic() + 20))
                    connection.sendall(heard[-1][32:])  # its own proof
                    with contextlib.suppress(OSError):
                        heard.append(connection.recv(100))

        thread = threading.Thread(target=answer)
        thread.start()
        port = server.getsockname()[1]
        address = Address(0, 0, 1, "", "here", port, "", 0, secret, 0)
        for _ in range(2):
            found = inquiry.ask(address, "0" * 32, 20, near=True, full=True)
            assert isinstance(found, Silence)
            assert "another program answers" in found.text
            assert not found.is_reason
        thread.join()
    assert [len(each) for each in heard] == [64, 0, 64, 0]
    assert secret not in b"".join(heard)
    assert heard[0] != heard[2]
    # What it heard is of no use where the rank listens.
    reception = _connections.Reception(secret, most=4, seconds=20)
    port = reception.listen("127.0.0.1", 4)
    with socket.create_connection(("127.0.0.1", port), 20) as replay:
        replay.sendall(heard[0])
        replay.settimeout(0.01)
        received, deadline = b"?", time.monotonic() + 20
        while received and time.monotonic() < deadline:
            assert reception.admit() == []
            with contextlib.suppress(TimeoutError, socket.timeout):
                try:
                    received = replay.recv(100)
                except ConnectionResetError:
                    received = b""
        assert received == b""
    reception.close()


ANSWERS = {
    "too deep": (b"[" * 100_000 + b"]" * 100_000, "recursion"),
    "too large": (b" " * (inquiry._MOST_BYTES + 1), "bytes"),
    "a huge number": (b'{"seconds": ' + b"9" * 1_000_000 + b"}", "digits"),
    "no dictionary": (b"[]", "no dictionary"),
    "no text": (b'"\xff"', "decode"),
}


@pytest.mark.mpi_skip
@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_are_bounded(kind):
    """In size, in depth and in their numbers, even those of who knows the secret."""
    content, said = ANSWERS[kind]
    secret = b"s" * 32
    reception = _connections.Reception(secret, most=4, seconds=20, n_bytes=REQUEST_BYTES)
    port = reception.listen("127.0.0.1", 4)

    def answer():
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            for connection, _ in reception.admit():
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(20)
                    connection.sendall(len(content).to_bytes(4, "big") + content)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=answer)
    thread.start()
    address = Address(0, 0, 1, "", "here", port, "", 0, secret, 0)
    found = inquiry.ask(address, "0" * 32, 20, near=True, full=True)
    thread.join()
    reception.close()
    assert isinstance(found, Silence)
    assert said in found.text
    assert not found.is_reason


def test_stacks_are_cut(comm):
    """An answer stays small, however deep a rank is in its functions."""

    def descend(depth):
        return descend(depth - 1) if depth else report.answer(None, full=True)

    stacks = descend(500)["stacks"]
    assert "in descend" in stacks
    assert stacks.count("\n") < 500
    assert comm.rank >= 0


@pytest.mark.mpi_skip
def test_the_address_for_other_nodes(monkeypatch):
    """Is the one address on the way to them; without any it is said what to set."""
    monkeypatch.delenv("CHAINER_DIST_ADDRESS", raising=False)
    monkeypatch.setattr(hosts, "own_hosts", lambda: ("192.0.2.9", "172.17.0.1", "here"))
    ways = {"198.51.100.7": "192.0.2.9", "172.17.0.1": "172.17.0.1", "there": "127.0.0.1"}
    monkeypatch.setattr(hosts, "own_address", lambda other: ways.get(other, ""))
    assert hosts.address_towards(("172.17.0.1", "198.51.100.7", "there")) == "192.0.2.9"
    assert hosts.address_towards(("192.0.2.9", "172.17.0.1", "here")) == "127.0.0.1"
    with pytest.raises(OSError, match="CHAINER_DIST_ADDRESS"):
        hosts.address_towards(("172.17.0.1", "there"))
    monkeypatch.setenv("CHAINER_DIST_ADDRESS", "10.0.0.5")
    assert hosts.address_towards(("there",)) == "10.0.0.5"


@pytest.mark.mpi_skip
def test_an_answer_that_fails(listener, capfd):
    """It is shown, and the next question is answered."""
    listening, answers = listener
    address = describe_self(listening, 0, 0, "here", 0)
    good, answers["answer"] = answers["answer"], lambda: 1 // 0
    assert isinstance(inquiry.ask(address, "0" * 32, 20, near=True, full=False), Silence)
    answers["answer"] = good
    assert inquiry.ask(address, "0" * 32, 20, near=True, full=False) == {"fine": True}
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_processes_are_known_by_their_start(comm):
    """A process that has the number of another one is not taken for it."""
    if comm.size == 1:
        pytest.skip("there are no addresses")
    own = comm.operation_log.peers[comm.rank]
    assert own.pid == os.getpid()
    assert process_state(own) in {"R", "S"}
    started, _, namespace = own.started.partition(" ")
    gone = own._replace(started=f"{int(started) + 1} {namespace}")
    assert process_state(gone) == "X"
    found = inquiry.ask(gone, comm.operation_log.identity, 5, near=True, full=False)
    assert found == Silence("has ended: there is no such process any more")
    # One in another container on this node can be asked, but its number says nothing here.
    elsewhere = own._replace(started=f"{started} pid:[1]")
    assert process_state(elsewhere) == "?"
    assert inquiry.ask(elsewhere, comm.operation_log.identity, 5, near=True, full=False)["knows"]


@pytest.mark.mpi_skip
def test_settings(monkeypatch):
    """What the environment says, and what it means when it says nothing."""
    names = ("STALL_WARN", "STALL_ABORT", "CHECKED", "TIMELINE")
    for name in names:
        monkeypatch.delenv(f"CHAINER_DIST_{name}", raising=False)
    assert from_environment() == Settings(60.0, None, checked=False, timeline=None)
    for name, value in zip(names, ("0", "90.5", "1", "a.json")):
        monkeypatch.setenv(f"CHAINER_DIST_{name}", value)
    settings = from_environment()
    assert settings == Settings(None, 90.5, checked=True, timeline="a.json")
    monkeypatch.setenv("CHAINER_DIST_STALL_STACKS", "1")
    assert from_environment().stacks
    assert settings.limits == (90.5,)
    for value in ("nan", "inf", "-1", "1 minute"):
        monkeypatch.setenv("CHAINER_DIST_STALL_ABORT", value)
        with pytest.raises(ValueError, match="CHAINER_DIST_STALL_ABORT is"):
            from_environment()


@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1, 2], "ranks 0-2"), ([5, 0, 2, 3], "ranks 0, 2-3, 5")],
)
def test_ranks_in_words(ranks, text):
    """Thousands of ranks fit on a line."""
    assert report._ranks(ranks) == text


def test_a_rank_that_waits_answers(comm):
    """The first collectives of a communicator leave Python's lock alone while they wait."""
    if comm.size == 1:
        pytest.skip("there is nobody to wait for")
    log = comm.operation_log
    for number, wait in enumerate((lambda: comm.gather_obj(0), lambda: comm.allgather_obj(0)), 1):
        if comm.rank == comm.size - 1:
            came, deadline = 0, time.monotonic() + 20
            while came < number and time.monotonic() < deadline:
                found = inquiry.ask(log.peers[0], log.identity, 20, near=True, full=False)
                assert not isinstance(found, Silence), found
                came = found["waits"]["number"] if found["waits"] else 0
            assert came == number
        wait()
