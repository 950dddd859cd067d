"""An iterator of any kind that gives each rank its share of every batch."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, Any

import numpy as np
from chainer.dataset import Iterator

from chainer_dist._proxy import Proxy
from chainer_dist.collectives.agreement import agree, digest
from chainer_dist.collectives.failures import describe_error, raise_first

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["DividedIterator"]


class DividedIterator(Proxy, Iterator, wraps="actual_iterator"):  # type: ignore[misc]  # Chainer has no types
    """Draws each batch on all ranks, and yields this rank's share of it.

    For iterators that have an order of their own, such as streams of a text whose states go on from batch
    to batch. Side by side, in the order of rank, the shares are the batch. Epochs and all other
    attributes are the wrapped iterator's, of whose batches all ranks together have one. They can be set, on every rank.

    A batch is a list of samples, or has arrays whose first axis is that of the samples: one array, or a tuple or dict of
    them. What the wrapped iterator draws from ``random`` and ``numpy.random`` is the same on all ranks: the numbers
    that rank 0 would have drawn, beginning with its state before the first batch. Each rank's own states stay apart. A
    single rank keeps its own.

    ``batch_size`` must be a multiple of the number of ranks. A batch that has fewer samples, as the last one of an epoch
    may, is filled up with its first ones, so that all ranks have equally many.

    Args:
        actual_iterator: Yields equal batches on all ranks.
        comm: Communicator.
        fingerprint: Returns a text of a batch that differs where the batch does.

    Raises:
        ValueError: Raised by ``next()`` on every rank, if a batch cannot be shared out equally, or differs.
        TypeError: Likewise, if it is of another kind.
    """

    actual_iterator: Any
    is_drawing: bool  # whether the wrapped iterator is being asked
    _comm: CommunicatorBase
    _fingerprint: Callable[[Any], str]
    _random: Any  # states from which the wrapped iterator draws; None before the first batch
    _has_arrays: bool | None  # whether batches are tuples or dicts of arrays; None before the first

    def __init__(
        self,
        actual_iterator: Any,
        comm: CommunicatorBase,
        *,
        fingerprint: Callable[[Any], str],
    ) -> None:
        self.actual_iterator = actual_iterator
        self._comm = comm
        self._fingerprint = fingerprint
        self.is_drawing = False
        self._random = self._has_arrays = None

    def __next__(self) -> Any:
        """Return this rank's share of the next batch. Collective."""
        comm = self._comm
        batch: Any = []
        error: BaseException | None = None
        if self._random is None and comm.size > 1:
            self._random = comm.bcast_obj(_random_states())
        try:
            with self._drawing():
                batch = next(self.actual_iterator)
            parts = self._parts(batch)
            mine = f"{len(parts[0])} {self._fingerprint(batch)}"
        except StopIteration:
            mine = "the end"
        except BaseException as caught:  # noqa: BLE001 - datasets may raise anything
            error, mine = caught, "error"
        if not all(agree(comm, digest(mine))):
            everyone = comm.allgather_obj((describe_error(error), mine))
            raise_first({rank: failure for rank, (failure, _) in enumerate(everyone)}, error)
            rank = next(i for i, (_, each) in enumerate(everyone) if each != everyone[0][1])
            raise ValueError(
                f"rank {rank}: {self._name()} yields another batch than on rank 0, so ranks cannot share it: "
                "let it draw alike on every rank, as by numpy.random.RandomState(0) of its own, or write "
                "chainer_dist.iterators.DistributedIterator(dataset, batch_size, comm) in its place"
            )
        if error is not None:
            raise error
        if mine == "the end":
            raise StopIteration
        own = self._share(len(parts[0]), parts)
        if parts[0] is batch:
            return own[0]
        if isinstance(batch, dict):
            return dict(zip(batch, own))
        return getattr(batch, "_make", tuple)(own)  # a named tuple stays one

    def _share(self, n_samples: int, parts: list[Any]) -> list[Any]:
        """Return this rank's share of the parts of a batch. Local."""
        comm = self._comm
        share = -(-n_samples // comm.size)
        own = slice(comm.rank * share, (comm.rank + 1) * share)
        if n_samples and n_samples == share * comm.size:
            return [part[own] for part in parts]
        if n_samples in (0, getattr(self, "batch_size", n_samples)):
            raise ValueError(
                f"a batch of {n_samples} samples of {self._name()} cannot be divided over {comm.size} ranks: "
                f"make it a multiple of {comm.size}"
            )
        chosen = [i % n_samples for i in range(own.start, own.stop)]
        return [
            part[chosen] if isinstance(part, np.ndarray) else type(part)(part[i] for i in chosen)
            for part in parts
        ]

    @contextlib.contextmanager
    def _drawing(self) -> Generator[None]:
        own = None
        if self._comm.size > 1:
            own = _random_states()
            _set_random_states(self._random)
        self.is_drawing = True
        try:
            yield
        finally:
            self.is_drawing = False
            if own is not None:
                self._random = _random_states()
                _set_random_states(own)

    def _parts(self, batch: Any) -> list[Any]:
        """Return what is to be divided: the batch, or its arrays, if these have a row for each sample. Local."""
        if not isinstance(batch, (tuple, dict)):
            return [batch]
        values = [*batch.values()] if isinstance(batch, dict) else [*batch]
        rows = {
            len(each) if isinstance(each, np.ndarray) and each.ndim else None for each in values
        }
        has_rows = len(rows) == 1 and None not in rows
        if self._has_arrays is None:
            # A sample is a row of each array, or a value of the tuple: whichever there are batch_size of.
            size = getattr(self, "batch_size", len(batch))
            has_arrays = isinstance(batch, dict) or rows == {size}
            has_samples = isinstance(batch, tuple) and len(batch) == size
            if has_arrays != has_samples:
                self._has_arrays = has_arrays
        if self._has_arrays is None or (self._has_arrays and not has_rows):
            raise TypeError(
                f"ranks cannot share a batch of {self._name()}, a {type(batch).__name__} of {len(batch)} values: make it "
                "a list of samples, or let all values be arrays with batch_size rows"
            )
        return values if self._has_arrays else [batch]

    def next(self) -> Any:
        """Return this rank's share of the next batch. Collective; the same as ``next(iterator)``."""
        return self.__next__()

    def finalize(self) -> None:
        """Finalize the wrapped iterator. Local."""
        self.actual_iterator.finalize()

    def serialize(self, serializer: Any) -> None:
        """Save or load the wrapped iterator, which is the same on all ranks. Local."""
        self.actual_iterator.serialize(serializer)

    def __del__(self) -> None:
        pass  # the wrapped iterator finalizes itself, and may live on

    def _name(self) -> str:
        return type(self.actual_iterator).__qualname__


def _random_states() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()  # noqa: NPY002 - what Chainer draws from


def _set_random_states(states: tuple[Any, Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
