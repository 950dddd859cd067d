"""The command line of ``chainer-dist scale``."""

from __future__ import annotations

import shlex
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from chainer_dist import kernels
from chainer_dist._arguments import percentage, positive, seconds
from chainer_dist.launcher.options import Parser
from chainer_dist.scaling import experiment, page, predicted, results
from chainer_dist.scaling.contenders import CONTENDERS
from chainer_dist.scaling.workloads import WORKLOADS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["main"]

_USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line says, and report it. Local; starts jobs.

    Args:
        arguments: Arguments without the program's name; by default the arguments of this process.

    Returns:
        The exit status: 1 if something fails, 2 if the call is wrong.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    args = parser.parse_args(arguments)
    places = []
    for name in ("hosts", "hostfile", "address"):
        if getattr(args, name):
            places += [f"--{name}", getattr(args, name)]
    here = not (args.hosts or args.hostfile)
    cores = experiment.n_cores() if here else None
    ranks = sorted({1, *args.ranks})
    if cores is not None and ranks[-1] > cores and not args.oversubscribe:
        parser.error(
            f"{ranks[-1]} ranks are more than this machine's {cores} cores, and would measure how they "
            "wait for one another; --oversubscribe does it all the same, and marks them"
        )
    more = sorted({*args.more_ranks})
    if more and more[0] <= ranks[-1]:
        parser.error(f"--more-ranks {more[0]} is not more than --ranks {ranks[-1]}")
    plan = experiment.Plan(
        workloads=list(dict.fromkeys(args.workloads)),
        contenders=list(dict.fromkeys(args.contenders)),
        ranks=ranks,
        more_ranks=more,
        scalings=list(dict.fromkeys(args.scaling)),
        batch=args.batch,
        kernels=args.kernels,
        rounds=args.rounds,
        seconds=args.seconds,
        steps=args.steps,
        accuracy=args.accuracy / 100,
        places=places,
        timeout=args.timeout,
    )
    try:
        missing = experiment.needed(plan)
        if missing:
            parser.error(
                f"not installed: {'; '.join(missing)}; pip install 'chainer_dist[scaling]'"
            )
        if all(job.kind == experiment.ACCURACY for job in experiment.jobs(plan)):
            parser.error(
                f"{', '.join(plan.contenders)} cannot train {', '.join(plan.workloads)}: torch is not installed, or "
                "the workload has no attribute torch, or for torch-channels-last no true attribute images"
            )
        for sentence in experiment.left_out(plan):
            sys.stderr.write(f"{parser.prog}: {sentence}\n")
        return _measure(plan, args, cores, arguments)
    except (OSError, ValueError, RuntimeError) as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(
            f"{parser.prog}: stopped; the same command goes on with what is missing in {args.out}\n"
        )
        return 130


def _measure(
    plan: experiment.Plan, args: argparse.Namespace, cores: int | None, arguments: Sequence[str]
) -> int:
    folder: Path = args.out
    if args.restart:
        (folder / experiment.RUNS).unlink(missing_ok=True)
    machine = experiment.machine()
    predictions = predicted.section(folder)  # now, as it may be none of ours
    found = experiment.run(plan, folder)
    rows, accuracies = results.rows(found, cores), results.accuracy_rows(found)
    parts = results.parts(found)
    command = shlex.join(["chainer-dist", "scale", *arguments])
    content = {
        "command": command,
        "machine": machine,
        "plan": plan._asdict(),
        "rows": [row._asdict() for row in rows],
        "accuracy": accuracies,
        "parts": [
            {"kind": kind, "workload": workload, "ranks": ranks, "seconds": seconds}
            for (kind, workload, ranks), seconds in parts.items()
        ],
        # What the choice came to, of the contenders that compute by Chainer.
        "kernels": {
            job.contender: each["kernels"] for job, each in found.items() if "kernels" in each
        },
        "model": {
            job.workload: {"parameters": each["parameters"], "bytes": each["bytes"]}
            for job, each in found.items()
            if each.get("parameters")
        },
    }
    results.write_json(folder / "scaling.json", content)
    results.write_csv(folder / "scaling.csv", rows)
    page.write(
        folder / "index.html",
        rows=rows,
        accuracies=accuracies,
        parts=parts,
        machine=machine,
        command=command,
        predicted=predictions,
    )
    sys.stdout.write(results.table(rows, accuracies))
    sys.stdout.write(f"\nPage: {folder / 'index.html'}\n")
    return 0


