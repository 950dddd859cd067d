"""torch.distributed over gloo, for the benchmarks that compare with it."""

from __future__ import annotations

import os
import socket


def connect() -> None:
    """Connect the ranks of the MPI job with one thread each, unless that is done. Collective."""
    import torch
    import torch.distributed as dist
    from mpi4py import MPI

    if dist.is_initialized():
        return
    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    # Where there are several hosts, a variable names the interface of gloo that connects them.
    name = socket.gethostname() if "GLOO_SOCKET_IFNAME" in os.environ else "localhost"
    url = f"tcp://{socket.gethostbyname(name)}:{20000 + os.getpid() % 20000}"
    dist.init_process_group(
        "gloo", init_method=world.bcast(url), rank=world.rank, world_size=world.size
    )
