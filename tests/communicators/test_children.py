"""Child processes of ranks: they come to an error, and never to a hang, if they try to communicate."""

from __future__ import annotations

import contextlib
import os
import re
import sys

import numpy as np
import pytest

import chainer_dist
import mpi_job

UNGUARDED = """
import concurrent.futures, multiprocessing
multiprocessing.set_start_method({method!r}, force=True)
import numpy as np
from chainer.iterators import MultiprocessIterator
import chainer_dist
comm = chainer_dist.create_communicator()
def iterator():
    next(batches := MultiprocessIterator(np.arange(32.0), 4, n_processes=1))
    next(batches)
def pool():
    with multiprocessing.Pool(1) as workers:
        workers.map(abs, range(4))
def executor():
    with concurrent.futures.ProcessPoolExecutor(1) as workers:
        workers.submit(abs, 1).result()
def process():
    queue = multiprocessing.Queue()
    multiprocessing.Process(target=queue.put, args=(1,)).start()
    queue.get()
if comm.rank == comm.size - 1:
    {work}()
comm.allgather_obj(0)
print("finished", flush=True)
"""


def run(tmp_path, text, ranks):
    """Run a script, whose time is not watched, on some ranks."""
    script = tmp_path / "script.py"
    script.write_text(text)
    env = mpi_job.environment(CHAINER_DIST_STALL_WARN="0")
    return mpi_job.run([sys.executable, script], ranks, timeout=120, env=env)


@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    ("method", "work", "ranks"),
    [
        ("forkserver", "iterator", 2),
        *(
            pytest.param(method, work, ranks, marks=pytest.mark.faults)
            for method in ("spawn", "forkserver")
            for work, ranks in (("iterator", 1), ("pool", 3), ("executor", 2), ("process", 2))
        ),
    ],
)
def test_a_script_without_guard(tmp_path, method, work, ranks):
    """Worker and job end with the advice to put one, whatever the rank waits in."""
    job = run(tmp_path, UNGUARDED.format(method=method, work=work), ranks)
    assert job.status not in {0, None}, job.output
    assert 'if __name__ == "__main__"' in job.output, job.output
    # The worker says so, or the rank, which may end the worker before it has spoken.
    said = r"create_communicator was called in the process|came to create_communicator"
    assert re.search(said, job.output), job.output
    assert "finished" not in job.output


GUARDED = """
import multiprocessing
import numpy as np
import chainer_dist
from chainer.iterators import MultiprocessIterator

def communicate(_):
    return chainer_dist.create_communicator()

if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    comm = chainer_dist.create_communicator()
    part = chainer_dist.scatter_dataset(np.arange(8.0), comm)
    batches = MultiprocessIterator(part, 2, n_processes=1, repeat=False)
    total = comm.allreduce_obj(sum(float(x) for batch in batches for x in batch))
    batches.finalize()
    with multiprocessing.Pool(1) as pool:
        try:
            pool.map(communicate, [0])
        except RuntimeError as error:
            print(total, str(error).partition(",")[0], flush=True)
    comm.allgather_obj(0)
"""


@pytest.mark.mpi_skip
def test_a_script_with_guard(tmp_path):
    """Its workers work; an error of one that tries to communicate is raised where the rank waits for it."""
    job = run(tmp_path, GUARDED, 2)
    assert job.status == 0, job.output
    assert job.output.count("28.0 create_communicator was called in the process") == 2, job.output


IMPORTS_MPI = """
import multiprocessing, os
from mpi4py import MPI
import numpy as np
import chainer_dist
from chainer.iterators import MultiprocessIterator
{use}
def started(_):
    return MPI.Is_initialized()

if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    comm = chainer_dist.create_communicator()
    batches = MultiprocessIterator(np.arange(8.0), 2, n_processes=1, repeat=False)
    total = sum(float(x) for batch in batches for x in batch)
    batches.finalize()
    with multiprocessing.Pool(1) as pool:
        print("found", total, pool.map(started, [0]), "MPI4PY_RC_INITIALIZE" in os.environ, flush=True)
    comm.allgather_obj(0)
"""


@pytest.mark.mpi_skip
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_script_that_imports_mpi(tmp_path, method, ranks):
    """It may do that at the top: no MPI is started in its workers, and all else is as it was."""
    job = run(tmp_path, IMPORTS_MPI.format(use="", method=method), ranks)
    assert job.status == 0, job.output
    assert job.output.count("found 28.0 [False] False") == ranks, job.output


@pytest.mark.mpi_skip
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_script_that_uses_mpi_outside_of_its_guard(tmp_path, method):
    """Job and worker end, with the advice to do that under the guard."""
    use = "MPI.COMM_WORLD.allgather(0)"
    job = run(tmp_path, IMPORTS_MPI.format(use=use, method=method), 2)
    assert job.status not in {0, None}, job.output
    assert 'if __name__ == "__main__"' in job.output, job.output
    assert "found" not in job.output


def test_forked_children(comm):
    """They know which rank they were forked from, and every attempt to communicate raises."""
    x = np.ones(3, np.float32)
    attempts = {
        "allgather_obj": lambda: comm.allgather_obj(0),
        "allreduce": lambda: comm.allreduce(x),
        "send_obj": lambda: comm.send_obj(0, dest=0),
        "recv": lambda: comm.recv(source=0, tag=0),
        "split": lambda: comm.split(0, 0),
        "create_communicator": chainer_dist.create_communicator,
        "scatter_dataset": lambda: chainer_dist.scatter_dataset([1, 2], comm),
    }
    ours, its = os.pipe()

    def tell(name):
        try:
            attempts[name]()
        except RuntimeError as error:
            if f"forked from rank {comm.rank};" in str(error):
                os.write(its, f"{name} ".encode())

    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            for name in attempts:
                tell(name)
        os._exit(0)
    os.close(its)
    os.waitpid(child, 0)
    assert os.read(ours, 1000).decode().split() == list(attempts)
    os.close(ours)
    assert comm.allreduce_obj(1) == comm.size
