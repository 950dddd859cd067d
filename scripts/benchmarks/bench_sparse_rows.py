#!/usr/bin/env python
"""Measure the exchange of an embedding's gradient, of which a batch changes few rows.

On one node, and between nodes (see netns_cluster.py)::

    mpiexec -n 2 python scripts/benchmarks/bench_sparse_rows.py
    python scripts/cluster/netns_cluster.py --hosts 2 --rate 1gbit -- python scripts/benchmarks/bench_sparse_rows.py

An embedding of 50,000 x 256 (51 MB) and 1,000 words a rank, drawn evenly: the mean of its gradient with
and without ``SparseRows``, and whole steps of SGD and Adam, in milliseconds. The exact one is that of the
default communicator, and its update is shared out to the ranks of a node. Medians of the slowest rank.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import time
from typing import TYPE_CHECKING

import bench_tables
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

import chainer_dist
from chainer_dist.compression import SparseRows

if TYPE_CHECKING:
    from collections.abc import Callable

WARM_UP = 2


def measure(
    comm: chainer_dist.CommunicatorBase, todo: dict[str, Callable[[], None]], repeats: int
) -> dict[str, float]:
    """Return for each the median of the milliseconds that the slowest rank takes; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in todo}
    for turn in range(WARM_UP + repeats):
        for name, function in todo.items():
            comm.mpi_comm.Barrier()
            started = time.perf_counter()
            function()
            seconds = max(comm.allgather_obj(time.perf_counter() - started))
            if turn >= WARM_UP:
                times[name].append(seconds * 1e3)
    return {name: statistics.median(each) for name, each in times.items()}


def make_step(
    comm: chainer_dist.CommunicatorBase,
    optimizer: chainer.Optimizer,
    way: SparseRows | None,
    args: argparse.Namespace,
) -> Callable[[], None]:
    """Return a training step."""
    model = chainer.Sequential(L.EmbedID(args.words, args.width))
    optimizer = chainer_dist.create_multi_node_optimizer(optimizer, comm, compression=way)
    optimizer.setup(model)
    rng = np.random.RandomState(comm.rank)

    def step() -> None:
        x = rng.randint(0, args.words, args.batch).astype(np.int32)
        optimizer.update(lambda: F.sum(model(x) ** 2))

    return step


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--words", type=int, default=50_000, help="default: 50000")
    parser.add_argument("--width", type=int, default=256, help="default: 256")
    parser.add_argument("--batch", type=int, default=1000, help="words a rank; default: 1000")
    parser.add_argument("--repeats", type=int, default=7, help="default: 7")
    bench_tables.add_option(parser)
    args = parser.parse_args()
    comm = chainer_dist.create_communicator()
    rng = np.random.RandomState(comm.rank)
    grad = np.zeros((args.words, args.width), np.float32)
    used = np.unique(rng.randint(0, args.words, args.batch))
    grad[used] = rng.randn(len(used), args.width)
    dense, way = grad.copy(), SparseRows()

    def exchange() -> None:
        # Not what the last turn has left: the rows of all ranks.
        grad[...] = 0
        grad[used] = 1

    def sparse() -> None:
        exchange()
        way.mean(comm, {"W": grad})

    exchanges = measure(
        comm,
        {
            "(filling)": exchange,
            "exact": lambda: comm.mean_arrays([dense]),
            "SparseRows": sparse,
        },
        args.repeats,
    )
    exchanges["SparseRows"] -= exchanges.pop("(filling)")
    rows = {"exchange": exchanges}
    for kind in (chainer.optimizers.SGD, chainer.optimizers.Adam):
        todo = {
            "exact": make_step(comm, kind(), None, args),
            "SparseRows": make_step(comm, kind(), SparseRows(), args),
        }
        rows[f"step of {kind.__name__}"] = measure(comm, todo, args.repeats)
    nodes = comm.inter_size
    report = bench_tables.Report(args.json, ranks=comm.size, speaks=comm.rank == 0)
    table = report.table(
        f"{comm.size} ranks on {nodes} nodes", {"": "", "exact": "", "SparseRows": ""}
    )
    if nodes > 1:
        exact = 2 * grad.nbytes * (nodes - 1) / nodes
        table.row("bytes a node", f"{exact:,.0f}", f"{way.sent:,.0f}")
    for name, row in rows.items():
        table.row(f"{name}, ms", f"{row['exact']:.1f}", f"{row['SparseRows']:.1f}")
    report.write()


if __name__ == "__main__":
    main()
