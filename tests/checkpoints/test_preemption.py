"""Jobs that are told to end, and jobs that are killed: nothing is lost, and a resume is exact."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import training
from mpi4py import MPI

import mpi_job
from chainer_dist import create_multi_node_optimizer
from chainer_dist.checkpoints import Checkpoint, Preempted
from chainer_dist.checkpoints.meetings import Rounds
from chainer_dist.checkpoints.preemption import SIGNALS, Signals
from chainer_dist.iterators import DistributedIterator

DATA = [(np.array([i, 1], np.float32) / 24, np.int32(i % 3)) for i in range(24)]

N_KILLS = int(os.environ.get("CHAINER_DIST_TEST_KILLS", "5"))


@pytest.fixture
def out(comm, tmp_path):
    """Return one folder for all ranks."""
    return Path(comm.bcast_obj(str(tmp_path)))


@pytest.fixture
def soon(monkeypatch):
    """Let ranks meet every third step, as the steps of tests are short."""
    monkeypatch.setattr("chainer_dist.checkpoints.meetings._MOST_STEPS", 3)


def make_trainer(comm, stop):
    """Return a trainer whose iterator is the same on all ranks."""
    model = L.Classifier(L.Linear(2, 3, initialW=1))
    optimizer = create_multi_node_optimizer(chainer.optimizers.Adam(0.01), comm).setup(model)
    updater = training.StandardUpdater(DistributedIterator(DATA, 2, comm, seed=1), optimizer)
    return training.Trainer(updater, (stop, "iteration"), out=tempfile.gettempdir())


def weights(trainer):
    """Return the parameters as one array."""
    params = trainer.updater.get_optimizer("main").target.namedparams()
    return np.concatenate([param.array.ravel() for _, param in sorted(params)])


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("due", [1, 999])
def test_a_rank_is_told(comm, out, number, due):
    """Every rank saves in the same iteration and leaves with status 75, finalizers included."""
    finalized = []
    last = comm.size - 1

    def tell(trainer):
        if comm.rank == last and trainer.updater.iteration == 5:
            os.kill(os.getpid(), number)

    trainer = make_trainer(comm, 99)
    checkpoint = Checkpoint(comm, out)
    trainer.extend(checkpoint, trigger=(due, "iteration"))
    trainer.extend(tell, name="tell", trigger=(1, "iteration"))
    trainer.extend(
        training.make_extension(finalizer=lambda: finalized.append(1))(lambda _: None), name="end"
    )
    checkpoint.resume(trainer)
    with pytest.raises(SystemExit) as caught:
        trainer.run()
    assert (caught.value.code, finalized) == (75, [1])
    assert [signal.getsignal(each) for each in SIGNALS] == [signal.SIG_DFL] * 2
    told = trainer.updater.iteration
    assert comm.allgather_obj(told) == [told] * comm.size
    assert 5 <= told <= 8

    again = make_trainer(comm, 20)
    checkpoint = Checkpoint(comm, out)
    assert checkpoint.resume(again) == told
    again.run()
    whole = make_trainer(comm, 20)
    whole.run()
    np.testing.assert_array_equal(weights(again), weights(whole))


@pytest.mark.usefixtures("soon")
def test_loops_of_ones_own(comm, out):
    """They ask in every step; all get the same answer in the same step."""
    link = L.Linear(1, 1)
    checkpoint = Checkpoint(comm, out)
    answers = []
    for i in range(1, 9):
        answers.append(checkpoint.preempted)
        if i == 2 and comm.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        if answers[-1]:
            break
    assert comm.allgather_obj(answers) == [answers] * comm.size
    assert i > 2
    with checkpoint, pytest.raises(Preempted):
        checkpoint.leave(link, i)
    with Checkpoint(comm, out) as checkpoint:
        assert checkpoint.resume(link) == i


@pytest.mark.usefixtures("soon")
def test_signals_that_are_not_ours(comm, out):
    """What the program has arranged stays; so does everything with preemption=False."""
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:
        checkpoint = Checkpoint(comm, out)
        assert not checkpoint.preempted
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not any(checkpoint.preempted for _ in range(9))
        assert seen == [1]
        checkpoint.close()
        careless = Checkpoint(comm, out, preemption=False)
        assert not careless.preempted
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_children_and_threads():
    """A child of a rank dies of SIGTERM as any process does; signals want the main thread."""
    signals = Signals()
    signals.listen()
    try:
        for pause in (0, 0, 0, 0.1):  # be it that the child has not begun to run
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            time.sleep(pause)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert signals.received == 0
    finally:
        signals.stop()
    errors = []

    def listen():
        try:
            Signals().listen()
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert "preemption=False" in errors[0]


def test_ranks_meet_in_the_same_steps(comm):
    """However different their steps are in length, the slowest decides; at most 100 go by."""
    rounds = Rounds(comm)
    met = []
    for i in range(260):
        if i < 3:
            time.sleep(0.05 * (comm.rank + 1))
        answer = rounds.step(comm.rank, -i)
        if answer is not None:
            met.append(i)
            assert answer == [comm.size - 1, -i]
    assert comm.allgather_obj(met) == [met] * comm.size
    assert met[0] == 0
    assert max(np.diff(met)) <= 100
    assert len(met) < 80


# Jobs


@contextlib.contextmanager
def started(code, ranks, *arguments):
    """Start a job; yield it, and a function that returns what it has printed."""
    command = [mpi_job.find_mpi().mpiexec, "-n", str(ranks), sys.executable, "-c", code]
    with tempfile.TemporaryFile() as output:
        job = subprocess.Popen(
            [*command, *map(str, arguments)],
            cwd=Path(__file__).parent,
            env=mpi_job.environment(PYTHONPATH=str(mpi_job.ROOT / "tests" / "helpers")),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

        def printed():
            return os.pread(output.fileno(), 1 << 20, 0).decode(errors="replace")

        try:
            yield job, printed
        finally:
            mpi_job.stop(job)


def wait_for(text, job, printed):
    """Wait until a job has printed something."""
    end = time.monotonic() + 60
    while not re.search(text, printed()):
        assert job.poll() is None, printed()
        assert time.monotonic() < end, printed()
        time.sleep(0.01)


TOLD = """
import multiprocessing, sys, time
import numpy as np
import chainer_dist
from chainer import dataset, iterators, training
from test_preemption import make_trainer, Checkpoint

