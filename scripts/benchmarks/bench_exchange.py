#!/usr/bin/env python
"""Measure how long it takes to average gradients: run it under ``mpiexec -n 2``.

The mean is left in each rank's own gradients. Contenders take turns in one run, on new gradients
that are not in the cache; a turn takes as long as its slowest rank. Beside chainer_dist's
communicators stand ChainerMN's ``naive``, one MPI_Allreduce of a buffer into which all gradients
are packed, torch's gloo backend on such a buffer where torch is installed, and, as the floor of any
copy, one memcpy of the same size.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import time
import warnings
from typing import TYPE_CHECKING, Any

import bench_tables
import chainer
import numpy as np
from mpi4py import MPI

import chainer_dist

if TYPE_CHECKING:
    from collections.abc import Callable

warnings.simplefilter("ignore")
WORLD = MPI.COMM_WORLD


def resnet50() -> list[tuple[int, ...]]:
    """Return the shapes of the 161 parameters of ResNet-50, 25.6 million elements."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), (width,), (width,)]
            shapes += [(width, width, 3, 3), (width,), (width,)]
            shapes += [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


WORKS: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "resnet50": resnet50,
    "small": lambda: [(1000,)] * 1000,
    "mlp": lambda: [(784, 2048), (2048,), *[(2048, 2048), (2048,)] * 5, (2048, 10), (10,)],
}


def packed_allreduce(model: chainer.Link) -> Callable[[], None]:
    """Return the exchange as one writes it with mpi4py alone."""
    params = [param for _, param in sorted(model.namedparams())]
    buffer = np.empty(sum(param.size for param in params), dtype=np.float32)

    def exchange() -> None:
        np.concatenate([param.grad.reshape(-1) for param in params], out=buffer)
        WORLD.Allreduce(MPI.IN_PLACE, buffer)
        buffer[...] *= 1 / WORLD.size
        start = 0
        for param in params:
            param.grad.reshape(-1)[...] = buffer[start : start + param.size]
            start += param.size

    return exchange


def gloo(model: chainer.Link) -> Callable[[], None] | None:
    """Return the exchange through torch's gloo backend, or None without torch."""
    try:
        import torch
        import torch.distributed as dist
    except ImportError:
        return None
    from chainer_dist.scaling import torch_gloo

    torch_gloo.connect()
    params = [param for _, param in sorted(model.namedparams())]
    buffer = torch.empty(sum(param.size for param in params))

    def exchange() -> None:
        tensors = [torch.from_numpy(param.grad).view(-1) for param in params]
        torch.cat(tensors, out=buffer)
        dist.all_reduce(buffer)
        buffer.div_(WORLD.size)
        for tensor, part in zip(tensors, buffer.split([len(tensor) for tensor in tensors])):
            tensor.copy_(part)

    return exchange


def memcpy(model: chainer.Link) -> Callable[[], None]:
    """Return a copy of as many bytes as there are gradients."""
    source = np.ones(sum(param.size for param in model.params()), dtype=np.float32)
    target = np.zeros_like(source)
    return lambda: np.copyto(target, source)


def make_model(shapes: list[tuple[int, ...]]) -> chainer.Link:
    """Return a link with one float32 parameter of each shape."""
    model = chainer.Link()
    with model.init_scope():
        for number, shape in enumerate(shapes):
            setattr(model, f"p{number:04}", chainer.Parameter(np.zeros(shape, np.float32)))
    return model


def measure(shapes: list[tuple[int, ...]], repeats: int, comms: dict[str, Any]) -> dict[str, float]:
    """Return the median of each contender in milliseconds."""
    model = make_model(shapes)
    contenders: dict[str, Callable[[], None]] = {
        name: lambda comm=comm: comm.multi_node_mean_grad(model)  # type: ignore[misc]
        for name, comm in comms.items()
    }
    contenders["packed MPI_Allreduce"] = packed_allreduce(model)
    torch_exchange = gloo(model)
    if torch_exchange is not None:
        contenders["torch gloo, packed"] = torch_exchange
    contenders["memcpy"] = memcpy(model)
    params = list(model.params())
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(1 + repeats):
        for name, exchange in contenders.items():
            for number, param in enumerate(params):
                param.grad = np.full(param.shape, WORLD.rank + number, dtype=np.float32)
            np.zeros(16 << 20, np.int8).fill(1)  # push them out of the cache
            WORLD.Barrier()
            started = time.perf_counter()
            exchange()
            seconds[name].append(WORLD.allreduce(time.perf_counter() - started, MPI.MAX))
            if name != "memcpy":
                for number, param in enumerate(params):
                    want = number + (WORLD.size - 1) / 2
                    if not np.allclose(param.grad, want):
                        raise SystemExit(f"{name} is wrong at parameter {number}")
    return {name: statistics.median(values[1:]) * 1e3 for name, values in seconds.items()}


def main() -> None:
    """Measure each work and report a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="turns of each (default: 15)")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    bench_tables.add_option(parser)
    args = parser.parse_args()
    import chainermn

    report = bench_tables.Report(args.json, ranks=WORLD.size, speaks=WORLD.rank == 0)

    comms: dict[str, Any] = {"ChainerMN naive": chainermn.create_communicator("naive")}
    for name in chainer_dist.communicators.names():
        if name != "dummy":
            comms[name] = chainer_dist.create_communicator(name)
    for work in args.works:
        shapes = WORKS[work]()
        medians = measure(shapes, args.repeats, comms)
        elements = sum(int(np.prod(shape)) for shape in shapes) / 1e6
        table = report.table(
            f"{work}: {len(shapes)} arrays, {elements:.1f} M float32, {WORLD.size} ranks",
            {"": "", "ms": ".2f", "ChainerMN / it": ".2f"},
        )
        for name, ms in medians.items():
            table.row(name, ms, medians["ChainerMN naive"] / ms)
    report.write()


if __name__ == "__main__":
    main()
