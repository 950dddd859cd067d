"""Commands under mpiexec, with a time limit that leaves nothing behind."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from chainer_dist.launcher import mpi

ROOT = Path(__file__).resolve().parents[2]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
SECONDS_TO_CLEAN_UP = 10


class Job(NamedTuple):
    """How a command ended: its exit status, None if it was stopped, and what it printed."""

    status: int | None
    output: str


find_mpi = functools.lru_cache(maxsize=None)(mpi.find)


def environment(**more):
    """Return the environment of a job: one thread a rank, and what this MPI's mpiexec wants."""
    env = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, "1"), **more}
    # Without buffers print writes word by word, and the words of ranks mix.
    env.pop("PYTHONUNBUFFERED", None)
    # Without bytecode each of hundreds of processes would compile the package anew.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    return {**env, **mpi.environment(find_mpi(), env)}


def run(command, ranks=None, *, timeout, capture=True, cwd=ROOT, env=None):
    """Run a command, under mpiexec if ranks are given, for at most timeout seconds."""
    if ranks is not None:
        command = [find_mpi().mpiexec, "-n", str(ranks), *command]
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
