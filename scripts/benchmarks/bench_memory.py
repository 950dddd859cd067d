#!/usr/bin/env python
"""Measure how much memory training takes: run it without mpiexec, it starts the jobs itself.

Each contender trains the MLP of ``bench_step.py``, 22.6 million parameters, by Adam for ten steps in a
job of its own. Then the proportional set sizes (PSS) of its ranks are summed up: memory that several
ranks share is counted once. Linux only.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import bench_tables
from bench_step import ALONE, OURS, PEER, launch, make_step

STEPS = 10
JOB = "chainer_dist, state per job"
OURS[JOB] = {"sharded_update": "job"}
CONTENDERS = (PEER, *OURS, ALONE)


def pss() -> float:
    """Return this process's proportional set size in MB."""
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("no Pss in /proc/self/smaps_rollup")


def train(contender: str, batch: int) -> None:
    """Train on this rank; rank 0 prints all ranks' memory before the model and at the end."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    before = world.allreduce(pss())
    step, _ = make_step(contender, "Adam", batch)
    for _ in range(STEPS):
        step()
    world.Barrier()
    after = world.allreduce(pss())
    if world.rank == 0:
        print(before, after, flush=True)
    world.Barrier()


def main() -> None:
    """Run each contender and report a table for each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="(default: 2 4)")
    parser.add_argument(
        "--nodes", type=int, default=1, help="that MPICH is to take the machine for (default: 1)"
    )
    parser.add_argument("--batch", type=int, default=64, help="examples a rank (default: 64)")
    parser.add_argument("--contender", choices=CONTENDERS, help="be a rank of this one's job")
    bench_tables.add_option(parser)
    args = parser.parse_args()
    if args.contender:
        train(args.contender, args.batch)
        return
    if args.nodes > 1:
        os.environ["MPIR_CVAR_NUM_CLIQUES"] = str(args.nodes)
    report = bench_tables.Report(args.json)
    for ranks in args.ranks:
        where = f"{ranks} ranks" + (f" on {args.nodes} nodes" if args.nodes > 1 else "")
        table = report.table(
            f"sum of PSS over {where}, MLP of 22.6 M parameters, Adam, {STEPS} steps",
            {"": "", "MB": ".0f", "it / ChainerMN": ".2f", "MB before the model": ".0f"},
            label_width=31,
        )
        peer = None
        for contender in CONTENDERS:
            rank = ["--contender", contender, "--batch", str(args.batch)]
            before, after = map(float, launch(__file__, ranks, *rank).split())
            peer = peer or after
            table.row(contender, after, after / peer, before)
    report.write()


if __name__ == "__main__":
    main()
