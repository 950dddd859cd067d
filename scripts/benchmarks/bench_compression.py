#!/usr/bin/env python
"""Compare ways of compressing gradients: bytes on the network, and how well the model learns.

Run it on several nodes. MPICH can take the ranks of one machine for those of two::

    MPIR_CVAR_NUM_CLIQUES=2 mpiexec -n 2 python scripts/benchmarks/bench_compression.py

Each way trains the same perceptron from the same parameters, with several seeds, by Adam; where it
does momentum itself by SGD, beside which stands MomentumSGD. Bytes are those that a node sends in a
step, on average over the whole training. Of the validation accuracies after the last epoch the mean
over seeds is printed. The task is handwritten digits, or with ``--task generated`` 20,000 points of
20 dimensions, whose 10 classes a random perceptron has chosen.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench_tables
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

import chainer_dist
from chainer_dist import compression

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from digits import MLP, get_digits

if TYPE_CHECKING:
    from collections.abc import Callable

ADAM = chainer.optimizers.Adam
WARMUP = 45  # updates: two of the digits' 20 epochs


def momentum_sgd() -> chainer.Optimizer:
    """Return an optimizer with momentum."""
    return chainer.optimizers.MomentumSGD(0.1, 0.9)


def sgd() -> chainer.Optimizer:
    """Return an optimizer for a way that does momentum."""
    return chainer.optimizers.SGD(0.1)


# How to compress, and with which optimizer.
Way = tuple["Callable[[], compression.Compression | None]", "Callable[[], chainer.Optimizer]"]
WAYS: dict[str, Way] = {
    "none": (lambda: None, ADAM),
    "Float16()": (compression.Float16, ADAM),
    "BFloat16()": (compression.BFloat16, ADAM),
    "Int8()": (compression.Int8, ADAM),
    "PowerSGD(rank=4)": (lambda: compression.PowerSGD(rank=4), ADAM),
    "PowerSGD(rank=2)": (lambda: compression.PowerSGD(rank=2), ADAM),
    "TopK(0.05)": (lambda: compression.TopK(0.05), ADAM),
    "TopK(0.01)": (lambda: compression.TopK(0.01), ADAM),
    f"TopK(0.01), warm-up {WARMUP}": (
        lambda: compression.TopK(0.01, warmup_updates=WARMUP),
        ADAM,
    ),
    "none, MomentumSGD": (lambda: None, momentum_sgd),
    "TopK(0.01), MomentumSGD": (lambda: compression.TopK(0.01), momentum_sgd),
    "TopK(0.01, momentum=0.9)": (lambda: compression.TopK(0.01, momentum=0.9), sgd),
    f"... momentum, warm-up {WARMUP}": (
        lambda: compression.TopK(0.01, momentum=0.9, warmup_updates=WARMUP),
        sgd,
    ),
}


def get_generated() -> tuple[chainer.datasets.TupleDataset, chainer.datasets.TupleDataset]:
    """Return random points and the classes that a random perceptron chooses, as digits are."""
    rng = np.random.RandomState(0)
    x = rng.randn(24_000, 20).astype(np.float32)
    hidden = np.maximum(x @ rng.randn(20, 16).astype(np.float32), 0)
    scores = hidden @ rng.randn(16, 10).astype(np.float32)
    t = (scores - scores.mean(axis=0)).argmax(axis=1).astype(np.int32)
    parts = [slice(0, 20_000), slice(20_000, None)]
    train_set, validation = [chainer.datasets.TupleDataset(x[part], t[part]) for part in parts]
    return train_set, validation


TASKS = {"digits": get_digits, "generated": get_generated}


def train(
    comm: chainer_dist.CommunicatorBase,
    way: compression.Compression | None,
    optimizer: chainer.Optimizer,
    seed: int,
    args: argparse.Namespace,
) -> tuple[float, float]:
    """Train once; return the validation accuracy and the bytes that a node sends in a step."""
    np.random.seed(seed)  # noqa: NPY002 - what Chainer draws from
    train_set, validation = TASKS[args.task]()
    own = chainer_dist.scatter_dataset(train_set, comm, shuffle=True, seed=seed)
    model = L.Classifier(MLP(args.units))
    optimizer = chainer_dist.create_multi_node_optimizer(optimizer, comm, compression=way)
    optimizer.setup(model)
    batches = chainer.iterators.SerialIterator(own, args.batch_size)
    np.random.seed(1000 * seed + comm.rank)  # noqa: NPY002
    sent = 0
    while batches.epoch < args.epochs:
        optimizer.update(model, *chainer.dataset.concat_examples(next(batches)))
        sent += 0 if way is None else way.sent
    x, t = chainer.dataset.concat_examples(validation)
    with chainer.using_config("train", value=False), chainer.no_backprop_mode():
        accuracy = float(F.accuracy(model.predictor(x), t).array)
    n_bytes = sum(param.array.nbytes for param in model.params())
    nodes = comm.inter_size
    mean: Any = 2 * n_bytes * (nodes - 1) / nodes if way is None else sent / optimizer.t
    return accuracy, comm.bcast_obj(mean)


def main() -> None:
    """Train each way and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, default="digits", help="default: digits")
    parser.add_argument("--epochs", type=int, default=20, help="default: 20")
    parser.add_argument("--batch-size", type=int, default=32, help="images a rank; default: 32")
    parser.add_argument("--units", type=int, default=256, help="of a layer; default: 256")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each; default: 3")
    parser.add_argument("--ways", default="", help="only those whose names have this in them")
    bench_tables.add_option(parser)
    args = parser.parse_args()
    comm = chainer_dist.create_communicator()
    if comm.inter_size == 1:
        raise SystemExit("nothing is compressed on one node: see --help")
    report = bench_tables.Report(args.json, ranks=comm.size, speaks=comm.rank == 0)
    table = report.table(
        f"{args.task}, {comm.size} ranks on {comm.inter_size} nodes, {args.epochs} epochs",
        {"compression": "", "bytes a step": ",.0f", "none / it": ".1f", "accuracy": ".2%"},
        label_width=26,
    )
    full = 0.0
    for name, (make, make_optimizer) in WAYS.items():
        if (
            full and args.ways.lower() not in name.lower()
        ):  # the first is what others are compared with
            continue
        results = [train(comm, make(), make_optimizer(), seed, args) for seed in range(args.seeds)]
        accuracy = np.mean([accuracy for accuracy, _ in results])
        sent = results[0][1]
        full = full or sent
        table.row(name, sent, full / sent, accuracy)
    report.write()


if __name__ == "__main__":
    main()
