#!/usr/bin/env python
"""Train one convolutional network whose filters are spread over the ranks.

    mpiexec -n 2 python scripts/examples/train_parallel_convolution.py

All ranks see the same images. Each computes its own part of the channels of a layer; the next layer
needs all of them, so that ranks gather them in between. Rank 0 classifies what the last layer found.
Gradients flow back through the gathering, and each rank updates its own filters.
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


class PartOfNetwork(chainer.Chain):
    """What one rank has of the network: some filters of each layer, and on rank 0 the classifier."""

    def __init__(self, comm: chainer_dist.CommunicatorBase, n_channels: int) -> None:
        """Create this rank's layers."""
        super().__init__()
        self.comm = comm
        edges = [n_channels * rank // comm.size for rank in range(comm.size + 1)]
        own_channels = edges[comm.rank + 1] - edges[comm.rank]
        with self.init_scope():
            self.c1 = L.Convolution2D(1, own_channels, 3, pad=1)
            self.c2 = L.Convolution2D(n_channels, own_channels, 3, pad=1)
            self.classifier = L.Linear(None, 10) if comm.rank == 0 else None

    def forward(self, x: Any) -> chainer.Variable:
        """Map images, (batch, 1, 8, 8) float32, to scores, (batch, 10) float32, on rank 0."""
        h = F.relu(self.c1(x))
        h = F.concat(chainer_dist.functions.allgather(self.comm, h), axis=1)
        h = F.max_pooling_2d(F.relu(self.c2(h)), 2)
        hs = chainer_dist.functions.gather(self.comm, h)
        if self.comm.rank > 0:
            return hs  # from which backward starts
        return self.classifier(F.dropout(F.concat(hs, axis=1), 0.3))

    def loss(self, x: Any, t: Any) -> chainer.Variable:
        """Return the loss on rank 0, and elsewhere what backward starts from."""
        y = self(x)
        return F.softmax_cross_entropy(y, t) if self.comm.rank == 0 else y


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels", type=int, default=64, help="of each layer; default: 64")
    parser.add_argument("--epochs", type=int, default=10, help="default: 10")
    parser.add_argument("--batch-size", type=int, default=64, help="default: 64")
    return parser.parse_args()


def main() -> None:
    """Train, and say how many digits of the validation set are recognized."""
    args = parse_args()
    comm = chainer_dist.create_communicator()
    np.random.seed(comm.rank)  # noqa: NPY002 - what Chainer draws from; ranks start unlike filters
    train, validation = get_digits()
    if comm.size > args.channels:
        raise SystemExit(f"{args.channels} channels cannot be spread over {comm.size} ranks")
    model = PartOfNetwork(comm, args.channels)
    optimizer = chainer.optimizers.Adam().setup(model)
    # The same batches on every rank: rank 0 draws them.
    batches = chainer_dist.iterators.create_multi_node_iterator(
        chainer.iterators.SerialIterator(train, args.batch_size), comm
    )
    while batches.epoch < args.epochs:
        optimizer.update(model.loss, *chainer.dataset.concat_examples(next(batches)))
        if batches.is_new_epoch:
            accuracy = validate(model, validation)
            if comm.rank == 0:
                print(f"epoch {batches.epoch}: validation accuracy {accuracy:.2%}", flush=True)
    if comm.rank == 0:
        print(f"\nValidation accuracy: {accuracy:.2%} with filters on {comm.size} rank(s)")


def validate(model: PartOfNetwork, dataset: Any) -> float:
    """Return the accuracy on rank 0, something else elsewhere. Collective."""
    x, t = chainer.dataset.concat_examples(dataset)
    with chainer.using_config("train", value=False), chainer.no_backprop_mode():
        y = model(x)
        return float(F.accuracy(y, t).array) if model.comm.rank == 0 else 0.0


if __name__ == "__main__":
    main()
