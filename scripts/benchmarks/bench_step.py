#!/usr/bin/env python
"""Measure whole training steps: run it without mpiexec, it starts the jobs itself.

An MLP of 22.6 million parameters (784, 6 x 2048, 10) is trained by Adam and by SGD. Each contender runs
in a job of its own, as its users would run it, because Python's memory is in another state where
several of them share a process; the jobs take turns, round after round. A step takes as long as its
slowest rank. Beside chainer_dist stand ChainerMN's ``naive``, Chainer alone (every rank an independent
copy that exchanges nothing: what the machine can do without being parallel), and torch's
DistributedDataParallel on gloo where torch is installed. Chainer and ChainerMN compute by Chainer's own code,
chainer_dist by its kernels. "rest" is a step less the contender's own forward and backward, measured alone: the cost
of exchange and update.
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
import warnings
from typing import TYPE_CHECKING, Any

import bench_tables
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    Step = Callable[[], None]

warnings.simplefilter("ignore")

WIDTHS = [784, *[2048] * 6, 10]
WARM_UP = 3
PEER = "ChainerMN naive"
ALONE = "Chainer, independent"
FORWARD = "forward and backward"
FORWARD_OF_CHAINER = "by Chainer's own code"
FORWARD_OF_TORCH = "by torch"
FORWARDS = (FORWARD, FORWARD_OF_CHAINER, FORWARD_OF_TORCH)
# What create_multi_node_optimizer is called with.
OURS: dict[str, dict[str, Any]] = {
    "chainer_dist": {},
    "chainer_dist, mean_grad": {"mean_grad": True},
    "chainer_dist, share_parameters": {"share_parameters": True},
    "chainer_dist, replicated": {"sharded_update": False},
}
TORCH = {"torch DDP gloo": False, "torch DDP gloo, fused": True}  # whether its update is fused


class Classifier(chainer.ChainList):
    """A multilayer perceptron and its loss."""

    def __init__(self) -> None:
        super().__init__(*[L.Linear(low, high) for low, high in zip(WIDTHS, WIDTHS[1:])])

    def forward(self, x: Any, t: Any) -> Any:
        """Return the loss."""
        *hidden, last = self
        for layer in hidden:
            x = F.relu(layer(x))
        return F.softmax_cross_entropy(last(x), t)


def make_step(contender: str, name: str, batch: int) -> tuple[Step, chainer.Link | None]:
    """Return what a contender does in a step, and its model if that is Chainer's. Collective.

    Chainer alone and ChainerMN compute by Chainer's own code, chainer_dist by its kernels.
    """
    from chainer_dist import kernels

    with kernels.use("auto" if contender in {FORWARD, *OURS} else "chainer"):
        chosen = kernels.status().name
    step, model = _make_step(contender, name, batch)

    def step_with_kernels() -> None:
        if kernels.status().name != chosen:
            kernels.use(chosen)
        step()

    return step_with_kernels, model


def _make_step(contender: str, name: str, batch: int) -> tuple[Step, chainer.Link | None]:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    rng = np.random.RandomState(world.rank)
    x = rng.randn(batch, WIDTHS[0]).astype(np.float32)
    t = rng.randint(0, WIDTHS[-1], batch).astype(np.int32)
    if contender in TORCH or contender == FORWARD_OF_TORCH:
        return torch_step(contender, name, x, t), None
    np.random.seed(0)  # noqa: NPY002 - what Chainer draws from
    model = Classifier()
    if contender in FORWARDS:

        def forward_and_backward() -> None:
            loss = model(x, t)
            model.cleargrads()
            loss.backward()

        return forward_and_backward, model
    optimizer: Any = {
        "Adam": lambda: chainer.optimizers.Adam(alpha=1e-3),
        "SGD": lambda: chainer.optimizers.SGD(lr=1e-2),
    }[name]()
    if contender == PEER:
        import chainermn

        comm = chainermn.create_communicator("naive")
        optimizer = chainermn.create_multi_node_optimizer(optimizer, comm)
    elif contender in OURS:
        import chainer_dist

        optimizer = chainer_dist.create_multi_node_optimizer(
            optimizer, chainer_dist.create_communicator(), **OURS[contender]
        )
    optimizer.setup(model)
    return lambda: optimizer.update(model, x, t), model


def torch_step(contender: str, name: str, x: Any, t: Any) -> Step:
    """Return a step of torch DDP, or forward and backward alone."""
    import torch

    from chainer_dist.scaling import torch_gloo, torch_models

    torch_gloo.connect()
    alone = contender == FORWARD_OF_TORCH
    model: Any = torch_models.MLP(WIDTHS)
    if not alone:
        model = torch.nn.parallel.DistributedDataParallel(model)
    kind = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}[name]
    options = {"fused": True} if TORCH.get(contender) else {}
    optimizer = kind(model.parameters(), lr=1e-3, **options)
    inputs = torch_models.tensors((x, t))

    def step() -> None:
        optimizer.zero_grad()
        model(*inputs).backward()
        if not alone:
            optimizer.step()

    return step


def run(contender: str, optimizer: str, batch: int, steps: int) -> None:
    """Be a rank of a contender's job; rank 0 prints the seconds of each step, and the outcome."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    step, model = make_step(contender, optimizer, batch)
    seconds = []
    for _ in range(WARM_UP + steps):
        world.Barrier()
        started = time.perf_counter()
        step()
        seconds.append(world.allreduce(time.perf_counter() - started, MPI.MAX))
    if world.rank == 0:
        norm = 0.0
        if model is not None:
            norm = sum(float(np.abs(p.array).sum(dtype=np.float64)) for p in model.params())
        print(json.dumps({"seconds": seconds[WARM_UP:], "norm": norm}), flush=True)
    world.Barrier()


