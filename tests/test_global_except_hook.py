"""A rank that fails ends the job at once; whoever does not fail is left alone."""

from __future__ import annotations

import signal
import sys

import pytest

import mpi_job

# These start jobs of their own.
pytestmark = pytest.mark.mpi_skip

HEADER = """
import os, sys
from sys import exit as exit_by_another_name, exit
import chainer_dist
from mpi4py import MPI
world = MPI.COMM_WORLD
"""
ENDING = "ending the job"

# What the failing rank does, the status it leaves with, and what it says.
FAILURES = {
    "exception": ("raise ValueError('boom')", 1, "ValueError: boom"),
    "interrupt": ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
    "sys.exit": ("sys.exit(3)", 3, "exit with status 3"),
    "imported exit": ("exit(3)", 3, "exit with status 3"),
    "SystemExit": ("raise SystemExit(4)", 4, "exit with status 4"),
    "subclass": ("class E(SystemExit): pass\n raise E(5)", 5, "exit with status 5"),
    "message": ("sys.exit('boom')", 1, "\nboom\n"),
    "argparse": ("import argparse; argparse.ArgumentParser().error('boom')", 2, "error: boom"),
}


def run(code, ranks=2, **environment):
    """Run a script on some ranks, in one process for None."""
    env = mpi_job.environment(**environment)
    return mpi_job.run([sys.executable, "-c", HEADER + code], ranks, timeout=60, env=env)


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("kind", FAILURES)
def test_a_failing_rank_ends_the_job(kind, rank):
    """The others wait in a collective, for ever if they were let."""
    statement, status, says = FAILURES[kind]
    job = run(f"if world.rank == {rank}:\n print('out')\n {statement}\nworld.Barrier()")
    assert job.status == status, job.output
    assert says in f"\n{job.output}"
    assert f"on rank {rank} of 2" in job.output
    assert job.output.count(ENDING) == 1
    assert "out" in job.output


def test_where_a_rank_left():
    """Python itself prints no traceback for sys.exit."""
    job = run("def here():\n sys.exit(3)\nworld.rank == 1 and here()\nworld.Barrier()")
    assert ", in here" in job.output


def test_all_ranks_fail_at_once():
    """The job ends once, and one of them at least says why."""
    job = run("world.Barrier()\nraise ValueError(f'boom {world.rank}')", ranks=3)
    assert job.status == 1, job.output
    assert "ValueError: boom" in job.output


def test_ranks_that_do_not_fail():
    """Clean exits, caught ones, and failures of threads and children do not end the job."""
    job = run("""
import atexit, subprocess, threading
try:
    sys.exit(3)
except SystemExit as error:
    assert error.code == 3
child = os.fork()
if child == 0:
    sys.excepthook(ValueError, ValueError("of a child"), None)
    os._exit(5)  # anything else would finalize MPI, of which the child has a copy
assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 5
for forward in (False, True):
    if forward:
        threading.excepthook = lambda args: sys.excepthook(*args[:3])
    for what in (lambda: sys.exit(6), lambda: 1 / 0):
        thread = threading.Thread(target=what)
        thread.start()
        thread.join()
class Unraisable:
    def __del__(self):
        raise ValueError("in a destructor")
Unraisable()
at_exit = Unraisable()
atexit.register(lambda: 1 / 0)
sys.excepthook(ValueError, ValueError("called by hand"), None)
assert subprocess.run([sys.executable, "-c", "import chainer_dist; exit(7)"]).returncode == 7
world.Barrier()
print("done")
sys.exit([0, None][world.rank])
""")
    assert job.status == 0, job.output
    assert job.output.count("done") == 2
    assert "ZeroDivisionError" in job.output
    for text in ("of a child", "in a destructor", "called by hand"):
        assert text in job.output
    assert ENDING not in job.output


def test_children_of_multiprocessing():
    """A worker that fails is its parent's affair, however it was started."""
    job = run("""
import multiprocessing
for method in ("fork", "spawn", "forkserver"):
    worker = multiprocessing.get_context(method).Process(target=sys.exit, args=(5,))
    worker.start()
    worker.join()
    assert worker.exitcode == 5, (method, worker.exitcode)
world.Barrier()
print("done")
""")
    assert job.status == 0, job.output
    assert job.output.count("done") == 2
    assert ENDING not in job.output


LOG = """
import os, sys
def log(kind, error, trace):
    sys.stderr.write(f"logged {error!r}\\n")
"""
CHAIN = """
outer = sys.excepthook
sys.excepthook = lambda *args: (log(*args), outer(*args))
"""
SLOW = "chainer_dist.global_except_hook.SECONDS_TO_REPORT = 1\n"

