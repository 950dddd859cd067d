"""The tests' own machinery: whatever goes wrong on a rank is reported, and nothing hangs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import is_for

import mpi_job

# These start jobs of their own.
pytestmark = pytest.mark.mpi_skip

TESTS = Path(__file__).resolve().parent
HEADER = "from mpi4py import MPI\nimport pytest, time\nworld = MPI.COMM_WORLD\n"


@pytest.fixture
def run_tests(tmp_path):
    """Return a function that runs the text of a test file on some ranks, with short limits."""

    def run(text, *options, ranks=3, timeout=60):
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        (tmp_path / "test_it.py").write_text(HEADER + text)
        plugins = [
            "-p",
            "result_file",
            "-p",
            "mpi_agreement",
            "-p",
            "no:cacheprovider",
            "--color=no",
        ]
        limits = ["--mpi-grace=2", "--mpi-limit=20", "--result-file=result.json"]
        command = [sys.executable, "-m", "pytest", *plugins, *limits, *options]
        if ranks > 1:
            command.append("--with-mpi")
        path = os.pathsep.join([str(TESTS / "plugins"), str(TESTS.parent)])
        return mpi_job.run(
            command,
            ranks if ranks > 1 else None,
            timeout=timeout,
            cwd=tmp_path,
            env=mpi_job.environment(PYTHONPATH=path),
        )

    return run


@pytest.mark.parametrize("rank", [0, 2])
def test_a_failure_of_one_rank_is_one_of_all(run_tests, rank):
    """It is reported once, with what that rank said, and the next test runs as usual."""
    job = run_tests(f"""
def boom(where):
    assert world.rank != {rank}, "boom in " + where

@pytest.fixture
def before(): boom("setup")

@pytest.fixture
def after():
    yield
    boom("teardown")

def test_setup(before): pass
def test_call(): boom("call")
def test_teardown(after): pass
def test_skip(): world.rank == {rank} and pytest.skip("boom in skip")
def test_next(): world.Barrier()
""")
    assert job.status == 1, job.output
    assert "2 failed, 2 passed, 2 errors" in job.output
    for where in ("setup", "call", "teardown", "skip"):
        assert f"boom in {where}" in job.output
    assert job.output.count("passed on rank") >= 4
    assert job.output.count("= test session starts =") == 1


def test_agreement_without_a_failure(run_tests):
    """What all ranks do alike keeps its outcome."""
    job = run_tests(
        "def test(): pass\n"
        "def test_skip(): pytest.skip('all')\n"
        "@pytest.mark.xfail\ndef test_xfail(): assert 0\n"
    )
    assert job.status == 0, job.output
    assert "1 passed, 1 skipped, 1 xfailed" in job.output


def test_a_rank_that_leaves_others_in_a_barrier(run_tests):
    """It shows its traceback and ends the job after the time of grace."""
    job = run_tests("def test():\n assert world.rank != 1, 'boom'\n world.Barrier()\n")
    assert job.status not in {0, None}, job.output
    assert "rank 1 failed in test_it.py::test (call)" in job.output
    assert "AssertionError: boom" in job.output


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_test_that_hangs(run_tests, ranks):
    """Its job ends, and every rank's stack shows where it hung."""
    job = run_tests(
        "def wait_here(): time.sleep(100)\ndef test(): wait_here()\n", "--mpi-limit=2", ranks=ranks
    )
    assert job.status not in {0, None}, job.output
    assert job.output.count("in wait_here") == ranks


@pytest.mark.parametrize(
    "text",
    [
        "@pytest.mark.parametrize('x', [world.rank])\ndef test(x): pass\n",
        "assert world.rank != 1, 'boom'\ndef test(): pass\n",
    ],
    ids=["parameters", "import"],
)
def test_ranks_that_collect_different_tests(run_tests, text):
    """No test runs, and all ranks leave with an error."""
    job = run_tests(text)
    assert job.status not in {0, None}, job.output
    assert "the ranks collected different tests" in job.output
    assert ("boom" in text) == ("AssertionError: boom" in job.output)
    assert "1 passed" not in job.output


