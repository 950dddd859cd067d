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
    command = [
        sys.executable,
        str(mpi_job.ROOT / "scripts" / "examples" / script),
        *map(str, arguments),
    ]
    job = mpi_job.run(command, ranks, timeout=150, cwd=cwd)
    assert job.status == 0, job.output
    lines = re.findall(
        r"^(?:Validation accuracy|Frechet|Turned|Perplexity|Elements).*$", job.output, re.MULTILINE
    )
    return [float(number) for number in re.findall(r"\d+\.\d+", lines[-1])]


def test_gan(tmp_path):
    """Drawn images become like the real ones."""
    arguments = "--epochs", 8, "--no-progress-bar", "--out", tmp_path
    before, after = last_numbers("train_gan.py", 2, *arguments, cwd=tmp_path)
    assert after < before / 3
    assert (tmp_path / "gan.png").stat().st_size > 0


def test_model_parallel(tmp_path):
    """Two replicas of a network on two ranks each."""
    arguments = "--epochs", 6, "--units", 128, "--ranks-per-model", 2
    (accuracy,) = last_numbers("train_model_parallel.py", 4, *arguments, cwd=tmp_path)
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


def test_language_model(tmp_path):
    """What only one rank has read, all ranks know: the text goes over into another language."""
    languages = [
        " ".join([f"{'ab'[i % 2]}{letters[i // 2]}" for i in range(16)] * 3 + ["."])
        for letters in ("cdefghij", "klmnopqr")
    ]
    text = tmp_path / "text.txt"
    text.write_text(" ".join([languages[0]] * 30 + [languages[1]] * 30), encoding="utf-8")
    arguments = "--text", text, "--epochs", 4, "--units", 24, "--length", 10, "--batch-size", 4
    (perplexity,) = last_numbers(
        "train_language_model.py", 2, *arguments, "--no-progress-bar", cwd=tmp_path
    )
    assert perplexity < 5  # of 34 words


def test_attention(tmp_path):
    """Dates are written without a mistake, which chance never does."""
    arguments = "--epochs", 2, "--samples", 4000, "--batch-size", 32, "--units", 48
    (accuracy,) = last_numbers(
        "train_attention.py", 2, *arguments, "--no-progress-bar", cwd=tmp_path
    )
    assert accuracy > 10


def test_fine_tuning(tmp_path):
    """What was learned from other digits is of use, and is there on all ranks after loading."""
    arguments = "--epochs", 2, "--no-progress-bar"
    fine_tuned, scratch = last_numbers("train_fine_tuning.py", 2, *arguments, cwd=tmp_path)
    assert fine_tuned > 75
    assert scratch > 40


def test_search(tmp_path):
    """Groups of ranks search side by side, and find something good."""
    arguments = "--candidates", 6
    (accuracy,) = last_numbers("search_hyperparameters.py", 4, *arguments, cwd=tmp_path)
    assert accuracy > 90


def test_image_folder(tmp_path):
    """Files are shared out, augmented in workers, and learned; an ended training goes on."""
    arguments = "--epochs", 2, "--warm-up", 1, "--channels", 8, "--no-progress-bar"
    (accuracy,) = last_numbers("train_image_folder.py", 2, *arguments, cwd=tmp_path)
    assert accuracy > 60
    assert list(tmp_path.glob("result/image_folder/checkpoints/*"))


@pytest.mark.parametrize("kind", ["hdf5", "lmdb", "parquet", "tar", "zarr"])
def test_files_of_other_formats(tmp_path, kind):
    """All ranks learn from one file, which is written first."""
    arguments = "--format", kind, "--epochs", 2, "--no-progress-bar"
    (accuracy,) = last_numbers("train_from_files.py", 2, *arguments, cwd=tmp_path)
    assert accuracy > 80
    assert (tmp_path / "result" / f"train.{kind}").exists()


def test_matrix(tmp_path):
    """All three ways compute the same."""
    arguments = "--size", 20, "--steps", 100, "--no-progress-bar"
    (same,) = last_numbers("compute_matrix.py", 3, *arguments, cwd=tmp_path)
    assert same == 100


def test_prediction(tmp_path):
    """A snapshot that one script leaves is what the other predicts with, through files.

    Its name is the one that the documentation gives.
    """
    trained, *_ = last_numbers("../train_digits.py", 2, "--no-progress-bar", cwd=tmp_path)
    assert (tmp_path / "result" / "accuracy.png").stat().st_size > 0
    (snapshot,) = tmp_path.glob("result/snapshot_iter_*")
    for path in ("docs/howto/examples.rst", "scripts/examples/predict_digits.py"):
        text = (mpi_job.ROOT / path).read_text(encoding="utf-8")
        assert f"--snapshot result/{snapshot.name}" in text
    arguments = "--snapshot", snapshot, "--no-progress-bar", "--files", tmp_path / "scores"
    assert last_numbers("predict_digits.py", 3, *arguments, cwd=tmp_path) == [trained]
