"""``chainer-dist predict``: what a step measured here would take on a cluster that is not here."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from chainer_dist import kernels
from chainer_dist._arguments import at_least_one, count, percentage, positive
from chainer_dist.launcher.options import Parser
from chainer_dist.scaling import answers, experiment, results, simulate
from chainer_dist.scaling.answers import Prediction
from chainer_dist.scaling.closed_form import closed_form, costs
from chainer_dist.scaling.cluster import NETWORKS, Cluster
from chainer_dist.scaling.design import DESIGNS
from chainer_dist.scaling.schedule import Schedule
from chainer_dist.scaling.workloads import load

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

__all__ = ["FILE", "REPORT", "Scenario", "main", "predict"]

FILE = "predictions.json"

_ACTIONS = 2_000_000  # in a trace: up to a minute of simulation
_SIZES = [1 << power for power in range(13)]  # ranks of the report
_ETHERNET = "10 Gbit/s Ethernet"


class Scenario(NamedTuple):
    """A kind of cluster, of any number of nodes; see :class:`chainer_dist.scaling.cluster.Cluster`."""

    name: str
    network: str
    ranks: int
    straggler: float = 1.0
    jitter: float = 0.0
    oversubscription: float = 1.0

    def of(self, nodes: int) -> Cluster:
        """Return the cluster that has so many nodes."""
        return Cluster(nodes, self.ranks, NETWORKS[self.network], *self[3:])


REPORT = [
    *(Scenario(name, name, 4) for name in NETWORKS),
    Scenario("16 ranks a node", _ETHERNET, 16),
    Scenario("64 ranks a node", _ETHERNET, 64),
    Scenario("one rank 20 % slower", _ETHERNET, 4, straggler=1.2),
    Scenario("ranks vary by 5 %", _ETHERNET, 4, jitter=0.05),
    Scenario("uplink oversubscribed 4:1", _ETHERNET, 4, oversubscription=4.0),
]


def record(workload: str, batch: int | None, ranks: int) -> Schedule:
    """Record a step on so many ranks of this machine. Local; starts a job.

    Raises:
        RuntimeError: If the job fails, with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="chainer-dist-") as folder:
        out = Path(folder) / "schedule.json"
        task = {"workload": workload, "batch": batch or load(workload).batch, "out": str(out)}
        program = [experiment.LAUNCH, "module", "chainer_dist.scaling.schedule", json.dumps(task)]
        done = experiment.launch(program, ranks, timeout=900)
        if done.returncode or not out.is_file():
            raise RuntimeError(f"recording {workload} failed:\n{done.stdout[-3000:]}")
        return Schedule(**json.loads(out.read_text(encoding="utf-8")))


def predict(
    schedule: Schedule,
    scenario: Scenario,
    nodes: int,
    design: str,
    *,
    actions: int = _ACTIONS,
) -> Prediction:
    """Predict a step. Local; starts a process.

    Args:
        schedule: Recorded on as many ranks as a node has, or as there were cores.
        scenario: On what kind of cluster,
        nodes: of how many nodes.
        design: The design, by its name.
        actions: Traces of more are not simulated.
    """
    cluster, how = scenario.of(nodes), DESIGNS[design]
    seconds = None
    if simulate.n_actions(schedule, cluster, how) <= actions:
        seconds = simulate.simulate(schedule, cluster, how)
    closed = closed_form(schedule, cluster, how)
    return Prediction(
        workload=schedule.workload,
        scenario=scenario.name,
        network=scenario.network,
        ranks_per_node=scenario.ranks,
        straggler=scenario.straggler,
        jitter=scenario.jitter,
        oversubscription=scenario.oversubscription,
        ranks=nodes * scenario.ranks,
        design=design,
        seconds=seconds,
        closed_form=closed,
        efficiency=schedule.alone / (closed if seconds is None else seconds),
        node=closed_form(schedule, Cluster(1, 1, cluster.network), how) - schedule.alone,
        **costs(schedule, cluster, how),
    )


def table(predictions: Sequence[Prediction]) -> str:
    """Return efficiencies as text: a line for each design, a column for each number of ranks. Local."""
    lines: list[str] = []
    groups = itertools.groupby(predictions, key=lambda each: (each.workload, each.scenario))
    for (workload, scenario), group in groups:
        found = list(group)
        numbers = list(dict.fromkeys(each.ranks for each in found))
        name = (
            found[0].network if scenario == found[0].network else f"{found[0].network}, {scenario}"
        )
        lines += ["", f"{workload}, {name}, {found[0].ranks_per_node} ranks a node: percent"]
        lines.append(f"{'ranks':14}{''.join(f'{number:>8}' for number in numbers)}")
        for design in dict.fromkeys(each.design for each in found):
            row = [each for each in found if each.design == design]
            marks = [
                f"{each.efficiency:.1%}".rstrip("%") + "~" * (each.seconds is None) for each in row
            ]
            lines.append(
                f"{design:14}{''.join(f'{mark:>8}' for mark in marks)}   {answers.limit(row)}"
            )
    lines += [
        "",
        "Percent of what as many ranks would do if each did what plain Chainer does on one rank alone.",
        "~ in closed form only; the others by SimGrid's SMPI.",
    ]
    return "\n".join(lines).lstrip("\n") + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict what the command line says. Local; starts jobs.

    Args:
        arguments: Arguments without the program's name; by default the arguments of this process.

    Returns:
        The exit status.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        for name in args.workloads:
            load(name)
    except ValueError as error:
        parser.error(str(error))
    places = list(_places(parser, args))
    has_simgrid = shutil.which("smpirun") is not None
    try:
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
        machine = experiment.machine()
        schedules, predictions = _predict_all(
            args.workloads, args.batch, places, actions=args.actions if has_simgrid else 0
        )
    except (OSError, ValueError, RuntimeError, subprocess.TimeoutExpired) as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 1
    sys.stdout.write(table(predictions))
    if not has_simgrid:
        sys.stdout.write(f"{simulate.MISSING}; so all is in closed form.\n")
    found = answers.answers(schedules, predictions)
    for question, lines in found.items():
        sys.stdout.write("\n".join(["", question, *(f"  {line}" for line in lines), ""]))
    if args.out:
        content = {
            "command": shlex.join(["chainer-dist", "predict", *arguments]),
            "machine": machine,
            "simulated": has_simgrid,
            "kernels": kernels.status().name,
            "schedules": {
                name: [each._asdict() for each in steps] for name, steps in schedules.items()
            },
            "predictions": [each._asdict() for each in predictions],
            "answers": found,
        }
        results.write_json(args.out / FILE, content)
        results.write_csv(args.out / "predictions.csv", predictions)
    return 0


