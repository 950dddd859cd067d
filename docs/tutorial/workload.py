"""What chainer-dist scale is to measure: the model of the tutorial, on batches of its digits."""

from __future__ import annotations

import chainer
from distributed import get_digits, make_model


def make(batch, rank):
    """Return a model, and the arguments with which model(*arguments) is the loss of this rank's batch."""
    train, _ = get_digits()
    first = rank * batch % (len(train) - batch)
    return make_model(), chainer.dataset.concat_examples(train[first : first + batch])
