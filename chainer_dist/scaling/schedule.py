"""What a training step consists of, recorded once, to be replayed on machines that are not here.

A step is forward, backward, in which each gradient becomes final at some moment, the exchange, and the
update. All but the exchange between nodes is computation, and is recorded on as many ranks as there are cores,
as ranks of a node slow one another down; and in turns with that on one rank while the others sleep, so
that whatever else the machine does meets both alike.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from chainer_dist._files import replacing
from chainer_dist.scaling import workloads

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpi4py import MPI

__all__ = ["Schedule", "record"]

WARM_UP, STEPS = 2, 7
_FEWEST, _ENOUGH = 3, 10.0  # steps, once these have taken so many seconds


class Schedule(NamedTuple):
    """A step of one rank; all times in seconds.

    Attributes:
        workload: See :func:`chainer_dist.scaling.workloads.load`.
        batch: Number of examples in a batch of one rank.
        ranks: Number of ranks of the node on which it was recorded.
        forward: Seconds until the loss is computed.
        backward: Seconds of backward.
        final: Pairs in the order in which gradients became final: seconds since the beginning of backward,
            and bytes of the gradient.
        update: Seconds of Chainer's update of all parameters.
        node_update: Seconds of this package's exchange within a node of so many ranks, with the update in
            which each rank updates its slice.
        alone: Seconds of computation and Chainer's update, while no other rank computed.
    """

    workload: str
    batch: int
    ranks: int
    forward: float
    backward: float
    final: list[tuple[float, int]]
    update: float
    node_update: float
    alone: float

    @property
    def compute(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    @property
    def nbytes(self) -> int:
        """Of all gradients."""
        return sum(nbytes for _, nbytes in self.final)

    def faster(self, times: float) -> Schedule:
        """Return the step of a processor that is so many times as fast in everything."""
        return self._replace(
            forward=self.forward / times,
            backward=self.backward / times,
            final=[(moment / times, nbytes) for moment, nbytes in self.final],
            update=self.update / times,
            node_update=self.node_update / times,
            alone=self.alone / times,
        )


def record(workload: str, batch: int, ranks_per_node: int | None = None) -> Schedule:
    """Record a step on the ranks of this job, which are on one node. Collective over all of them.

    Medians of seven steps (three, if these take more than ten seconds), each as long as its slowest rank.

    Args:
        workload: See :func:`chainer_dist.scaling.workloads.load`.
        batch: Examples a rank.
        ranks_per_node: Ranks that are to be one node, of which there are then several, at work at the same
            time; None for all.
    """
    import chainer
    import numpy as np
    from mpi4py import MPI

    import chainer_dist

    world = MPI.COMM_WORLD
    np.random.seed(0)  # noqa: NPY002 - what Chainer draws from
    model, arguments = workloads.load(workload).make(batch, world.rank)
    model(*arguments)  # initializes what waits for its shape
    everyone = chainer_dist.create_communicator()
    per_node = ranks_per_node or world.size
    comm = everyone.split(world.rank // per_node, world.rank)
    assert comm is not None  # noqa: S101 - no rank is left out

    def times(optimizer: Any) -> tuple[list[_Computation], float]:
        """Return how long computations took, and the median of updates."""
        computations: list[_Computation] = []
        seconds: list[float] = []
        lasted = 0.0
        while len(seconds) < WARM_UP + STEPS:
            if len(seconds) >= WARM_UP + _FEWEST and lasted > _ENOUGH:
                break
            step = time.perf_counter()
            if optimizer is plain and world.size > 1:
                alone.append(_sleeping(world, one_step))
            world.Barrier()
            computations.append(_compute(model, arguments))
            world.Barrier()
            began = time.perf_counter()
            optimizer.update()
            seconds.append(world.allreduce(time.perf_counter() - began, MPI.MAX))
            lasted += world.allreduce(time.perf_counter() - step, MPI.MAX)  # the same on all ranks
        return computations[WARM_UP:], statistics.median(seconds[WARM_UP:])

    def one_step() -> None:
        _compute(model, arguments)
        plain.update()

    alone: list[float] = []
    plain = chainer.optimizers.Adam(alpha=1e-4).setup(model)
    computations, update = times(plain)
    shared = chainer_dist.create_multi_node_optimizer(chainer.optimizers.Adam(alpha=1e-4), comm)
    _, node_update = times(shared.setup(model))
    slowest = functools.partial(world.allreduce, op=MPI.MAX)
    forward = slowest(statistics.median(each.forward for each in computations))
    backward = slowest(statistics.median(each.backward for each in computations))
    sizes = [param.array.nbytes for _, param in sorted(model.namedparams())]
    moments = {
        number: statistics.median(each.final[number] for each in computations)
        for number in computations[0].final
    }
    comm.finalize()
    everyone.finalize()
    return Schedule(
        workload=workload,
        batch=batch,
        ranks=per_node,
        forward=forward,
        backward=backward,
        final=sorted((min(moment, backward), sizes[number]) for number, moment in moments.items()),
        update=update,
        node_update=node_update,
        alone=statistics.median(alone[WARM_UP:]) if alone else forward + backward + update,
    )


def _sleeping(world: MPI.Intracomm, function: Callable[[], None]) -> float:
    """Return how many seconds a function takes on rank 0 while the other ranks sleep. Collective."""
    began = time.perf_counter()
    if world.rank == 0:
        function()
    seconds = time.perf_counter() - began
    everyone = world.Ibarrier()
    while not everyone.Test():
        time.sleep(1e-3)
    return float(world.bcast(seconds))


class _Computation(NamedTuple):
    """The seconds of a forward and a backward, and when each gradient was final, by parameter."""

    forward: float
    backward: float
    final: dict[int, float]


def _compute(model: Any, arguments: tuple[Any, ...]) -> _Computation:
    from chainer_dist.optimizers.final_gradients import FinalGradients

    params = [param for _, param in sorted(model.namedparams())]
    final: dict[int, float] = {}
    began = time.perf_counter()
    loss = model(*arguments)
    middle = time.perf_counter()

    def note(number: int, _: Any) -> None:
        final[number] = time.perf_counter() - middle

    model.cleargrads()
    FinalGradients(loss, params).backward(note, lambda: None)
    return _Computation(middle - began, time.perf_counter() - middle, final)


def main(text: str) -> None:
    """Record a step and write it to a file. Collective over the ranks of this job.

    Args:
        text: JSON object of the arguments of :func:`record`, and ``out``, the file.
    """
    from mpi4py import MPI

    task = json.loads(text)
    out = Path(task.pop("out"))
    schedule = record(**task)
    if MPI.COMM_WORLD.rank == 0:
        with replacing(out) as file:
            json.dump(schedule._asdict(), file)
    MPI.COMM_WORLD.Barrier()


if __name__ == "__main__":
    main(sys.argv[1])
