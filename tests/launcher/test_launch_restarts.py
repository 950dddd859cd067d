"""Starting a job again after a failure: while it gets on, and on the hosts that are left."""

from __future__ import annotations

import math
import os
import subprocess
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist.launcher import mpi, restarts
from chainer_dist.launcher.hostfiles import Host
from chainer_dist.launcher.job import Outcome
from launcher import launch, run, write

pytestmark = pytest.mark.faults
jobs = pytest.mark.mpi_skip  # these start jobs of their own

ATTEMPT = "attempt = int(os.environ['CHAINER_DIST_RESTART'])\n"
PROGRESS = "open(os.environ['CHAINER_DIST_PROGRESS'], 'w').write(str({}))\n"


@jobs
def test_a_job_goes_on_after_a_failure(tmp_path):
    """Scripts are told how often the job was started again."""
    code = f"{ATTEMPT}print('attempt', attempt)\nif attempt == 0 and rank == 1: sys.exit(3)"
    job = run(tmp_path, code, "--max-restarts", "2")
    assert job.status == 0, job
    assert "rank 1 on" in job.stderr
    assert "starting again on 2 ranks (restart 1 of 2)" in job.stderr
    assert job.stdout.count("attempt 1") == 2
    assert "attempt 2" not in job.stdout


@jobs
def test_a_job_that_gets_on_is_started_again(tmp_path):
    """As often as it may be; standard input goes on where it was."""
    code = ATTEMPT + PROGRESS.format("100 + attempt")
    code += "if rank == 0: print('read', sys.stdin.readline())\nsys.exit(rank * 5)"
    job = run(tmp_path, code, "--max-restarts", "3", stdin=b"line\n")
    assert job.status == 5, job
    assert job.stderr.count("starting again") == 3
    assert job.reason == "chainer-dist: given up after 3 restarts"
    assert job.stdout.count("read line") == 1


@jobs
def test_a_job_that_does_not_get_on_is_given_up(tmp_path):
    """The second failure at the same iteration is the last one."""
    code = ATTEMPT + PROGRESS.format("min(100 + attempt, 101)") + "sys.exit(rank * 5)"
    job = run(tmp_path, code, "--max-restarts", "9")
    assert job.status == 5
    assert job.stderr.count("starting again") == 3
    assert "2 failures in a row without progress (it stays at iteration 101)" in job.reason


@jobs
def test_the_time_limit_is_for_all_attempts(tmp_path):
    """And ends them."""
    code = ATTEMPT + "time.sleep(attempt * 1000)\nsys.exit(5)"
    job = run(tmp_path, code, "--max-restarts", "9", "--timeout", "6")
    assert job.status == 124, job
    assert job.stderr.count("starting again") == 1


def outcome(progress, *, fails=True, final=False):
    """Return how an attempt ended."""
    return Outcome(5 if fails else 0, "reason" if fails else "", final or not fails, progress)


@given(
    attempts=st.lists(st.none() | st.integers(0, 5), min_size=1, max_size=8),
    max_restarts=st.integers(0, 6),
    ends_well=st.booleans(),
)
def test_when_a_job_is_given_up(attempts, max_restarts, ends_well):
    """After an end that is one, after the last restart, or after two failures without progress."""
    outcomes = [outcome(progress) for progress in attempts]
    outcomes.append(outcome(9, fails=not ends_well, final=True))
    seen = []

    def start(attempt, n_ranks, hosts, seconds):
        assert (attempt, n_ranks, hosts, seconds) == (len(seen), 3, [], math.inf)
        seen.append(outcomes[attempt])
        return seen[-1]

    places = restarts.GivenHosts(3, [], lambda hosts: hosts)
    ended = restarts.run(start, places, max_restarts=max_restarts, seconds=math.inf)
    assert ended is seen[-1]
    grew = [
        one.progress is not None
        and one.progress > max([-1, *(p for p in attempts[:n] if p is not None)])
        for n, one in enumerate(seen)
    ]
    without = [not one and not two for one, two in zip(grew, grew[1:])]
    assert not any(without[:-1])
    assert len(seen) <= max_restarts + 1
    assert seen[-1].final or len(seen) == max_restarts + 1 or without[-1]


@pytest.mark.parametrize(
    ("n_ranks", "left", "then"),
    [(4, "ab", 4), (4, "b", 1), (2, "a", 2), (9, "ab", 9), (9, "a", 3), (4, "", None)],
)
def test_ranks_of_the_hosts_that_are_left(n_ranks, left, then):
    """No more than they have slots, if some are gone; without any the job is given up."""
    hosts = [Host("a", 3), Host("b", 1)]
    seen = []

    def start(attempt, n_ranks, hosts, seconds):
        del attempt, seconds
        seen.append((n_ranks, "".join(host.name for host in hosts)))
        return outcome(None, fails=len(seen) == 1)

    def probe(hosts):
        return [host for host in hosts if host.name in left]

    places = restarts.GivenHosts(n_ranks, hosts, probe)
    restarts.run(start, places, max_restarts=1, seconds=math.inf)
    assert seen == [(n_ranks, "ab"), *([(then, left)] if then else [])]


