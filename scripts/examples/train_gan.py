#!/usr/bin/env python
"""Train a generative adversarial network on handwritten digits: two models, two optimizers.

    python scripts/examples/train_gan.py                  # one process
    mpiexec -n 2 python scripts/examples/train_gan.py     # two, each with its part of the images

A small DCGAN (Radford et al., 2015) whose batch normalization spans all ranks. How alike drawn and
real images are is told by the Frechet distance of their pixels, which is 0 for equal mean and
covariance.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer.training import extensions
from digits import get_digits

import chainer_dist

N_LATENT = 32


class Generator(chainer.Sequential):
    """Maps latent vectors, (batch, 32) float32, to images, (batch, 1, 8, 8) float32 in [0, 1]."""

    def __init__(self) -> None:
        """Create the layers."""
        super().__init__(
            L.Linear(N_LATENT, 64 * 2 * 2),
            functools.partial(F.reshape, shape=(-1, 64, 2, 2)),
            L.BatchNormalization(64),
            F.relu,
            L.Deconvolution2D(64, 32, 4, stride=2, pad=1),
            L.BatchNormalization(32),
            F.relu,
            L.Deconvolution2D(32, 1, 4, stride=2, pad=1),
            F.sigmoid,
        )


class Discriminator(chainer.Sequential):
    """Maps images to scores, (batch, 1) float32, high for those it takes to be real."""

    def __init__(self) -> None:
        """Create the layers."""
        super().__init__(
            L.Convolution2D(1, 32, 4, stride=2, pad=1),
            F.leaky_relu,
            L.Convolution2D(32, 64, 4, stride=2, pad=1),
            L.BatchNormalization(64),
            F.leaky_relu,
            L.Linear(64 * 2 * 2, 1),
        )


class Updater(chainer.training.updaters.StandardUpdater):
    """Updates the discriminator, then the generator."""

    def update_core(self) -> None:
        """Do one step with one batch of real images."""
        optimizers = self.get_all_optimizers()
        generator = optimizers["generator"].target
        discriminator = optimizers["discriminator"].target
        real = self.converter(self.get_iterator("main").next(), self.device)

        score_real = discriminator(real)
        drawn = generator(latent(len(real)))
        score_drawn = discriminator(drawn)
        loss = F.mean(F.softplus(-score_real)) + F.mean(F.softplus(score_drawn))
        self.update_by(optimizers["discriminator"], loss)
        self.update_by(optimizers["generator"], F.mean(F.softplus(-discriminator(drawn))))

    @staticmethod
    def update_by(optimizer: Any, loss: chainer.Variable) -> None:
        """Update one of the models to make its loss smaller."""
        optimizer.target.cleargrads()
        loss.backward()
        optimizer.update()
        chainer.report({"loss": loss}, optimizer.target)


def latent(n: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return latent vectors, (n, 32) float32."""
    return np.random.standard_normal((n, N_LATENT)).astype(np.float32)  # noqa: NPY002


def draw(generator: chainer.Link, n: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return images of a generator, (n, 1, 8, 8) float32."""
    with chainer.using_config("train", False), chainer.no_backprop_mode():  # noqa: FBT003
        return generator(latent(n)).array


def frechet_distance(one: Any, other: Any) -> float:
    """Return the Frechet distance between Gaussians fitted to two sets of images."""
    one, other = (x.reshape(len(x), -1).astype(np.float64) for x in (one, other))
    cov_one, cov_other = np.cov(one.T), np.cov(other.T)
    roots = np.sqrt(np.linalg.eigvals(cov_one @ cov_other).real.clip(0))
    means = np.square(one.mean(axis=0) - other.mean(axis=0)).sum()
    return float(means + np.trace(cov_one) + np.trace(cov_other) - 2 * roots.sum())


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=60, help="default: 60")
    parser.add_argument("--batch-size", type=int, default=32, help="images a rank; default: 32")
    parser.add_argument("--out", type=Path, default=Path("result/gan"), help="default: result/gan")
    parser.add_argument("--no-progress-bar", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Train, and say how like the real images the drawn ones have become."""
    args = parse_args()
    comm = chainer_dist.create_communicator()
    np.random.seed(comm.rank)  # noqa: NPY002 - what Chainer draws from; ranks draw unlike images

    real = np.stack([image for image, _ in get_digits()[0]])
    train = chainer_dist.scatter_dataset(real if comm.rank == 0 else None, comm, shuffle=True)

    optimizers = {}
    for name, model in (("generator", Generator()), ("discriminator", Discriminator())):
        spanning = chainer_dist.links.create_mnbn_model(model, comm)
        optimizer = chainer.optimizers.Adam(alpha=1e-3, beta1=0.5)
        optimizer = chainer_dist.create_multi_node_optimizer(optimizer, comm)
        optimizers[name] = optimizer.setup(spanning)
    generator = optimizers["generator"].target
    before = frechet_distance(real, draw(generator, len(real)))

    updater = Updater(chainer.iterators.SerialIterator(train, args.batch_size), optimizers)
    trainer = chainer.training.Trainer(updater, (args.epochs, "epoch"), out=str(args.out))
    trainer.extend(extensions.LogReport(trigger=(10, "epoch")))
    trainer.extend(
        extensions.PrintReport(["epoch", "generator/loss", "discriminator/loss"]),
        trigger=(10, "epoch"),
    )
    if not args.no_progress_bar:
        trainer.extend(extensions.ProgressBar(update_interval=20))
    chainer_dist.on_rank_zero(trainer, comm)  # one rank writes, of what all observe
    trainer.run()

    if comm.rank == 0:
        after = frechet_distance(real, draw(generator, len(real)))
        print(f"\nFrechet distance: {before:.2f} before, {after:.2f} after")
        print(f"Plot: {plot(draw(generator, 40), args.out / 'gan.png')}")


def plot(images: Any, path: Path) -> Path:
    """Write 40 images as one picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = images.reshape(4, 10, 8, 8).transpose(0, 2, 1, 3).reshape(32, 80)
    plt.imsave(path, np.kron(rows, np.ones((6, 6))), cmap="gray_r")
    return path


if __name__ == "__main__":
    main()
