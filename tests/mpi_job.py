"""Commands under mpiexec, with a time limit that leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
SECONDS_TO_CLEAN_UP = 10


class Job(NamedTuple):
    """How a command ended: its exit status, None if it was stopped, and what it printed."""

    status: int | None
    output: str


def mpiexec():
    """Return the mpiexec beside this Python, or the one on the path."""
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        raise FileNotFoundError("no mpiexec found: pip install mpich, or see the README")
    return found


def environment(**more):
    """Return the environment of a job: one thread a rank, and an Open MPI that runs as root."""
    env = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, "1"), **more}
    env.setdefault("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
    env.setdefault("OMPI_MCA_rmaps_base_oversubscribe", "1")  # the same for Open MPI 4
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        env.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
        env.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    return env


def run(command, ranks=None, *, timeout, capture=True, cwd=ROOT, env=None):
    """Run a command, under mpiexec if ranks are given, for at most timeout seconds."""
    if ranks is not None:
        command = [mpiexec(), "-n", str(ranks), *command]
    with tempfile.TemporaryFile() as output:
        job = subprocess.Popen(
            command,
            cwd=cwd,
            env=env or environment(),
            stdin=subprocess.DEVNULL,
            stdout=output if capture else None,
            stderr=subprocess.STDOUT if capture else None,
            start_new_session=True,
        )
        status = None
        try:
            status = job.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            stop(job)
        output.seek(0)
        return Job(status, output.read().decode(errors="replace"))


def stop(job):
    """End a command and what it started; the launchers end their ranks when asked to."""
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGTERM)
        try:
            job.wait(SECONDS_TO_CLEAN_UP)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
