"""The scripts that show how it is done learn what they are to learn."""

from __future__ import annotations

import re
import sys

import pytest

import mpi_job

# They start jobs of their own.
pytestmark = pytest.mark.mpi_skip


def last_numbers(script, ranks, *arguments, cwd):
    """Run a script and return the numbers in the line that says how well it learned."""
    command = [sys.executable, str(mpi_job.ROOT / "scripts" / script), *map(str, arguments)]
    job = mpi_job.run(command, ranks, timeout=150, cwd=cwd)
    assert job.status == 0, job.output
    lines = re.findall(r"^(?:Validation accuracy|Frechet|Turned).*$", job.output, re.MULTILINE)
    return [float(number) for number in re.findall(r"\d+\.\d+", lines[-1])]


def test_gan(tmp_path):
    """Drawn images become like the real ones."""
    arguments = "--epochs", 8, "--no-progress-bar", "--out", tmp_path
    before, after = last_numbers("train_gan.py", 2, *arguments, cwd=tmp_path)
    assert after < before / 3
    assert (tmp_path / "gan.png").stat().st_size > 0


@pytest.mark.parametrize(("ranks", "options"), [(3, ()), (4, ("--ranks-per-model", 2))])
def test_model_parallel(tmp_path, ranks, options):
    """One network on all ranks, and replicas of a network on two."""
    arguments = "--epochs", 6, "--units", 128, *options
    (accuracy,) = last_numbers("train_model_parallel.py", ranks, *arguments, cwd=tmp_path)
    assert accuracy > 90


def test_parallel_convolution(tmp_path):
    """Filters on two ranks are one network."""
    arguments = "--epochs", 3, "--channels", 16
    (accuracy,) = last_numbers("train_parallel_convolution.py", 2, *arguments, cwd=tmp_path)
    assert accuracy > 80


def test_seq2seq(tmp_path):
    """The decoder learns to write what the encoder has read."""
    arguments = "--updates", 200, "--longest", 3
    (right,) = last_numbers("train_seq2seq.py", 2, *arguments, cwd=tmp_path)
    assert right > 50  # by chance it is less than one


def test_resumable(tmp_path):
    """A training that was ended goes on, and comes to what one in a single run comes to."""
    arguments = "--every", 10, "--out"
    whole = last_numbers(
        "train_resumable.py", 2, "--epochs", 3, *arguments, tmp_path / "whole", cwd=tmp_path
    )
    parts = [
        last_numbers(
            "train_resumable.py",
            2,
            "--epochs",
            epochs,
            *arguments,
            tmp_path / "parts",
            cwd=tmp_path,
        )
        for epochs in (1, 3)
    ]
    assert whole == parts[1] != parts[0]
    assert whole[0] > 90
