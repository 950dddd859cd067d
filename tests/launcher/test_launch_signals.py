"""Signals reach the ranks of ``chainer-dist run`` whoever reads what it says; and nothing outlives a job."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import sys
import time
from pathlib import Path

import pytest

from launcher import LAUNCHER, Launched, run, write

# These start jobs of their own.
pytestmark = [pytest.mark.mpi_skip, pytest.mark.faults]

HANG = "time.sleep(1000)"
READY = "open({!r} + f'/ready {{rank}}', 'w').close()\n"

# The launcher, in less of a hurry or more.
PATCH = """
import sys
from chainer_dist.launcher import cli, job
job.SECONDS_TO_HANG_UP = job.SECONDS_TO_LEAVE = 1
job.SECONDS_TO_FINISH = 2
"""
QUICK = [sys.executable, "-c", f"{PATCH}sys.exit(cli.main())"]


def start(tmp_path, code, ranks=2, **options):
    """Start a job whose script says at its end when it is ready, and wait for that."""
    script = write(tmp_path, f"{code}\n{READY.format(str(tmp_path))}{HANG}")
    job = Launched("run", "-n", ranks, script, **options)
    for rank in range(ranks):
        job.wait_for(tmp_path / f"ready {rank}")
    return job


@contextlib.contextmanager
def nobody_to_tell(how):
    """Yield a file that cannot be written to, and a function that makes it so."""
    if how == "terminal is gone":
        ours, terminal = pty.openpty()
        yield terminal, lambda: os.close(ours)
        os.close(terminal)
    elif how == "disk is full":
        with Path("/dev/full").open("wb") as full:
            yield full, lambda: None
    else:
        ours, its = os.pipe()

        def fill():
            os.set_blocking(its, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(its, bytes(1 << 16))
            os.set_blocking(its, True)

        yield its, fill
        os.close(ours)
        os.close(its)


@pytest.mark.skipif(
    sys.platform != "linux", reason="uses /dev/full, and how Linux treats terminals"
)
@pytest.mark.parametrize("how", ["terminal is gone", "disk is full", "reader has stopped"])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_signals_come_before_words(tmp_path, number, how):
    """The ranks get them, and end, though nothing can be said of it."""
    code = f"""
def save(*_):
    open({str(tmp_path)!r} + f"/saved {{rank}}", "w").close()
    os._exit(0)
signal.signal({int(number)}, save)
"""
    with nobody_to_tell(how) as (file, close):
        job = start(tmp_path, code, stdout=file, stderr=file)
        close()
        job.process.send_signal(number)
        ended = job.end()
    assert ended.status == 0
    assert all((tmp_path / f"saved {rank}").exists() for rank in range(2))


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("to_group", [False, True])
def test_signals_that_are_ignored(tmp_path, number, to_group):
    """By nohup, or by a shell that starts a job in the background: so they are in the ranks."""
    go = tmp_path / "go"
    code = f"""
os.kill(os.getpid(), {int(number)})
print(signal.getsignal({int(number)}) == signal.SIG_IGN)
{READY.format(str(tmp_path))}
while not os.path.exists({str(go)!r}): time.sleep(0.05)
"""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        job = Launched("run", "-n", 2, write(tmp_path, code))
    finally:
        signal.signal(number, before)
    for rank in range(2):
        job.wait_for(tmp_path / f"ready {rank}")
    (os.killpg if to_group else os.kill)(job.process.pid, number)
    time.sleep(0.5)
    go.touch()
    ended = job.end()
    assert ended.status == 0, ended
    assert sorted(ended.stdout.splitlines()) == ["[0] True", "[1] True"]


@pytest.mark.parametrize(
    ("sent", "ignored", "wanted"),
    [
        ("SIGHUP", ["SIGHUP"], 143),
        ("SIGHUP", ["SIGHUP", "SIGTERM"], 129),
        ("SIGTERM", ["SIGTERM"], 143),
    ],
)
def test_ranks_that_do_not_end(tmp_path, sent, ignored, wanted):
    """Libraries of MPI catch SIGHUP: SIGTERM follows, and when that does not help SIGKILL."""
    code = "".join(f"signal.signal(signal.{name}, lambda *_: None)\n" for name in ignored)
    job = start(tmp_path, code, launcher=QUICK)
    job.process.send_signal(signal.Signals[sent])
    ended = job.end()
    assert ended.status == wanted, ended
    assert f"{sent}: the ranks are asked to end, and killed after" in ended.stderr
    if wanted != 143 or sent == "SIGTERM":
        assert f"{sent}: rank 0, 1 had not ended" in ended.reason


def test_a_signal_between_two_attempts(tmp_path):
    """It waits for the next one, which gets it."""
    patch = f"""{PATCH}
import os, signal
from chainer_dist.launcher import restarts
def say(text, say=restarts.say):
    say(text)
    if "starting again" in text:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
restarts.say = say
sys.exit(cli.main())
"""
    script = write(tmp_path, "sys.exit(3)")
    arguments = ("run", "-n", 2, "--max-restarts", 1, script)
    ended = Launched(*arguments, launcher=[sys.executable, "-c", patch]).end()
    assert ended.status == 128 + signal.SIGTERM, ended
    assert "SIGTERM came before any rank had started" in ended.stderr


ESCAPES = {
    "a session of its own": "subprocess.Popen(['sleep', '1000'], start_new_session=True)",
    "a daemon": """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for n in range(3): os.close(n)
        time.sleep(1000)
    os._exit(0)
os.wait()
""",
    "a daemon that writes": "subprocess.Popen('(setsid sh -c \"while :; do echo x; done\") &', shell=True)",
}


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("how", ESCAPES)
@pytest.mark.parametrize(
    "end", ["pass", "sys.exit(4)", "os.kill(os.getppid(), 9); time.sleep(1000)"]
)
def test_no_process_escapes(tmp_path, how, end):
    """What a script has started ends with the job, in whatever session it is, and however the job ends."""
    job = run(tmp_path, f"import subprocess\n{ESCAPES[how]}\ntime.sleep(0.3)\nif rank: {end}")
    assert (job.status == 0) == (end == "pass"), job


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_the_launcher_and_all_monitors_are_killed(tmp_path):
    """No script is left, though nobody is left to end it."""
    job = start(tmp_path, "")
    found = job.processes()
    ours = f"{LAUNCHER[0]} {LAUNCHER[1]} ".encode()
    victims = [pid for pid in found if found[pid].startswith(ours)]
    assert len(victims) == 5
    for pid in sorted(victims):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert job.end().status == -signal.SIGKILL


def parent_of(pid):
    """Return the parent of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_mpiexec_is_killed(tmp_path):
    """The status says by what, and so does the reason."""
    job = start(tmp_path, "")
    (mpiexec,) = (pid for pid in job.processes() if parent_of(pid) == job.process.pid)
    os.kill(mpiexec, signal.SIGKILL)
    ended = job.end()
    assert ended.status == 137, ended
    assert "mpiexec was killed by SIGKILL" in ended.reason


def test_a_rank_killed_by_a_signal_without_name(tmp_path):
    """Those for real time have none."""
    job = run(tmp_path, f"if rank: os.kill(os.getpid(), signal.SIGRTMIN + 6)\n{HANG}")
    number = signal.SIGRTMIN + 6
    assert job.status == 128 + number, job
    assert f"killed by signal {number}" in job.reason
