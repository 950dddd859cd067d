"""``chainer-dist predict``: what a step measured here would take on a cluster that is not here."""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from chainer_dist.scaling import experiment, results, simulate
from chainer_dist.scaling.schedule import Schedule
from chainer_dist.scaling.simulate import DESIGNS, NETWORKS, Cluster
from chainer_dist.scaling.workloads import load

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Prediction", "main", "predict"]

ANNOUNCED = 0.852  # ChainerMN's on 128 GPUs (Akiba et al., 2017)
_SIMULATED = 2_000_000  # actions in a trace: some ten seconds of simulation


class Prediction(NamedTuple):
    """A step on a cluster.

    Attributes:
        workload: What is trained.
        network: By its name.
        nodes: How many.
        ranks: Of each node.
        design: See :data:`chainer_dist.scaling.simulate.DESIGNS`.
        seconds: Of a step, by SMPI; None where that was left out, because it would take too long.
        closed_form: The same in closed form.
        efficiency: What a rank does, against plain Chainer on one rank alone. More than 1 where ranks of a node
            share an update that costs more than the exchange.
    """

    workload: str
    network: str
    nodes: int
    ranks: int
    design: str
    seconds: float | None
    closed_form: float
    efficiency: float


def record(workload: str, batch: int | None, ranks: int) -> Schedule:
    """Record a step on so many ranks of this machine. Local; starts a job.

    Raises:
        RuntimeError: If the job fails, with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="chainer-dist-") as folder:
        out = Path(folder) / "schedule.json"
        task = {"workload": workload, "batch": batch or load(workload).batch, "out": str(out)}
        done = subprocess.run(  # noqa: S603 - this package
            [
                *(
                    sys.executable,
                    "-m",
                    "chainer_dist",
                    "run",
                    "-n",
                    str(ranks),
                    "--timeout",
                    "300",
                ),
                *("-m", "chainer_dist.scaling.schedule", json.dumps(task)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            check=False,
            env=experiment.environment(),
        )
        if done.returncode or not out.is_file():
            raise RuntimeError(f"recording {workload} failed:\n{done.stdout[-3000:]}")
        return Schedule(**json.loads(out.read_text(encoding="utf-8")))


def predict(
    alone: Schedule, schedule: Schedule, cluster: Cluster, name: str, design: str
) -> Prediction:
    """Predict a step. Local; starts a process.

    Args:
        alone: Recorded on one rank.
        schedule: Recorded on as many ranks as a node has, or as there were cores.
        cluster: Where.
        name: Of its network.
        design: By its name.
    """
    how = DESIGNS[design]
    closed = simulate.closed_form(schedule, cluster, how)
    seconds = None
    if simulate.n_actions(schedule, cluster, how) <= _SIMULATED:
        seconds = simulate.simulate(schedule, cluster, how)
    one = alone.compute + alone.update
    return Prediction(
        schedule.workload,
        name,
        cluster.nodes,
        cluster.ranks,
        design,
        seconds,
        closed,
        one / (closed if seconds is None else seconds),
    )


def table(predictions: Sequence[Prediction]) -> str:
    """Return efficiencies as text: a line for each design, a column for each number of ranks. Local."""
    lines: list[str] = []
    groups = itertools.groupby(predictions, key=lambda each: (each.workload, each.network))
    for (workload, network), group in groups:
        found = list(group)
        numbers = list(dict.fromkeys(each.nodes * each.ranks for each in found))
        lines += ["", f"{workload}, {network}, {found[0].ranks} ranks a node: efficiency, percent"]
        lines.append(f"{'ranks':14}{''.join(f'{number:>8}' for number in numbers)}")
        for design in dict.fromkeys(each.design for each in found):
            row = [each for each in found if each.design == design]
            marks = [
                f"{each.efficiency:.1%}".rstrip("%") + "~" * (each.seconds is None) for each in row
            ]
            lines.append(f"{design:14}{''.join(f'{mark:>8}' for mark in marks)}{_limit(row)}")
    lines += [
        "",
        "Efficiency is against plain Chainer on one rank. ~ in closed form; the others by SMPI.",
    ]
    return "\n".join(lines).lstrip("\n") + "\n"


def _limit(row: Iterable[Prediction]) -> str:
    below = next((each for each in row if each.efficiency < ANNOUNCED), None)
    if below is None:
        return f"   never below {ANNOUNCED:.1%}"
    return f"   below {ANNOUNCED:.1%} from {below.nodes * below.ranks} ranks"


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict what the command line says. Local; starts jobs.

    Args:
        arguments: Without the program's name; by default those of this process.

    Returns:
        The exit status.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    cores = experiment.n_cores()
    predictions: list[Prediction] = []
    schedules: dict[str, Any] = {}
    try:
        for workload in args.workloads:
            alone = record(workload, args.batch, 1)
            here = min(args.ranks_per_node, cores)
            schedule = alone if here == 1 else record(workload, args.batch, here)
            schedules[workload] = [alone._asdict(), schedule._asdict()]
            for network, design, nodes in itertools.product(args.networks, DESIGNS, args.nodes):
                cluster = Cluster(
                    nodes, args.ranks_per_node, NETWORKS[network], args.straggler, args.uplink
                )
                predictions.append(predict(alone, schedule, cluster, network, design))
    except (OSError, ValueError, RuntimeError) as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 1
    sys.stdout.write(table(predictions))
    if args.ranks_per_node > cores:
        sys.stdout.write(
            f"Computation and update on a node are as recorded with {cores} ranks, on {cores} cores.\n"
        )
    if args.out:
        content = {
            "machine": experiment.machine(),
            "schedules": schedules,
            "predictions": [each._asdict() for each in predictions],
        }
        results.write_json(args.out, content)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chainer-dist predict",
        description="Record a training step on this machine and replay it, with SimGrid's SMPI, on clusters "
        "of many nodes (weak scaling: the same batch on every rank).",
    )
    parser.add_argument("--workloads", nargs="+", default=["mlp"], metavar="W")
    parser.add_argument("--batch", type=int, help="examples a rank")
    parser.add_argument("--ranks-per-node", type=int, default=1, metavar="R")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 16, 64, 128], metavar="N")
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=NETWORKS,
        default=["1 Gbit/s Ethernet", "10 Gbit/s Ethernet"],
    )
    parser.add_argument(
        "--straggler",
        type=float,
        default=1.0,
        metavar="X",
        help="the first node takes X times as long to compute (default: 1)",
    )
    parser.add_argument(
        "--uplink",
        type=int,
        default=0,
        metavar="N",
        help="all nodes share a link as fast as N of theirs (default: 0, none is shared)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
