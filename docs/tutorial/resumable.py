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
    """Return the images and labels to train on, and those to validate with."""
    digits = load_digits()
    images = (digits.data / 16).astype(np.float32)
    labels = digits.target.astype(np.int32)
    data = chainer.datasets.TupleDataset(images, labels)
    return chainer.datasets.split_dataset_random(data, 1437, seed=0)


def make_model():
    """Return a perceptron with two hidden layers, and its loss."""
    hidden = [L.Linear(64, 256), F.relu, L.Linear(256, 256), F.relu]
    return L.Classifier(chainer.Sequential(*hidden, L.Linear(256, 10)))


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

    train_iter = chainer_dist.iterators.DistributedIterator(train, 32, comm, seed=0)
    validation_iter = chainer.iterators.SerialIterator(validation, 256, repeat=False, shuffle=False)
    updater = chainer.training.updaters.StandardUpdater(train_iter, optimizer)
    trainer = chainer.training.Trainer(updater, (10, "epoch"), out="result")
    evaluator = extensions.Evaluator(validation_iter, model)
    evaluator = chainer_dist.create_multi_node_evaluator(evaluator, comm)
    trainer.extend(evaluator)
    if comm.rank == 0:
        trainer.extend(extensions.LogReport())
        trainer.extend(
            extensions.PrintReport(["epoch", "iteration", "main/loss", "validation/main/accuracy"])
        )
    checkpoint = chainer_dist.Checkpoint(comm, "checkpoints")
    trainer.extend(checkpoint, trigger=(20, "iteration"))
    iteration = checkpoint.resume(trainer)
    if comm.rank == 0:
        print(f"beginning at iteration {iteration}")
    trainer.run()


if __name__ == "__main__":
    main()
