"""A cluster on one machine: its links are what they should be, and nothing of it is left behind."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mpi_job

# It starts jobs of its own.
pytestmark = [pytest.mark.mpi_skip, pytest.mark.faults]

SCRIPT = mpi_job.ROOT / "scripts" / "cluster" / "netns_cluster.py"
_spec = importlib.util.spec_from_file_location("netns_cluster", SCRIPT)
netns_cluster = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(netns_cluster)


@pytest.fixture(scope="module")
def create_cluster():
    """Return the class, where this machine can have hosts."""
    try:
        with netns_cluster.Cluster(1, check=False):
            pass
    except netns_cluster.UnavailableError as error:
        pytest.skip(f"no cluster here: {error}")
    return netns_cluster.Cluster


TRAINING = """
import os, socket, sys
import chainer, chainer.functions as F, chainer.links as L, numpy as np
import chainer_dist
from chainer_dist.communicators import names

hosts, ranks_per_host, largest = map(int, sys.argv[1:])
name, address = socket.gethostname(), socket.gethostbyname(socket.gethostname())
for kind in names():
    if kind in ("dummy", "single_node"):
        continue
    with chainer_dist.create_communicator(kind) as comm:
        rank, size = comm.rank, comm.size
        assert (size, comm.inter_size) == (hosts * ranks_per_host, hosts), comm
        assert (comm.inter_rank, comm.intra_rank) == divmod(rank, ranks_per_host), comm
        assert (name, address) == (f"host{comm.inter_rank}", f"10.0.0.{1 + comm.inter_rank}")
        assert len(set(comm.allgather_obj(os.readlink("/proc/self/ns/net")))) == hosts
        sizes = 1, 1000, largest
        everyone = [
            [np.random.RandomState(each).randn(n).astype(np.float32) for n in sizes]
            for each in range(size)
        ]
        arrays = [x.copy() for x in everyone[rank]]
        comm.mean_arrays(arrays)
        for array, same in zip(arrays, zip(*everyone)):
            np.testing.assert_allclose(array, np.mean(same, axis=0, dtype=float), atol=1e-6)


def train(comm, x, t):
    np.random.seed(0)
    model = L.Classifier(chainer.Sequential(L.Linear(20, 300), F.relu, L.Linear(300, 5)))
    optimizer = chainer.optimizers.Adam(alpha=1e-2)
    if comm is not None:
        optimizer = chainer_dist.create_multi_node_optimizer(optimizer, comm)
    optimizer.setup(model)
    for _ in range(5):
        optimizer.update(model, x, t)
    assert comm is None or (optimizer.sharded and optimizer.overlapped)
    return [param.array for param in model.params()]


