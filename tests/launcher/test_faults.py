"""Jobs in which something goes wrong: each ends soon, says who is to blame, and goes on from its checkpoint.

``make test-faults ARGS="tests/launcher/test_faults.py -k SIGKILL"`` runs one case, and a table of what was measured
follows.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest

import chainer_dist
import fault_cases
import faulty_training
import mpi_job
from fault_cases import CASES, LIMIT, Result
from faulty_training import CALM, CHECKPOINTS

# These start jobs of their own.
pytestmark = [pytest.mark.mpi_skip, pytest.mark.faults]

RANKS = [2, 3, 4]
BLOCK = 4096  # bytes

N_KILLS = int(os.environ.get("CHAINER_DIST_TEST_KILLS", "50"))


@pytest.fixture(scope="session")
def expected(tmp_path_factory):
    """Return a function that returns what jobs of so many ranks print if nothing goes wrong."""
    found = {}

    def of(ranks):
        if ranks not in found:
            ended = fault_cases.start(ranks, tmp_path_factory.mktemp("whole")).end(LIMIT)
            assert ended.status == 0, ended
            found[ranks] = fault_cases.results(ended)
            assert len(found[ranks]) == ranks
        return found[ranks]

    return of


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", CASES)
def test_a_fault(name, ranks, tmp_path, expected, fault_table):
    """The job ends, and says who is to blame; the next one has the result of one without the fault."""
    case = CASES[name]
    try:
        result = fault_cases.run(case, ranks, tmp_path, expected(ranks))
    except PermissionError:
        pytest.skip("this user may not make file systems")
    fault_table.append((name, ranks, result))
    assert result.status == case.status, result.output
    assert result.named is not False, result.output
    assert result.equal is not False, result.output


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_killed_at_random_instants(tmp_path, fault_table):
    """However often processes of a job are killed, its restarts end with the result of one that was not.

    Half of the kills come at any time, also while the job starts; the others when the launcher has heard of a new
    checkpoint, because it gives up a job that fails twice without one.
    """
    draw = random.Random(0)
    steps = ("--fault", "killed often", "--steps", 30 * N_KILLS)
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / CALM).touch()
    options = ("--timeout", 10 * LIMIT)
    wanted = fault_cases.results(
        fault_cases.start(2, whole, *steps, options=options).end(10 * LIMIT)
    )
    assert len(wanted) == 2
    folder = tmp_path / "parts"
    folder.mkdir()
    options = ("--max-restarts", 2 * N_KILLS, "--timeout", 20 * LIMIT)
    job = fault_cases.start(2, folder, *steps, options=options)
    longest = 0.0
    with fault_cases.nothing_left(folder), contextlib.ExitStack() as stack:
        stack.callback(mpi_job.stop, job.process)
        for n in range(N_KILLS):
            newest = newest_iteration(folder)
            if n % 2:
                wait_until(lambda newest=newest: newest_iteration(folder) > newest, job)
            time.sleep(draw.uniform(1, 2) if n % 2 else draw.uniform(0, 3))
            wait_until(lambda: victims_of(job), job)
            victims = victims_of(job)
            began = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(victims), signal.SIGKILL)
            wait_until(lambda victims=victims: not {*victims} & {*victims_of(job)}, job)
            longest = max(longest, time.monotonic() - began)
        (folder / CALM).touch()
        ended = job.end(10 * LIMIT)
    result = fault_cases.results(ended)
    output = f"{ended.stdout}\n{ended.stderr}"
    row = Result(longest, ended.status, None, {*result} == {*wanted}, output)
    fault_table.append((f"{N_KILLS} kills in one run, the longest", 2, row))
    assert ended.status == 0, output
    assert ended.stderr.count("starting again") >= N_KILLS, output
    assert row.equal, output


def wait_until(condition, job):
    """Wait until something is so, while a job runs."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, job.end(1)
        assert job.process.poll() is None, job.end()
        time.sleep(0.02)


def newest_iteration(folder):
    """Return the iteration of the newest complete checkpoint."""
    found = [0]
    with contextlib.suppress(FileNotFoundError):
        for path in (folder / CHECKPOINTS).iterdir():
            match = re.fullmatch(r"(\d+)-[0-9a-f]+", path.name)
            found += [int(match[1])] if match else []
    return max(found)


def victims_of(job):
    """Return the processes of a job's ranks, and mpiexec.

    Without Hydra's helper on a host the ranks just go on, to the end of their script.
    """
    found = job.processes()
    return [pid for pid in found if pid != job.process.pid and b"hydra_pmi_proxy" not in found[pid]]


def train(comm, folder, steps):
    """Go on to a step; return where it began, what there was then, and at the end."""
    args = faulty_training.parse_args(["--out", str(folder), "--steps", str(steps)])
    trainer, step = faulty_training.make_trainer(args, comm)
    with chainer_dist.Checkpoint(comm, folder, asynchronous=False) as checkpoint:
        trainer.extend(checkpoint, trigger=(faulty_training.EVERY, "iteration"))
        begun_at = step.iteration = checkpoint.resume(trainer)
        begun = copies(trainer)
        trainer.run()
    return begun_at, begun, copies(trainer)


def copies(trainer):
    """Return copies of all that counts."""
    state = faulty_training.state_of(trainer)
    return {name: np.array(value) for name, value in state.items()}


def assert_same(got, wanted):
    """Compare what two trainings have, to the bit."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].tobytes() == value.tobytes(), name


def test_truncated_anywhere(tmp_path, comm):
    """At whichever block a file of the newest checkpoint ends, the one before is taken, and is whole."""
    _, _, at_half = train(comm, tmp_path / "half", faulty_training.EVERY)
    _, _, at_end = train(comm, tmp_path / "whole", 2 * faulty_training.EVERY)
    newest = max((tmp_path / "whole").iterdir(), key=lambda path: int(path.name.split("-")[0]))
    n_places = 0
    for file in newest.iterdir():
        for size in range(0, file.stat().st_size, BLOCK):
            damaged = tmp_path / "damaged"
            shutil.copytree(tmp_path / "whole", damaged)
            os.truncate(damaged / newest.name / file.name, size)
            with pytest.warns(UserWarning, match=f"{newest.name} is damaged"):
                begun_at, begun, ended = train(comm, damaged, 2 * faulty_training.EVERY)
            assert begun_at == faulty_training.EVERY
            assert_same(begun, at_half)
            assert_same(ended, at_end)
            shutil.rmtree(damaged)
            n_places += 1
    assert n_places > 3
