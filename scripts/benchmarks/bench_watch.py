#!/usr/bin/env python
"""Measure what watching costs: run it without mpiexec, it starts the jobs itself.

Steps with the hooks that watching needs, which is how they are, and steps without, from which the hooks
were taken away, take turns in one job, so that both meet the same machine. A step takes as long as its
slowest rank. The watchdog's thread sleeps nearly always; the kernel tells how long it was awake.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import json
import statistics
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench_step
import bench_tables
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

import chainer_dist
import chainer_dist.watch
from chainer_dist import exchange
from chainer_dist.collectives import operation
from chainer_dist.collectives.operation import Operation
from chainer_dist.optimizers import MultiNodeOptimizer

if TYPE_CHECKING:
    from collections.abc import Iterator

warnings.simplefilter("ignore")

# Widths of a multilayer perceptron, batch, and pairs of steps.
MODELS = {"small": ([784, 100, 10], 8, 2000), "large": (bench_step.WIDTHS, 64, 25)}
WARM_UP = 5
CALLS = 100_000


class Counter(operation.Observer):
    """Counts operations."""

    count = 0

    def left(self, operation: Operation, end: float) -> None:
        """See :meth:`chainer_dist.collectives.operation.Observer.left`."""
        del operation, end
        self.count += 1


@contextlib.contextmanager
def without_hooks(comm: chainer_dist.CommunicatorBase) -> Iterator[None]:
    """Take the hooks away for a while."""
    changed: list[tuple[Any, str, Any]] = []
    for owner in (*type(comm).__mro__, exchange, MultiNodeOptimizer):
        for name, value in list(vars(owner).items()):
            if getattr(getattr(value, "__code__", None), "co_name", "") == "operate":
                changed.append((owner, name, value))
                setattr(owner, name, value.__wrapped__)
    for name in ("__enter__", "__exit__"):
        changed.append((Operation, name, vars(Operation)[name]))
        setattr(Operation, name, lambda *_: None)
    try:
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def awake_seconds() -> float:
    """Return how long the watchdog's thread has run."""
    for thread in threading.enumerate():
        if thread.name == "chainer_dist watch":
            stat = Path(f"/proc/self/task/{thread.native_id}/schedstat")
            return int(stat.read_text(encoding="utf-8").split()[0]) / 1e9
    raise RuntimeError("there is no watchdog; is CHAINER_DIST_STALL_WARN set to 0?")


def operation_seconds(comm: chainer_dist.CommunicatorBase) -> float:
    """Return what entering and leaving an operation takes."""

    @operation.collective("root")
    def hooked(comm: Any, root: int = 0) -> None:
        del comm, root

    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(CALLS):
            hooked(comm)
        best = min(best, (time.perf_counter() - started) / CALLS)
    return best


def run(model_name: str) -> None:
    """Be a rank; rank 0 prints the seconds of steps with hooks and without, and more."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    widths, batch, pairs = MODELS[model_name]
    comm = chainer_dist.create_communicator()
    rng = np.random.RandomState(comm.rank)
    x = rng.randn(batch, widths[0]).astype(np.float32)
    t = rng.randint(0, widths[-1], batch).astype(np.int32)
    layers: list[Any] = []
    for low, high in zip(widths, widths[1:]):
        layers += [L.Linear(low, high), F.relu]
    model = L.Classifier(chainer.Sequential(*layers[:-1]))
    optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.Adam(), comm)
    optimizer.setup(model)

    def step() -> float:
        world.Barrier()
        started = time.perf_counter()
        optimizer.update(model, x, t)
        return float(world.allreduce(time.perf_counter() - started, MPI.MAX))

    for _ in range(WARM_UP):
        step()
    counter = Counter()
    operation.observers.append(counter)
    step()
    operation.observers.remove(counter)
    began, awake = time.perf_counter(), awake_seconds()
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(2 * pairs):
        # with, without, without, with, ...: neither always comes first
        if number % 4 in (0, 3):
            seconds["with"].append(step())
        else:
            with without_hooks(comm):
                seconds["without"].append(step())
    share = (awake_seconds() - awake) / (time.perf_counter() - began)
    each = operation_seconds(comm)
    if comm.rank == 0:
        print(json.dumps([seconds, counter.count, each, share]), flush=True)
    comm.finalize()


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="(default: 2)")
    parser.add_argument("--model", choices=MODELS, help="be a rank of this one's job")
    bench_tables.add_option(parser)
    args = parser.parse_args()
    if args.model:
        run(args.model)
        return
    report = bench_tables.Report(args.json)
    table = report.table(
        f"steps of {args.ranks} ranks, with and without what watching needs",
        {
            "model": "",
            "with, ms": ".3f",
            "without": ".3f",
            "difference": ".2%",
            "operations": "",
            "us each": ".2f",
            "of a step": ".3%",
            "watchdog awake": ".5%",
        },
        label_width=6,
    )
    for name in MODELS:
        output = bench_step.launch(__file__, args.ranks, "--model", name)
        seconds, count, each, share = json.loads(output)
        hooked, bare = (statistics.median(seconds[key]) * 1e3 for key in ("with", "without"))
        spent = count * each * 1e3 / bare
        table.row(name, hooked, bare, hooked / bare - 1, count, each * 1e6, spent, share)
    report.write()


if __name__ == "__main__":
    main()