RENAME = 'unshare --user --map-root-user --uts sh -c "hostname {}; {}"'
if os.geteuid() == 0:
    RENAME = RENAME.replace("--user --map-root-user ", "")


@pytest.fixture
def two_hosts(tmp_path):
    """Return settings under which mpiexec gets to the hosts nodea and nodeb: this machine, renamed.

    Instead of ssh it calls a script, which refuses to go to a host once its file ``gone`` is there.
    """
    if subprocess.run(["/bin/sh", "-c", RENAME.format("x", "true")], check=False).returncode:
        pytest.skip("this user may not rename hosts")
    shell = tmp_path / "ssh"
    shell.write_text(f"""#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do
    case $1 in -p|-i) echo "$1 $2" >> {tmp_path}/options; shift;; esac
    shift
done
host=$1; shift
[ ! -e {tmp_path}/$host.gone ] || {{ echo "ssh: no route to $host" >&2; exit 255; }}
exec {RENAME.format("$host", "$*")}
""")
    shell.chmod(0o755)
    return {
        "HYDRA_LAUNCHER": "ssh",
        "HYDRA_LAUNCHER_EXEC": str(shell),
        "PRTE_MCA_plm_ssh_agent": str(shell),
        "OMPI_MCA_plm_rsh_agent": str(shell),
    }


HOSTS = ("--hosts", "nodea:2,nodeb:1", "--address", "127.0.0.1")


@jobs
def test_another_way_to_a_host(tmp_path, two_hosts):
    """What ssh says of one way does not end a job that comes there by another one, a little later."""
    shell = tmp_path / "ssh"
    first = 'echo "ssh: connect to host gateway port 22: No route to host" >&2; sleep 2'
    shell.write_text(shell.read_text().replace("exec ", f"{first}\nexec "))
    job = launch("run", *HOSTS, write(tmp_path, "print(rank)"), env=two_hosts)
    assert job.status == 0, job
    assert sorted(job.stdout.split()[1::2]) == ["0", "1", "2"]


@jobs
def test_several_hosts(tmp_path, two_hosts):
    """Variables reach them, lines say whose they are, and the reason names the host."""
    code = (
        "import socket; print(socket.gethostname(), os.environ['OMP_DYNAMIC'], os.environ['OWN'])\n"
    )
    script = write(tmp_path, code + "if rank == 2: time.sleep(2); sys.exit(6)\ntime.sleep(1000)")
    settings = {**two_hosts, "OMP_DYNAMIC": "x"}
    job = launch("run", *HOSTS, "--env", "OWN=y", script, env=settings)
    assert job.status == 6, job
    assert sorted(job.stdout.splitlines()) == ["[0] nodea x y", "[1] nodea x y", "[2] nodeb x y"]
    assert job.reason == "chainer-dist: rank 2 on nodeb failed first: exit status 6"


@jobs
def test_port_and_key_of_ssh(tmp_path, two_hosts):
    """Mpiexec hands them to ssh, beside what the environment has."""
    key = tmp_path / "key"
    key.touch()
    options = ["--ssh-port", 2222, "--ssh-identity", key]
    settings = {**two_hosts, "HYDRA_LAUNCHER_EXTRA_ARGS": "-q", "PRTE_MCA_plm_ssh_args": "-q"}
    job = launch("run", *HOSTS, *options, write(tmp_path, "print(rank)"), env=settings)
    assert job.status == 0, job
    assert {*(tmp_path / "options").read_text().splitlines()} == {"-p 2222", f"-i {key}"}


@jobs
def test_a_host_that_is_gone(tmp_path, two_hosts):
    """The job goes on without it, on fewer ranks."""
    code = f"""{ATTEMPT}
if attempt == 0 and rank == 2:
    open({str(tmp_path / "nodeb.gone")!r}, "w").close()
    os.kill(os.getppid(), signal.SIGKILL)
if attempt == 0: time.sleep(1000)
print("again")
"""
    job = launch("run", *HOSTS, "--max-restarts", "1", write(tmp_path, code), env=two_hosts)
    assert job.status == 0, job
    assert "rank 2 on nodeb" in job.stderr
    assert "cannot be reached any more: nodeb" in job.stderr
    assert "starting again on 2 ranks" in job.stderr
    assert sorted(job.stdout.splitlines()) == ["[0] again", "[1] again"]


@jobs
def test_probing_takes_its_time_limit(tmp_path, two_hosts, monkeypatch):
    """A host that does not answer is one that cannot be reached."""
    for name, value in two_hosts.items():
        monkeypatch.setenv(name, value)
    found = mpi.find()
    hosts = [Host("nodea"), Host("nodeb"), Host("localhost")]
    assert restarts.reachable(found, hosts) == hosts
    shell = tmp_path / "ssh"
    shell.write_text(
        shell.read_text().replace("exec", "[ $host = nodea ] && exec sleep 1000\nexec")
    )
    monkeypatch.setattr(restarts, "SECONDS_TO_ANSWER", 3)
    started = time.monotonic()
    assert restarts.reachable(found, hosts) == hosts[1:]
    assert time.monotonic() - started < 20
