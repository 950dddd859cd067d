"""What may go wrong in a job, how the job is to end then, and a look at what it does."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import faulty_training
import mpi_job
from chainer_dist.launcher import leftovers
from faulty_training import BALLAST, CHECKPOINTS, PLANTED
from launcher import Launched

SCRIPT = Path(faulty_training.__file__)
STALL = 8  # seconds
LIMIT = 90  # seconds that no job may take
SECONDS_TO_VANISH = 10
SYSTEM_V = Path("/proc/sysvipc/shm")

STALLS = ("--stall-abort", STALL)
ENDED_BY_STALL = (
    rf"rank \d+ on \S+ ended the job: stalled for {STALL} s .* which waits for rank {{rank}}\n"
)
ELSEWHERE = r"rank {rank} \(pid \d+ on \S+\): is in another operation \d+: "
DIFFERS = r"RankMismatchError: rank {rank}: operation \d+ is "


class Case(NamedTuple):
    """A fault that is planted on one rank, and what is expected of the job.

    Attributes:
        fault: Its name in the script.
        status: Exit status of the launcher.
        named: What is printed about the culprit, with the place of its number.
        options: Of the launcher.
        environment: Of the job, names and values.
        sent: A signal that the launcher gets.
        full: Whether the checkpoints are on a small file system of their own.
        resumes: Whether the job, started again, has the result of one without the fault; otherwise it has it
            at once, or if there is no such result None.
    """

    fault: str
    status: int
    named: str
    options: tuple = ()
    environment: tuple = ()
    sent: int | None = None
    full: bool = False
    resumes: bool | None = True


CASES = {
    "exception": Case("exception", 1, r"rank {rank} on \S+ failed first: RuntimeError: planted"),
    "sys.exit(0)": Case("exit 0", 1, ENDED_BY_STALL, STALLS),
    "sys.exit(3)": Case("exit 3", 3, r"rank {rank} on \S+ failed first: exit status 3"),
    "SIGKILL": Case("killed", 137, r"rank {rank} on \S+ failed first: killed by SIGKILL"),
    "SIGKILL before updates": Case(
        "killed at first", 137, r"rank {rank} on \S+ failed first: killed by SIGKILL"
    ),
    "SIGSTOP": Case("stopped", 1, ENDED_BY_STALL, STALLS),
    "SIGSTOP in an exchange": Case("stopped within", 1, ENDED_BY_STALL, STALLS),
    "asleep in an exchange": Case("asleep within", 1, ENDED_BY_STALL, STALLS),
    "segmentation fault": Case(
        "segfault", 139, r"rank {rank} on \S+ failed first: killed by SIGSEGV"
    ),
    "out of memory": Case("memory", 1, r"rank {rank} on \S+ failed first: .*MemoryError"),
    "slow rank": Case(
        "slow",
        0,
        r"stalled for [\d.]+ s: .*which waits for rank {rank}\n",
        environment=(("CHAINER_DIST_STALL_WARN", "1"),),
        resumes=False,
    ),
    "NaN in a gradient": Case(
        "nan", 1, r"rank {rank}: the gradient of /predictor/l2/W has", ("--checked",)
    ),
    "parameter of another shape": Case("shape", 1, r"rank {rank}: /predictor/l2/"),
    "skipped collective": Case("skipped", 1, ELSEWHERE, STALLS),
    "skipped collective, checked": Case("skipped", 1, DIFFERS, ("--checked",)),
    "order of collectives": Case("order", 1, ELSEWHERE + "bcast_obj", STALLS),
    "order of collectives, checked": Case("order", 1, DIFFERS + "bcast_obj", ("--checked",)),
    "fewer batches": Case("uneven", 1, ELSEWHERE, STALLS, resumes=None),
    "fewer batches, checked": Case("uneven", 1, DIFFERS, ("--checked",), resumes=None),
    "fewer batches, joined": Case("uneven joined", 0, "", STALLS, resumes=None),
    **{
        f"data loader, {how}": Case(
            f"damaged in {how}",
            1,
            r"rank {rank} on \S+ failed first: ValueError: sample \d+ is damaged",
        )
        for how in ("threads", "forkserver", "spawn")
    },
    "Ctrl-C": Case("signal", 130, "", sent=signal.SIGINT),
    "disk full": Case(
        "full",
        1,
        r"rank \d+: .*No space left on device.*; the checkpoint of iteration \d+ cannot",
        full=True,
    ),
    "file too large": Case(
        "quota", 1, r"rank {rank}: .*File too large.*; the checkpoint of iteration \d+ cannot"
    ),
}


class Result(NamedTuple):
    """What a job did.

    Attributes:
        seconds: From the fault until nothing was left of the job.
        status: Exit status of the launcher.
        named: Whether it was said who is to blame; None if nobody is.
        equal: Whether the result, resumed or at once, is bit for bit that without the fault; None if there is none.
        output: What was printed.
    """

    seconds: float
    status: int
    named: bool | None
    equal: bool | None
    output: str


def run(case, ranks, folder, expected):
    """Run a case.

    Args:
        case: The case.
        ranks: Number of ranks, of which the last one is to blame.
        folder: That is empty.
        expected: What a job of so many ranks without a fault prints as its result.
    """
    with contextlib.ExitStack() as stack:
        if case.full:
            stack.enter_context(small_file_system(folder / CHECKPOINTS))
        planted = folder / PLANTED
        arguments = ("--fault", case.fault, "--rank", ranks - 1)
        job = start(ranks, folder, *arguments, options=case.options, env=dict(case.environment))
        stack.callback(mpi_job.stop, job.process)
        if case.sent:
            job.wait_for(planted)
            job.process.send_signal(case.sent)
        with nothing_left(folder):
            ended = job.end(LIMIT)
        seconds = time.time() - float(planted.read_text())
        (folder / BALLAST).unlink(missing_ok=True)  # so that there is room
        result = results(start(ranks, folder).end(LIMIT) if case.resumes else ended)
    said = re.search(case.named.format(rank=ranks - 1), ended.stderr)
    return Result(
        seconds,
        ended.status,
        bool(said) if case.named else None,
        None if case.resumes is None else result == expected,
        f"{ended.stdout}\n{ended.stderr}",
    )


def start(ranks, folder, *arguments, options=(), env=None):
    """Start the training."""
    temporary = folder / "temporary"
    temporary.mkdir(exist_ok=True)
    env = {"TMPDIR": str(temporary), **(env or {})}
    command = ("run", "-n", ranks, "--timeout", LIMIT - 20, *options)
    return Launched(*command, SCRIPT, "--out", folder, *arguments, env=env)


def results(ended):
    """Return what each rank has printed as its result."""
    return sorted(re.findall(r"^(?:\[\d+\] )?result .*", ended.stdout, re.MULTILINE))


@contextlib.contextmanager
def nothing_left(folder):
    """Make sure that there are no new segments of shared memory, and no temporary files.

    Segments that a process still maps belong to other jobs: this one has no process any more.
    """
    before = shared_memory()
    yield
    deadline = time.monotonic() + SECONDS_TO_VANISH
    while left := [*shared_memory() - before - mapped(), *temporary_files(folder)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def temporary_files(folder):
    """Return what a job has left in its temporary folder.

    Empty folders of multiprocessing do not count, nor that of Open MPI's mpiexec, which may have been killed.
    """
    others = ("pymp-", "ompi.")
    return [path for path in (folder / "temporary").iterdir() if not path.name.startswith(others)]


def mapped():
    """Return names of the shared memory that processes of this machine map."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            found |= set(
                re.findall(rf"{leftovers.SHARED_MEMORY}/(\S+)", maps.read_text(errors="replace"))
            )
    return found


def shared_memory():
    """Return names of shared memory, POSIX's and System V's."""
    posix = leftovers.SHARED_MEMORY
    names = {path.name for path in posix.iterdir()} if posix.is_dir() else set()
    if SYSTEM_V.exists():
        lines = [line.split() for line in SYSTEM_V.read_text().splitlines()[1:]]
        names |= {number for _, number, _, _, _, _, n_attached, *_ in lines if n_attached == "0"}
    return names


@contextlib.contextmanager
def small_file_system(folder):
    """Make a folder a file system of four megabytes.

    Raises:
        PermissionError: If this user may not.
    """
    folder.mkdir()
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    if not unmount or subprocess.run(command, capture_output=True, check=False).returncode:
        raise PermissionError("mount")
    try:
        yield
    finally:
        subprocess.run([unmount, folder], check=True)
