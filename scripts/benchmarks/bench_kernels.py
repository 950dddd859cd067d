#!/usr/bin/env python
"""Measure forward and backward by Chainer's own code, by the kernels of chainer_dist, and by torch.

Run it without mpiexec. Each model has a process of its own, where the contenders take turns from the same parameters, step
by step, or with several threads for half a second each; what they compute is compared first. torch is measured with images
in both of its layouts, and counts as fast as the faster one. With ``--train`` it measures whole training steps with Adam on
ranks of MPI instead, exchange and update included: chainer_dist by each choice of kernels, and torch
DistributedDataParallel over gloo. With ``--hosts`` each rank is on a host of its own, all of which are made of this
machine, see netns_cluster.py.

Nothing else may run meanwhile: a thread whose core is taken keeps the others of its team waiting.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import bench_tables

sys.path.append(str(Path(__file__).resolve().parent.parent / "cluster"))
import netns_cluster

from chainer_dist._arguments import positive, seconds
from chainer_dist.scaling import contenders, experiment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from chainer_dist.scaling.experiment import Start

    # Returns the loss; gradients are in the model then.
    Step = Callable[[], float]

warnings.simplefilter("ignore")  # of Chainer, which is older than the NumPy it meets

MODELS = Path(__file__).with_name("kernel_models.py")
WORKS = ["mlp:64", "cnn:64", "resnet50:4", "resnet50:16", "vgg16:4", "mobilenet:16", "unet:4"]
WORKS += ["lstm:8", "lstm:64", "lstm_steps:8", "gru:8", "bilstm:32"]
WORKS += ["transformer:32", "transformer_large:8"]
# Its columns, and whether images are channels last.
TORCH = {"torch": False, "channels last": True}
WARM_UP = 1
LEAST_TURNS = 3
# Idle threads of a library keep their core for a while, OpenBLAS's for a tenth of a second, and would disturb the next.
PAUSE = 0.3
# After a pause a contender computes for so long, since a single step of several threads varies by a third.
TURN = 0.5
LOSS_TOLERANCE = 1e-4
# Where rounding lets another value of a window be the largest, or a value pass 0 in a ReLU, a gradient goes elsewhere;
# with batch normalization that comes to percents, for Chainer's own code as for the kernels.
GRADIENT_TOLERANCE = 0.2


class Work(NamedTuple):
    """A model to measure, written ``name:batch``."""

    name: str
    batch: int

    @classmethod
    def parse(cls, text: str) -> Work:
        """Return what is named on the command line."""
        name, colon, batch = text.partition(":")
        if name not in {each.partition(":")[0] for each in WORKS}:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(WORKS)}")
        if colon and not (batch.isdigit() and int(batch)):
            raise argparse.ArgumentTypeError(f"{text!r} has no number of examples from 1 up")
        return cls(name, int(batch) if colon else cls(name, 1).workload().batch)

    def path(self) -> str:
        """Return its name for chainer-dist scale."""
        from chainer_dist.scaling import workloads

        return self.name if self.name in workloads.WORKLOADS else f"{MODELS}:{self.name}"

    def workload(self) -> Any:
        """Return it as chainer-dist scale has it."""
        from chainer_dist.scaling import workloads

        return workloads.load(self.path())


def chainer_step(model: Any, arguments: Any, kernels: str) -> Step:
    """Return a forward and backward pass of Chainer, with a choice of kernels."""
    from chainer_dist.kernels import use

    def step() -> float:
        with use(kernels):
            loss = model(*arguments)
            model.cleargrads()
            loss.backward()
        return float(loss.array)

    return step


def torch_step(net: Any, arguments: Any, *, channels_last: bool) -> Step:
    """Return the same of torch."""
    import torch

    from chainer_dist.scaling import torch_models

    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    inputs = torch_models.tensors(arguments, channels_last=channels_last)

    def step() -> float:
        loss = net(*inputs)
        net.zero_grad()
        loss.backward()
        return float(loss.detach())

    return step


def measure(work: Work, threads: int, kernels: list[str], seconds: float) -> dict[str, Any]:
    """Return medians in ms, losses and numbers of parameters of each contender, in this process."""
    import numpy as np

    from chainer_dist import _allocator

    _allocator.keep_freed_memory()  # as on ranks; for all contenders

    workload = work.workload()
    np.random.seed(0)  # noqa: NPY002 - what Chainer draws from
    model, arguments = workload.make(work.batch, 0)
    steps: dict[str, Step] = {
        name: chainer_step(model, arguments, name) for name in dict.fromkeys(["chainer", *kernels])
    }
    parameters = {"chainer": model.count_params()}
    losses, gradients = {}, {}
    for name, step in steps.items():
        losses[name] = step()
        gradients[name] = np.concatenate([each.grad.ravel() for each in model.params()])
    if has_torch():
        import torch

        from chainer_dist.scaling import torch_models

        torch.set_num_threads(threads)
        for name, channels_last in TORCH.items():
            if channels_last and not workload.images:
                continue
            net = workload.torch()
            torch_models.copy_parameters(model, net)
            parameters["torch"] = sum(each.numel() for each in net.parameters())
            steps[name] = torch_step(net, arguments, channels_last=channels_last)
            losses[name] = steps[name]()
    error = compare(work, losses, gradients)

    taken: dict[str, list[float]] = {name: [] for name in steps}
    turns, ended = 0, time.monotonic() + seconds
    while turns < WARM_UP + LEAST_TURNS or time.monotonic() < ended:
        for name, step in steps.items():
            if threads > 1:
                time.sleep(PAUSE)
                step()  # in training no step follows a pause, after which threads sleep and caches are cold
            started = time.perf_counter()
            turn_ends = started + (TURN if threads > 1 else 0)
            while started <= turn_ends:
                step()
                before, started = started, time.perf_counter()
                taken[name].append(started - before)
        turns += 1
        if turns == WARM_UP:
            taken = {name: [] for name in steps}
            ended = time.monotonic() + seconds
    ms = {name: statistics.median(each) * 1e3 for name, each in taken.items()}
    return {"ms": ms, "loss": losses["chainer"], "error": error, "parameters": parameters}


def compare(work: Work, losses: Mapping[str, float], gradients: Mapping[str, Any]) -> float:
    """Return the largest error of gradients, relative to their norm; stop where contenders compute different things.

    Args:
        work: What they computed.
        losses: Of each contender.
        gradients: Of each choice of kernels, all in one array.
    """
    import numpy as np

    own = gradients["chainer"]
    for name, loss in losses.items():
        if not np.isclose(loss, losses["chainer"], rtol=LOSS_TOLERANCE):
            raise SystemExit(f"{work.name}: the loss is {losses['chainer']}, by {name} {loss}")
    errors = {
        name: float(np.linalg.norm(gradient - own) / np.linalg.norm(own))
        for name, gradient in gradients.items()
    }
    for name, error in errors.items():
        if not error < GRADIENT_TOLERANCE:
            raise SystemExit(f"{work.name}: gradients by {name} have an error of {error:.1%}")
    return max(errors.values())


def measure_alone(work: Work, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the same of a new process."""
    command = [sys.executable, __file__, "--work", f"{work.name}:{work.batch}"]
    command += ["--threads", str(threads), "--seconds", str(args.seconds), "--kernels"]
    environment = dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"], str(threads))
    done = subprocess.run(  # noqa: S603 - this script itself
        [*command, *args.kernels],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=args.timeout,
    )
    if done.returncode:
        raise SystemExit(f"{work.name}:{work.batch} ended with status {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def forward_and_backward(report: bench_tables.Report, args: argparse.Namespace) -> None:
    """Report a table for each number of threads."""
    more = {"loss": ".4f", "gradient error": ".0e", "parameters": ",d"}
    if has_torch():
        more["parameters of torch"] = ",d"
    for threads in args.threads:
        title = f"forward and backward, {threads} thread{'s' * (threads > 1)}; {described(args)}"
        table = report.table(title, {**columns(args.kernels), **more})
        for work in args.works:
            result = measure_alone(work, threads, args)
            counts = result["parameters"].values()
            checks = result["loss"], result["error"], *counts
            table.row(*cells(work, result["ms"], args.kernels), *checks)


def train(report: bench_tables.Report, args: argparse.Namespace) -> None:
    """Report a table of training steps, whose jobs are those of chainer-dist scale."""
    if not args.hosts:
        report_training(report, args, f"{args.ranks} ranks of one thread", None)
        return
    places = f"{args.hosts} hosts of one rank, {args.rate}"
    os.environ.update(experiment.environment())
    with netns_cluster.Cluster(args.hosts, rate=args.rate) as cluster:

        def start(program: Sequence[str]) -> subprocess.CompletedProcess[str]:
            return cluster.run(
                [sys.executable, *program],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=args.timeout,
            )

        report_training(report, args, places, start)


def report_training(
    report: bench_tables.Report,
    args: argparse.Namespace,
    places: str,
    start: Start | None,
) -> None:
    """Report a table of training steps of jobs that are started by a function, by default with chainer-dist run."""
    torches = dict(zip(TORCH, (contenders.TORCH, contenders.TORCH_CHANNELS_LAST)))
    kinds = {name: (contenders.OURS, name) for name in dict.fromkeys(["chainer", *args.kernels])}
    kinds.update({name: (contender, "chainer") for name, contender in torches.items()})
    table = report.table(f"training step, Adam, {places}; {described(args)}", columns(args.kernels))
    ranks = args.hosts or args.ranks
    for work in args.works:
        seconds: dict[str, list[float]] = {}
        for turn in range(args.rounds):
            for name, (contender, kernels) in kinds.items():
                if not contenders.available(contender, work.path()):
                    continue
                job = experiment.Job(
                    experiment.WEAK, work.path(), contender, ranks, work.batch, turn
                )
                plan = experiment.Plan(
                    workloads=[work.path()],
                    contenders=[contender],
                    ranks=[ranks],
                    more_ranks=[],
                    scalings=[experiment.WEAK],
                    batch=work.batch,
                    kernels=kernels,
                    rounds=args.rounds,
                    seconds=args.seconds,
                    steps=50,
                    accuracy=0,
                    places=[],
                    timeout=args.timeout,
                )
                result = experiment.run_job(job, plan, start)
                seconds.setdefault(name, []).extend(result["seconds"])
        ms = {name: statistics.median(each) * 1e3 for name, each in seconds.items()}
        table.row(*cells(work, ms, args.kernels))


def has_torch() -> bool:
    """Tell whether torch can be measured."""
    return importlib.util.find_spec("torch") is not None


def described(args: argparse.Namespace) -> str:
    """Return in words what the choices of kernels come to here."""
    from chainer_dist.kernels import status, use

    texts = []
    for name in args.kernels:
        with use(name):
            texts.append(f"{name} is {status().name}")
    return ", ".join(texts)


def columns(kernels: Iterable[str]) -> dict[str, str]:
    """Return headings and formats of the times and ratios of all contenders."""
    times = ["Chainer", *kernels, *(TORCH if has_torch() else ())]
    ratios = [f"{name} / torch" for name in ("Chainer", *kernels)] if has_torch() else []
    ratios += [f"Chainer / {name}" for name in kernels]
    return {
        "": "",
        **{f"{name}, ms": ".1f" for name in times},
        **dict.fromkeys(ratios, ".2f"),
    }


def cells(work: Work, ms: Mapping[str, float], kernels: Iterable[str]) -> list[Any]:
    """Return a row for :func:`columns`."""
    own = ["chainer", *kernels]
    row = [f"{work.name}, {work.batch}", *(ms[name] for name in own)]
    if has_torch():
        fastest = min(ms[name] for name in TORCH if name in ms)
        row += [*(ms.get(name) for name in TORCH), *(ms[name] / fastest for name in own)]
    return [*row, *(ms["chainer"] / ms[name] for name in kernels)]


def main() -> None:
    """Measure all works, each in processes of its own, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--works",
        nargs="+",
        type=Work.parse,
        default=[Work.parse(each) for each in WORKS],
        metavar="NAME[:BATCH]",
        help=f"of {', '.join(WORKS)}, or with other batches (default: all)",
    )
    parser.add_argument(
        "--kernels",
        nargs="+",
        choices=("auto", "numpy", "onednn"),
        default=["auto"],
        help="of chainer_dist, beside Chainer's own code (default: auto)",
    )
    parser.add_argument(
        "--threads", type=positive, nargs="+", default=[1, 2], help="(default: 1 2)"
    )
    parser.add_argument(
        "--seconds", type=seconds, default=5.0, help="time steps for so long (default: 5)"
    )
    parser.add_argument("--train", action="store_true", help="whole training steps on ranks")
    parser.add_argument("--ranks", type=positive, default=2, help="with --train (default: 2)")
    parser.add_argument(
        "--hosts",
        type=positive,
        help="with --train: one rank on each of so many hosts (default: all on one)",
    )
    parser.add_argument("--rate", default="10gbit", help="with --hosts (default: 10gbit)")
    parser.add_argument(
        "--rounds", type=positive, default=2, help="jobs of each, with --train (default: 2)"
    )
    parser.add_argument(
        "--timeout", type=seconds, default=1800.0, help="seconds for a process (default: 1800)"
    )
    parser.add_argument("--work", type=Work.parse, help="measure this one, in this process")
    bench_tables.add_option(parser)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(measure(args.work, args.threads[0], args.kernels, args.seconds)))
        return
    if not has_torch():
        print("torch is not installed, and has no columns: pip install torch==2.13.0")
    report = bench_tables.Report(args.json)
    try:
        (train if args.train else forward_and_backward)(report, args)
    except netns_cluster.UnavailableError as error:
        print(error)
        raise SystemExit(netns_cluster.CANNOT) from error
    report.write()


if __name__ == "__main__":
    main()
