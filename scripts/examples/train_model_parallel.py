#!/usr/bin/env python
"""Train a network whose layers are on different ranks, as one pipeline or as several replicas of it.

    mpiexec -n 2 python scripts/examples/train_model_parallel.py                       # one network on two ranks
    mpiexec -n 4 python scripts/examples/train_model_parallel.py --ranks-per-model 2   # two replicas of it

Each batch goes through the ranks in pieces (micro-batches), so that they compute at the same time.
Replicas train on parts of the data, and average the gradients of each layer.
"""

from __future__ import annotations

import argparse
from typing import Any

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from digits import get_digits

import chainer_dist


class Layers(chainer.Chain):
    """One rank's share of the hidden layers; on the last rank the output layer as well."""

    def __init__(self, n_hidden: int, n_units: int, *, is_last: bool) -> None:
        """Create the layers; input sizes are found out in the first forward pass."""
        super().__init__()
        with self.init_scope():
            self.hidden = chainer.ChainList(*[L.Linear(None, n_units) for _ in range(n_hidden)])
            self.output = L.Linear(None, 10) if is_last else None

    def forward(self, h: Any) -> chainer.Variable:
        """Map images or activations, (batch, ...) float32, to activations or scores."""
        for layer in self.hidden:
            h = F.relu(layer(h))
        return h if self.output is None else self.output(h)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks-per-model", type=int, help="default: all of them")
    parser.add_argument("--micro-batches", type=int, default=4, help="default: 4")
    parser.add_argument("--epochs", type=int, default=10, help="default: 10")
    parser.add_argument("--batch-size", type=int, default=64, help="a replica; default: 64")
    parser.add_argument("--layers", type=int, default=4, help="hidden layers; default: 4")
    parser.add_argument("--units", type=int, default=256, help="of each; default: 256")
    return parser.parse_args()


def main() -> None:
    """Train, and say how many digits of the validation set are recognized."""
    args = parse_args()
    world = chainer_dist.create_communicator()
    n_stages = args.ranks_per_model or world.size
    if world.size % n_stages:
        raise SystemExit(f"{world.size} ranks cannot be shared out to models of {n_stages}")
    replica, stage = divmod(world.rank, n_stages)
    pipeline = world.split(replica, world.rank)  # the ranks of one network
    replicas = world.split(stage, world.rank)  # the ranks with the same layers
    np.random.seed(stage)  # noqa: NPY002 - what Chainer draws from

    model = chainer_dist.MultiNodeChainList(pipeline, n_micro_batches=args.micro_batches)
    is_first, is_last = stage == 0, stage == n_stages - 1
    n_hidden = args.layers * (stage + 1) // n_stages - args.layers * stage // n_stages
    model.add_link(
        Layers(n_hidden, args.units, is_last=is_last),
        rank_in=None if is_first else stage - 1,
        rank_out=None if is_last else stage + 1,
    )

    def loss(x: Any, t: Any) -> chainer.Variable:
        y = model(x)
        return F.softmax_cross_entropy(y, t) if is_last else y

    optimizer = chainer.optimizers.Adam()
    optimizer = chainer_dist.create_multi_node_optimizer(optimizer, replicas).setup(model)
    train, validation = get_digits()
    # A part of the data for each replica; of one replica all ranks draw the same batches.
    train = chainer_dist.scatter_dataset(train, replicas, shuffle=True, seed=0)
    batches = chainer_dist.iterators.create_multi_node_iterator(
        chainer.iterators.SerialIterator(train, args.batch_size), pipeline
    )
    accuracy = 0.0
    while batches.epoch < args.epochs:
        optimizer.update(loss, *chainer.dataset.concat_examples(next(batches)))
        if batches.is_new_epoch:
            x, t = chainer.dataset.concat_examples(validation)
            with chainer.using_config("train", value=False), chainer.no_backprop_mode():
                y = model(x)
            if is_last and replica == 0:
                accuracy = float(F.accuracy(y, t).array)
                print(f"epoch {batches.epoch}: validation accuracy {accuracy:.2%}", flush=True)
    if is_last and replica == 0:
        print(
            f"\nValidation accuracy: {accuracy:.2%} with {world.size // n_stages} model(s) "
            f"on {n_stages} rank(s) each"
        )


if __name__ == "__main__":
    main()
