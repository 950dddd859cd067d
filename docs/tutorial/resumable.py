"""Train a classifier of handwritten digits on many ranks, interruptions allowed."""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer.training import extensions
from sklearn.datasets import load_digits

import chainer_dist


def get_digits():
    """Return 1,437 images to train on and 360 to validate with, and their labels."""
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    labels = digits.target.astype(np.int32)
    data = chainer.datasets.TupleDataset(images, labels)
    return chainer.datasets.split_dataset_random(data, 1437, seed=0)


def make_model():
    """Return a network of two convolutions, and its loss."""
    first = L.Convolution2D(1, 16, 3, pad=1)
    second = L.Convolution2D(16, 32, 3, pad=1)
    scores = L.Linear(32 * 8 * 8, 10)
    return L.Classifier(chainer.Sequential(first, F.relu, second, F.relu, scores))


def main():
    """Train, and validate after each epoch."""
    comm = chainer_dist.create_communicator()
    np.random.seed(comm.rank)
    train, validation = get_digits()
    validation = chainer_dist.scatter_dataset(validation, comm, force_equal_length=False)

    model = make_model()
    optimizer = chainer.optimizers.Adam()
    optimizer = chainer_dist.create_multi_node_optimizer(optimizer, comm)
    optimizer.setup(model)

    batch = 32 // comm.size
    train_iter = chainer_dist.iterators.DistributedIterator(train, batch, comm, seed=0)
    validation_iter = chainer.iterators.SerialIterator(
        validation, len(validation), repeat=False, shuffle=False
    )
    updater = chainer.training.updaters.StandardUpdater(train_iter, optimizer)
    trainer = chainer.training.Trainer(updater, (40, "epoch"), out="result")
    evaluator = extensions.Evaluator(validation_iter, model)
    evaluator = chainer_dist.create_multi_node_evaluator(evaluator, comm)
    trainer.extend(evaluator)
    columns = ["epoch", "iteration", "main/loss", "validation/main/accuracy"]
    trainer.extend(extensions.LogReport())
    trainer.extend(extensions.PrintReport(columns))
    chainer_dist.on_rank_zero(trainer, comm)
    checkpoint = chainer_dist.Checkpoint(comm, "checkpoints")
    trainer.extend(checkpoint, trigger=(20, "iteration"))
    iteration = checkpoint.resume(trainer)
    if comm.rank == 0:
        print(f"beginning at iteration {iteration}", flush=True)
    trainer.run()


if __name__ == "__main__":
    main()
