#!/usr/bin/env python
"""Train on a folder of image files, as one trains on ImageNet: a sub-folder for each class.

    mpiexec -n 2 python scripts/examples/train_image_folder.py
    mpiexec -n 2 python scripts/examples/train_image_folder.py --images photos --size 64

Without ``--images`` handwritten digits are written as PNG files first. Every rank has the list of
files and opens those of its batches only: an epoch is one shuffled order for all ranks. Images are
read and augmented (cut out at random places, lighter or darker) in processes beside the ranks. As in
Goyal et al. (2017) the learning rate grows with the number of ranks, which make the batch larger,
and is reached step by step in the first epochs. Killed and started again, the training goes on.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer.training import extensions
from digits import get_digits
from example import add_reports, make_parser, positive
from PIL import Image

import chainer_dist

if TYPE_CHECKING:
    import argparse


class ConvNet(chainer.Sequential):
    """Convolutions until little is left of the picture, and the mean over that."""

    def __init__(self, n_classes: int, n_channels: int) -> None:
        """Create the layers."""
        convolutions: list[Any] = []
        for times in (1, 2, 4):
            convolutions += [
                L.Convolution2D(None, times * n_channels, 3, pad=1, nobias=True),
                L.BatchNormalization(times * n_channels),
                F.relu,
                functools.partial(F.max_pooling_2d, ksize=2),
            ]
        mean = functools.partial(F.mean, axis=(2, 3))
        super().__init__(*convolutions, mean, L.Linear(None, n_classes))


class ImageFiles(chainer.dataset.DatasetMixin):  # type: ignore[misc]
    """Files and their classes; workers get it pickled, and read the files."""

    def __init__(self, samples: list[tuple[Path, int]], size: int, *, augment: bool) -> None:
        """Remember what to do."""
        self.samples, self.size, self.augment = samples, size, augment

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.samples)

    def get_example(self, i: int) -> tuple[Any, Any]:
        """Return an image, (1, size, size) float32 around 0, and its class, int32."""
        path, label = self.samples[i]
        with Image.open(path) as file:
            larger = self.size + self.size // 4
            image = np.asarray(file.convert("L").resize((larger, larger)), np.float32)
        top = left = (larger - self.size) // 2
        if self.augment:
            top, left = np.random.randint(0, larger - self.size + 1, 2)  # noqa: NPY002 - seeded in each worker
            image = image * np.float32(np.random.uniform(0.7, 1.3))  # noqa: NPY002
        cut = image[top : top + self.size, left : left + self.size]
        return (cut[None] - 128) / 128, np.int32(label)


def write_digits(folder: Path) -> None:
    """Write scikit-learn's digits as PNG files: FOLDER/CLASS/NUMBER.png."""
    images, labels = zip(*(sample for part in get_digits() for sample in part))
    for number, (image, label) in enumerate(zip(images, labels)):
        path = folder / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).astype(np.uint8)).save(path)


def find_images(folder: Path) -> tuple[list[str], list[Any], list[Any]]:
    """Return names of classes, and files with their classes: four fifths for training, the rest."""
    classes = sorted(each.name for each in folder.iterdir() if each.is_dir())
    samples = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).iterdir())
    ]
    if not samples:
        raise SystemExit(f"{folder} has no sub-folders with images")
    samples = [samples[i] for i in np.random.RandomState(0).permutation(len(samples))]
    n_train = len(samples) * 4 // 5
    return classes, samples[:n_train], samples[n_train:]


