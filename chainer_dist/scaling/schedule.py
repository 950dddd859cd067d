"""What a training step consists of, recorded once, to be replayed on machines that are not here.

A step is forward, backward, in which each gradient becomes final at some moment, the exchange, and the
update. All but the exchange between nodes is computation, and is recorded on one rank; what ranks of a
node slow one another down, as they share its memory, is recorded on as many as there are cores.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from chainer_dist._files import replacing
from chainer_dist.scaling import workloads

__all__ = ["Schedule", "record"]

WARM_UP, STEPS = 2, 7


class Schedule(NamedTuple):
    """A step of one rank; all times in seconds.

    Attributes:
        workload: See :func:`chainer_dist.scaling.workloads.load`.
        batch: Examples a rank.
        ranks: Of one node, that took part in recording.
        forward: Until the loss is there.
        backward: From then on until all gradients are.
        final: When each gradient was final, from the beginning of backward, and its bytes, in that order.
        update: Chainer's, of all parameters.
        node_update: Of this package: exchange within a node of so many ranks, and the update in which each
            rank updates its slice.
        node_exchange: The exchange alone, within a node of so many ranks.
    """

    workload: str
    batch: int
    ranks: int
    forward: float
    backward: float
    final: list[tuple[float, int]]
    update: float
    node_update: float
    node_exchange: float

    @property
    def compute(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    @property
    def nbytes(self) -> int:
        """Of all gradients."""
        return sum(nbytes for _, nbytes in self.final)


def record(workload: str, batch: int) -> Schedule:
    """Record a step on the ranks of this job, which are on one node. Collective over all of them.

    Medians of seven steps, each as long as its slowest rank.
    """
    import chainer
    import numpy as np
    from mpi4py import MPI

    import chainer_dist
    from chainer_dist.optimizers.final_gradients import FinalGradients

    world = MPI.COMM_WORLD
    np.random.seed(0)  # noqa: NPY002 - what Chainer draws from
    model, arguments = workloads.load(workload).make(batch, world.rank)
    chainer.optimizers.Adam(alpha=1e-4).setup(model)
    model(*arguments)  # initializes what waits for its shape
    params = [param for _, param in sorted(model.namedparams())]
    recorded: list[list[Any]] = []

    def compute() -> list[Any]:
        world.Barrier()
        began = time.perf_counter()
        loss = model(*arguments)
        forward = time.perf_counter()
        model.cleargrads()
        final: dict[int, float] = {}

        def note(number: int, _: Any) -> None:
            final[number] = time.perf_counter() - forward

        FinalGradients(loss, params).backward(note, lambda: None)
        ended = time.perf_counter()
        del loss
        return [forward - began, ended - forward, final]

    optimizer: Any = chainer.optimizers.Adam(alpha=1e-4).setup(model)
    comm = chainer_dist.create_communicator()
    updates, exchanges, node_updates = [], [], []

    def slowest(began: float) -> float:
        return float(world.allreduce(time.perf_counter() - began, MPI.MAX))

    for _ in range(WARM_UP + STEPS):
        recorded.append(compute())
        world.Barrier()
        began = time.perf_counter()
        optimizer.update()
        updates.append(slowest(began))
        began = time.perf_counter()
        comm.multi_node_mean_grad(model)
        exchanges.append(slowest(began))
    shared = chainer_dist.create_multi_node_optimizer(
        chainer.optimizers.Adam(alpha=1e-4), comm
    ).setup(model)
    for _ in range(WARM_UP + STEPS):
        compute()
        world.Barrier()
        began = time.perf_counter()
        shared.update()
        node_updates.append(slowest(began))
    kept = recorded[WARM_UP:]
    forward, backward = (
        float(world.allreduce(statistics.median(each[part] for each in kept), MPI.MAX))
        for part in (0, 1)
    )
    order = sorted(
        (statistics.median(each[2][number] for each in kept), number) for number in kept[0][2]
    )
    comm.finalize()
    return Schedule(
        workload=workload,
        batch=batch,
        ranks=world.size,
        forward=forward,
        backward=backward,
        final=[(min(moment, backward), params[number].grad.nbytes) for moment, number in order],
        update=statistics.median(updates[WARM_UP:]),
        node_update=statistics.median(node_updates[WARM_UP:]),
        node_exchange=statistics.median(exchanges[WARM_UP:]) if world.size > 1 else 0.0,
    )


def main(text: str) -> None:
    """Record a step and write it to a file. Collective over the ranks of this job.

    Args:
        text: As JSON, ``workload`` and ``batch``, and ``out``, the file.
    """
    from mpi4py import MPI

    task = json.loads(text)
    schedule = record(task["workload"], task["batch"])
    if MPI.COMM_WORLD.rank == 0:
        with replacing(Path(task["out"])) as file:
            json.dump(schedule._asdict(), file)
    MPI.COMM_WORLD.Barrier()


if __name__ == "__main__":
    main(sys.argv[1])
