#!/usr/bin/env python
"""Measure exchange and training steps between nodes: it sets up the nodes itself, see netns_cluster.py.

Exchange: the mean of 1, 10 and 100 MB of gradients in 160 arrays, left in each rank's own arrays, on
two hosts of two ranks and on four hosts. The floor is a message of as many bytes as an allreduce has
to send through each link, 2 (n - 1) / n of the gradients on n hosts, timed in the same job.

Steps: a perceptron of 1.5 million parameters (784, 5 x 512, 10) under SGD on two hosts, with few and
many examples a rank, so that the exchange counts much or little; and one of 22.6 million (784,
6 x 2048, 10) under Adam on two hosts of two ranks. Without overlap gradients are exchanged after
backward.

Contenders are those of bench_exchange.py and bench_step.py; they take turns, a turn takes as long as
its slowest rank, and the table shows medians. All ranks share this machine's processors, so whoever
spends processor time on sending has less of it left.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import bench_tables

sys.path.append(str(Path(__file__).resolve().parents[1] / "cluster"))
import netns_cluster

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench_step import Step

PEER = "ChainerMN naive"
FLOOR = "floor: a message"
TORCH = "torch DDP gloo"
FUSED = "torch DDP gloo, fused"
AFTER = "chainer_dist, no overlap"
ROUNDED = {"chainer_dist, Float16": "Float16", "chainer_dist, BFloat16": "BFloat16"}
ARRAYS = 160
REPEATS = {1: 11, 10: 7, 100: 3}  # of an exchange of so many megabytes
RANK_SECONDS = 300


class Steps(NamedTuple):
    """Training steps to be measured."""

    hosts: int
    ranks_per_host: int
    rates: tuple[str, ...]
    widths: list[int]
    optimizer: str
    batches: tuple[int, ...]
    steps: int
    rounds: int  # of jobs with one contender each; 0: all contenders in one job


EXCHANGES = {"exchange-2x2": (2, 2), "exchange-4x1": (4, 1)}
STEPS = {
    "steps-2x1": Steps(
        2, 1, ("1gbit", "10gbit"), [784, *[512] * 5, 10], "SGD", (64, 1024, 4096), 7, 0
    ),
    "steps-2x2": Steps(2, 2, ("10gbit",), [784, *[2048] * 6, 10], "Adam", (64,), 5, 2),
}
QUICK = ["exchange-2x2", "steps-2x1"]


def be_exchanging_rank(megabytes: Sequence[int]) -> None:
    """Be a rank of an exchange; rank 0 prints each contender's median in milliseconds."""
    import bench_exchange
    import chainermn

    import chainer_dist

    comms: dict[str, Any] = {PEER: chainermn.create_communicator("naive")}
    for name in chainer_dist.communicators.names():
        if name not in {"dummy", "single_node"}:
            comms[name] = chainer_dist.create_communicator(name)
    hosts = comms["naive"].inter_size
    results = {}
    for number in megabytes:
        shapes = [(number * 10**6 // 4 // ARRAYS,)] * ARRAYS
        medians = bench_exchange.measure(shapes, REPEATS[number], comms)
        del medians["memcpy"]
        nbytes = 2 * (hosts - 1) * number * 10**6 // hosts
        first = comms["naive"].size // hosts  # the first rank of the second host
        seconds, _ = netns_cluster.messages(bench_exchange.WORLD, first, nbytes, REPEATS[number])
        results[number] = {FLOOR: seconds * 1e3, **medians}
    if bench_exchange.WORLD.rank == 0:
        print(json.dumps(results), flush=True)
    for comm in comms.values():
        comm.finalize()


def be_training_rank(
    contenders: Sequence[str], widths: list[int], optimizer: str, batches: Sequence[int], steps: int
) -> None:
    """Be a rank that trains; rank 0 prints the seconds of each contender's steps, for each batch."""
    import bench_step
    from mpi4py import MPI

    from chainer_dist import compression

    world = MPI.COMM_WORLD
    bench_step.WIDTHS[:] = widths
    bench_step.OURS[AFTER] = {"overlap": False}
    results = {}
    for batch in batches:
        for name, kind in ROUNDED.items():  # one for each optimizer
            bench_step.OURS[name] = {"compression": getattr(compression, kind)()}
        todo: dict[str, Step] = {}
        for name in contenders:
            todo[name], _ = bench_step.make_step(name, optimizer, batch)
        seconds: dict[str, list[float]] = {name: [] for name in todo}
        for _ in range(bench_step.WARM_UP + steps):
            for name, step in todo.items():
                world.Barrier()
                started = time.perf_counter()
                step()
                seconds[name].append(world.allreduce(time.perf_counter() - started, MPI.MAX))
        results[batch] = {name: each[bench_step.WARM_UP :] for name, each in seconds.items()}
    if world.rank == 0:
        print(json.dumps(results))


def on_cluster(cluster: netns_cluster.Cluster, part: str, *arguments: Any) -> Any:
    """Run a part of this script on all hosts, and return what rank 0 prints."""
    rank = [sys.executable, __file__, "--rank", json.dumps([part, *arguments])]
    job = cluster.run(rank, stdout=subprocess.PIPE, timeout=RANK_SECONDS)
    if job.returncode:
        raise SystemExit(f"{part} {arguments} ended with status {job.returncode}")
    return json.loads(job.stdout.splitlines()[-1])


def compare_exchanges(
    report: bench_tables.Report, hosts: int, ranks: int, rate: str, megabytes: Sequence[int]
) -> None:
    """Measure exchanges on a cluster and report a table of each size."""
    with netns_cluster.Cluster(hosts, rate=rate, ranks_per_host=ranks) as cluster:
        results = on_cluster(cluster, "exchange", megabytes)
    for number, medians in results.items():
        table = report.table(
            f"{number} MB in {ARRAYS} arrays, {hosts} hosts of {ranks} ranks, {rate}",
            {"": "", "ms": ".2f", "it / floor": ".2f", "ChainerMN / it": ".2f"},
        )
        for name, ms in medians.items():
            table.row(name, ms, ms / medians[FLOOR], medians[PEER] / ms)


def compare_steps(
    report: bench_tables.Report, work: Steps, rate: str, batches: Sequence[int]
) -> None:
    """Measure steps on a cluster and report a table of each batch size."""
    import bench_step

    contenders = [PEER, "chainer_dist", AFTER, *ROUNDED, "chainer_dist, replicated"]
    if importlib.util.find_spec("torch"):
        contenders += [TORCH, FUSED] if work.optimizer == "Adam" else [TORCH]
    contenders += [bench_step.ALONE, bench_step.FORWARD]
    jobs = [contenders] if not work.rounds else [[name] for name in contenders] * work.rounds
    seconds: dict[str, dict[str, list[float]]] = {}
    with netns_cluster.Cluster(
        work.hosts, rate=rate, ranks_per_host=work.ranks_per_host
    ) as cluster:
        for names in jobs:
            result = on_cluster(
                cluster, "train", names, work.widths, work.optimizer, batches, work.steps
            )
            for batch, found in result.items():
                for name, each in found.items():
                    seconds.setdefault(batch, {}).setdefault(name, []).extend(each)
    size = sum((low + 1) * high for low, high in zip(work.widths, work.widths[1:])) / 1e6
    for batch, found in seconds.items():
        medians = {name: statistics.median(each) * 1e3 for name, each in found.items()}
        title = (
            f"{size:.2f} M parameters, {work.hosts} hosts of {work.ranks_per_host}, {rate}; "
            f"{work.optimizer}, batch {batch} a rank"
        )
        bench_step.report_steps(report, title, medians)


def main() -> int:
    """Measure each work and report tables."""
    works = [*EXCHANGES, *STEPS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--works", nargs="+", choices=works, help="(default: all)")
    parser.add_argument("--rates", nargs="+", metavar="RATE", help="(default: 1gbit 10gbit)")
    parser.add_argument("--quick", action="store_true", help="two hosts at 1gbit, few sizes")
    parser.add_argument("--rank", type=json.loads, help=argparse.SUPPRESS)
    bench_tables.add_option(parser)
    args = parser.parse_args()
    if args.rank:
        part, *arguments = args.rank
        if part == "exchange":
            be_exchanging_rank(*arguments)
        else:
            be_training_rank(*arguments)
        return 0
    report = bench_tables.Report(args.json)
    rates = args.rates or (["1gbit"] if args.quick else ["1gbit", "10gbit"])
    try:
        for rate in rates:
            for name in args.works or (QUICK if args.quick else works):
                if name in EXCHANGES:
                    megabytes = [1, 10] if args.quick else [*REPEATS]
                    compare_exchanges(report, *EXCHANGES[name], rate, megabytes)
                elif args.rates or rate in STEPS[name].rates:
                    work = STEPS[name]
                    batches = work.batches[:2] if args.quick else work.batches
                    compare_steps(report, work, rate, batches)
    except netns_cluster.UnavailableError as error:
        print(error, file=sys.stderr)
        return netns_cluster.CANNOT
    report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