def learning_rate(epoch: float, full: float, args: argparse.Namespace) -> float:
    """Return the rate after some epochs: warmed up to the full one, and slowly down to 0."""
    warm = min(1.0, epoch / args.warm_up)
    return (
        (args.rate + (full - args.rate) * warm)
        * 0.5
        * (1 + math.cos(math.pi * epoch / args.epochs))
    )


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__, epochs=8, batch_size=32, out=Path("result/image_folder"))
    parser.add_argument("--images", type=Path, help="folder; default: digits, in the --out folder")
    parser.add_argument("--size", type=positive, default=16, help="in pixels; default: 16")
    parser.add_argument(
        "--channels", type=positive, default=16, help="of the first layer; default: 16"
    )
    parser.add_argument("--workers", type=positive, default=1, help="processes a rank; default: 1")
    parser.add_argument("--rate", type=float, default=0.05, help="for one rank; default: 0.05")
    parser.add_argument("--warm-up", type=positive, default=2, help="epochs; default: 2")
    return parser.parse_args()


def main() -> None:
    """Train, validate after each epoch, and say how well it went."""
    args = parse_args()
    # Forked workers would have a copy of the rank's MPI.
    multiprocessing.set_start_method("forkserver")
    comm = chainer_dist.create_communicator()
    np.random.seed(args.seed + comm.rank)  # noqa: NPY002 - what Chainer draws from

    folder = args.images or args.out / "digits"
    if comm.rank == 0 and not folder.exists():  # distributed: one rank writes
        write_digits(folder)
    files = find_images(folder) if comm.rank == 0 else None
    classes, train_files, validation_files = comm.bcast_obj(files)  # distributed
    train = ImageFiles(train_files, args.size, augment=True)
    validation = chainer_dist.scatter_dataset(  # distributed: names of files, no images
        ImageFiles(validation_files, args.size, augment=False), comm, force_equal_length=False
    )

    model = L.Classifier(ConvNet(len(classes), args.channels))
    optimizer = chainer.optimizers.MomentumSGD(args.rate)
    optimizer = chainer_dist.create_multi_node_optimizer(optimizer, comm)  # distributed
    optimizer.setup(model)
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(1e-4))

    workers = functools.partial(
        chainer.iterators.MultiprocessIterator, n_processes=args.workers, n_prefetch=2
    )
    train_iter = chainer_dist.iterators.DistributedIterator(  # distributed
        train, args.batch_size, comm, seed=args.seed, make_iterator=workers
    )
    validation_iter = chainer.iterators.SerialIterator(validation, 256, repeat=False, shuffle=False)
    updater = chainer.training.updaters.StandardUpdater(train_iter, optimizer)
    trainer = chainer.training.Trainer(updater, (args.epochs, "epoch"), out=str(args.out))

    full = args.rate * comm.size  # distributed: the batch is that much larger

    @chainer.training.make_extension(trigger=(1, "iteration"))
    def set_learning_rate(trainer: Any) -> None:
        optimizer.lr = learning_rate(trainer.updater.epoch_detail, full, args)

    trainer.extend(set_learning_rate, name="learning rate")
    evaluator = extensions.Evaluator(validation_iter, model)
    evaluator = chainer_dist.create_multi_node_evaluator(evaluator, comm)  # distributed
    trainer.extend(evaluator)
    # Distributed: what batch normalization has seen on the ranks is averaged before each validation.
    trainer.extend(chainer_dist.extensions.AllreducePersistent(model, comm))
    columns = ["main/loss", "validation/main/loss", "validation/main/accuracy"]
    log = add_reports(trainer, comm, columns, columns[2:], args)
    checkpoint = chainer_dist.Checkpoint(comm, args.out / "checkpoints")  # distributed
    trainer.extend(checkpoint, trigger=(2, "epoch"))
    iteration = checkpoint.resume(trainer)  # after all extensions were added
    if comm.rank == 0 and iteration:
        print(f"Going on from iteration {iteration}", flush=True)

    trainer.run()
    train_iter.finalize()

    if comm.rank == 0:
        print(f"\nPlot: {args.out / 'plot.png'}")
        accuracy = log.log[-1]["validation/main/accuracy"]
        print(f"Validation accuracy: {accuracy:.2%} on {len(validation_files)} images")


if __name__ == "__main__":
    main()
