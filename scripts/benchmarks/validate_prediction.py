#!/usr/bin/env python
"""Compare predicted steps with measured ones, on hosts made of this machine (root needed).

For every number of hosts, bandwidth and model: a ping-pong tells what the network gives, the computation of a
step is recorded with as many ranks on the same cores but without a network, and from both a step
is predicted; then steps are measured over the network, of chainer_dist, which overlaps the exchange with
backward, and of ChainerMN's naive communicator.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from chainer_dist.scaling import design as designs
from chainer_dist.scaling import experiment, results, validation
from chainer_dist.scaling.closed_form import closed_form
from chainer_dist.scaling.cluster import Cluster as Place
from chainer_dist.scaling.cluster import Network
from chainer_dist.scaling.schedule import Schedule
from chainer_dist.scaling.simulate import simulate
from chainer_dist.scaling.worker import Task
from chainer_dist.scaling.workloads import load

sys.path.append(str(Path(__file__).resolve().parents[1] / "cluster"))
from netns_cluster import Cluster, UnavailableError

# Our name of a contender, and the design that it has.
DESIGNS = {"chainer_dist": "overlap", "chainermn": "naive"}
LARGE, SMALL = 4 << 20, 8  # bytes
TIMES = 15
# As chainer_dist sets glibc up where nothing is said, but for all: what is to differ is the exchange.
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
UNAVAILABLE = 77


def ping_pong() -> None:
    """Be a rank: ranks 0 and 1 measure their network; rank 0 prints bytes a second, and seconds."""
    import numpy as np
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    medians = []
    for nbytes in (LARGE, SMALL):
        data, seconds = np.zeros(nbytes, np.uint8), []
        for _ in range(TIMES if world.rank < 2 else 0):
            began = time.perf_counter()
            for sender in (0, 1):
                if world.rank == sender:
                    world.Send(data, 1 - sender)
                else:
                    world.Recv(data, sender)
            seconds.append((time.perf_counter() - began) / 2)
        medians.append(statistics.median(seconds or [0]))
    if world.rank == 0:
        print(json.dumps([LARGE / (medians[0] - medians[1]), medians[1]]), flush=True)
    world.Barrier()


def run(cluster: Cluster, *command: str) -> str:
    """Run a job on the cluster and return what it prints."""
    done = cluster.run(
        [sys.executable, *command],
        timeout=300,
        stdout=-1,
        env={**experiment.environment(), **MEMORY},
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout}")
    return str(done.stdout)


def main() -> int:
    """Print a line for each comparison, and the errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit", "10gbit"])
    parser.add_argument("--workloads", nargs="+", default=["cnn", "transformer", "lstm"])
    parser.add_argument("--batch", type=int, help="examples a rank (default: each workload's)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON")
    parser.add_argument("--ping-pong", action="store_true", help="be a rank")
    args = parser.parse_args()
    if args.ping_pong:
        ping_pong()
        return 0
    print(
        f"{'hosts':>5} {'rate':>8} {'workload':12} {'contender':13} {'predicted, ms':>13} "
        f"{'closed form':>12} {'measured':>9} {'error':>7}"
    )
    found: list[validation.Comparison] = []
    machine = experiment.machine()
    try:
        for hosts in args.hosts:
            for rate in args.rates:
                found += compare(hosts, rate, args.workloads, args.batch)
    except UnavailableError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return UNAVAILABLE
    print(validation.summary(found))
    if args.out:
        comparisons = [each._asdict() for each in found]
        results.write_json(args.out, {"machine": machine, "comparisons": comparisons})
    return 0


def compare(
    hosts: int, rate: str, workloads: list[str], batch: int | None
) -> list[validation.Comparison]:
    """Predict and measure steps on some hosts; print and return them."""
    found = []
    with (
        tempfile.TemporaryDirectory(prefix="chainer-dist-") as folder,
        Cluster(hosts, rate=rate, check=False) as cluster,
        Cluster(1, ranks_per_host=hosts, check=False) as one_host,
    ):
        out = Path(folder) / "out.json"

        def result(where: Cluster, module: str, task: dict[str, Any]) -> Any:
            run(
                where, "-m", f"chainer_dist.scaling.{module}", json.dumps({**task, "out": str(out)})
            )
            return json.loads(out.read_text(encoding="utf-8"))

        network = Network(*json.loads(run(cluster, __file__, "--ping-pong")))
        place = Place(hosts, 1, network)
        for workload in workloads:
            examples = batch or load(workload).batch
            what = {"workload": workload, "batch": examples}
            schedule = Schedule(**result(one_host, "schedule", {**what, "ranks_per_node": 1}))
            for contender, design in DESIGNS.items():
                task = Task(contender, workload, examples, 10.0, 15, "")
                seconds = statistics.median(result(cluster, "worker", task._asdict())["seconds"])
                how = designs.DESIGNS[design]
                predicted = simulate(schedule, place, how)
                closed = closed_form(schedule, place, how)
                each = validation.Comparison(
                    hosts, rate, workload, contender, predicted, closed, seconds
                )
                found.append(each)
                print(
                    f"{hosts:>5} {rate:>8} {workload:12} {contender:13} {predicted * 1e3:>13.1f} "
                    f"{closed * 1e3:>12.1f} {seconds * 1e3:>9.1f} {each.error:>7.0%}",
                    flush=True,
                )
    return found


if __name__ == "__main__":
    sys.exit(main())