def _parser() -> Parser:
    workloads = "\n".join(
        textwrap.fill(f"{name}: {each.text}", initial_indent="  ", subsequent_indent="    ")
        for name, each in WORKLOADS.items()
    )
    own = textwrap.fill(
        "file.py:function, a function of the number of examples and the rank that returns a model and the "
        "arguments it is called with for its loss. The function may have attributes: batch, the number of examples "
        "by default; torch, a function without arguments that returns the same model as a torch module, called with "
        "tensors for its loss; images, true if it takes arrays (N, C, H, W), which torch may keep channels last",
        initial_indent="  ",
        subsequent_indent="    ",
    )
    parser = Parser(
        prog="chainer-dist scale",
        description="Measure how training scales over ranks, beside ChainerMN, raw MPI, torch DDP and\n"
        "independent copies. Writes scaling.json, scaling.csv and index.html.",
        epilog=f"workloads:\n{workloads}\n{own}\n\n"
        "examples:\n"
        "  chainer-dist scale --ranks 1 2 --workloads lstm\n"
        "  chainer-dist scale --ranks 1 8 --hosts node1:4,node2:4 --workloads my_model.py:make",
    )
    parser.add_argument(
        "--ranks",
        type=positive,
        nargs="+",
        metavar="N",
        default=[1, 2],
        help="numbers of ranks; 1 is always among them (default: 1 2)",
    )
    parser.add_argument(
        "--workloads",
        nargs="+",
        default=["mlp", "cnn"],
        metavar="W",
        help="what is trained; see below (default: mlp cnn)",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=[*CONTENDERS],
        metavar="C",
        help=f"of {', '.join(CONTENDERS)} (default: all)",
    )
    parser.add_argument(
        "--scaling",
        nargs="+",
        choices=(experiment.WEAK, experiment.STRONG),
        default=[experiment.WEAK, experiment.STRONG],
        metavar="S",
        help="weak: the same batch on each rank; strong: one batch divided by the ranks (default: both)",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="examples on each rank, and in strong scaling on one rank (default: the workload's)",
    )
    parser.add_argument(
        "--kernels",
        choices=kernels.CHOICES,
        metavar="K",
        default=kernels.asked_for(),
        help=f"of {', '.join(kernels.CHOICES)}: what computes forward and backward of chainer_dist and of independent copies; ChainerMN and allreduce have "
        "Chainer's own code, as their users do (default: as the environment asks for, now %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=positive, metavar="N", default=3, help="jobs of each kind (default: 3)"
    )
    parser.add_argument(
        "--seconds",
        type=seconds,
        metavar="S",
        default=3.0,
        help="for how long each job times its steps (default: 3)",
    )
    parser.add_argument(
        "--steps", type=positive, metavar="N", default=50, help="steps at most (default: 50)"
    )
    parser.add_argument(
        "--accuracy",
        type=percentage,
        default=97.0,
        metavar="PERCENT",
        help="train digits to this validation accuracy; 0 leaves that out (default: 97)",
    )
    parser.add_argument(
        "--oversubscribe", action="store_true", help="allow more ranks than cores, and mark them"
    )
    parser.add_argument(
        "--more-ranks",
        type=positive,
        nargs="+",
        metavar="N",
        default=[],
        help="for orientation also so many ranks, even if they are more than cores: of chainer_dist and "
        "independent copies, once (default: none)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("scaling"),
        help="folder of the results (default: ./scaling)",
    )
    parser.add_argument(
        "--restart", action="store_true", help="forget what the folder has, and begin anew"
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        metavar="S",
        default=300.0,
        help="seconds that a job may take (default: 300)",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hosts", metavar="A:2,B:2", help="as for chainer-dist run")
    where.add_argument("--hostfile", metavar="FILE", help="as for chainer-dist run")
    parser.add_argument("--address", metavar="NAME", help="as for chainer-dist run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
