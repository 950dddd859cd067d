"""Train a classifier of handwritten digits with plain Chainer."""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer.training import extensions
from sklearn.datasets import load_digits


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
    np.random.seed(0)
    train, validation = get_digits()

    model = make_model()
    optimizer = chainer.optimizers.Adam()
    optimizer.setup(model)

    train_iter = chainer.iterators.SerialIterator(train, 32)
    validation_iter = chainer.iterators.SerialIterator(
        validation, len(validation), repeat=False, shuffle=False
    )
    updater = chainer.training.updaters.StandardUpdater(train_iter, optimizer)
    trainer = chainer.training.Trainer(updater, (10, "epoch"), out="result")
    evaluator = extensions.Evaluator(validation_iter, model)
    trainer.extend(evaluator)
    columns = ["epoch", "iteration", "main/loss", "validation/main/accuracy"]
    trainer.extend(extensions.LogReport())
    trainer.extend(extensions.PrintReport(columns))
    trainer.run()


if __name__ == "__main__":
    main()
