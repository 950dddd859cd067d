"""The files of the tutorial, as its reader runs them, and what the tutorial shows that they print."""

from __future__ import annotations

import re
import shutil
import signal
import sys
import textwrap

import pytest

import launcher
import mpi_job
from chainer_dist.scaling import contenders, workloads

# They start jobs of their own.
pytestmark = pytest.mark.mpi_skip

TUTORIAL = mpi_job.ROOT / "docs" / "tutorial"
LIMIT = 110  # seconds
RANK = r"(?:\[0\] )?"  # chainer-dist run writes it before a line


@pytest.fixture
def folder(tmp_path):
    """Return a folder with the files."""
    for file in TUTORIAL.glob("*.py"):
        shutil.copy(file, tmp_path)
    return tmp_path


def shown(command):
    """Return what the tutorial shows below a command, each time it has the command."""
    text = (TUTORIAL / "index.rst").read_text(encoding="utf-8")
    pattern = rf"^\.\. code-block:: console\n\n   \$ {re.escape(command)}\n((?:   .*\n|\n(?=   ))+)"
    found = [textwrap.dedent(output) for output in re.findall(pattern, text, re.MULTILINE)]
    assert found, f"the tutorial has no output of {command}"
    return found


def epochs(output):
    """Return the numbers of each printed line: epoch, iteration, loss, accuracy."""
    number = r" +(\d+(?:\.\d+)?(?:e-\d+)?)"
    lines = re.findall(
        rf"^(?:\x1b\[J)? *{RANK}(?:\x1b\[J)?(\d+){number * 3} *$", output, re.MULTILINE
    )
    return [tuple(map(float, line)) for line in lines]


def headings(output):
    """Return the lines that are above the numbers."""
    return [line.split() for line in re.findall(rf"^{RANK}(epoch .*)$", output, re.MULTILINE)]


def check_shown(output, expected):
    """Check that a script prints what the tutorial shows, up to rounding, which grows in training."""
    assert headings(expected) == headings(output)
    assert epochs(expected)
    printed = {epoch: numbers for epoch, *numbers in epochs(output)}
    for epoch, iteration, loss, accuracy in epochs(expected):
        assert printed[epoch][0] == iteration
        assert printed[epoch][1] == pytest.approx(loss, rel=0.3, abs=0.02)
        assert printed[epoch][2] == pytest.approx(accuracy, abs=0.025)


def run(folder, script, ranks=None):
    """Run a script to its end and return what it prints."""
    job = mpi_job.run([sys.executable, script], ranks, timeout=LIMIT, cwd=folder)
    assert job.status == 0, job.output
    return job.output


def test_the_plain_script(folder):
    """It learns, in as many updates as the text says."""
    output = run(folder, "plain.py")
    (expected,) = shown("python plain.py")
    assert len(epochs(expected)) == len(epochs(output)) == 10
    assert epochs(expected)[-1][1] == 450
    check_shown(output, expected)


def test_two_ranks(folder):
    """So does the distributed one, in as many updates; and it says everything once."""
    output = run(folder, "distributed.py", 2)
    (expected,) = shown("mpiexec -n 2 python distributed.py")
    assert [epoch for epoch, *_ in epochs(output)] == [*range(1, 11)]
    assert len(epochs(expected)) == 10
    check_shown(output, expected)
    (expected,) = shown("chainer-dist run -n 2 distributed.py")
    assert len(epochs(expected)) == 10
    check_shown(output, expected)


def test_the_plain_script_made_distributed(folder):
    """It can stay as it is, and makes half the updates then, as the batches are twice as large."""
    job = launcher.Launched("run", "-n", 2, "--distribute", "plain.py", cwd=folder).end(LIMIT)
    assert job.status == 0, job.stderr
    assert epochs(job.stdout)[-1][:2] == (10, 225)
    assert epochs(job.stdout)[-1][3] > 0.9


