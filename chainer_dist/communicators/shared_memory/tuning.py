"""Measurements of the best size of blocks, and of the best number of sums under way at a time."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from typing import TYPE_CHECKING, cast

import numpy as np

from chainer_dist.communicators.shared_memory.layout import Tuning

if TYPE_CHECKING:
    from chainer_dist.collectives.arrays import ArrayCommunicator
    from chainer_dist.communicators.shared_memory.transport import Transport

_FEWEST_BYTES = 64 << 10
_ROUNDS = 5


def tune(comm: ArrayCommunicator, transport: Transport, nbytes: int) -> Tuning:
    """Measure the tunings of a communicator, and use the fastest one from now on. Collective.

    Args:
        comm: The communicator.
        transport: The transport of the communicator.
        nbytes: Number of bytes of the model's parameters, the same on every rank.

    Returns:
        The fastest tuning, the same on every rank.
    """
    from mpi4py import MPI

    most = transport.most
    sizes = [most.block_bytes]
    while sizes[-1] // 2 >= _FEWEST_BYTES:
        sizes.append(sizes[-1] // 2)
    flights = [1 << power for power in range(most.in_flight.bit_length())] or [0]
    # The first of several equally fast ones wins.
    others = [Tuning(*each) for each in itertools.product(sizes, flights[::-1])]
    candidates = [*dict.fromkeys([transport.untuned, *others])]
    data = np.zeros(max(nbytes // 4, 1), dtype=np.float32)
    seconds: dict[Tuning, list[float]] = {each: [] for each in candidates}
    for turn in range(_ROUNDS + 1):
        for each in candidates:
            transport.tuning = each
            comm.mpi_comm.Barrier()
            began = time.perf_counter()
            comm.mean_arrays([data])
            # The time of the slowest rank counts, so that all ranks choose the same.
            lasted = cast("float", comm.mpi_comm.allreduce(time.perf_counter() - began, MPI.MAX))
            if turn:  # the first is a warm-up
                seconds[each].append(lasted)
    medians = {each: statistics.median(values) for each, values in seconds.items()}
    chosen = transport.tuning = min(candidates, key=lambda each: medians[each])
    if comm.rank == 0:
        flight = f", {chosen.in_flight} under way at a time" if chosen.in_flight else ""
        what = f"blocks of {chosen.block_bytes >> 10} KiB{flight}"
        sys.stderr.write(
            f"chainer_dist: tuned for {nbytes:,} bytes: {'as untuned' if chosen == transport.untuned else what}, "
            f"{medians[chosen] * 1e3:.3g} ms (untuned {medians[transport.untuned] * 1e3:.3g} ms)\n"
        )
        sys.stderr.flush()
    return chosen
