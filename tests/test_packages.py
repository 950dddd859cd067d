"""Wheel and sdist, built and installed into clean environments, train; needs a package index.

``make test-packages PYTHONS="python3.9 python3.13"`` names the Pythons.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mpi_job

pytestmark = [pytest.mark.mpi_skip, pytest.mark.packages]

PYTHONS = os.environ.get("PYTHONS", sys.executable).split()
CONSTRAINTS = str(mpi_job.ROOT / "build-constraints.txt")
LIMIT = 600  # seconds

TRAINING = """
import chainer  # first: the repair of Chainer does not depend on the order
import chainer.functions as F, chainer.links as L, numpy as np
import chainer_dist

comm = chainer_dist.create_communicator()
assert comm.size == 2, comm
model = L.Classifier(chainer.Sequential(L.Linear(None, 16), F.relu, L.Linear(16, 2)))
optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.Adam(1e-2), comm)
optimizer.setup(model)
rng = np.random.RandomState(comm.rank)
for _ in range(60):
    x = rng.randn(32, 8).astype(np.float32)
    optimizer.update(model, x, (x[:, 0] > x[:, 1]).astype(np.int32))
assert optimizer.sharded
assert model.accuracy.array > 0.8
for param in model.params():
    assert comm.allreduce_obj(param.array.tobytes() == comm.bcast_obj(param.array.tobytes())) == 2
if comm.rank == 0:
    print("trained")
"""


def run(*command, cwd, **env):
    """Run a command to its end, without what this environment has set, and return what it prints."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**kept, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Return the folder that ``make dist`` makes, from a copy of what git has."""
    clone = tmp_path_factory.mktemp("clone") / "chainer_dist"
    run("git", "clone", "-q", mpi_job.ROOT, clone, cwd=clone.parent)
    venv = Path(sys.executable).parent.parent
    run("make", "dist", f"VENV={venv}", "--assume-old", venv / ".installed", cwd=clone)
    return clone / "dist"


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("kind", ["folder", "wheel", "sdist"])
def test_installed_packages_train(dist, tmp_path, python, kind):
    """It installs, imports from anywhere, and trains on two ranks: from the folder with nothing set."""
    run(python, "-m", "venv", "env", cwd=tmp_path)
    binaries = tmp_path / "env" / "bin"
    if kind == "folder":
        run(binaries / "pip", "install", "--find-links", dist, "chainer_dist[mpich]", cwd=tmp_path)
    else:
        (file,) = dist.glob("chainer_dist-*" + {"wheel": ".whl", "sdist": ".tar.gz"}[kind])
        constraint = dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), CONSTRAINTS)
        run(binaries / "pip", "install", f"{file}[mpich]", cwd=tmp_path, **constraint)
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    for starter in ([binaries / "mpiexec"], [binaries / "chainer-dist", "run", "--no-prefix"]):
        command = [*starter, "-n", 2]
        command += [binaries / "python"] if starter[0].name == "mpiexec" else []
        printed = run(*command, script, cwd=tmp_path)
        assert printed.splitlines()[-1] == "trained"
    assert "Warnings" in run(binaries / "chainer-dist", "info", cwd=tmp_path)
