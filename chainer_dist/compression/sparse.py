"""Only the largest numbers of all gradients."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import numpy as np

from chainer_dist._counts import checked_count
from chainer_dist.compression.compression import (
    Kept,
    NodeCompression,
    are_finite,
    are_too_large,
    flatten,
    unpack,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import chainer

    from chainer_dist._typing import Array
    from chainer_dist.communicators import CommunicatorBase
    from chainer_dist.compression.compression import Nodes

_FIRST_DENSITY = 0.25  # of a warm-up, as in the paper


class TopK(NodeCompression):
    """Each node sends its largest numbers, and keeps the others for later (error feedback).

    Deep gradient compression (Lin et al., arXiv 1712.01887). With ``density`` 0.01 that is a
    fiftieth of the bytes between two nodes; as all nodes get the numbers of all, it grows with
    their number.

    A number that is sent rarely comes as a sum over many steps. Adam, which divides by what it has
    seen of late, makes too small a step of that; and momentum, begun anew at each of these sums,
    comes late. So training reaches a little less in as many updates. The cure is
    momentum correction: give ``momentum`` here, and none to the optimizer, as in::

        optimizer = chainer_dist.create_multi_node_optimizer(
            chainer.optimizers.SGD(0.1), comm, compression=TopK(0.01, momentum=0.9))

    Each node then sums up momentum before it chooses what to send. On one node, and with a
    ``density`` of 1, this is ``MomentumSGD`` (but for the momentum of what was sent, which the paper
    clears). Hooks see the result, so weight decay belongs to the loss.

    The first updates change parameters most, and bear delay least: with ``warmup_updates`` they
    send more, from a quarter of all numbers on, less from update to update by one factor.
    Over ``warmup_updates`` that is 0.075 of all numbers on average for a ``density`` of 0.01.

    Args:
        density: Fraction of all numbers that is sent, above 0 and up to 1.
        warmup_updates: Number of updates after which ``density`` is reached, 0 or more; the same on
            every rank.
        momentum: Factor of a gradient's momentum from one update to the next, from 0 to below 1; the
            same on every rank.

    Raises:
        ValueError: If one of them is out of range.
    """

    needs_all = True

    def __init__(
        self, density: float = 0.01, *, warmup_updates: int = 0, momentum: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 < density <= 1:
            raise ValueError(f"density is {density}, expected a number above 0 and up to 1")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}, expected a number from 0 to below 1")
        self.density = density
        self.momentum = momentum
        self.warmup_updates = checked_count("warmup_updates", warmup_updates, 0)
        self._updates = 0
        # Of a node; of all gradients that it exchanges, one after the other.
        self._velocity = Kept()

    @property
    def _kept(self) -> list[Kept]:
        return [*super()._kept, self._velocity]

    def forget(self) -> None:
        """See :meth:`Compression.forget`."""
        super().forget()
        self._updates = 0

    def mean(self, comm: CommunicatorBase, grads: dict[str, Array]) -> None:
        """See :meth:`Compression.mean`."""
        super().mean(comm, grads)
        if self._updates < self.warmup_updates and are_finite(grads.values()):
            self._updates += 1
        if comm.inter_size == 1 and self.momentum:
            with self._unless_it_overflows(grads):
                values = flatten(grads)
                self._add_momentum(values, _too_large_parts(grads.values()))
                unpack(values, grads.values())

    def mean_over_nodes(self, nodes: Nodes, grads: dict[str, Array]) -> None:
        """See :meth:`NodeCompression.mean_over_nodes`."""
        comm = nodes.mpi_comm
        rest = flatten(grads)
        if not rest.size:
            return
        large = _too_large_parts(grads.values())
        self._add_momentum(rest, large)
        before = self._residual.get("all", rest.shape)
        self._residual.add_to({"all": rest})
        count = math.ceil(self._density_now() * rest.size)
        largest = np.argpartition(np.abs(rest), rest.size - count)[rest.size - count :]
        indices = np.sort(largest).astype(np.uint32 if rest.size < 1 << 32 else np.uint64)
        values = rest[indices]
        rest[indices] = 0
        _restore(rest, large, before)
        self._residual.keep("all", rest)
        velocity = self._velocity.get("all", rest.shape)
        if velocity is not None:
            velocity[indices] = 0
        all_indices = np.empty((comm.size, count), indices.dtype)
        all_values = np.empty((comm.size, count), values.dtype)
        comm.Allgather(indices, all_indices)
        comm.Allgather(values, all_values)
        self.sent = (indices.nbytes + values.nbytes) * (comm.size - 1)
        mean = np.zeros_like(rest)
        for where, what, weight in zip(all_indices, all_values, nodes.weights):
            mean[where] += what * np.float32(weight)
        unpack(mean, grads.values())

    def _density_now(self) -> float:
        if self._updates >= self.warmup_updates:
            return self.density
        first = max(self.density, _FIRST_DENSITY)
        factor: float = (self.density / first) ** (self._updates / self.warmup_updates)
        return first * factor

    def _add_momentum(self, values: Array, large: Sequence[slice]) -> None:
        """Replace gradients by what they are with momentum, in place. Local."""
        if not self.momentum:
            return
        before = self._velocity.get("all", values.shape)
        if before is not None:
            values += before * np.float32(self.momentum)
        velocity = values.copy()
        _restore(velocity, large, before)
        self._velocity.keep("all", velocity)

    def serialize(self, serializer: chainer.AbstractSerializer, comm: CommunicatorBase) -> None:
        """See :meth:`Compression.serialize`."""
        super().serialize(serializer, comm)
        # On one node all ranks have the same.
        rank = None if comm.inter_size == 1 else comm.rank
        self._velocity.serialize(serializer["velocity"], rank)
        with contextlib.suppress(KeyError):  # saved with another compression
            self._updates = int(serializer("updates", self._updates))


def _too_large_parts(grads: Iterable[Array]) -> list[slice]:
    """Return where those gradients are, among all of them, of which nothing is to be kept."""
    found, start = [], 0
    for grad in grads:
        if are_too_large(grad):
            found.append(slice(start, start + grad.size))
        start += grad.size
    return found


def _restore(values: Array, parts: Iterable[slice], before: Array | None) -> None:
    """Put what was there before, or zeros, in the place of some parts. Local."""
    for part in parts:
        values[part] = 0 if before is None else before[part]
