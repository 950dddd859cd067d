"""Calling a function on many ranks: what comes back, what is raised, and that nothing is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import chainer_dist
import mpi_job
from chainer_dist.launcher import call as call_module
from chainer_dist.launcher.call import RemoteTraceback

pytestmark = pytest.mark.mpi_skip

LIMIT = {"timeout": 60}
GREETING = "hello"


class Unpicklable(Exception):  # noqa: N818 - a user's class
    """An error that no other process can make anew."""

    def __init__(self, text, lock):
        super().__init__(text)
        self.lock = lock


def test_results_in_the_order_of_rank():
    """Of a closure over arrays, on ranks that know of one another."""
    offset = np.arange(3.0)

    def function(scale, *, power):
        comm = chainer_dist.create_communicator()
        return comm.rank, comm.allreduce(offset + comm.rank) * scale**power

    results = chainer_dist.launch(function, (2,), n=np.int64(3), kwargs={"power": 3}, **LIMIT)
    assert [rank for rank, _ in results] == [0, 1, 2]
    for _, array in results:
        np.testing.assert_array_equal(array, (3 * offset + 3) * 8)


NOTEBOOK = """
import chainer, numpy as np, chainer_dist
import chainer.links as L

class Net(chainer.Chain):
    def __init__(self, n):
        super().__init__()
        with self.init_scope():
            self.l = L.Linear(n, 2)

    def forward(self, x):
        return super().__call__ and self.l(x) * scale

class Count(chainer.training.Extension):
    n = 0

scale = 3

def train(net):
    net.l.b.array[...] = chainer_dist.create_communicator().rank
    return net, Count(), net(np.zeros((1, 4), "f")).array.tolist()

nets = chainer_dist.launch(train, (Net(4),), n=2)
assert all(type(net) is Net and type(count) is Count for net, count, _ in nets)
print([y for _, _, y in nets], [net.l.b.array.tolist() for net, _, _ in nets])
"""


@pytest.mark.parametrize("how", ["script", "prompt"])
def test_classes_of_a_notebook(tmp_path, how):
    """Links and extensions of ``__main__`` travel there and back; so do they from a prompt."""
    script = tmp_path / "script.py"
    script.write_text(NOTEBOOK)
    prompt = NOTEBOOK.replace("\n\n    def", "\n    def")  # where an empty line ends a class
    job = subprocess.run(
        [sys.executable, *(["-i"] if how == "prompt" else [script])],
        input=prompt if how == "prompt" else "",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=mpi_job.environment(),
    )
    assert "[[[0.0, 0.0]], [[3.0, 3.0]]] [[0.0, 0.0], [1.0, 1.0]]" in job.stdout, job.stderr


def test_large_arguments_and_results():
    """Longer than any buffer on the way."""
    array = np.random.default_rng(0).random(3 << 20)
    first, second = chainer_dist.launch(lambda x: x * 2, (array,), **LIMIT)
    np.testing.assert_array_equal(first, array * 2)
    np.testing.assert_array_equal(second, first)


def test_what_ranks_print(capsys):
    """Is printed here, whole lines with the rank's number."""

    def function():
        print(GREETING)
        print("to error", file=sys.stderr)

    assert chainer_dist.launch(function, n=2, env={"OWN": "1"}, **LIMIT) == [None, None]
    printed = capsys.readouterr()
    assert sorted(printed.out.splitlines()) == ["[0] hello", "[1] hello"]
    assert sorted(printed.err.splitlines())[-2:] == ["[0] to error", "[1] to error"]


def test_the_first_failure_is_raised():
    """With its traceback; the other rank, which waits, is ended."""

    def function():
        comm = chainer_dist.create_communicator()
        if comm.rank == 1:
            raise KeyError("missing")
        comm.bcast_obj(None, root=1)

    with pytest.raises(KeyError, match="missing") as caught:
        chainer_dist.launch(function, **LIMIT)
    cause = caught.value.__cause__
    assert isinstance(cause, RemoteTraceback)
    assert "rank 1:" in str(cause)
    assert "in function" in str(cause)


