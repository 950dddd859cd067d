#!/usr/bin/env python
"""Search for good hyperparameters, with groups of ranks that train candidates side by side.

    mpiexec -n 2 python scripts/examples/search_hyperparameters.py
    mpiexec -n 4 python scripts/examples/search_hyperparameters.py --candidates 12

Successive halving (Jamieson and Talwalkar, 2016): random candidates are trained for a short time, the
better half of them anew for twice as long, and so on until one is left. In each round the ranks are
split into as many groups as there is work for; while there are fewer candidates than ranks,
several ranks train one together. Groups know nothing of one another.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from digits import MLP, get_digits
from example import make_parser, positive

import chainer_dist


class Candidate(NamedTuple):
    """What is searched for."""

    learning_rate: float
    units: int
    weight_decay: float


def draw_candidates(n: int, seed: int) -> list[Candidate]:
    """Return random candidates."""
    rng = np.random.RandomState(seed)
    return [
        Candidate(
            learning_rate=10 ** rng.uniform(-5, -0.5),
            units=int(2 ** rng.uniform(3, 8)),
            weight_decay=10 ** rng.uniform(-6, -2),
        )
        for _ in range(n)
    ]


def train(comm: Any, candidate: Candidate, data: Any, epochs: int, args: Any) -> float:
    """Train one candidate on the ranks of a group; return its validation accuracy. Collective."""
    np.random.seed(args.seed + comm.rank)  # noqa: NPY002 - what Chainer draws from
    model = L.Classifier(MLP(candidate.units))
    optimizer = chainer.optimizers.Adam(candidate.learning_rate)
    optimizer = chainer_dist.create_multi_node_optimizer(optimizer, comm)  # distributed
    optimizer.setup(model)
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(candidate.weight_decay))
    own = chainer_dist.scatter_dataset(data[0], comm, shuffle=True, seed=args.seed)  # distributed
    batches = chainer.iterators.SerialIterator(own, max(1, args.batch_size // comm.size))
    while batches.epoch < epochs:
        optimizer.update(model, *chainer.dataset.concat_examples(next(batches)))
    x, t = chainer.dataset.concat_examples(data[1])
    with chainer.using_config("train", value=False), chainer.no_backprop_mode():
        return float(F.accuracy(model.predictor(x), t).array)


def search_round(
    comm: Any, candidates: list[Candidate], data: Any, epochs: int, args: Any
) -> list[tuple[float, Candidate, int]]:
    """Train all candidates; return accuracies, best first, and the ranks of each. Collective."""
    n_groups = min(len(candidates), comm.size)
    group = comm.rank * n_groups // comm.size
    own_comm = comm.split(group, comm.rank)  # distributed: the ranks of this group
    results = [
        (train(own_comm, candidate, data, epochs, args), candidate, own_comm.size)
        for candidate in candidates[group::n_groups]
    ]
    everyone = comm.allgather_obj(results if own_comm.rank == 0 else [])  # distributed
    own_comm.finalize()
    return sorted((each for part in everyone for each in part), reverse=True)


def main() -> None:
    """Search, and print a table of each round."""
    parser = make_parser(__doc__, epochs=1, batch_size=32)
    parser.add_argument("--candidates", type=positive, default=16, help="default: 16")
    args = parser.parse_args()
    comm = chainer_dist.create_communicator()
    candidates, epochs = draw_candidates(args.candidates, args.seed), args.epochs
    data = get_digits()
    began = time.perf_counter()
    n_trained = 0
    while True:
        results = search_round(comm, candidates, data, epochs, args)
        n_trained += len(candidates)
        if comm.rank == 0:
            print(
                f"\n{len(candidates)} candidates, {epochs} epoch(s), on {results[0][2]} rank(s) or more each"
            )
            print(f"{'accuracy':>8} {'learning rate':>14} {'units':>6} {'weight decay':>13}")
            for accuracy, (rate, units, decay), _ in results:
                print(f"{accuracy:8.2%} {rate:14.6f} {units:6} {decay:13.6f}", flush=True)
        if len(candidates) == 1:
            break
        candidates = [candidate for _, candidate, _ in results[: len(candidates) // 2]]
        epochs *= 2
    if comm.rank == 0:
        seconds = time.perf_counter() - began
        print(f"\n{n_trained} trainings in {seconds:.1f} s on {comm.size} rank(s)")
        print(f"Best: {results[0][1]}")
        print(f"Validation accuracy: {results[0][0]:.2%}")


if __name__ == "__main__":
    main()
