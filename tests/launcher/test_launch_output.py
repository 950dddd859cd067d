"""What the ranks of ``chainer-dist run`` print keeps nobody waiting, and decides nothing."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from launcher import Launched, run, write

# These start jobs of their own.
pytestmark = [pytest.mark.mpi_skip, pytest.mark.faults]

LINE = "x" * 99


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("how", ["time limit", "signal"])
def test_a_reader_that_stops(tmp_path, how, stream):
    """The job ends as it would otherwise."""
    ready = tmp_path / "ready"
    code = f"""
import threading
def say():
    time.sleep(3)
    open({str(ready)!r}, "w").write("ready")
if rank == 0: threading.Thread(target=say, daemon=True).start()
while True: print('x' * 100, file=sys.{stream})
"""
    options = ["--timeout", 6] if how == "time limit" else []
    job = Launched("run", "-n", 2, *options, write(tmp_path, code))
    if how == "signal":
        job.wait_for(ready, "ready")
        job.process.send_signal(signal.SIGTERM)
    status = job.process.wait(60)  # reading nothing
    assert status == (124 if how == "time limit" else 143)
    job.end()


def test_a_reader_that_stops_between_two_attempts(tmp_path):
    """A rank that fails is started again; and when somebody reads again nothing is missing."""
    done = tmp_path / "done"
    code = f"""
attempt = int(os.environ["CHAINER_DIST_RESTART"])
for n in range(2000): print({LINE!r})
printed = {str(tmp_path / "printed")!r}
if rank == 0: open(printed, "w").close()
while not os.path.exists(printed): time.sleep(0.01)  # the failure of rank 1 ends rank 0
if attempt == 0: sys.exit(rank * 3)
if rank == 0: open({str(done)!r}, "w").write("done")
"""
    job = Launched("run", "-n", 2, "--max-restarts", 1, write(tmp_path, code))
    job.wait_for(done, "done")
    time.sleep(1)
    assert job.process.poll() is None  # it waits for who reads
    ended = job.end()
    assert ended.status == 0, ended.stderr
    assert "starting again" in ended.stderr
    lines = ended.stdout.splitlines()
    assert lines.count(f"[0] {LINE}") + lines.count(f"[1] {LINE}") == len(lines) == 8000


def test_a_reader_that_is_slow(tmp_path):
    """Gets everything, and so does a file."""
    n = 30_000
    job = Launched("run", "-n", 2, write(tmp_path, f"for n in range({n}): print({LINE!r})"))
    time.sleep(3)
    ended = job.end()
    assert ended.status == 0
    assert ended.stdout.splitlines().count(f"[0] {LINE}") == n
    assert ended.stdout.count("\n") == 2 * n


def test_a_time_limit_for_the_reader(tmp_path):
    """A job that has ended waits for its reader no longer than it might have run."""
    code = f"for n in range(1500): print({LINE!r})"
    job = Launched("run", "-n", 2, "--timeout", 6, write(tmp_path, code))
    assert job.process.wait(60) == 124
    assert b"not all that the ranks have printed was read" in job.process.stderr.read()
    job.end()


@pytest.mark.skipif(sys.platform != "linux", reason="uses /dev/full")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("how", ["full", "closed"])
def test_output_that_goes_nowhere(tmp_path, stream, how):
    """The job goes on; a full disk is reported."""
    code = f"""
print("printed"); print("printed", file=sys.stderr)
open({str(tmp_path)!r} + f"/{{rank}}", "w").close()
while not os.path.exists({str(tmp_path)!r} + "/0"):  # the failure of rank 1 ends rank 0
    time.sleep(0.01)
