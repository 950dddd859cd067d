"""The tutorial's model and batches of its digits, for chainer-dist scale."""

from __future__ import annotations

import chainer
from distributed import get_digits, make_model


def make(batch, rank):
    """Return the model, and the images and labels of a rank's batch."""
    train, _ = get_digits()
    first = rank * batch % (len(train) - batch)
    return make_model(), chainer.dataset.concat_examples(train[first : first + batch])
