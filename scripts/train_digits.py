#!/usr/bin/env python
"""Train a classifier of handwritten digits, on one process or on many.

    python scripts/train_digits.py                  # one process
    mpiexec -n 2 python scripts/train_digits.py     # two

This is an ordinary Chainer script. What makes it distributed is marked "distributed".
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer.training import extensions
from sklearn.datasets import load_digits

import chainer_dist

N_VALIDATION = 360  # of the 1,797 images
CURVES = {"main/accuracy": "training", "validation/main/accuracy": "validation"}


class MLP(chainer.Chain):
    """Two hidden layers."""

    def __init__(self, n_units: int = 256) -> None:
        """Create the layers; input sizes are found out in the first forward pass."""
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(None, n_units)
            self.l2 = L.Linear(None, n_units)
            self.l3 = L.Linear(None, 10)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        """Map images, (batch, 1, 8, 8) float32, to scores, (batch, 10) float32."""
        h = F.dropout(F.relu(self.l1(x)), 0.2)
        return self.l3(F.relu(self.l2(h)))


class CNN(chainer.Chain):
    """Two convolutions and two linear layers."""

    def __init__(self, n_classes: int = 10) -> None:
        """Create the layers."""
        super().__init__()
        with self.init_scope():
            self.c1 = L.Convolution2D(1, 32, 3, pad=1)
            self.c2 = L.Convolution2D(32, 64, 3, pad=1)
            self.l1 = L.Linear(None, 128)
            self.l2 = L.Linear(None, n_classes)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        """Map images, (batch, 1, 8, 8) float32, to scores, (batch, n_classes) float32."""
        h = F.relu(self.c1(x))
        h = F.max_pooling_2d(F.relu(self.c2(h)), 2)
        return self.l2(F.dropout(F.relu(self.l1(h)), 0.3))


def get_digits() -> tuple[chainer.datasets.TupleDataset, chainer.datasets.TupleDataset]:
    """Return scikit-learn's 8x8 images and their labels, for training and for validation."""
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    labels = digits.target.astype(np.int32)
    order = np.random.RandomState(0).permutation(len(labels))
    validation, train = order[:N_VALIDATION], order[N_VALIDATION:]
    return (
        chainer.datasets.TupleDataset(images[train], labels[train]),
        chainer.datasets.TupleDataset(images[validation], labels[validation]),
    )


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["mlp", "cnn"], default="mlp")
    parser.add_argument(
        "--communicator",
        choices=["auto", *chainer_dist.communicators.names()],
        default="auto",
        help="how gradients are averaged (default: auto)",
    )
    parser.add_argument("--epochs", type=int, default=25, help="default: 25")
    parser.add_argument("--batch-size", type=int, default=32, help="images a rank; default: 32")
    parser.add_argument("--out", type=Path, default=Path("result"), help="default: ./result")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--no-progress-bar", action="store_true")
    args = parser.parse_args()
    for name in ("epochs", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def label_axes(_figure: Any, axes: Any, _summary: Any) -> None:
    """Give the plot its title, and its axes and curves their names."""
    axes.set_title("Accuracy on handwritten digits, the mean of all ranks")
    axes.set_xlabel("epochs")
    axes.set_ylabel("images that are recognized, %")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share * 100:g}")
    for line in axes.get_lines():
        line.set_label(CURVES[line.get_label()])


def main() -> None:
    """Train, validate after each epoch, and say how well and how fast it went."""
    args = parse_args()
    comm = chainer_dist.create_communicator(args.communicator)  # distributed
    np.random.seed(args.seed + comm.rank)  # noqa: NPY002 - what Chainer draws from

    train, validation = get_digits() if comm.rank == 0 else (None, None)  # distributed
    train = chainer_dist.scatter_dataset(train, comm, shuffle=True, seed=args.seed)  # distributed
    validation = chainer_dist.scatter_dataset(  # distributed
        validation, comm, force_equal_length=False
    )

    model = L.Classifier(MLP() if args.model == "mlp" else CNN())
    optimizer = chainer.optimizers.Adam()
    optimizer = chainer_dist.create_multi_node_optimizer(optimizer, comm)  # distributed
    optimizer.setup(model)
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(1e-4))

    train_iter = chainer.iterators.SerialIterator(train, args.batch_size)
    validation_iter = chainer.iterators.SerialIterator(validation, 256, repeat=False, shuffle=False)
    updater = chainer.training.updaters.StandardUpdater(train_iter, optimizer)
    trainer = chainer.training.Trainer(updater, (args.epochs, "epoch"), out=str(args.out))

    evaluator = extensions.Evaluator(validation_iter, model)
    evaluator = chainer_dist.create_multi_node_evaluator(evaluator, comm)  # distributed
    trainer.extend(evaluator)

    log = extensions.LogReport()
    trainer.extend(log)
    trainer.extend(extensions.snapshot(n_retains=1), trigger=(args.epochs, "epoch"))
    columns = ["epoch", "main/loss", "validation/main/loss", "validation/main/accuracy"]
    trainer.extend(extensions.PrintReport(columns))
    trainer.extend(
        extensions.PlotReport([*CURVES], "epoch", postprocess=label_axes, filename="accuracy.png")
    )
    if not args.no_progress_bar:
        trainer.extend(extensions.ProgressBar(update_interval=20))
    chainer_dist.on_rank_zero(trainer, comm)  # distributed: one rank writes

    trainer.run()

    if comm.rank == 0:
        images = updater.iteration * args.batch_size * comm.size
        print(f"\nValidation accuracy: {log.log[-1]['validation/main/accuracy']:.2%}")
        print(f"Throughput: {images / trainer.elapsed_time:,.0f} images/s on {comm.size} rank(s)")
        print(f"Plot: {args.out / 'accuracy.png'}")


if __name__ == "__main__":
    main()
