"""A typed script in the manner of a user: ``make type`` checks that the public API has types that serve."""

from __future__ import annotations

from typing import Any

import chainer
import numpy as np

import chainer_dist
from chainer_dist import compression, datasets, extensions, functions, iterators, watch

Score = dict[str, float]


def communicate(comm: chainer_dist.CommunicatorBase) -> int:
    """Exchange arrays and objects."""
    rank: int = comm.rank
    parts = comm.allgather(np.arange(3))
    total: int = sum(int(part.sum()) for part in parts)
    scores: list[Score] = comm.allgather_obj({"accuracy": 0.5})
    best: Any = comm.bcast_obj(max(score["accuracy"] for score in scores))
    half = comm.split(rank % 2, rank)
    return total + int(best) + (0 if half is None else half.size)


def load(comm: chainer_dist.CommunicatorBase, paths: list[str]) -> Any:
    """Return an iterator over data of several kinds."""
    chainer_dist.scatter_dataset(np.zeros((8, 2)) if comm.rank == 0 else None, comm, shuffle=True)
    part = datasets.shard_files(paths, comm, force_equal_length=False)
    length: int = len(part)
    files = datasets.FilesDataset(paths)
    return iterators.DistributedIterator(files, min(32, max(1, length)), comm, seed=1)


def train(comm: chainer_dist.CommunicatorBase, model: chainer.Link) -> int:
    """Train with what the options take."""
    optimizer = chainer_dist.create_multi_node_optimizer(
        chainer.optimizers.Adam(),
        comm,
        compression=compression.PowerSGD(rank=2),
        accumulate_steps=2,
        overlap=None,
    )
    optimizer.setup(model)
    is_sharded: bool | None = optimizer.sharded
    with chainer_dist.Join(optimizer), watch.timeline("trace.json", comm) as trace:
        optimizer.update(model, np.zeros((4, 3), np.float32))
    seconds: float = trace.duration
    checkpoint = chainer_dist.Checkpoint(comm, "checkpoints", keep=2)
    iteration: int = checkpoint.resume({"model": model, "optimizer": optimizer})
    try:
        checkpoint.save({"model": model, "optimizer": optimizer}, iteration + int(seconds))
    except chainer_dist.RankMismatchError as error:
        text: str = str(error)
        raise SystemExit(text) from None
    return iteration + bool(is_sharded)


def extend(comm: chainer_dist.CommunicatorBase, trainer: Any, iterator: Any, model: Any) -> None:
    """Add extensions to a trainer."""
    evaluator = chainer.training.extensions.Evaluator(iterator, model)
    trainer.extend(chainer_dist.create_multi_node_evaluator(evaluator, comm))
    trainer.extend(extensions.ObservationAggregator(comm, "main/loss"))


def loss(comm: chainer_dist.CommunicatorBase, x: chainer.Variable) -> Any:
    """Communicate within a model."""
    return functions.allreduce(comm, x)


def main() -> None:
    """Run it in one process, or under mpiexec."""
    with chainer_dist.create_communicator("shared_memory") as comm:
        communicate(comm)


if __name__ == "__main__":
    main()