chainer.global_config.dtype = np.float64
x, t = np.random.RandomState(7).randn(12, 20), np.arange(12, dtype=np.int32) % 5
with chainer_dist.create_communicator() as comm:
    mine = slice(rank * 12 // size, (rank + 1) * 12 // size)
    for got, want in zip(train(comm, x[mine], t[mine]), train(None, x, t)):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
print("fine", end=" ")
"""


@pytest.mark.parametrize(("hosts", "ranks_per_host"), [(2, 2), (3, 1)])
def test_training(create_cluster, capfd, hosts, ranks_per_host):
    """Hosts are nodes; exchange and sharded step give what one process computes from all data."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "timeout": 60}
    with create_cluster(hosts, ranks_per_host=ranks_per_host, rate="1gbit") as cluster:
        rank = [sys.executable, "-c", TRAINING, str(hosts), str(ranks_per_host), "700000"]
        job = cluster.run(rank, env=mpi_job.environment(), **options)
    assert job.returncode == 0, job.stdout
    assert job.stdout.count("fine") == hosts * ranks_per_host
    table = capfd.readouterr().out.splitlines()
    assert len(table) == hosts  # host 0 in itself, and to each of the others


LEAVE = """
import sys
import numpy as np
import chainer_dist

comm = chainer_dist.create_communicator("shared_memory")
comm.mean_arrays([np.ones(1000, np.float32)])
if sys.argv[1:] == ["early"] and comm.rank == 0:
    sys.exit(0)
"""


@pytest.mark.parametrize("when", ["together", "early"])
def test_leaving_communicators_open(create_cluster, when):
    """A script that finalizes no communicator ends well, whichever rank gets there first."""
    with create_cluster(2, check=False) as cluster:
        job = cluster.run(
            [sys.executable, "-c", LEAVE, when], env=mpi_job.environment(), timeout=60
        )
    assert job.returncode == 0


def test_check_finds_a_wrong_rate(create_cluster):
    """A link that is slower, or faster, than was asked for is noticed."""
    with create_cluster(2, rate="200mbit", check=False) as cluster:
        for rate, ratio in (("100mbit", r"0\.[45]"), ("400mbit", r"(1\.[5-9]|2\.)")):
            for host in range(2):
                link = netns_cluster._Link.parse(rate=rate, delay="0s", loss="0%")
                cluster._set_rate(host, link)
            with pytest.raises(RuntimeError, match=rf"host 1 is reached at {ratio}\d* of its link"):
                cluster.check()


def test_check_finds_ranks_that_share_no_memory(create_cluster):
    """An MPI that takes each rank for a node of its own is noticed."""
    with create_cluster(2, check=False) as cluster:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MPIR_CVAR_NOLOCAL", "1")
            with pytest.raises(RuntimeError, match="MPI finds 4 nodes, expected 2"):
                cluster.check()
        assert "host 1" in cluster.check()


ROUND_TRIPS = """
import time
from mpi4py import MPI
world = MPI.COMM_WORLD
buffer = bytearray(100_000)
while True:
    world.Sendrecv_replace(buffer, 1 - world.rank, source=1 - world.rank)
    if world.rank == 0:
        print("round", flush=True)
        time.sleep(0.01)
"""


def rounds(job, seconds):
    """Count the round trips of so many seconds."""
    end = time.monotonic() + seconds
    count = 0
    while (left := end - time.monotonic()) > 0:
        if select.select([job.stdout], [], [], left)[0]:
            count += os.read(job.stdout.fileno(), 1 << 16).count(b"round")
    return count


def test_links_change_while_a_job_runs(create_cluster):
    """A link gets slower and is cut, and the job goes on when it is mended."""
    with create_cluster(2, rate="1gbit", check=False) as cluster:
        job = cluster.start([sys.executable, "-c", ROUND_TRIPS], stdout=subprocess.PIPE)
        while not rounds(job, 0.1):
            assert job.poll() is None
        assert rounds(job, 1) > 15
        cluster.set_link(1, rate="8mbit")  # 0.1 s for 100 kB
        rounds(job, 0.3)
        assert 3 <= rounds(job, 1) <= 14
        cluster.set_link(1, rate="1gbit")
        cluster.cut(0)
        rounds(job, 0.2)
        assert rounds(job, 0.5) == 0
        assert job.poll() is None
        cluster.mend(0)
        while rounds(job, 0.2) < 10:
            assert job.poll() is None
        netns_cluster.stop(job)
        assert job.returncode != 0


ENDLESS_TRAINING = """
import chainer, chainer.links as L, numpy as np
import chainer_dist

comm = chainer_dist.create_communicator()
optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.SGD(), comm)
optimizer.setup(L.Classifier(L.Linear(50, 10)))
x, t = np.zeros((4, 50), np.float32), np.zeros(4, np.int32)
for number in range(10**9):
    optimizer.update(optimizer.target, x, t)
    if comm.rank == 0 and number % 100 == 0:
        print("round", flush=True)
"""


def test_a_dead_link_ends_the_job(create_cluster):
    """A host that cannot be reached any more is named, and nobody waits for it for ever."""
    with create_cluster(2, check=False) as cluster:
        job = cluster.start(
            [sys.executable, "-c", ENDLESS_TRAINING],
            env={"CHAINER_DIST_STALL_WARN": "2", "CHAINER_DIST_STALL_ABORT": "4"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        while not rounds(job, 0.1):
            assert job.poll() is None
        cluster.cut(1)
        out = job.communicate(timeout=60)[0]
        assert job.returncode != 0
        assert re.search(r"waits for rank 1\n.*\n?.*host1.*does not answer", out), out
        assert "ending the job, stalled for 4 s" in out


def test_delay(create_cluster):
    """A delay is there in full, and can be changed."""
    with create_cluster(2, rate="50mbit", delay="3ms", check=False) as cluster:
        assert 3000 < float(cluster.check().split()[-4]) < 5000  # us
        for host in range(2):
            cluster.set_link(host, delay="20ms")
        assert 20_000 < float(cluster.check().split()[-4]) < 25_000


def test_training_over_a_bad_network(create_cluster):
    """With 200 ms to and fro, and one packet of a hundred lost, it is slow and right."""
    with create_cluster(2, rate="50mbit", delay="100ms", loss="1%", check=False) as cluster:
        began = time.monotonic()
        job = cluster.run(
            [sys.executable, "-c", TRAINING, "2", "1", "5000"],
            env=mpi_job.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
    assert job.returncode == 0, job.stdout
    assert job.stdout.count("fine") == 2
    assert time.monotonic() - began > 3  # it did cross that network


def test_two_at_a_time(create_cluster):
    """Clusters do not know of each other, and each passes its job's status on."""
    with create_cluster(2, check=False) as one, create_cluster(2, check=False) as two:
        jobs = [each.start(["sh", "-c", "sleep 0.2; exit 3"]) for each in (one, two)]
        assert [job.wait(20) for job in jobs] == [3, 3]


def networks():
    """Return the network namespaces that processes are in."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found.add(str(path.readlink()))
    return found


@pytest.mark.usefixtures("create_cluster")
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGINT, 130)]
)
def test_nothing_is_left_behind(number, status):
    """Whatever ends the script ends its hosts and all that runs on them."""
    rank = "import os, time; print(os.readlink('/proc/self/ns/net'), flush=True); time.sleep(99)"
    command = [
        sys.executable,
        SCRIPT,
        "--hosts",
        "2",
        "--no-check",
        "--",
        sys.executable,
        "-c",
        rank,
    ]
    script = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = script.stdout.readline() + script.stdout.readline()
    hosts = {*re.findall(r"net:\[\d+\]", lines)}
    assert len(hosts) == 2
    assert hosts <= networks()
    script.send_signal(number)
    assert script.wait(20) == status
    end = time.monotonic() + 10
    while hosts & networks():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    "options",
    [
        {"hosts": 0},
        {"ranks_per_host": 0},
        {"rate": "1 gigabit"},
        {"rate": "0gbit"},
        {"delay": "1"},
        {"loss": "101%"},
        {"loss": "0.1"},
    ],
)
def test_bad_arguments(options):
    """An argument that makes no sense is named."""
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=name) as error:
        netns_cluster.Cluster(**{"hosts": 2, **options})
    assert str(value) in str(error.value)


@pytest.mark.parametrize(("user", "path", "message"), [(1, None, "root"), (0, "", "iproute2")])
def test_what_is_missing_is_named(monkeypatch, capsys, user, path, message):
    """Without rights or tools the script says which, with the status of what is skipped."""
    monkeypatch.setattr(os, "geteuid", lambda: user)
    if path is not None:
        monkeypatch.setenv("PATH", path)
    monkeypatch.setattr(sys, "argv", ["netns_cluster.py", "--", "true"])
    assert netns_cluster.main() == netns_cluster.CANNOT == 77
    assert message in capsys.readouterr().err
