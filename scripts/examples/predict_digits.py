#!/usr/bin/env python
"""Recognize digits with a trained model, on all ranks.

    mpiexec -n 2 python scripts/train_digits.py       # leaves result/snapshot_iter_...
    mpiexec -n 2 python scripts/examples/predict_digits.py --snapshot result/snapshot_iter_562

Without ``--snapshot`` it trains for a moment first. Results come back in the order of the images, or,
with ``--files``, each rank writes those that it has computed.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import chainer
import chainer.links as L
import numpy as np
from digits import CNN, MLP, get_digits
from example import make_parser, positive

import chainer_dist


def train(comm: chainer_dist.CommunicatorBase, model: Any, dataset: Any, epochs: int) -> None:
    """Train for a moment. Collective."""
    optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.Adam(), comm)
    optimizer.setup(model)
    own = chainer_dist.scatter_dataset(dataset, comm, shuffle=True, seed=0)
    batches = chainer.iterators.SerialIterator(own, 32)
    while batches.epoch < epochs:
        optimizer.update(model, *chainer.dataset.concat_examples(next(batches)))


def main() -> None:
    """Load or train a model, apply it to the validation set, and compare with the labels."""
    parser = make_parser(__doc__, batch_size=32)
    parser.add_argument("--model", choices=["mlp", "cnn"], default="mlp", help="default: mlp")
    parser.add_argument("--snapshot", type=Path, help="of train_digits.py with the same --model")
    parser.add_argument("--epochs", type=positive, default=5, help="without snapshot; default: 5")
    parser.add_argument("--files", type=Path, help="folder to write results to")
    args = parser.parse_args()
    comm = chainer_dist.create_communicator()
    np.random.seed(args.seed + comm.rank)  # noqa: NPY002 - what Chainer draws from

    training, validation = get_digits()
    images = [image for image, _ in validation]
    labels = np.array([label for _, label in validation])
    model = L.Classifier(MLP() if args.model == "mlp" else CNN())
    if args.snapshot is None:
        train(comm, model, training, args.epochs)
    else:
        chainer.serializers.load_npz(args.snapshot, model, path="updater/model:main/")

    began = time.perf_counter()
    scores = chainer_dist.predict(  # distributed
        model.predictor,
        images,
        comm,
        batchsize=args.batch_size,
        out=args.files,
        progress=not args.no_progress_bar,
    )
    seconds = time.perf_counter() - began
    if comm.rank == 0:
        if args.files is not None:
            rows = chainer_dist.datasets.FilesDataset(scores)
            scores = [row["output"] for row in rows]
        accuracy = (np.stack(scores).argmax(axis=1) == labels).mean()
        print(f"\nThroughput: {len(images) / seconds:,.0f} images/s on {comm.size} rank(s)")
        print(f"Validation accuracy: {accuracy:.2%}")


if __name__ == "__main__":
    main()
