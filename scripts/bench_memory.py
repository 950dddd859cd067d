#!/usr/bin/env python
"""Measure how much memory training takes: run it without mpiexec, it starts the jobs itself.

Each contender trains an MLP of 22.6 million parameters by Adam for ten steps in a job of its own. Then
the proportional set sizes (PSS) of its ranks are summed up: memory that several ranks share is counted
once. Linux only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

STEPS = 10
CONTENDERS = (
    "ChainerMN naive",
    "chainer_dist",
    "chainer_dist, replicated",
    "Chainer, independent",
)


def pss(pid: str = "self") -> float:
    """Return the proportional set size of a process in MB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("no Pss in /proc/self/smaps_rollup")


def train(contender: str, batch: int) -> None:
    """Train on this rank and print, on rank 0, the ranks' memory before the model and at the end."""
    from bench_step import WORLD, Work, wrappers

    before = WORLD.allreduce(pss())
    work = Work("Adam", [784, *[2048] * 6, 10], batch)
    step, _ = work.chainer_step(wrappers()[contender])
    for _ in range(STEPS):
        step()
    WORLD.Barrier()
    after = WORLD.allreduce(pss())
    if WORLD.rank == 0:
        print(before, after)
    WORLD.Barrier()


def launch(contender: str, ranks: int, batch: int) -> tuple[float, float]:
    """Return what a job of that contender printed."""
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        raise SystemExit("no mpiexec found")
    command = [mpiexec, "-n", str(ranks), sys.executable, __file__]
    command += ["--contender", contender, "--batch", str(batch)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, timeout=300, env=env
    )
    before, after = job.stdout.split()
    return float(before), float(after)


def main() -> None:
    """Run each contender and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="(default: 2 4)")
    parser.add_argument("--batch", type=int, default=64, help="examples a rank (default: 64)")
    parser.add_argument("--contender", choices=CONTENDERS, help="be a rank of this one's job")
    args = parser.parse_args()
    if args.contender:
        train(args.contender, args.batch)
        return
    for ranks in args.ranks:
        print(f"\nsum of PSS over {ranks} ranks, MLP of 22.6 M parameters, Adam, {STEPS} steps")
        print(f"{'':26} {'MB':>7} {'it / ChainerMN':>15} {'before the model':>17}")
        peer = None
        for contender in CONTENDERS:
            before, after = launch(contender, ranks, args.batch)
            peer = peer or after
            print(f"{contender:26} {after:>7.0f} {after / peer:>15.2f} {before:>17.0f}", flush=True)


if __name__ == "__main__":
    main()