sys.exit(rank * 3)
"""
    script = write(tmp_path, code)
    number = {"stdout": 1, "stderr": 2}[stream]
    if how == "full":
        with Path("/dev/full").open("w") as full:
            ended = Launched("run", "-n", 2, script, **{stream: full}).end()
    else:
        ended = Launched("run", "-n", 2, script, preexec_fn=lambda: os.close(number)).end()
    assert ended.status == 3, ended
    assert all((tmp_path / str(rank)).exists() for rank in range(2))
    other = ended.stdout if stream == "stderr" else ended.stderr
    assert "printed" in other
    if stream == "stdout":
        assert "rank 1 on" in ended.reason
        assert ("No space left on device" in ended.stderr) == (how == "full")
    assert "Traceback" not in ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="uses /dev/full")
@pytest.mark.parametrize("how", ["full", "closed"])
def test_a_dry_run_that_cannot_print(tmp_path, how):
    """It fails, in one line."""
    script = write(tmp_path, "")
    if how == "full":
        with Path("/dev/full").open("w") as full:
            ended = Launched("run", "--dry-run", script, stdout=full).end()
    else:
        ended = Launched("run", "--dry-run", script, preexec_fn=lambda: os.close(1)).end()
    assert (ended.status, ended.stderr.count("\n")) == (1, 1), ended


# What MPICH, chainer_dist and Python say when a rank fails.
FAKES = """
for file in (sys.stdout, sys.stderr):
    print("Abort(1) on node 0 (rank 0 in comm 0): application called MPI_Abort(MPI_COMM_WORLD, 1) - process 0", file=file)
    print("chainer_dist: uncaught E on rank 0 of 2 (h); ending the job with status 1.", file=file)
    print("chainer_dist: ending the job, stalled for 8 s (X): rank 0 waits for rank 1", file=file)
    print("Traceback (most recent call last):\\nValueError: boom", file=file, flush=True)
"""


def test_words_of_a_healthy_rank(tmp_path):
    """A job that ends well is not started again, whatever its ranks print."""
    job = run(tmp_path, f"{FAKES}\ntime.sleep(1)", "--max-restarts", 2)
    assert job.status == 0, job
    assert "starting again" not in job.stderr
    assert "failed first" not in job.stderr


@pytest.mark.parametrize(
    ("end", "status", "reason"),
    [
        ("sys.exit(3)", 3, "rank 1 on {} failed first: exit status 3"),
        ("os._exit(1)", 1, "rank 1 on {} failed first: exit status 1"),
        ("os.kill(os.getpid(), 9)", 137, "rank 1 on {} failed first: killed by SIGKILL"),
    ],
)
def test_words_of_another_rank(tmp_path, end, status, reason):
    """Who has really failed is named."""
    job = run(
        tmp_path,
        f"if rank == 0:\n {FAKES.strip().replace(chr(10), chr(10) + ' ')}\ntime.sleep(1)\nif rank == 1: {end}\ntime.sleep(1000)",
    )
    assert job.status == status, job
    assert reason.format(socket.gethostname()) in job.reason


def test_a_hook_that_leaves_as_if_all_were_well(tmp_path):
    """The job has failed, of the exception that nothing caught."""
    code = """
import chainer_dist
from mpi4py import MPI
sys.excepthook = lambda *_: os._exit(0)
if rank == 1: raise ValueError("boom")
MPI.COMM_WORLD.Barrier()
"""
    job = run(tmp_path, code)
    assert job.status == 1, job
    assert "rank 1 on" in job.reason
    assert "ValueError: boom (exit status 1)" in job.reason


def test_causes_of_children_are_not_the_script_s(tmp_path):
    """A job within the job may fail, and the script go on."""
    code = """
import json, subprocess
tell = "import os, json; json.dump({'pid': os.getpid(), 'status': 5}, open(os.environ['CHAINER_DIST_CAUSE'], 'w'))"
subprocess.run([sys.executable, "-c", tell], check=True)
"""
    job = run(tmp_path, code)
    assert job.status == 0, job


@pytest.mark.parametrize(
    "text", ["[]", "{", "{}", '{"pid": 1, "status": 1}', '{"pid": PID, "status": "x"}']
)
def test_causes_that_make_no_sense(tmp_path, text):
    """Are none."""
    code = f"open(os.environ['CHAINER_DIST_CAUSE'], 'w').write({text!r}.replace('PID', str(os.getpid())))"
    assert run(tmp_path, code, ranks=1).status == 0
