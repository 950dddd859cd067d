#!/usr/bin/env python
"""Train a classifier of handwritten digits that goes on after whatever has ended it.

    mpiexec -n 2 python scripts/examples/train_resumable.py

Interrupt it, kill it, and start it again, on as many processes or on others: it goes on from the newest
checkpoint. On as many the result is, to the last bit, that of a training without interruption. On
SIGTERM it saves first, and leaves with status 75.

What is more than in train_digits.py is marked "resumable".
"""

from __future__ import annotations

import argparse
from pathlib import Path

import chainer
import chainer.links as L
import numpy as np
from chainer.training import extensions
from digits import MLP, get_digits

import chainer_dist


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=25, help="default: 25")
    parser.add_argument("--batch-size", type=int, default=32, help="images a rank; default: 32")
    parser.add_argument("--every", type=int, default=50, help="iterations; default: 50")
    parser.add_argument("--keep", type=int, default=3, help="checkpoints; default: 3")
    parser.add_argument(
        "--out", type=Path, default=Path("result/resumable"), help="default: result/resumable"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args()
    for name in ("epochs", "batch_size", "every", "keep"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def main() -> None:
    """Train, saving now and then, and say how well it went."""
    args = parse_args()
    comm = chainer_dist.create_communicator()
    np.random.seed(args.seed + comm.rank)  # noqa: NPY002 - what Chainer draws from

    train, validation = get_digits()
    validation = chainer_dist.scatter_dataset(validation, comm, force_equal_length=False)

    model = L.Classifier(MLP())
    optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.Adam(), comm)
    optimizer.setup(model)

    # Resumable: of this iterator each epoch is exact on another number of processes, too.
    train_iter = chainer_dist.iterators.DistributedIterator(
        train, args.batch_size, comm, seed=args.seed
    )
    validation_iter = chainer.iterators.SerialIterator(validation, 256, repeat=False, shuffle=False)
    updater = chainer.training.updaters.StandardUpdater(train_iter, optimizer)
    trainer = chainer.training.Trainer(updater, (args.epochs, "epoch"), out=str(args.out))

    evaluator = extensions.Evaluator(validation_iter, model)
    trainer.extend(chainer_dist.create_multi_node_evaluator(evaluator, comm))
    log = extensions.LogReport()
    trainer.extend(log)
    columns = ["epoch", "main/loss", "validation/main/loss", "validation/main/accuracy"]
    trainer.extend(extensions.PrintReport(columns))
    chainer_dist.on_rank_zero(trainer, comm)

    folder = args.out / "checkpoints"
    checkpoint = chainer_dist.Checkpoint(comm, folder, keep=args.keep)  # resumable
    trainer.extend(checkpoint, trigger=(args.every, "iteration"))  # resumable
    iteration = checkpoint.resume(trainer)  # resumable: after all extensions were added
    if comm.rank == 0:
        print(f"Beginning at iteration {iteration}", flush=True)

    trainer.run()

    if comm.rank == 0:
        print(f"\nValidation accuracy: {log.log[-1]['validation/main/accuracy']:.2%}")


if __name__ == "__main__":
    main()
