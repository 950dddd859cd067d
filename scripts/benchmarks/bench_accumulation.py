#!/usr/bin/env python
"""Measure training that communicates less often: accumulated gradients, and local SGD.

On one node, and between nodes (see netns_cluster.py)::

    mpiexec -n 2 python scripts/benchmarks/bench_accumulation.py
    python scripts/cluster/netns_cluster.py --hosts 2 --rate 1gbit -- python scripts/benchmarks/bench_accumulation.py

A perceptron of 1.5 million parameters (784, 5 x 512, 10) is trained by SGD: on batches that are exchanged
each, on four accumulated ones, on one of four times the size, and by local SGD with a period of four.
Printed are milliseconds a batch of the slowest rank, medians, and how many collectives there were in
four batches.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import time
from typing import Any

import bench_tables
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

import chainer_dist

WIDTHS = [784, *[512] * 5, 10]
STEPS = 4
WARM_UP = 2


def make_model() -> chainer.Chain:
    """Return the perceptron."""
    layers: list[Any] = []
    for low, high in zip(WIDTHS, WIDTHS[1:]):
        layers += [L.Linear(low, high), F.relu]
    return L.Classifier(chainer.Sequential(*layers[:-1]))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32, help="samples a rank; default: 32")
    parser.add_argument("--repeats", type=int, default=11, help="default: 11")
    bench_tables.add_option(parser)
    args = parser.parse_args()
    comm = chainer_dist.create_communicator()
    sgd = chainer.optimizers.SGD
    contenders = {
        "every batch": (chainer_dist.create_multi_node_optimizer(sgd(), comm), 1),
        "accumulate_steps=4": (
            chainer_dist.create_multi_node_optimizer(sgd(), comm, accumulate_steps=STEPS),
            1,
        ),
        "batches of 4 times": (chainer_dist.create_multi_node_optimizer(sgd(), comm), STEPS),
        "local SGD, period 4": (
            chainer_dist.create_local_sgd_optimizer(sgd(), comm, period=STEPS),
            1,
        ),
    }
    for optimizer, _ in contenders.values():
        optimizer.setup(make_model())
    x = np.random.RandomState(comm.rank).rand(STEPS * args.batch, WIDTHS[0]).astype(np.float32)
    t = (x.sum(axis=1) % 10).astype(np.int32)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    collectives = {}
    for turn in range(WARM_UP + args.repeats):
        for name, (optimizer, times_larger) in contenders.items():
            size = args.batch * times_larger
            comm.mpi_comm.Barrier()
            before = comm.operation_log.number
            started = time.perf_counter()
            for _ in range(STEPS // times_larger):
                optimizer.update(optimizer.target, x[:size], t[:size])
            elapsed = time.perf_counter() - started
            collectives[name] = comm.operation_log.number - before
            slowest = max(comm.allgather_obj(elapsed))
            if turn >= WARM_UP:
                times[name].append(slowest * 1e3 / STEPS)
    report = bench_tables.Report(args.json, ranks=comm.size, speaks=comm.rank == 0)
    table = report.table(
        f"{comm.size} ranks on {comm.inter_size} nodes, {args.batch} samples a batch",
        {"": "", "ms a batch": ".1f", "collectives in four": ""},
    )
    for name, each in times.items():
        table.row(name, statistics.median(each), collectives[name])
    report.write()


if __name__ == "__main__":
    main()
