#!/usr/bin/env python
"""Train on one task, save, and go on from there with another task and little data.

    python scripts/examples/train_fine_tuning.py                  # one process
    mpiexec -n 2 python scripts/examples/train_fine_tuning.py     # two

A network learns the digits 0 to 4 and is saved. For the digits 5 to 9, of which there are few images
(``--images``), it is loaded and its linear layers are replaced by new ones. These learn alone at
first, while the convolutions below are frozen; then all learn. Beside it the same network learns as
long from scratch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chainer
import chainer.links as L
import numpy as np
from chainer.training import extensions
from digits import CNN, get_digits
from example import add_reports, make_parser, positive

import chainer_dist


def get_task(digits: range, n_train: int | None = None) -> tuple[Any, Any]:
    """Return images of some digits and labels from 0 on, for training and for validation."""
    parts = [
        [(image, np.int32(label - digits[0])) for image, label in part if label in digits]
        for part in get_digits()
    ]
    return parts[0][:n_train], parts[1]


def train(
    comm: chainer_dist.CommunicatorBase, model: Any, task: Any, name: str, *, epochs: int, args: Any
) -> float:
    """Train a classifier, and return its accuracy on the task's validation set. Collective."""
    own, validation = (
        chainer_dist.scatter_dataset(part, comm, seed=args.seed, **options)  # distributed
        for part, options in zip(task, ({"shuffle": True}, {"force_equal_length": False}))
    )
    optimizer = chainer.optimizers.Adam()
    optimizer = chainer_dist.create_multi_node_optimizer(optimizer, comm)  # distributed
    optimizer.setup(model)
    updater = chainer.training.updaters.StandardUpdater(
        chainer.iterators.SerialIterator(own, max(1, args.batch_size // comm.size)), optimizer
    )
    trainer = chainer.training.Trainer(updater, (epochs, "epoch"), out=str(args.out / name))
    iterator = chainer.iterators.SerialIterator(validation, 256, repeat=False, shuffle=False)
    evaluator = extensions.Evaluator(iterator, model)
    evaluator = chainer_dist.create_multi_node_evaluator(evaluator, comm)  # distributed
    trainer.extend(evaluator)
    columns = ["main/loss", "validation/main/accuracy"]
    if comm.rank == 0:  # distributed: one rank writes
        print(f"\n{name}")
    add_reports(trainer, comm, columns, columns[1:], args)
    trainer.run()
    return float(evaluator()["validation/main/accuracy"])


def main() -> None:
    """Train three times, and compare."""
    parser = make_parser(__doc__, epochs=20, out=Path("result/fine_tuning"))
    parser.add_argument("--batch-size", type=positive, default=10, help="of all ranks; default: 10")
    parser.add_argument("--images", type=positive, default=60, help="of digits 5 to 9; default: 60")
    parser.add_argument(
        "--frozen-epochs", type=positive, default=3, help="of the new layers alone; default: 3"
    )
    parser.add_argument(
        "--tuned-epochs", type=positive, default=2, help="of all layers after that; default: 2"
    )
    args = parser.parse_args()
    comm = chainer_dist.create_communicator()
    np.random.seed(args.seed + comm.rank)  # noqa: NPY002 - what Chainer draws from

    snapshot = args.out / "digits_0_to_4.npz"
    model = L.Classifier(CNN(n_classes=5))
    train(comm, model, get_task(range(5)), "digits 0 to 4", epochs=args.epochs, args=args)
    if comm.rank == 0:  # distributed: one rank writes
        chainer.serializers.save_npz(snapshot, model)
    comm.mpi_comm.Barrier()  # distributed: the others read it only then

    few = get_task(range(5, 10), args.images)
    tuned = L.Classifier(CNN(n_classes=5))
    chainer.serializers.load_npz(snapshot, tuned)
    tuned.predictor.l1, tuned.predictor.l2 = L.Linear(None, 128), L.Linear(None, 5)
    tuned.predictor.c1.disable_update()
    tuned.predictor.c2.disable_update()
    train(comm, tuned, few, "digits 5 to 9, new layers", epochs=args.frozen_epochs, args=args)
    tuned.enable_update()
    fine_tuned = train(
        comm, tuned, few, "digits 5 to 9, all layers", epochs=args.tuned_epochs, args=args
    )

    fresh = L.Classifier(CNN(n_classes=5))
    epochs = args.frozen_epochs + args.tuned_epochs
    from_scratch = train(comm, fresh, few, "digits 5 to 9, from scratch", epochs=epochs, args=args)
    if comm.rank == 0:
        print(f"\nPlots: {args.out}/*/plot.png")
        print(
            f"Validation accuracy: {fine_tuned:.2%} fine-tuned, {from_scratch:.2%} from scratch, "
            f"on {len(few[0])} images"
        )


if __name__ == "__main__":
    main()