def launch(script: str, ranks: int, *arguments: str) -> str:
    """Run a script under mpiexec and return what it prints."""
    from chainer_dist.launcher import mpi

    job = subprocess.run(  # noqa: S603 - this script itself
        [mpi.find().mpiexec, "-n", str(ranks), sys.executable, script, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    return job.stdout


def report_steps(report: bench_tables.Report, title: str, medians: dict[str, float]) -> None:
    """Report medians in milliseconds and ratios; the rest is a step less its own forward and backward."""
    forwards = {name: medians[name] for name in FORWARDS if name in medians}
    alone = ", ".join(f"{name} {ms:.1f} ms" for name, ms in forwards.items())
    table = report.table(
        f"{title}; {alone}",
        {
            "": "",
            "step, ms": ".1f",
            "ChainerMN / it": ".2f",
            "independent / it": ".2f",
            "rest, ms": ".1f",
            "rest, ChainerMN / it": ".2f",
        },
        label_width=31,
    )
    peer = medians[PEER]
    rest_of_peer = peer - forwards[FORWARD_OF_CHAINER]
    for contender, ms in medians.items():
        if contender in FORWARDS:
            continue
        own = FORWARD_OF_TORCH if contender in TORCH else FORWARD_OF_CHAINER
        rest = ms - forwards[FORWARD if contender in OURS else own]
        ratios = peer / ms, medians[ALONE] / ms
        table.row(contender, ms, *ratios, rest, rest_of_peer / rest)


def main() -> None:
    """Let the contenders take turns and report a table for each optimizer."""
    contenders = [PEER, *OURS, ALONE, FORWARD, FORWARD_OF_CHAINER]
    if importlib.util.find_spec("torch"):
        contenders += [FORWARD_OF_TORCH, *TORCH]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="(default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="jobs of each (default: 3)")
    parser.add_argument("--steps", type=int, default=10, help="steps of a job (default: 10)")
    parser.add_argument("--batch", type=int, default=64, help="examples a rank (default: 64)")
    parser.add_argument("--optimizers", nargs="+", choices=("Adam", "SGD"), default=["Adam", "SGD"])
    parser.add_argument("--contenders", nargs="+", choices=contenders, default=contenders)
    parser.add_argument("--contender", choices=contenders, help="be a rank of this one's job")
    bench_tables.add_option(parser)
    args = parser.parse_args()
    if args.contender:
        run(args.contender, args.optimizers[0], args.batch, args.steps)
        return
    report = bench_tables.Report(args.json)
    for optimizer in args.optimizers:
        seconds: dict[str, list[float]] = {}
        norms: dict[str, float] = {}
        for _ in range(args.rounds):
            needed = [PEER, ALONE, FORWARD, FORWARD_OF_CHAINER]
            if {*args.contenders} & {*TORCH}:
                needed.append(FORWARD_OF_TORCH)
            for contender in dict.fromkeys([*needed, *args.contenders]):
                rank = ["--contender", contender, "--optimizers", optimizer]
                rank += ["--batch", str(args.batch), "--steps", str(args.steps)]
                result = json.loads(launch(__file__, args.ranks, *rank))
                seconds.setdefault(contender, []).extend(result["seconds"])
                norms[contender] = result["norm"]
        for contender in {*norms} & {*OURS}:  # ChainerMN's first update updates nothing
            if not np.isclose(norms[contender], norms[PEER], rtol=1e-2):
                raise SystemExit(f"{contender} has come to other parameters than {PEER}: {norms}")
        medians = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
        title = f"{optimizer}, batch {args.batch} a rank, {args.ranks} ranks"
        report_steps(report, title, medians)
    report.write()


if __name__ == "__main__":
    main()
