"""Waiting for what other ranks of the node write to shared memory."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from chainer_dist.collectives.operation import WAITING, Kind, Operation

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainer_dist.collectives.arrays import ArrayCommunicator

_SPINS = 10
_YIELDS = 1_000
_PAUSE = 5e-5  # seconds

_WAIT = Kind("waiting", WAITING)


def have_cores(ranks: int) -> bool:
    """Return whether this process may use a core for each of so many ranks. Local."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(1)
    return ranks <= len(cores)


def wait_until(
    is_there: Callable[[], bool],
    comm: ArrayCommunicator,
    describe_late: Callable[[], str],
    *,
    spins: bool,
    patient: bool,
) -> None:
    """Return when a function returns true. Local.

    Args:
        is_there: The function, which is called again and again, and may do work meanwhile.
        comm: The communicator whose ranks are waited for.
        describe_late: Function that says which ranks these are.
        spins: Whether there is a core for each rank, so that a short wait need not give this one away.
        patient: Whether to sleep at once, so that another thread of this process has the core.
    """
    tries = 0
    while not is_there():
        tries += 1
        if patient or tries > _YIELDS:
            break
        if tries > _SPINS or not spins:
            os.sched_yield()
    else:
        return
    # Those ranks are far behind, and may want this core.
    with Operation(_WAIT, comm, within=f"for {describe_late()}"):
        while not is_there():
            if not patient:
                comm.mpi_comm.Iprobe()  # they may wait for a message that MPI goes on sending only in a call
            time.sleep(_PAUSE)
