"""The benchmark of kernels measures what it says, with torch and without it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

import mpi_job

HAS_TORCH = importlib.util.find_spec("torch") is not None
SCRIPT = mpi_job.ROOT / "scripts" / "benchmarks" / "bench_kernels.py"


def call(*arguments):
    """Run the script."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.mpi_skip
def test_forward_and_backward(tmp_path):
    """A row for each work has times of all contenders, ratios of them, and the size of the model."""
    out = tmp_path / "kernels.json"
    done = call(
        "--works", "transformer:2", "unet:1", "--threads", 1, "--seconds", 0.1, "--json", out
    )
    assert done.returncode == 0, done.stderr
    (table,) = json.loads(out.read_text())["tables"]
    assert "1 thread;" in table["title"]
    rows = {row[0]: dict(zip(table["columns"], row)) for row in table["rows"]}
    assert {*rows} == {"transformer, 2", "unet, 1"}
    for row in rows.values():
        chainer, auto = float(row["Chainer, ms"]), float(row["auto, ms"])
        assert float(row["Chainer / auto"]) == pytest.approx(chainer / auto, abs=0.1)
        if HAS_TORCH:
            images = row["channels last, ms"]
            torch = min(float(each) for each in (row["torch, ms"], images) if each)
            assert float(row["Chainer / torch"]) == pytest.approx(chainer / torch, abs=0.1)
            assert row["parameters"] == row["parameters of torch"]
    assert rows["transformer, 2"]["parameters"] == "530,314"
    if HAS_TORCH:
        assert not rows["transformer, 2"]["channels last, ms"]
        assert rows["unet, 1"]["channels last, ms"]
    assert ("pip install torch" in done.stdout) is not HAS_TORCH


@pytest.mark.mpi_skip
def test_training():
    """Each choice of kernels, and torch, trains on ranks."""
    arguments = ["--kernels", "auto", "numpy", "--rounds", 1, "--seconds", 0.1]
    done = call("--train", "--works", "transformer:2", *arguments)
    assert done.returncode == 0, done.stderr
    head, row = done.stdout.splitlines()[-2:]
    assert "numpy, ms" in head
    assert ("torch, ms" in head) is HAS_TORCH
    assert row.startswith("transformer, 2")
    assert len(row.split()) == (2 + 4 + 3 + 2 if HAS_TORCH else 2 + 3 + 2)


@pytest.mark.mpi_skip
@pytest.mark.parametrize("work", ["nothing", "cnn:0", "cnn:x", "os:1"])
def test_bad_input(work):
    """It is told before anything is measured."""
    done = call("--works", work)
    assert done.returncode == 2
    assert repr(work) in done.stderr
