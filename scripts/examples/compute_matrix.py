#!/usr/bin/env python
"""Compute a matrix element by element on all ranks, though its elements take uneven times.

    mpiexec -n 2 python scripts/examples/compute_matrix.py

An element says after how many steps a point of the plane leaves the Mandelbrot set, in plain Python:
one step for some, ``--steps`` for others. Timed beside it are a loop, and multiprocessing.Pool with as
many processes as there are ranks; those of the Pool are started before the clock is.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from example import make_parser, positive

import chainer_dist

if TYPE_CHECKING:
    from collections.abc import Callable


def element(point: tuple[float, float], steps: int) -> int:
    """Return after how many steps a point leaves the circle with radius 2."""
    c = complex(*point)
    z = 0j
    for step in range(steps):
        if abs(z) > 2:
            return step
        z = z * z + c
    return steps


def measure(name: str, compute: Callable[[], list[int]]) -> tuple[list[int], float]:
    """Return what is computed, and the seconds that it took, which are printed."""
    began = time.perf_counter()
    values = compute()
    seconds = time.perf_counter() - began
    if values:
        print(f"{name:24} {seconds:8.2f} s", flush=True)
    return values, seconds


def compare(function: Any, points: list[Any], n_processes: int, chunksize: int) -> list[list[int]]:
    """Compute the same by a loop and by a pool."""
    loop, _ = measure("a loop", lambda: list(map(function, points)))
    # Forked children would have a copy of this rank's MPI.
    with multiprocessing.get_context("forkserver").Pool(n_processes) as pool:
        pool.map(abs, range(n_processes))
        pooled, _ = measure(
            "multiprocessing.Pool", lambda: list(pool.imap(function, points, chunksize))
        )
    return [loop, pooled]


def main() -> None:
    """Compute the matrix, compare, and draw it."""
    parser = make_parser(__doc__, out=Path("result/matrix"))
    parser.add_argument("--size", type=positive, default=120, help="rows; default: 120")
    parser.add_argument("--steps", type=positive, default=10000, help="at most; default: 10000")
    parser.add_argument("--chunksize", type=positive, default=20, help="elements; default: 20")
    args = parser.parse_args()
    comm = chainer_dist.create_communicator()
    x, y = np.linspace(-2, 0.6, args.size), np.linspace(-1.3, 1.3, args.size)
    points = list(itertools.product(y.tolist(), x.tolist()))
    points = [(x, y) for y, x in points]
    function = functools.partial(element, steps=args.steps)

    if comm.rank == 0:
        print(f"{args.size} x {args.size} elements, {comm.size} rank(s)")
    values, _ = measure(
        "chainer_dist.pmap",
        lambda: list(
            chainer_dist.pmap(  # distributed
                function, points, comm, chunksize=args.chunksize, progress=not args.no_progress_bar
            )
        ),
    )
    done = comm.mpi_comm.Ibarrier() if comm.rank else None
    if done is not None:
        while not done.Test():  # asleep: waiting in MPI would keep a core busy
            time.sleep(0.05)
        return
    others = compare(function, points, comm.size, args.chunksize)
    comm.mpi_comm.Ibarrier().Wait()
    same = all(values == other for other in others)
    print(f"Elements that are the same: {100.0 if same else 0.0} % of {len(values)}")
    print(f"Plot: {plot(np.reshape(values, (args.size, args.size)), args.out)}")


def plot(matrix: Any, folder: Path) -> Path:
    """Draw a matrix."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    plt.imsave(folder / "matrix.png", np.log(matrix + 1.0))
    return folder / "matrix.png"


if __name__ == "__main__":
    main()
