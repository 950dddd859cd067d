"""Time to accuracy: how long ranks take to classify handwritten digits as well as is asked for."""

from __future__ import annotations

import time
from typing import Any

RULES = (
    "each rank takes its own batch; the learning rate is that of one rank times their number, reached "
    "from a tenth of it over the first epochs (the linear scaling rule with gradual warm-up, Goyal et "
    "al., 2017); MomentumSGD, momentum 0.9; the time is that of training, without evaluation"
)
RATE, WARM_UP_EPOCHS, MOST_EPOCHS = 0.02, 2, 60
UNITS = 512


def train(batch: int, target: float, seed: int) -> dict[str, Any]:
    """Train until the validation accuracy is reached. Collective over all ranks.

    The data are scikit-learn's 1,797 images of 8 x 8, a fifth of them for validation.

    Args:
        batch: Images a rank.
        target: The accuracy, from 0 to 1.
        seed: Seed of the initial parameters and of the order of the images.

    Returns:
        ``seconds`` of training, ``epochs`` and ``updates`` that it took, and the accuracy it came to;
        ``reached`` is whether that is at least ``target``, which is given up after 60 epochs.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    import chainer
    import chainer.functions as F
    import chainer.links as L
    import numpy as np
    from mpi4py import MPI
    from sklearn.datasets import load_digits

    import chainer_dist

    np.random.seed(seed)  # noqa: NPY002 - what Chainer draws from
    comm = chainer_dist.create_communicator()
    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))
    x = (digits.data[order] / 16).astype(np.float32)
    t = digits.target[order].astype(np.int32)
    held_out = len(t) // 5
    validation = chainer_dist.scatter_dataset(
        chainer.datasets.TupleDataset(x[:held_out], t[:held_out]), comm, force_equal_length=False
    )
    training = chainer.datasets.TupleDataset(x[held_out:], t[held_out:])
    iterator = chainer_dist.iterators.DistributedIterator(training, batch, comm, seed=seed)

    model = L.Classifier(
        chainer.Sequential(
            L.Linear(64, UNITS), F.relu, L.Linear(UNITS, UNITS), F.relu, L.Linear(UNITS, 10)
        )
    )
    optimizer: Any = chainer.optimizers.MomentumSGD(RATE, momentum=0.9)
    optimizer = chainer_dist.create_multi_node_optimizer(optimizer, comm).setup(model)

    def evaluate() -> float:
        images, labels = chainer.dataset.concat_examples(validation[:])
        with chainer.using_config("train", value=False), chainer.no_backprop_mode():
            right = int((model.predictor(images).array.argmax(axis=1) == labels).sum())
        return int(comm.allreduce_obj(right)) / held_out

    seconds, accuracy, updates = 0.0, 0.0, 0
    while accuracy < target and iterator.epoch < MOST_EPOCHS:
        comm.mpi_comm.Barrier()
        started, epoch = time.perf_counter(), iterator.epoch
        while iterator.epoch == epoch:
            warm = min(1.0, 0.1 + 0.9 * iterator.epoch_detail / WARM_UP_EPOCHS)
            optimizer.lr = RATE * comm.size * warm
            optimizer.update(model, *chainer.dataset.concat_examples(iterator.next()))
            updates += 1
        seconds += comm.mpi_comm.allreduce(time.perf_counter() - started, MPI.MAX)
        accuracy = evaluate()
    return {
        "seconds": seconds,
        "epochs": iterator.epoch,
        "updates": updates,
        "accuracy": accuracy,
        "reached": accuracy >= target,
    }
