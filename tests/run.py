#!/usr/bin/env python
"""Run the tests in one process and under mpiexec, and say plainly how it went.

python tests/run.py                     # in one process, and on 2, 3 and 4 ranks
python tests/run.py --ranks 3 -- -k scatter
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [
    str(HERE / "helpers"),
    str(HERE / "plugins"),
]  # where pyproject.toml has pytest look, too

import mpi_job  # noqa: E402
from result_file import WHERE  # noqa: E402

ALL_RANKS = [1, 2, 3, 4]


class Result(NamedTuple):
    """One job: its number of ranks, the outcome of each test, and its seconds."""

    ranks: int
    outcomes: dict[str, str]
    seconds: float

    @property
    def counts(self):
        """How many tests had which outcome."""
        return Counter(self.outcomes.values())


def parse_args():
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=ALL_RANKS,
        help="how many ranks, job after job; 1 is one process without mpiexec (default: 1 2 3 4)",
    )
    parser.add_argument(
        "--timeout", type=float, default=3600, help="seconds a job may take (default: 3600)"
    )
    parser.add_argument(
        "--outcomes",
        type=Path,
        help="folder that keeps outcomes; tests that no job runs are looked for in all that is there",
    )
    parser.add_argument("pytest_args", nargs="*", metavar="-- PYTEST_ARGS")
    args = parser.parse_args()
    if min(args.ranks) < 1:
        parser.error("--ranks are at least 1")
    return args


def run_job(ranks, pytest_args, timeout):
    """Run the tests on a number of ranks."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", "pytest", f"--result-file={file}", *pytest_args]
        if ranks > 1:
            command.append("--with-mpi")
        processes = ranks if ranks > 1 else None
        status = mpi_job.run(command, processes, timeout=timeout, capture=False).status
        ended_well = file.exists() and status in (
            pytest.ExitCode.OK,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        )
        outcomes = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        where = file.with_suffix(WHERE)
        lines = where.read_text(encoding="utf-8").splitlines() if where.exists() else []
    # A job that ended badly without a failed test (a crash, an abort, a time limit) is a failure.
    if not ended_well and "failed" not in outcomes.values():
        ended = f"ended with status {status}" if status is not None else "exceeded its time limit"
        place = ", in " + ": ".join(dict.fromkeys([lines[0], lines[-1]])) if lines else ""
        outcomes[f"the job on {ranks} ranks {ended}{place}"] = "failed"
    return Result(ranks, outcomes, time.monotonic() - started)


def run_by_none(results, folder):
    """Return the tests that were skipped on every number of ranks, if there are results of each.

    Those of earlier calls are in the folder, if one is given, and these are added.
    """
    jobs = {result.ranks: result.outcomes for result in results}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for ranks, outcomes in jobs.items():
            (folder / f"{ranks}.json").write_text(json.dumps(outcomes), encoding="utf-8")
        jobs = {
            int(file.stem): json.loads(file.read_text(encoding="utf-8"))
            for file in folder.glob("*.json")
        }
    if not set(jobs) >= set(ALL_RANKS):
        return []
    ran = {test for each in jobs.values() for test, how in each.items() if how != "skipped"}
    return sorted({test for each in jobs.values() for test in each} - ran)


def main():
    """Run the jobs one after the other and print a table."""
    args = parse_args()
    # Whoever ends this ends the job with it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # What a shell starts in the background ignores it, and so would the jobs that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    results = []
    for ranks in args.ranks:
        print(f"\n==== {'one process' if ranks == 1 else f'{ranks} ranks'} ====", flush=True)
        results.append(run_job(ranks, args.pytest_args, args.timeout))
    total = sum((result.counts for result in results), Counter())

    print(f"\n{'ranks':>5} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}")
    for ranks, outcomes, seconds in results:
        n = Counter(outcomes.values())
        print(f"{ranks:>5} {n['passed']:>7} {n['failed']:>7} {n['skipped']:>8} {seconds:>8.0f}")
    for result in results:
        for test, outcome in result.outcomes.items():
            if outcome == "failed":
                print(f"failed on {result.ranks}: {test}")
    for test in run_by_none(results, args.outcomes):
        print(f"skipped in every job, which counts as failed: {test}")
        total["failed"] += 1
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return int(total["failed"] > 0 or total["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main())