comm = chainer_dist.create_communicator("naive")
folder, method = sys.argv[1:]
trainer = make_trainer(comm, 10**6)
multiprocessing.set_start_method(method)
data = [(np.zeros(2, np.float32), np.int32(0))] * 24
trainer.updater._iterators["main"] = iterators.MultiprocessIterator(
    data, 2, n_processes=2, shared_mem=100)
checkpoint = Checkpoint(comm, folder)
trainer.extend(checkpoint, trigger=(10**6, "iteration"))

@training.make_extension(trigger=(1, "iteration"), finalizer=lambda: print("finalized", flush=True))
def say(trainer):
    if trainer.updater.iteration == 10:
        print("running", flush=True)
    time.sleep(0.01)

trainer.extend(say)
print("resumed", checkpoint.resume(trainer), flush=True)
try:
    trainer.run()
finally:
    time.sleep(comm.rank)
    print("at the end", flush=True)
"""


@pytest.mark.mpi_skip
@pytest.mark.parametrize("workers", ["fork", "forkserver"])
def test_a_job_is_told(tmp_path, workers):
    """Status 75, when all ranks have come to their end; workers of data loaders are no obstacle."""
    family = MPI.get_vendor()[0]
    with started(TOLD, 2, tmp_path, workers) as (job, printed):
        wait_for("running(.|\n)*running", job, printed)
        # Open MPI's mpiexec passes this one on; of SIGTERM it ends the ranks by itself.
        job.send_signal(signal.SIGTERM if family != "Open MPI" else signal.SIGUSR1)
        assert job.wait(30) == 75, printed()
        output = printed()
    assert output.count("finalized") == output.count("at the end") == 2, output
    assert output.count("leaving with status 75") == 1
    assert "Traceback" not in output
    assert "ending the job" not in output
    (generation,) = tmp_path.iterdir()
    (iteration,) = re.findall(r"preempted in iteration (\d+)", output)
    assert generation.name.split("-")[0] == iteration


KILLED = """
import os, sys, time
import numpy as np
import chainer
import chainer.functions as F
import chainer.links as L
import chainer_dist
from chainer_dist.checkpoints import Checkpoint
from chainer_dist.iterators import DistributedIterator

comm = chainer_dist.create_communicator("shared_memory")
np.random.seed(comm.rank)
model = L.Classifier(chainer.Sequential(L.Linear(2, 50), F.dropout, L.Linear(50, 3)))
optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.Adam(), comm).setup(model)
data = DistributedIterator(np.random.RandomState(0).rand(50, 2).astype("f"), 4, comm)
state = {"model": model, "optimizer": optimizer, "data": data}
with Checkpoint(comm, sys.argv[1], keep=2) as checkpoint:
    iteration = checkpoint.resume(state)
    print(f"rank at {iteration}, process {os.getpid()}.", flush=True)
    while iteration < 100:
        x = np.array(next(data))
        optimizer.update(model, x, (x[:, 0] * 3).astype("i"))
        iteration += 1
        if iteration % 4 == 0:
            checkpoint.save(state, iteration)
        time.sleep(0.01)
if comm.rank == 0:
    print("ended with", [param.array.tobytes().hex() for _, param in sorted(model.namedparams())])
"""


@pytest.mark.faults
@pytest.mark.mpi_skip
def test_killed_at_any_time(tmp_path):
    """A job that is killed again and again ends with the parameters of one that was not."""
    draw = random.Random(0)
    with started(KILLED, 2, tmp_path / "whole") as (job, printed):
        assert job.wait(60) == 0, printed()
        expected = re.findall("ended with .*", printed())
    begun = []
    for _ in range(N_KILLS):
        with started(KILLED, 2, tmp_path / "parts") as (job, printed):
            wait_for(r"process(.|\n)*process \d+\.", job, printed)
            time.sleep(draw.uniform(0, 1.2))
            pids = [job.pid, *map(int, re.findall(r"process (\d+)", printed()))]
            for pid in draw.sample(pids, draw.randint(1, len(pids))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            job.wait(30)
            begun.append(int(re.findall(r"rank at (\d+)", printed())[0]))
    with started(KILLED, 2, tmp_path / "parts") as (job, printed):
        assert job.wait(60) == 0, printed()
        output = printed()
    assert begun == sorted(begun)
    assert begun[-1] > 0
    assert re.findall("ended with .*", output) == expected