def test_a_rank_that_is_interrupted(run_tests):
    """Leaving pytest on one rank ends the job."""
    job = run_tests("def test():\n world.rank == 1 and pytest.exit('boom')\n world.Barrier()\n")
    assert job.status not in {0, None}, job.output
    assert "rank 1 was interrupted" in job.output
    assert "boom" in job.output


def test_an_example_fails_on_one_rank(run_tests):
    """Hypothesis tries it again on all ranks, and they stay together."""
    job = run_tests("""
from hypothesis import Phase, given, settings, strategies as st

@settings(derandomize=True, database=None, deadline=None, phases=[Phase.generate])
@given(x=st.integers())
def test(x):
    assert world.allreduce(x) == world.size * x
    assert world.rank == 0 or x < 20, "boom"

def test_next(): world.Barrier()
""")
    assert job.status == 1, job.output
    assert "1 failed, 1 passed" in job.output
    assert "AssertionError: boom" in job.output


def test_job_that_does_not_end(tmp_path):
    """The time limit stops all ranks; none lives on."""
    code = f"import os, pathlib, time; pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch()\n"
    job = mpi_job.run([sys.executable, "-c", code + "time.sleep(100)"], 2, timeout=4)
    assert job.status is None
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    check_ended(pids)


def check_ended(pids):
    """Check that ranks have ended; an orphan is there until the system collects it."""
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "ranks outlived their job"
        time.sleep(0.1)


def is_alive(pid):
    """Return whether a process is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_runner(tmp_path):
    """Its status, its table and its last line tell how all jobs went."""
    job = run_runner(
        tmp_path,
        """
