"""A rank of a job that is measured: times training steps, or the training to an accuracy.

Started by :mod:`chainer_dist.scaling.experiment` on every rank, with a :class:`Task` as JSON. Rank 0
writes what came of it, as JSON, to the task's file.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

WARM_UP = 3
TIMELINE_STEPS = 5


class Task(NamedTuple):
    """What a job is to do.

    Attributes:
        contender: One of :data:`chainer_dist.scaling.contenders.CONTENDERS`.
        workload: See :func:`chainer_dist.scaling.workloads.load`.
        batch: Examples a rank.
        kernels: Choice of :func:`chainer_dist.kernels.use`, for the contenders that have them.
        seconds: How long to go on timing steps,
        steps: and how many there are at most, after the warm-up.
        out: The file for the result.
        target: Accuracy on the validation set of handwritten digits until which is trained, instead of
            timing steps; 0 to time steps.
        seed: Seed of the initial parameters, and of the order of the data.
    """

    contender: str
    workload: str
    batch: int
    kernels: str
    seconds: float
    steps: int
    out: str
    target: float = 0.0
    seed: int = 0


def main(text: str) -> None:
    """Do a task. Collective over all ranks of the job.

    Args:
        text: A :class:`Task` as JSON.
    """
    from mpi4py import MPI

    from chainer_dist import kernels
    from chainer_dist._files import replacing
    from chainer_dist.scaling import contenders

    task = Task(**json.loads(text))
    warnings.simplefilter("ignore")  # of Chainer, which is older than the NumPy it meets
    kernels.use("chainer" if task.contender in contenders.WITHOUT_KERNELS else task.kernels)
    if task.target:
        from chainer_dist.scaling import accuracy

        result = accuracy.train(task.batch, task.target, task.seed)
    else:
        result = _time_steps(task)
    if MPI.COMM_WORLD.rank == 0:
        with replacing(Path(task.out)) as file:
            json.dump(result, file)
    MPI.COMM_WORLD.Barrier()


def _time_steps(task: Task) -> dict[str, Any]:
    import numpy as np
    from mpi4py import MPI

    from chainer_dist import kernels
    from chainer_dist.scaling import contenders, workloads

    world = MPI.COMM_WORLD
    np.random.seed(task.seed)  # noqa: NPY002 - what Chainer draws from
    model, arguments = workloads.load(task.workload).make(task.batch, world.rank)
    step, optimizer = contenders.make_step(task.contender, task.workload, model, arguments)

    def timed() -> float:
        world.Barrier()
        started = time.perf_counter()
        step()
        return float(world.allreduce(time.perf_counter() - started, MPI.MAX))

    for _ in range(WARM_UP):
        timed()
    seconds: list[float] = []
    while len(seconds) < task.steps and (len(seconds) < 3 or sum(seconds) < task.seconds):  # noqa: PLR2004
        seconds.append(timed())  # the maximum: the same on all ranks, and so is when they end
    result: dict[str, Any] = {"seconds": seconds, "parts": {}, "parameters": 0, "bytes": 0}
    if not contenders.is_torch(task.contender):
        result["kernels"] = kernels.status().name
        params = [param.array for param in model.params()]
        result["parameters"] = sum(each.size for each in params)
        result["bytes"] = sum(each.nbytes for each in params)
    if optimizer is not None:
        result["parts"] = _parts(optimizer.communicator, timed)
    return result


def _parts(comm: Any, timed: Any) -> dict[str, float]:
    """Return where the seconds of a step go, the mean over ranks."""
    from chainer_dist.watch import timeline

    with timeline(None, comm) as recording:
        for _ in range(TIMELINE_STEPS):
            timed()
    each = comm.allgather_obj(recording.seconds)
    return {name: sum(part[name] for part in each) / comm.size / TIMELINE_STEPS for name in each[0]}


if __name__ == "__main__":
    main(sys.argv[1])
