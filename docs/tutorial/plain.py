"""Train a classifier of handwritten digits with plain Chainer."""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer.training import extensions
from sklearn.datasets import load_digits


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
    np.random.seed(0)
    train, validation = get_digits()

    model = make_model()
    optimizer = chainer.optimizers.Adam()
    optimizer.setup(model)

    train_iter = chainer.iterators.SerialIterator(train, 32)
    validation_iter = chainer.iterators.SerialIterator(validation, 256, repeat=False, shuffle=False)
    updater = chainer.training.updaters.StandardUpdater(train_iter, optimizer)
    trainer = chainer.training.Trainer(updater, (10, "epoch"), out="result")
    evaluator = extensions.Evaluator(validation_iter, model)
    trainer.extend(evaluator)
    trainer.extend(extensions.LogReport())
    trainer.extend(
        extensions.PrintReport(["epoch", "iteration", "main/loss", "validation/main/accuracy"])
    )
    trainer.run()


if __name__ == "__main__":
    main()
