"""The launcher as its users call it, and a look at what its jobs leave behind."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import chainer_dist
import mpi_job

# The console script runs this path too.
LAUNCHER = [sys.executable, str(Path(chainer_dist.__file__).parent / "launcher")]
MARK = "CHAINER_DIST_TEST_MARK"
SECONDS_TO_VANISH = 10

# Which rank a script is, without the cost of starting MPI.
RANK = """
import os, sys, time, signal
rank = int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")))
"""


class Ended(NamedTuple):
    """How a launcher ended: its exit status and what it printed."""

    status: int
    stdout: str
    stderr: str

    @property
    def reason(self):
        """The last line of standard error."""
        return self.stderr.splitlines()[-1]


class Launched:
    """A launcher that is running. All its processes inherit a mark in their environment."""

    def __init__(self, *arguments, stdin=b"", env=None, cwd=None, launcher=LAUNCHER, **options):
        self._mark = uuid.uuid4().hex
        self._stdin = stdin
        env = {**mpi_job.environment(), MARK: self._mark, **(env or {})}
        self.process = subprocess.Popen(
            [*launcher, *map(str, arguments)],
            stdin=subprocess.PIPE,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
            env={name: value for name, value in env.items() if value is not None},
            cwd=cwd,
            start_new_session=True,  # a group of its own, as a terminal would give it
        )

    def wait_for(self, file, text="", seconds=40):
        """Wait until a script has written some text to a file."""
        deadline = time.monotonic() + seconds
        while not (file.exists() and text in file.read_text()):
            assert time.monotonic() < deadline, f"{file} does not say {text!r}"
            assert self.process.poll() is None, self.end()
            time.sleep(0.02)

    def end(self, seconds=60):
        """Wait for the end, and for that of all processes of the job."""
        try:
            stdout, stderr = self.process.communicate(self._stdin, timeout=seconds)
        finally:
            mpi_job.stop(self.process)
        left = self.processes()
        deadline = time.monotonic() + SECONDS_TO_VANISH
        while left and time.monotonic() < deadline:
            time.sleep(0.05)
            left = self.processes()
        assert not left
        return Ended(self.process.returncode, (stdout or b"").decode(), (stderr or b"").decode())

    def processes(self):
        """Return the processes that carry the mark and their command lines, on Linux."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended, or is somebody else's
                if f"{MARK}={self._mark}".encode() in (folder / "environ").read_bytes():
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(folder.name)] = command
        return found


def launch(*arguments, **options):
    """Run the launcher to its end; nothing is left of the job then."""
    return Launched(*arguments, **options).end()


def run(tmp_path, code, *options, ranks=2, **more):
    """Run a script, given as text that may use ``rank``."""
    return launch("run", "-n", ranks, *options, write(tmp_path, code), **more)


def write(tmp_path, code):
    """Write a script that may use ``rank``, and return its path."""
    script = tmp_path / "script.py"
    script.write_text(RANK + code)
    return script
