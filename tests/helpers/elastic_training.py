"""Training that counts how often each sample was seen, for jobs whose hosts come and go.

The counts are part of the model, so that a checkpoint has them: an update that is undone is not counted.
"""

from __future__ import annotations

import argparse
import sys
import time

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

import chainer_dist

N_SAMPLES = 60


class Net(chainer.Chain):
    """A tiny model that counts."""

    def __init__(self, comm):
        super().__init__()
        self.comm = comm
        with self.init_scope():
            self.layer = L.Linear(1, 1)
        self.add_persistent("counts", np.zeros(N_SAMPLES, np.int64))

    def forward(self, samples):
        """Return a loss, and count the samples of all ranks."""
        seen = np.bincount(samples.astype(int).ravel(), minlength=N_SAMPLES)
        self.counts += self.comm.allreduce(seen)
        return F.mean(self.layer(samples[:, None]) ** 2)


def main():
    """Train, and print how often each sample was seen."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seconds", type=float, help="of each update")
    args = parser.parse_args()
    comm = chainer_dist.create_communicator()
    optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.SGD(1e-5), comm)
    net = Net(comm)
    optimizer.setup(net)
    samples = np.arange(N_SAMPLES, dtype=np.float32)
    iterator = chainer_dist.iterators.DistributedIterator(samples, 2, comm, seed=0)
    updater = chainer.training.StandardUpdater(iterator, optimizer)
    trainer = chainer.training.Trainer(updater, (args.epochs, "epoch"), out=args.out)
    checkpoint = chainer_dist.Checkpoint(comm, f"{args.out}/checkpoints")
    trainer.extend(checkpoint, trigger=(10, "iteration"))

    @trainer.extend
    def slow(_):
        time.sleep(args.seconds)

    started_at = checkpoint.resume(trainer)
    if comm.rank == 0:
        print(f"{comm.size} ranks from {started_at}", flush=True)
        with open(f"{args.out}/started", "a", encoding="ascii") as file:  # noqa: PTH123 - a path as text
            file.write(f"{comm.size} {started_at}\n")
    trainer.run()
    if comm.rank == 0:
        print("counts", *net.counts.tolist(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