def _predict_all(
    workloads: Sequence[str],
    batch: int | None,
    places: Sequence[tuple[Scenario, int]],
    *,
    actions: int,
) -> tuple[dict[str, list[Schedule]], list[Prediction]]:
    """Record steps of all workloads, and predict them in all places."""
    cores = experiment.n_cores()
    # The ranks of a node slow one another down; that can be recorded on as many as there are cores.
    numbers = sorted({min(scenario.ranks, cores) for scenario, _ in places})
    schedules = {name: [record(name, batch, ranks) for ranks in numbers] for name in workloads}

    def predict_one(job: tuple[list[Schedule], tuple[Scenario, int], str]) -> Prediction:
        steps, (scenario, nodes), design = job
        here = steps[numbers.index(min(scenario.ranks, cores))]
        return predict(here, scenario, nodes, design, actions=actions)

    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        jobs = itertools.product(schedules.values(), places, DESIGNS)
        return schedules, list(pool.map(predict_one, jobs))


def _places(
    parser: argparse.ArgumentParser, args: argparse.Namespace
) -> Iterator[tuple[Scenario, int]]:
    """Yield kinds of clusters, and of each the numbers of nodes."""
    if args.report:
        for name in ("networks", "ranks_per_node", "nodes", *Scenario._fields[3:]):
            if getattr(args, name) is not None:
                parser.error(
                    f"--report has clusters of its own: leave out --{name.replace('_', '-')}"
                )
        for scenario in REPORT:
            yield from ((scenario, n // scenario.ranks) for n in _SIZES if n >= scenario.ranks)
        return
    for network in args.networks or ["1 Gbit/s Ethernet", _ETHERNET]:
        scenario = Scenario(
            network,
            network,
            args.ranks_per_node or 1,
            args.straggler or 1.0,
            (args.jitter or 0.0) / 100,
            args.oversubscription or 1.0,
        )
        yield from ((scenario, nodes) for nodes in args.nodes or [1, 2, 4, 16, 64, 128])


def _parser() -> Parser:
    parser = Parser(
        prog="chainer-dist predict",
        description="Record a training step on this machine and replay it, with SimGrid's SMPI, on clusters\n"
        "of many nodes (weak scaling: the same batch on every rank).",
        epilog="example:\n  chainer-dist predict --workloads resnet50 --nodes 16 128 --networks '10 Gbit/s Ethernet'",
    )
    parser.add_argument(
        "--workloads",
        nargs="+",
        default=["mlp"],
        metavar="W",
        help="as for chainer-dist scale (default: mlp)",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="examples on each rank (default: the workload's)",
    )
    parser.add_argument(
        "--ranks-per-node", type=positive, metavar="R", help="ranks on each node (default: 1)"
    )
    parser.add_argument(
        "--nodes",
        type=positive,
        nargs="+",
        metavar="N",
        help="numbers of nodes (default: 1 2 4 16 64 128)",
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=NETWORKS,
        metavar="NAME",
        help=f"of {', '.join(NETWORKS)} (default: Ethernet of 1 and 10 Gbit/s)",
    )
    parser.add_argument(
        "--straggler",
        type=at_least_one,
        metavar="X",
        help="the first rank takes X times as long to compute (default: 1)",
    )
    parser.add_argument(
        "--jitter",
        type=percentage,
        metavar="PERCENT",
        help="what ranks compute takes so much more or less, by chance: the standard deviation "
        "(default: 0)",
    )
    parser.add_argument(
        "--oversubscription",
        type=at_least_one,
        metavar="X",
        help="the nodes share a link that is X times slower than theirs together (default: 1)",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="on 4 to 4096 ranks of nine kinds of clusters: "
        + ", ".join(scenario.name for scenario in REPORT).replace("%", "%%"),
    )
    parser.add_argument(
        "--actions",
        type=count,
        default=_ACTIONS,
        metavar="N",
        help="where a simulation would have more actions, give the closed form alone "
        f"(default: {_ACTIONS}, up to a minute)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help=f"write {FILE} and predictions.csv there; chainer-dist scale, with the same folder, has "
        "them on its page",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