# What a script does with the exception hook before the import and after it, what the hook then says, and the
# status of the job.
HOOKS = {
    "set before": ("sys.excepthook = log", "", "logged", 1),
    "set after": ("", "sys.excepthook = log", "logged", 1),
    "chained": ("", CHAIN, "logged", 1),
    "put back": ("", "sys.excepthook = sys.__excepthook__", "Traceback", 1),
    "deleted": ("", "del sys.excepthook", "Traceback", 1),
    "no function": ("", "sys.excepthook = None", "Traceback", 1),
    "fails": ("", "sys.excepthook = lambda *_: 1 / 0", "Error in sys.excepthook", 1),
    "leaves": ("", "sys.excepthook = lambda *_: sys.exit(5)", "", 5),
    "leaves as if all were well": ("", "sys.excepthook = lambda *_: sys.exit()", "", 1),
    "leaves at once": ("", "sys.excepthook = lambda *_: os._exit(6)", "", 6),
    "interrupted": ("", "sys.excepthook = lambda *_: os.kill(os.getpid(), 2)", "Original", 1),
    "never returns": ("", f"{SLOW}sys.excepthook = lambda *_: world.recv()", "not return", 1),
}
QUICK = ("set before", "chained", "put back", "fails")


@pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.faults) for kind in HOOKS],
)
def test_a_hook_of_the_script(kind):
    """The job ends whatever that one does; and it is called once."""
    before, after, says, status = HOOKS[kind]
    code = f"{LOG}{before}\n{HEADER}{after}\nif world.rank == 1: raise ValueError('boom')\nworld.Barrier()"
    job = mpi_job.run([sys.executable, "-c", code], 2, timeout=60, env=mpi_job.environment())
    assert job.status == status, job.output
    assert says in job.output
    assert job.output.count("logged ValueError('boom')") == (says == "logged")
    assert job.output.count(ENDING) == (kind != "leaves at once")


def test_a_hook_of_one_process():
    """It is called as ever, and Python leaves with its own status."""
    code = f"{LOG}{HEADER}sys.excepthook = log\nraise ValueError('boom')"
    job = mpi_job.run([sys.executable, "-c", code], timeout=60)
    assert (job.status, job.output) == (1, "logged ValueError('boom')\n")


@pytest.mark.faults
def test_a_hook_of_threads():
    """Threads may fail; and a rank that its threads' hook ends, ends the job."""
    job = run("""
import threading
threading.excepthook = lambda args: os._exit(7)
if world.rank == 1:
    threading.Thread(target=lambda: 1 / 0).start()
world.Barrier()
""")
    assert job.status == 7, job.output


@pytest.mark.parametrize("how", ["variable", "call"])
def test_off(how):
    """Both ways out leave all to Python."""
    variable = {"CHAINER_DIST_ABORT_ON_EXCEPTION": "0"} if how == "variable" else {}
    remove = "" if how == "variable" else "chainer_dist.global_except_hook.remove_hook()\n"
    job = run(f"{remove}raise ValueError('boom')", **variable)
    assert job.status not in {0, None}, job.output
    assert "ValueError" in job.output
    assert "boom" in job.output  # perhaps not on one line, as two ranks print
    assert ENDING not in job.output


@pytest.mark.parametrize("ranks", [None, 1])
@pytest.mark.parametrize("kind", ["exception", "sys.exit", "message"])
def test_a_job_of_one_rank(kind, ranks):
    """It does what Python does."""
    statement, status, _ = FAILURES[kind]
    job = run(statement, ranks)
    assert job.status == status, job.output
    assert ENDING not in job.output


def test_an_interrupt_without_mpi():
    """A shell sees that the process died of the signal."""
    code = "import chainer_dist; raise KeyboardInterrupt"
    job = mpi_job.run([sys.executable, "-c", code], timeout=60)
    assert job.status == -signal.SIGINT, job.output


def test_system_exit_is_what_it_was():
    """With the hook and after its removal: reading, writing, pickling, copying, deriving."""
    code = """
import copy, pickle, sys
before = SystemExit.__dict__["code"], sys.exit, sys.excepthook
import chainer_dist
from chainer_dist.global_except_hook import remove_hook

class Derived(SystemExit):
    pass

def check():
    for kind in (SystemExit, Derived):
        for code in (None, 0, 3, "text", (1, 2)):
            try:
                raise kind(code)
            except SystemExit as error:
                assert error.code == code
                assert error.args == (code,)
                assert pickle.loads(pickle.dumps(error)).code == code
                assert copy.copy(error).code == code
                error.code = 9
                assert error.code == 9
                del error.code
                assert error.code is None
    for arguments in ((), (None,), (3,), ("text",), ((1, 2),), (SystemExit(4),)):
        seen = []
        for leave in (sys.exit, before[1]):
            try:
                leave(*arguments)
            except SystemExit as error:
                seen.append((error.code, error.args))
        assert len(seen) == 2 and seen[0] == seen[1], seen
    try:
        sys.exit(1, 2)
    except TypeError:
        pass
    else:
        raise AssertionError
    assert pickle.loads(pickle.dumps(sys.exit)) is sys.exit
    assert SystemExit().code is None

for _ in range(50):
    check()
assert SystemExit.__dict__["code"] is not before[0]
remove_hook()
remove_hook()
for _ in range(50):
    check()
assert (SystemExit.__dict__["code"], sys.exit, sys.excepthook) == before
sys.exit(3)
"""
    job = mpi_job.run([sys.executable, "-c", code], timeout=60)
    assert job.status == 3, job.output