def test_a_job_that_goes_on(folder):
    """Ended in the middle and started again it goes on, and prints the remaining epochs."""
    first, again = shown("chainer-dist run -n 2 resumable.py")
    job = launcher.Launched("run", "-n", 2, "resumable.py", cwd=folder)
    job.wait_for(folder / "result" / "log", '"epoch": 2', LIMIT)
    job.process.send_signal(signal.SIGINT)
    ended = job.end(LIMIT)
    assert ended.status == 130, ended.stderr
    check_shown(again, first)  # its lines are in both
    before = epochs(ended.stdout)
    last = "ended after SIGINT; rank . on .* failed first: KeyboardInterrupt .exit status 130."
    for text in first, ended.stderr:
        assert "chainer-dist: SIGINT: the ranks are asked to end; Ctrl-C again kills them" in text
        assert re.fullmatch(f"chainer-dist: {last}", text.splitlines()[-1])

    job = launcher.Launched("run", "-n", 2, "resumable.py", cwd=folder)
    job.wait_for(folder / "result" / "log", '"epoch": 6', LIMIT)
    job.process.send_signal(signal.SIGTERM)
    ended = job.end(LIMIT)
    assert ended.status == 75, ended.stderr
    assert "Warning" not in ended.stdout + ended.stderr
    assert ended.stdout.startswith("[0] beginning at iteration ")
    iteration = int(ended.stdout.split()[4])
    assert iteration > 0
    assert iteration % 20 == 0
    assert epochs(ended.stdout)[: len(before)] == before  # from the log
    check_shown(ended.stdout, "\n".join(again.splitlines()[: 2 + len(before)]))
    assert first.startswith("[0] beginning at iteration 0\n")
    assert again.startswith("[0] beginning at iteration ")
    assert int(again.split()[4]) % 20 == 0

    saved = epochs(ended.stdout)[-1][1]
    script = folder / "resumable.py"
    text = script.read_text(encoding="utf-8")
    script.write_text(text.replace('(40, "epoch")', '(12, "epoch")'), encoding="utf-8")
    output = run(folder, "resumable.py", 2)
    assert int(re.findall(r"^beginning at iteration (\d+)$", output, re.MULTILINE)[0]) >= saved
    assert [epoch for epoch, *_ in epochs(output)] == [*range(1, 13)]


def test_the_workload():
    """What is to be measured is the model, and batches that differ between ranks."""
    make = workloads.load(f"{TUTORIAL / 'workload.py'}:make").make
    losses = []
    for rank in (0, 1):
        model, (images, labels) = make(32, rank)
        assert (images.shape, labels.shape) == ((32, 1, 8, 8), (32,))
        losses.append(float(model(images, labels).array))
    assert losses[0] != losses[1]
    assert all(1 < loss < 4 for loss in losses)  # log(10) would be by chance


def test_how_it_scales(folder):
    """The table has the contenders and columns that the tutorial shows; here two of them are measured."""
    (expected,) = shown("chainer-dist scale --workloads workload.py:make --rounds 1 --accuracy 0")
    ours, other = contenders.OURS, contenders.INDEPENDENT
    quick = "--contenders", ours, other, "--scaling", "weak", "--seconds", 0.1, "--oversubscribe"
    arguments = "--workloads", "workload.py:make", "--rounds", 1, "--accuracy", 0, *quick
    job = launcher.Launched("scale", *arguments, cwd=folder).end(LIMIT)
    assert job.status == 0, job.stderr

    def rows(text):
        """Return the contender and the number of ranks of each line of numbers, and other lines' words."""
        lines = [line.split() for line in text.splitlines()]
        return [line[:2] if line[2:] and line[1].isdigit() else line for line in lines]

    weak, strong = (rows(part) for part in expected.split("\n\n")[:2])
    assert strong[1:] == weak[1:]
    assert [name for name, ranks in weak[2:] if ranks == "1"] == [
        name for name in contenders.CONTENDERS if not contenders.is_torch(name)
    ]
    measured = [row for row in weak if row[0] not in {"chainermn", "allreduce"}]
    assert rows(job.stdout.split("\n\n")[0]) == measured
    assert job.stdout.splitlines()[-1] == expected.splitlines()[-1]
