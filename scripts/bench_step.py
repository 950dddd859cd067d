#!/usr/bin/env python
"""Measure whole training steps: run it under ``mpiexec -n 2``.

An MLP of 22.6 million parameters (784, 6 x 2048, 10) is trained by Adam and by SGD. Contenders take
turns in one run, each with a model of its own on the same data; a turn takes as long as its slowest
rank. Beside chainer_dist stand ChainerMN's ``naive``, Chainer alone (every rank an independent copy
that exchanges nothing: what the machine can do without being parallel), and torch's
DistributedDataParallel on gloo where torch is installed. "rest" is the step less Chainer's own
forward and backward, which are measured in the same turns: the cost of exchange and update.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import time
import warnings
from typing import TYPE_CHECKING, Any

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from mpi4py import MPI

import chainer_dist

if TYPE_CHECKING:
    from collections.abc import Callable

    Step = Callable[[], None]

warnings.simplefilter("ignore")
WORLD = MPI.COMM_WORLD
FORWARD = "forward and backward"
PEER = "ChainerMN naive"
ALONE = "Chainer, independent"


class Classifier(chainer.ChainList):
    """A multilayer perceptron and its loss."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__(*[L.Linear(low, high) for low, high in zip(widths, widths[1:])])

    def forward(self, x: Any, t: Any) -> Any:
        """Return the loss."""
        *hidden, last = self
        for layer in hidden:
            x = F.relu(layer(x))
        return F.softmax_cross_entropy(last(x), t)


class Work:
    """A model's size, a batch of this rank's data, and an optimizer."""

    def __init__(self, optimizer: str, widths: list[int], batch: int) -> None:
        self.optimizer, self.widths = optimizer, widths
        rng = np.random.RandomState(WORLD.rank)
        self.x = rng.randn(batch, widths[0]).astype(np.float32)
        self.t = rng.randint(0, widths[-1], batch).astype(np.int32)

    def model(self) -> Classifier:
        """Return a model, the same on every rank and for every contender."""
        np.random.seed(0)  # noqa: NPY002 - what Chainer draws from
        return Classifier(self.widths)

    def make_optimizer(self) -> chainer.Optimizer:
        """Return the optimizer, of the same settings for every contender."""
        if self.optimizer == "Adam":
            return chainer.optimizers.Adam(alpha=1e-3)
        return chainer.optimizers.SGD(lr=1e-2)

    def chainer_step(self, wrap: Callable[[chainer.Optimizer], Any]) -> tuple[Step, Any]:
        """Return a step of an optimizer that ``wrap`` makes parallel, and the model."""
        model = self.model()
        optimizer = wrap(self.make_optimizer())
        optimizer.setup(model)
        return lambda: optimizer.update(model, self.x, self.t), model

    def forward_and_backward(self) -> Step:
        """Return what every Chainer contender has in common."""
        model = self.model()

        def step() -> None:
            loss = model(self.x, self.t)
            model.cleargrads()
            loss.backward()

        return step

    def torch_step(self, *, fused: bool) -> Step | None:
        """Return a step of torch DDP, or None without torch."""
        try:
            import torch
            import torch.distributed as dist
        except ImportError:
            return None
        if not dist.is_initialized():
            torch.set_num_threads(1)
            address = WORLD.bcast(f"tcp://127.0.0.1:{20000 + os.getpid() % 20000}")
            dist.init_process_group(
                "gloo", init_method=address, rank=WORLD.rank, world_size=WORLD.size
            )
        layers: list[Any] = []
        for low, high in zip(self.widths, self.widths[1:]):
            layers += [torch.nn.Linear(low, high), torch.nn.ReLU()]
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(*layers[:-1]))
        kind = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}[self.optimizer]
        optimizer = kind(model.parameters(), lr=1e-3, **({"fused": True} if fused else {}))
        x, t = torch.from_numpy(self.x), torch.from_numpy(self.t.astype(np.int64))

        def step() -> None:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), t).backward()
            optimizer.step()

        return step


def wrappers() -> dict[str, Callable[[chainer.Optimizer], Any]]:
    """Return what makes Chainer's optimizer that of each contender."""
    import chainermn

    naive = chainermn.create_communicator("naive")
    comm = chainer_dist.create_communicator()
    return {
        PEER: lambda optimizer: chainermn.create_multi_node_optimizer(optimizer, naive),
        "chainer_dist": lambda optimizer: chainer_dist.create_multi_node_optimizer(optimizer, comm),
        "chainer_dist, replicated": lambda optimizer: chainer_dist.create_multi_node_optimizer(
            optimizer, comm, sharded_update=False
        ),
        "chainer_dist, shared": lambda optimizer: chainer_dist.create_multi_node_optimizer(
            optimizer, comm, share_parameters=True
        ),
        ALONE: lambda optimizer: optimizer,
    }


def measure(work: Work, repeats: int) -> dict[str, float]:
    """Return the median step of each contender in milliseconds."""
    steps: dict[str, Step] = {}
    models = {}
    for name, wrap in wrappers().items():
        steps[name], models[name] = work.chainer_step(wrap)
    del models[ALONE]
    for name, fused in (("torch DDP gloo", False), ("torch DDP gloo, fused", True)):
        torch_step = work.torch_step(fused=fused)
        if torch_step is not None:
            steps[name] = torch_step
    steps[FORWARD] = work.forward_and_backward()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(3 + repeats):  # three to warm up
        for name, step in steps.items():
            WORLD.Barrier()
            started = time.perf_counter()
            step()
            seconds[name].append(WORLD.allreduce(time.perf_counter() - started, MPI.MAX))
    for name, model in models.items():
        for param, expected in zip(model.params(), models[PEER].params()):
            if not np.allclose(param.array, expected.array, rtol=1e-2, atol=1e-2):
                raise SystemExit(f"{name} has come to other parameters than {PEER}")
    return {name: statistics.median(values[3:]) * 1e3 for name, values in seconds.items()}


def main() -> None:
    """Measure each optimizer and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="steps of each (default: 15)")
    parser.add_argument("--batch", type=int, default=64, help="examples a rank (default: 64)")
    parser.add_argument(
        "--widths",
        type=int,
        nargs="+",
        default=[784, *[2048] * 6, 10],
        help="units of each layer, input first (default: the MLP of 22.6 M parameters)",
    )
    parser.add_argument("--optimizers", nargs="+", choices=("Adam", "SGD"), default=["Adam", "SGD"])
    args = parser.parse_args()
    for optimizer in args.optimizers:
        medians = measure(Work(optimizer, args.widths, args.batch), args.repeats)
        if WORLD.rank == 0:
            forward = medians.pop(FORWARD)
            print(f"\n{optimizer}, batch {args.batch} a rank, {WORLD.size} ranks")
            print(f"{FORWARD}: {forward:.1f} ms")
            print(f"{'':26} {'step, ms':>9} {'ChainerMN / it':>15} {'rest, ms':>9} {'ratio':>6}")
            peer = medians[PEER]
            for name, ms in medians.items():
                rest = ms - forward
                print(
                    f"{name:26} {ms:>9.1f} {peer / ms:>15.2f} {rest:>9.1f} "
                    f"{(peer - forward) / rest:>6.2f}"
                )


if __name__ == "__main__":
    main()
