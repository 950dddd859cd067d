#!/usr/bin/env python
"""Measure what the fair share of threads saves: run it under ``mpiexec -n 2``.

Every rank trains a multi-layer perceptron of its own with plain Chainer, in turn with the default
number of BLAS threads and with this rank's fair share of the cores. A step takes as long as its
slowest rank.
"""

# ruff: noqa: E402 - the default is what is measured, so nothing may be set before NumPy is loaded

from __future__ import annotations

import os

for _name in [name for name in os.environ if name.endswith("_NUM_THREADS")]:
    del os.environ[_name]

import argparse
import statistics
import time

import bench_tables
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import threadpoolctl
from mpi4py import MPI

from chainer_dist import _threads

WARM_UP = 2


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="of each kind (default: 100)")
    parser.add_argument(
        "--units",
        type=int,
        nargs="+",
        default=[128, 256, 512, 1024],
        help="of a layer, model after model (default: 128 256 512 1024)",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="a rank (default: 32)")
    bench_tables.add_option(parser)
    return parser.parse_args()


def measure(
    world: MPI.Intracomm, units: int, batch_size: int, threads: dict[str, int], steps: int
) -> dict[str, float]:
    """Take steps of all kinds in turn; return the median of each kind in milliseconds."""
    hidden = L.Linear(784, units), F.relu, L.Linear(units, units), F.relu
    model = L.Classifier(chainer.Sequential(*hidden, L.Linear(units, 10)))
    optimizer = chainer.optimizers.SGD().setup(model)
    rng = np.random.default_rng(world.rank)
    x = rng.random((batch_size, 784), dtype=np.float32)
    t = rng.integers(0, 10, batch_size).astype(np.int32)

    seconds: dict[str, list[float]] = {kind: [] for kind in threads}
    for _ in range(WARM_UP + steps):
        for kind, limit in threads.items():
            with threadpoolctl.threadpool_limits(limit):
                world.Barrier()
                started = time.perf_counter()
                optimizer.update(model, x, t)
                seconds[kind].append(world.allreduce(time.perf_counter() - started, MPI.MAX))
    return {kind: statistics.median(values[WARM_UP:]) * 1e3 for kind, values in seconds.items()}


def main() -> None:
    """Measure models of several sizes and print a table."""
    args = parse_args()
    world = MPI.COMM_WORLD
    threads = {"default": max(p["num_threads"] for p in threadpoolctl.threadpool_info())}
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    cores = node.allgather(_threads.cores())
    threads["share"] = _threads.fair_share(cores, node.rank, _threads.quota())
    report = bench_tables.Report(args.json, ranks=world.size, speaks=world.rank == 0)
    table = report.table(
        f"{world.size} ranks on {len(set().union(*cores))} cores, medians of {args.steps} steps; threads a "
        f"rank: BLAS default {threads['default']}, fair share {threads['share']}",
        {"units a layer": "", "default, ms": ".2f", "fair share, ms": ".2f", "ratio": ".2f"},
    )
    for units in args.units:
        ms = measure(world, units, args.batch_size, threads, args.steps)
        table.row(units, ms["default"], ms["share"], ms["default"] / ms["share"])
    report.write()


if __name__ == "__main__":
    main()
