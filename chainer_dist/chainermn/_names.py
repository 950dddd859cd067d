"""Classes and functions that ChainerMN has at places of its own, and chainer_dist does not need."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from chainer.functions.normalization import batch_normalization as chainer_batch_normalization

from chainer_dist.datasets.intervals import split_evenly
from chainer_dist.functions import batch_normalization

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from chainer_dist._typing import Array
    from chainer_dist.communicators import CommunicatorBase


class MultiNodeBNImplSelector:
    """Makes Chainer's function ``BatchNormalization`` take the statistics of all ranks.

    To be its ``impl_selector``. Batches are of equal size, and so is everything else, on all ranks;
    :class:`~chainer_dist.functions.batch_normalization.MultiNodeBatchNormalization` does without that.

    Args:
        comm: Communicator.
        communication_backend_name: ``auto`` or ``mpi``, which mean the same.
    """

    def __init__(self, comm: CommunicatorBase, communication_backend_name: str) -> None:
        self.comm = comm
        self.communication_backend_name = batch_normalization.get_communication_backend(
            comm, communication_backend_name
        )

    def __call__(self, batch_norm_func: Any, inputs: Any) -> _MpiImpl:
        del batch_norm_func, inputs
        return _MpiImpl(self.comm)


class _MpiImpl(chainer_batch_normalization.GeneralBatchNormalizationImpl):  # type: ignore[misc]
    """Chainer's implementation, with the statistics of all ranks."""

    def __init__(self, comm: CommunicatorBase) -> None:
        self.comm = comm

    def get_mean_and_var(
        self, axis: tuple[int, ...], gamma: Array, x: Array, xp: Any, interm_dtype: Any
    ) -> tuple[Array, Array]:
        del xp
        count = x.size // max(gamma.size, 1)
        mean, var = x.mean(axis=axis, dtype=np.float64), x.var(axis=axis, dtype=np.float64)
        moments = batch_normalization.moments_of(count, mean, var * count)
        lines = (("gamma of batch normalization", f"{gamma.shape} {gamma.dtype}"),)
        counts, means, squares = batch_normalization.merge_over_ranks(self.comm, moments, lines).T
        variance = squares / np.maximum(counts, 1)
        return (
            means.reshape(mean.shape).astype(interm_dtype),
            variance.reshape(mean.shape).astype(interm_dtype),
        )

    def get_ggamma_and_gbeta(
        self, axis: tuple[int, ...], gamma: Array, gy: Array, x_hat: Array, xp: Any
    ) -> tuple[Array, Array]:
        gbeta, ggamma = super().get_ggamma_and_gbeta(axis, gamma, gy, x_hat, xp)
        both = np.stack([gbeta, ggamma])
        self.comm._multi_node_mean(None, both)  # noqa: SLF001 - ChainerMN's name
        return both[0], both[1]


class _CheckpointStats:
    """A clock for what is done again and again."""

    def __init__(self) -> None:
        self.timings: list[dict[str, float]] = []
        self.begin: float | None = None

    def start(self) -> None:
        self.begin = time.time()

    def end(self) -> None:
        if self.begin is not None:
            self.timings.append({"b": self.begin, "d": time.time() - self.begin})
            self.begin = None

    def report(self) -> str:
        if not self.timings:
            return "No stats available"
        seconds = [each["d"] for each in self.timings]
        return (
            f"Snapshot duration stats (sec): avg={sum(seconds) / len(seconds):f}, "
            f"min={min(seconds):f}, max={max(seconds):f}"
        )


def _filenames(self: Any, iterations: Iterable[int]) -> list[str]:
    """Return the names of this rank's checkpoints."""
    return [f"{self.name}.{self.comm.rank}.{iteration}" for iteration in iterations]


def _parse_filenames(self: Any, names: Iterable[str]) -> Iterator[tuple[str, int, int]]:
    """Yield name, rank and iteration of those that are names of checkpoints."""
    for match in filter(None, map(self._pattern.fullmatch, names)):
        yield self.name, int(match[1]), int(match[2])


def _scatter_index(
    n_total_samples: int, size: int, force_equal_length: bool
) -> Iterator[tuple[int, int, int]]:
    """Yield each rank, the first of its samples, and the one after its last."""
    parts = split_evenly(n_total_samples, size, force_equal_length=force_equal_length)
    for rank, part in enumerate(parts):
        yield rank, part.begin, part.end


def _build_ctrl_msg(*values: float) -> Array:
    """Return the values that ChainerMN's multi-node iterator sends before a batch, as an array."""
    return np.array(values, dtype=np.float64)


def _parse_ctrl_msg(message: Sequence[float]) -> tuple[bool, bool, bool, bool, int]:
    """Return what :func:`_build_ctrl_msg` was given."""
    stop, is_valid, is_paired, is_new_epoch, position = message
    return bool(stop), bool(is_valid), bool(is_paired), bool(is_new_epoch), int(position)