@pytest.mark.mpi_skip
def test_of_one_process(): pass
def test_good(): world.Barrier()
def test_bad(): assert world.size < 3
def test_never(): pytest.skip("always")
""",
    )
    assert job.status == 1, job.output
    *_, table_end, first, second, rot, last = job.output.splitlines()
    assert table_end.split()[:4] == ["4", "1", "1", "2"]
    assert first.startswith("failed on 3: ")
    assert second.startswith("failed on 4: ")
    assert "test_bad" in second
    assert rot.startswith("skipped in every job, which counts as failed: ")
    assert "test_never" in rot
    assert last == "7 passed, 3 failed, 7 skipped"


def test_runners_that_share_the_numbers_of_ranks(tmp_path):
    """With the outcomes of the others, one finds what no job runs."""
    outcomes = tmp_path / "outcomes"
    outcomes.mkdir()
    for ranks in (2, 3, 4):
        found = {"a test": "skipped", "another": "passed" if ranks == 3 else "skipped"}
        (outcomes / f"{ranks}.json").write_text(json.dumps(found))
    job = run_runner(tmp_path, "def test(): pass", "--ranks", "1", "--outcomes", str(outcomes))
    assert job.status == 1, job.output
    *_, rot, last = job.output.splitlines()
    assert rot == "skipped in every job, which counts as failed: a test"
    assert last == "1 passed, 1 failed, 0 skipped"
    assert [*json.loads((outcomes / "1.json").read_text()).values()] == ["passed"]


@pytest.mark.parametrize(
    ("text", "ranks", "status", "last"),
    [
        ("def test(): pass", "1", 0, "1 passed, 0 failed, 0 skipped"),
        ("import os\ndef test(): os._exit(0)", "1", 1, "0 passed, 1 failed, 0 skipped"),
        ("import os\ndef test(): os._exit(3)", "2", 1, "0 passed, 1 failed, 0 skipped"),
        ("def test(): pytest.skip('all')", "1", 1, "0 passed, 0 failed, 1 skipped"),
        ("", "1", 1, "0 passed, 0 failed, 0 skipped"),
    ],
    ids=["good", "silent end", "crash", "all skipped", "nothing"],
)
def test_status_of_the_runner(tmp_path, text, ranks, status, last):
    """Success takes a test that passed, and none that failed, vanished or crashed."""
    job = run_runner(tmp_path, text, "--ranks", ranks)
    assert job.status == status, job.output
    assert job.output.splitlines()[-1] == last


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import os\ndef test(): os._exit(3)", r"ended with status 3, in .*test_it.py::test$"),
        (
            "def test():\n assert world.rank != 1\n world.Barrier()",
            r"ended .*, in rank 1 failed in .*::test \(call\).*: .*test_it.py:5: AssertionError$",
        ),
    ],
    ids=["crash", "abort"],
)
def test_runner_says_where_a_job_ended(tmp_path, text, said):
    """The last lines tell which test, and why it was aborted: of a long log they are what is read."""
    job = run_runner(tmp_path, text, "--ranks", "2", options=["--mpi-grace=1"])
    line = job.output.splitlines()[-2]
    assert re.match(rf"failed on 2: the job on 2 ranks {said}", line), job.output


def test_runner_stops_a_job_at_the_time_limit(tmp_path):
    """A job that takes too long is a failed one."""
    job = run_runner(tmp_path, "def test(): time.sleep(100)", "--ranks", "2", "--timeout", "8")
    assert job.status == 1, job.output
    assert "exceeded its time limit" in job.output
    assert job.output.splitlines()[-1] == "0 passed, 1 failed, 0 skipped"


def test_a_runner_that_is_terminated_ends_its_job(tmp_path):
    """As a time limit from outside does it, or a service that cancels a run."""
    pids = tmp_path / "pids"
    pids.mkdir()
    text = (
        f"import os\ndef test():\n open(f'{pids}/{{os.getpid()}}', 'w').close()\n time.sleep(100)"
    )
    command, env = runner(tmp_path, text, "--ranks", "2")
    job = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while len(ranks := [int(path.name) for path in pids.iterdir()]) < 2:
        assert time.monotonic() < deadline
        assert job.poll() is None
        time.sleep(0.05)
    job.terminate()
    assert job.wait(60) == 143
    check_ended(ranks)


@pytest.mark.parametrize("name", ["test_it", "test_other"])
def test_three_and_four_ranks_share_cases(name):
    """Each case is run on one of the two numbers of ranks, and both run every value of every parameter."""
    marks = [SimpleNamespace(args=("first, beside",)), SimpleNamespace(args=(["second"],))]

    def case(first, second, layout="", **fixtures):
        indices = {"first": first, "beside": first, "second": second, **fixtures}
        return SimpleNamespace(
            name=f"{name}[{first}-{second}-{layout}]",
            originalname=name,
            callspec=SimpleNamespace(indices=indices),
            iter_markers=lambda _: marks,
        )

    cases = [*product(range(2), range(3))]
    of_3, of_4 = ([each for each in cases if is_for(ranks, case(*each))] for ranks in (3, 4))
    assert sorted(of_3 + of_4) == cases
    for firsts, seconds in (zip(*of_3), zip(*of_4)):
        assert {*firsts} == {0, 1}
        assert {*seconds} == {0, 1, 2}
    kinds = [case(0, 0), case(0, 0, any_comm=1)]
    assert is_for(3, kinds[0]) != is_for(3, kinds[1])
    assert all(is_for(ranks, case(*each, "a node each")) for ranks in (3, 4) for each in cases)
    assert all(is_for(ranks, case(*each)) for ranks in (1, 2, 5) for each in cases)


def run_runner(folder, text, *arguments, options=()):
    """Run tests/run.py on one test file, and return how it ended."""
    command, env = runner(folder, text, *arguments, options=options)
    return mpi_job.run(command, timeout=100, env=env)


def runner(folder, text, *arguments, options=()):
    """Return a call of tests/run.py on one test file, with the project's own configuration, and its environment."""
    (folder / "test_it.py").write_text(HEADER + text + "\n")
    (folder / "conftest.py").write_text("pytest_plugins = ['result_file', 'mpi_agreement']\n")
    (folder / "pytest.ini").write_text("[pytest]\n")
    rest = [
        "--",
        *options,
        "-p",
        "no:cacheprovider",
        "--color=no",
        "-c",
        str(folder / "pytest.ini"),
        str(folder),
    ]
    command = [sys.executable, str(TESTS / "run.py"), *arguments, *rest]
    return command, mpi_job.environment(PYTHONPATH=str(TESTS / "plugins"))
