#!/usr/bin/env python
"""Measure what keeping freed memory saves: run it without mpiexec, it starts the jobs itself.

Models are trained by Adam in jobs with glibc as it is, and as chainer_dist sets it up, in turn. Printed are
the median step of the slowest rank; how many pages the system hands out a step and rank, and its time for that and
whatever else a step asks of it; and the largest memory (resident set) that a rank has had. Linux only.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import resource
import statistics
import time
from typing import Any

import bench_tables
from bench_step import launch

WORKLOADS = ("mlp", "cnn", "lstm", "transformer")
AS_IT_IS, SET_UP = "glibc as it is", "chainer_dist"
# glibc's own default; but that anything is said there keeps chainer_dist from changing anything.
NO_CHANGE = "glibc.malloc.tcache_count=7"
WARM_UP = 3


def train(workload: str, steps: int) -> None:
    """Train on this rank; rank 0 prints what each step took."""
    import numpy as np
    from mpi4py import MPI

    from chainer_dist.scaling import contenders, workloads

    world = MPI.COMM_WORLD
    np.random.seed(0)  # noqa: NPY002 - what Chainer draws from
    work = workloads.WORKLOADS[workload]
    model, arguments = work.make(work.batch, world.rank)
    step, _ = contenders.make_step(contenders.OURS, workload, model, arguments)
    figures = []
    for _ in range(WARM_UP + steps):
        world.Barrier()
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        step()
        seconds = world.allreduce(time.perf_counter() - started, MPI.MAX)
        after = resource.getrusage(resource.RUSAGE_SELF)
        figures.append(
            (seconds, after.ru_minflt - before.ru_minflt, after.ru_stime - before.ru_stime)
        )
    peak = world.allreduce(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, MPI.MAX)
    if world.rank == 0:
        print(json.dumps({"figures": figures[WARM_UP:], "peak": peak}), flush=True)


def measure(workload: str, ranks: int, rounds: int, steps: int) -> dict[str, tuple[float, ...]]:
    """Return ms a step, pages, ms of the system's and the peak in MB, as it is and as it is set up."""
    results: dict[str, list[dict[str, Any]]] = {AS_IT_IS: [], SET_UP: []}
    for _ in range(rounds):
        for name, outcomes in results.items():
            os.environ.pop("GLIBC_TUNABLES", None)
            if name == AS_IT_IS:
                os.environ["GLIBC_TUNABLES"] = NO_CHANGE
            job = launch(__file__, ranks, "--workload", workload, "--steps", str(steps))
            outcomes.append(json.loads(job))
    table = {}
    for name, outcomes in results.items():
        seconds, pages, system = zip(*[figure for each in outcomes for figure in each["figures"]])
        peak = max(each["peak"] for each in outcomes) * 1024 / 1e6
        medians = statistics.median(seconds) * 1e3, statistics.median(pages)
        table[name] = (*medians, statistics.fmean(system) * 1e3, peak)
    return table


def main() -> None:
    """Let both take turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="(default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="jobs of each (default: 3)")
    parser.add_argument("--steps", type=int, default=10, help="steps of a job (default: 10)")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    parser.add_argument("--workload", choices=WORKLOADS, help="be a rank of a job that trains it")
    bench_tables.add_option(parser)
    args = parser.parse_args()
    if args.workload:
        train(args.workload, args.steps)
        return
    report = bench_tables.Report(args.json)
    steps_table = report.table(
        f"a step of Adam on {args.ranks} ranks",
        {
            "": "",
            "step, ms": ".1f",
            "ratio": ".2f",
            "pages a step": ".0f",
            "system, ms": ".1f",
            "peak, MB": ".0f",
        },
        label_width=28,
    )
    for workload in args.workloads:
        table = measure(workload, args.ranks, args.rounds, args.steps)
        for name, (ms, *others) in table.items():
            steps_table.row(f"{workload}, {name}", ms, table[AS_IT_IS][0] / ms, *others)
    report.write()


if __name__ == "__main__":
    main()
