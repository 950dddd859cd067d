"""``chainer-dist info``: what there is, and what will hurt."""

from __future__ import annotations

import copy
import json
import sys

import chainer
import mpi4py
import numpy as np
import pytest
from mpi4py import MPI

import chainer_dist
import mpi_job
from chainer_dist.launcher import mpi, report
from launcher import LAUNCHER, launch

pytestmark = pytest.mark.faults
jobs = pytest.mark.mpi_skip  # these start jobs of their own


def check(facts, n_ranks):
    """Compare what is reported with what this process sees."""
    assert facts["versions"] == {
        "chainer_dist": chainer_dist.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "chainer": chainer.__version__,
        "numpy": np.__version__,
        "mpi4py": mpi4py.__version__,
    }
    assert facts["mpi"]["library"] == mpi.name_of(MPI.Get_library_version())
    assert facts["mpi"]["mpiexec"]["mpiexec"] == mpi.find().mpiexec
    assert facts["n_ranks"] == n_ranks
    (host,) = facts["hosts"]
    assert host["ranks"] == [*range(n_ranks)]
    assert facts["communicators"]["names"] == list(chainer_dist.communicators.names())
    auto = chainer_dist.create_communicator(mpi_comm=MPI.COMM_SELF)
    assert facts["communicators"]["auto"] in type(auto).__module__
    auto.finalize()


@jobs
def test_one_process():
    """Without -n no ranks are started."""
    job = launch("info", "--json")
    assert job.status == 0, job
    check(json.loads(job.stdout), 1)


@jobs
@pytest.mark.parametrize(
    "arguments", [["info"], ["info", "-n", "2"], ["scale", "--help"], ["predict", "--help"]]
)
def test_nothing_is_imported_from_the_current_folder(arguments, tmp_path):
    """It may be anybody's."""
    trace = tmp_path / "was imported"
    for name in ("mpi4py", "json", "chainer", "chainer_dist", "numpy", "threadpoolctl"):
        (tmp_path / f"{name}.py").write_text(f"open({str(trace)!r}, 'w')")
    job = launch(*arguments, cwd=tmp_path)
    assert job.status == 0, job
    assert not trace.exists()


@jobs
def test_several_ranks():
    """With -n, and under mpiexec, all ranks are asked, and one speaks."""
    check(json.loads(launch("info", "-n", "3", "--json").stdout), 3)
    job = mpi_job.run([*LAUNCHER, "info", "--json"], 3, timeout=60)
    facts = json.loads(job.output)
    check(facts, 3)
    assert not [warning for warning in facts["warnings"] if "another MPI" in warning]


@jobs
def test_text():
    """For people the same in lines."""
    job = launch("info")
    assert job.status == 0
    for word in (
        "MPI",
        "mpiexec",
        "rank on",
        "auto",
        "shared_memory",
        "Warnings",
        chainer.__version__,
    ):
        assert word in job.stdout


def facts_of_these_ranks():
    """Return what the ranks of this run see."""
    ranks, auto, problem = report.collect()
    assert not problem
    launcher = {"mpi": mpi.Mpi("MPICH", "1", "", "mpiexec", "1")._asdict(), "problem": None}
    return ranks, report.summary(ranks, auto, launcher)


def test_every_rank_is_counted():
    """Ranks of a host are put together, whatever the number of them."""
    ranks, facts = facts_of_these_ranks()
    size = MPI.COMM_WORLD.size
    assert len(ranks) == facts["n_ranks"] == size
    assert sorted(rank for host in facts["hosts"] for rank in host["ranks"]) == [*range(size)]
    assert not facts["differing"]
    assert report.speaks(ranks) == (MPI.COMM_WORLD.rank == 0)


GIB = 1 << 30
GOOD = {
    "mpi": {"problem": None, "mpiexec": {"mpiexec_version": "5", "version": "5"}},
    "n_ranks": 2,
    "started_as": [0, 2, 0, 2],
    "differing": [],
    "start_method": "spawn",
    "hosts": [
        {
            "name": "h",
            "ranks": [0, 1],
            "cores": 4,
            "quota": None,
            "threads": [2, 2],
            "shared_memory": {"total": 8 * GIB, "free": 4 * GIB},
        }
    ],
}

# What is changed, and the warning it gives.
HURTS = [
    ("hosts.0.ranks", [0, 1, 2, 3, 4], "h has 5 ranks on 4 cores"),
    ("hosts.0.quota", 1.5, "h has 2 ranks on 1.5 cores"),
    ("hosts.0.quota", 3.0, "h has 4 threads on 3 cores"),
    ("hosts.0.threads", [4, 4], "h has 8 threads on 4 cores"),
    ("hosts.0.shared_memory.free", GIB // 16, "h has 0.062 GiB free in /dev/shm"),
    ("start_method", "fork", "set_start_method"),
    ("mpi.problem", "no mpiexec", "no mpiexec"),
    ("mpi.mpiexec.mpiexec_version", "4", "mpiexec is of version 4, the library of 5"),
    ("n_ranks", 1, "2 ranks were started, and each of them knows 1"),
    ("differing", ["ranks have different versions"], "ranks have different versions"),
]


def test_nothing_hurts():
    """No warning without a reason."""
    assert report.warnings(GOOD) == []
    assert report.warnings({**GOOD, "started_as": None}) == []


@pytest.mark.parametrize(("path", "value", "warning"), HURTS, ids=[path for path, *_ in HURTS])
def test_what_hurts(path, value, warning):
    """Each has its own warning, and no other."""
    facts = copy.deepcopy(GOOD)
    *way, last = path.split(".")
    inner = facts
    for key in way:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    inner[last] = value
    (found,) = report.warnings(facts)
    assert warning in found


def test_versions_that_differ():
    """The ranks and hosts that have them are named."""
    ranks, _ = facts_of_these_ranks()
    other = copy.deepcopy(ranks[0])
    other.update(rank=7, host="old", library="MPICH 3.0")
    other["versions"]["numpy"] = "1.0"
    found = report.summary([*ranks, other], {}, {"mpi": None, "problem": ""})["differing"]
    assert len(found) == 2
    assert (
        f"numpy: {np.__version__} on rank 0 ({ranks[0]['host']}), 1.0 on rank 7 (old)" in found[0]
    )
    assert "MPICH 3.0 on rank 7 (old)" in found[1]
