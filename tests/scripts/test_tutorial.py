"""The files of the tutorial, as its reader runs them."""

from __future__ import annotations

import re
import shutil
import signal
import sys

import pytest

import launcher
import mpi_job
from chainer_dist.scaling import workloads

# They start jobs of their own.
pytestmark = pytest.mark.mpi_skip

TUTORIAL = mpi_job.ROOT / "docs" / "tutorial"
LIMIT = 100  # seconds


@pytest.fixture
def folder(tmp_path):
    """Return a folder with the files."""
    for file in TUTORIAL.glob("*.py"):
        shutil.copy(file, tmp_path)
    return tmp_path


def epochs(output):
    """Return the numbers of each printed line: epoch, iteration, loss, accuracy."""
    lines = re.findall(r"^(?:\x1b\[J)?(\d+) +(\d+) +(\S+) +(\S+) *$", output, re.MULTILINE)
    return [tuple(map(float, line)) for line in lines]


def run(folder, script, ranks=None):
    """Run a script to its end and return the numbers it prints."""
    job = mpi_job.run([sys.executable, script], ranks, timeout=LIMIT, cwd=folder)
    assert job.status == 0, job.output
    return epochs(job.output)


def test_one_process(folder):
    """The plain script learns, in as many updates as the text says."""
    printed = run(folder, "plain.py")
    assert printed[-1][:2] == (10, 450)
    assert printed[-1][3] > 0.95


def test_four_ranks(folder):
    """So does the distributed one, in a quarter of the updates; and it says everything once."""
    printed = run(folder, "distributed.py", 4)
    assert [epoch for epoch, *_ in printed] == list(range(1, 11))
    assert printed[-1][1] == 113
    assert printed[-1][3] > 0.9


def test_a_job_that_goes_on(folder):
    """Ended in the middle and started again it goes on, and prints the remaining epochs."""
    job = launcher.Launched("run", "-n", 2, "--no-prefix", "resumable.py", cwd=folder)
    job.wait_for(folder / "result" / "log")  # the first epoch is over
    job.process.send_signal(signal.SIGTERM)
    ended = job.end()
    assert ended.status == 75, ended.stderr
    before = epochs(ended.stdout)
    job = mpi_job.run([sys.executable, "resumable.py"], 2, timeout=LIMIT, cwd=folder)
    assert job.status == 0, job.output
    (iteration,) = re.findall(r"^beginning at iteration (\d+)$", job.output, re.MULTILINE)
    printed = epochs(job.output)  # once more those of before, from the log
    assert before[-1][1] <= int(iteration) < printed[-1][1]
    assert printed[: len(before)] == before
    assert [epoch for epoch, *_ in printed] == list(range(1, 11))
    assert printed[-1][3] > 0.9


def test_the_workload():
    """What is to be measured is the model, and batches that differ between ranks."""
    make = workloads.load(f"{TUTORIAL / 'workload.py'}:make").make
    losses = []
    for rank in (0, 1):
        model, (images, labels) = make(32, rank)
        assert (images.shape, labels.shape) == ((32, 64), (32,))
        losses.append(float(model(images, labels).array))
    assert losses[0] != losses[1]
    assert all(1 < loss < 4 for loss in losses)  # log(10) would be by chance