def test_an_error_that_cannot_be_sent():
    """One that says the same is raised."""

    def function():
        raise Unpicklable("details", threading.Lock())

    with pytest.raises(RuntimeError, match="Unpicklable: details"):
        chainer_dist.launch(function, **LIMIT)


def test_a_result_that_cannot_be_sent():
    """The rank says so."""
    with pytest.raises(TypeError, match="cannot be sent back"):
        chainer_dist.launch(threading.Lock, **LIMIT)


def test_a_rank_that_dies():
    """Without an exception: the launcher's reason is the error's text."""

    def function():
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(
        chainer_dist.LaunchError, match=r"failed first: killed by SIGKILL .* status 137"
    ):
        chainer_dist.launch(function, **LIMIT)
    with pytest.raises(chainer_dist.LaunchError, match="the job ended with status 3"):
        chainer_dist.launch(sys.exit, (3,), **LIMIT)
    # A rank that leaves without an answer has not returned anything.
    with pytest.raises(chainer_dist.LaunchError, match="the job ended with status 0"):
        chainer_dist.launch(sys.exit, (0,), n=1, **LIMIT)


def test_the_time_limit():
    """Ends the job."""
    with pytest.raises(chainer_dist.LaunchError, match=r"the time limit is reached.* status 124"):
        chainer_dist.launch(time.sleep, (1000,), n=1, timeout=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n is the number of ranks"),
        ({"n": 1.5}, "n is the number of ranks"),
        ({"n": True}, "n is the number of ranks"),
        ({"timeout": -1}, "timeout is a number of seconds"),
        ({"hosts": "a", "hostfile": "b"}, "give one of them"),
        ({"hosts": "a:"}, "slots are a number"),
        ({"hostfile": "/no/file"}, "hostfile /no/file"),
        ({"options": ["--no-such-option"]}, "unrecognized arguments: --no-such-option"),
    ],
)
def test_wrong_calls(arguments, message):
    """Before anything is started, where that can be known."""
    with pytest.raises((ValueError, chainer_dist.LaunchError), match=message):
        chainer_dist.launch(print, **arguments)


def test_no_function():
    """A mistake such as calling the function oneself."""
    with pytest.raises(TypeError, match="function is called on each rank, got int"):
        chainer_dist.launch(len("abc"))


def test_on_a_rank(monkeypatch):
    """A job within a job is refused."""
    for name, value in zip(("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"), "0202"):
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="launch was called on a rank"):
        chainer_dist.launch(print)


INTERRUPTED = """
import os, time, chainer_dist

def function(folder):
    open(f"{folder}/{os.getpid()}", "w").close()
    while True:
        time.sleep(0.1)

try:
    chainer_dist.launch(function, (%r,), n=2)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_caller_is_interrupted_or_killed(tmp_path, number):
    """All ranks end."""
    script = tmp_path / "script.py"
    folder = tmp_path / "ranks"
    folder.mkdir()
    script.write_text(INTERRUPTED % str(folder))
    caller = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=mpi_job.environment()
    )
    deadline = time.monotonic() + 60
    while len(ranks := [int(path.name) for path in folder.iterdir()]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    caller.send_signal(number)
    printed, _ = caller.communicate(timeout=60)
    assert ("interrupted" in printed) == (number == signal.SIGINT)
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline + 60
        time.sleep(0.05)


def test_strangers_get_nothing(monkeypatch):
    """Who connects without knowing the secret is neither given the function nor believed."""
    seen = []

    class Watched(call_module.Reception):
        def listen(self, address, backlog):
            port = super().listen(address, backlog)
            stranger = socket.create_connection((address, port))
            stranger.sendall(bytes(200))
            seen.append(stranger)
            return port

    monkeypatch.setattr(call_module, "Reception", Watched)
    assert chainer_dist.launch(len, ("ab",), n=1, **LIMIT) == [2]
    (stranger,) = seen
    stranger.settimeout(10)
    received = b""
    try:
        while piece := stranger.recv(1000):
            received += piece
    except ConnectionError:
        pass
    assert len(received) <= 32  # the challenge
