"""Cutting of a batch into micro-batches, and putting together of what is computed from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import chainer.functions as F
import numpy as np

from chainer_dist.collectives.failures import describe_error, raise_first
from chainer_dist.errors import RankMismatchError
from chainer_dist.functions import gradient_messages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["cut", "flat", "is_variable", "joined", "mapped"]


def cut(
    comm: CommunicatorBase, ranks: Sequence[int], inputs: Any, n_pieces: int
) -> list[tuple[Any, ...]]:
    """Cut the inputs into pieces, as many on each of some ranks, which all do this together.

    Args:
        comm: Communicator.
        ranks: The ranks.
        inputs: Tuple of inputs, None on ranks that take none.
        n_pieces: Pieces to make, if there are as many samples.
    """
    error, length = None, None
    try:
        if inputs is not None:
            length = _common_length(inputs)
    except (TypeError, ValueError) as caught:
        error = caught
    tag = gradient_messages.reserved_tag(gradient_messages.BATCHES)
    everyone = {comm.rank: (length, describe_error(error))}
    for rank in ranks:
        if rank != comm.rank:
            gradient_messages.post_obj(comm, everyone[comm.rank], rank, tag)
    for rank in ranks:
        if rank != comm.rank:
            everyone[rank] = comm.recv_obj(rank, tag=tag)
    raise_first({rank: everyone[rank][1] for rank in ranks}, error)
    lengths = {rank: n for rank in ranks for n, _ in [everyone[rank]] if n is not None}
    first = min(lengths)
    for rank, n in lengths.items():
        if n != lengths[first]:
            raise RankMismatchError(
                f"rank {rank}: the batch has {n} samples, expected {lengths[first]} as on "
                f"rank {first}"
            )
    n_pieces = max(1, min(n_pieces, lengths[first]))
    if length is None:
        return [()] * n_pieces
    bounds = [length * i // n_pieces for i in range(n_pieces + 1)]
    return list(zip(*(_slices(x, bounds) for x in inputs)))


def _common_length(inputs: tuple[Any, ...]) -> int:
    """Return the number of samples in the inputs."""
    lengths = []
    for x in inputs:
        if not (isinstance(x, list) or (is_variable(x) and x.ndim > 0)):
            raise TypeError(
                f"an input is {type(x).__name__}, expected an array, a variable or a list, to be "
                "cut into micro-batches"
            )
        lengths.append(len(x))
    if len(set(lengths)) != 1:
        raise ValueError(
            f"inputs have lengths {lengths}, expected one length, to be cut into micro-batches"
        )
    return lengths[0]


def _slices(x: Any, bounds: Sequence[int]) -> Sequence[Any]:
    if isinstance(x, chainer.Variable):
        pieces: Sequence[Any] = F.split_axis(x, bounds[1:-1], axis=0, force_tuple=True)
        return pieces
    return [x[begin:end] for begin, end in zip(bounds, bounds[1:])]


def joined(pieces: Sequence[Any]) -> Any:
    """Put the outputs of all pieces of the batch together."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if isinstance(first, tuple):
        return tuple(map(joined, zip(*pieces)))
    if isinstance(first, list):
        return [y for piece in pieces for y in piece]
    if not is_variable(first):
        raise TypeError(f"an output is {first!r}, expected variables, to be put together")
    if first.ndim == 0:
        raise ValueError(
            "an output is 0-dimensional (a loss?), and cannot be put together from micro-batches: "
            "return one value for each sample, and compute the loss from what the model returns"
        )
    return F.concat(pieces, axis=0)


def is_variable(x: Any) -> bool:
    """Return whether an object is a variable or an array."""
    return isinstance(x, (chainer.Variable, np.ndarray))


def flat(xs: Any) -> list[Any]:
    """Return the elements of a tuple or list, or the one thing that ``xs`` is."""
    return [y for x in xs for y in flat(x)] if isinstance(xs, (tuple, list)) else [xs]


def mapped(function: Callable[[Any], Any], xs: Any) -> Any:
    """Return a tuple or list, as ``xs`` is one, of the function's results, or its one result."""
    if not isinstance(xs, (tuple, list)):
        return function(xs)
    results = [mapped(function, x) for x in xs]
    return tuple(results) if isinstance(xs, tuple) else results
