#!/usr/bin/env python
"""Compare ways of compressing gradients: bytes on the network, and how well the model learns.

Run it on several nodes. MPICH can take the ranks of one machine for those of two::

    MPIR_CVAR_NUM_CLIQUES=2 mpiexec -n 2 python scripts/bench_compression.py

Each way trains the same perceptron on handwritten digits, from the same parameters, with several
seeds. Of the validation accuracies after the last epoch the mean over seeds is printed.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
from typing import TYPE_CHECKING, Any

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from train_digits import MLP, get_digits

import chainer_dist
from chainer_dist import compression

if TYPE_CHECKING:
    from collections.abc import Callable

WAYS: dict[str, Callable[[], compression.Compression | None]] = {
    "none": lambda: None,
    "Float16()": compression.Float16,
    "BFloat16()": compression.BFloat16,
    "Int8()": compression.Int8,
    "PowerSGD(rank=4)": lambda: compression.PowerSGD(rank=4),
    "PowerSGD(rank=2)": lambda: compression.PowerSGD(rank=2),
    "TopK(0.05)": lambda: compression.TopK(0.05),
    "TopK(0.01)": lambda: compression.TopK(0.01),
}


def train(
    comm: chainer_dist.CommunicatorBase,
    way: compression.Compression | None,
    seed: int,
    args: argparse.Namespace,
) -> tuple[float, float]:
    """Train once; return the validation accuracy and the bytes that a node sends in a step."""
    np.random.seed(seed)  # noqa: NPY002 - what Chainer draws from
    train_set, validation = get_digits()
    own = chainer_dist.scatter_dataset(train_set, comm, shuffle=True, seed=seed)
    model = L.Classifier(MLP(args.units))
    optimizer = chainer.optimizers.Adam()
    optimizer = chainer_dist.create_multi_node_optimizer(optimizer, comm, compression=way)
    optimizer.setup(model)
    batches = chainer.iterators.SerialIterator(own, args.batch_size)
    np.random.seed(1000 * seed + comm.rank)  # noqa: NPY002
    while batches.epoch < args.epochs:
        optimizer.update(model, *chainer.dataset.concat_examples(next(batches)))
    x, t = chainer.dataset.concat_examples(validation)
    with chainer.using_config("train", value=False), chainer.no_backprop_mode():
        accuracy = float(F.accuracy(model.predictor(x), t).array)
    n_bytes = sum(param.array.nbytes for param in model.params())
    nodes = comm.inter_size
    sent: Any = 2 * n_bytes * (nodes - 1) / nodes if way is None else way.sent
    return accuracy, comm.bcast_obj(sent)


def main() -> None:
    """Train each way and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20, help="default: 20")
    parser.add_argument("--batch-size", type=int, default=32, help="images a rank; default: 32")
    parser.add_argument("--units", type=int, default=256, help="of a layer; default: 256")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each; default: 3")
    args = parser.parse_args()
    comm = chainer_dist.create_communicator()
    if comm.inter_size == 1:
        raise SystemExit("nothing is compressed on one node: see --help")
    if comm.rank == 0:
        print(f"{comm.size} ranks on {comm.inter_size} nodes, {args.epochs} epochs")
        print(f"{'compression':20} {'bytes a step':>12} {'none / it':>10} {'accuracy':>9}")
    full = 0.0
    for name, make in WAYS.items():
        results = [train(comm, make(), seed, args) for seed in range(args.seeds)]
        accuracy = np.mean([accuracy for accuracy, _ in results])
        sent = results[0][1]
        full = full or sent
        if comm.rank == 0:
            print(f"{name:20} {sent:12,.0f} {full / sent:10.1f} {accuracy:9.2%}", flush=True)


if __name__ == "__main__":
    main()
