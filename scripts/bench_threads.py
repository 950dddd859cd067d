#!/usr/bin/env python
"""Measure what the fair share of threads saves.

    mpiexec -n 2 python scripts/bench_threads.py

Every rank trains a multi-layer perceptron of its own, in turn with NumPy's default number of BLAS
threads and with this rank's fair share of the cores. A step counts as long as its slowest rank.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import threadpoolctl
from mpi4py import MPI

from chainer_dist import _threads


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="of each kind (default: 12)")
    parser.add_argument("--units", type=int, default=1024, help="a layer (default: 1024)")
    parser.add_argument("--batch-size", type=int, default=64, help="a rank (default: 64)")
    return parser.parse_args()


def main() -> None:
    """Take steps of both kinds in turn, and print medians and their ratio."""
    args = parse_args()
    world = MPI.COMM_WORLD
    if any(name in os.environ for name in _threads.VARIABLES):
        raise SystemExit(f"the default is measured, so unset {', '.join(_threads.VARIABLES)}")
    default = max(p["num_threads"] for p in threadpoolctl.threadpool_info())
    affinities = world.Split_type(MPI.COMM_TYPE_SHARED).allgather(_threads._cores())
    share = _threads.fair_share(affinities, 0)

    model = L.Classifier(
        chainer.Sequential(
            L.Linear(784, args.units),
            F.relu,
            L.Linear(args.units, args.units),
            F.relu,
            L.Linear(args.units, 10),
        )
    )
    optimizer = chainer.optimizers.SGD().setup(model)
    rng = np.random.default_rng(world.rank)
    x = rng.random((args.batch_size, 784), dtype=np.float32)
    t = rng.integers(0, 10, args.batch_size).astype(np.int32)

    seconds: dict[str, list[float]] = {"default": [], "share": []}
    for step in range(args.steps + 2):
        for kind, threads in (("default", default), ("share", share)):
            with threadpoolctl.threadpool_limits(threads):
                world.Barrier()
                started = time.perf_counter()
                optimizer.update(model, x, t)
                slowest = world.allreduce(time.perf_counter() - started, MPI.MAX)
            if step >= 2:  # the first ones warm up
                seconds[kind].append(slowest)
    if world.rank == 0:
        medians = {kind: statistics.median(values) * 1e3 for kind, values in seconds.items()}
        print(
            f"{world.size} ranks on {len(set().union(*affinities))} cores, median of {args.steps}"
        )
        print(f"NumPy's default, {default} threads a rank: {medians['default']:8.1f} ms a step")
        print(f"fair share,      {share} threads a rank: {medians['share']:8.1f} ms a step")
        print(f"default / share: {medians['default'] / medians['share']:.2f}")


if __name__ == "__main__":
    main()
