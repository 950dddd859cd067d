"""Iterators of all ranks that go through equal datasets in one and the same order."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
from chainer import iterators
from chainer import serializer as serializers
from chainer.dataset import Iterator

from chainer_dist import _chainer
from chainer_dist._proxy import Proxy
from chainer_dist.collectives.agreement import check_same
from chainer_dist.collectives.calls import check_call
from chainer_dist.collectives.failures import together

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainer_dist.communicators import CommunicatorBase


class EpochOrder(np.ndarray[Any, np.dtype[Any]]):
    """An order of samples, with the number of resets before it and of epochs since."""

    number: tuple[int, int] | None = None

    def __array_finalize__(self, obj: Any) -> None:
        self.number = getattr(obj, "number", None)


class SynchronizedSampler:
    """Draws orders that depend only on a seed and the number of the order.

    Iterators that prefetch draw the next order at a time that differs between ranks, and may draw it
    again after a reset. From one random stream ranks would then draw different orders.
    """

    def __init__(self, actual_sampler: Callable[[Any, Any], Any], seed: int) -> None:
        self.actual_sampler = actual_sampler
        self.seed = seed
        self.resets = 0

    def __call__(self, current_order: Any, current_position: int) -> EpochOrder:
        """Return the order of the next epoch, or of the first one after a reset. Local."""
        number = getattr(current_order, "number", None)
        if number is None:  # the iterator was reset
            self.resets += 1
            number = (self.resets, 0)
        else:
            number = (number[0], number[1] + 1)
        random = np.random.RandomState([self.seed, *number])
        if type(self.actual_sampler) is iterators.ShuffleOrderSampler:
            drawn: Any = random.permutation(len(current_order))
        else:
            own: Any = np.random.get_state()  # noqa: NPY002
            np.random.set_state(random.get_state())  # noqa: NPY002
            try:
                drawn = self.actual_sampler(current_order, current_position)
            finally:
                np.random.set_state(own)  # noqa: NPY002
        order = np.asarray(drawn).view(EpochOrder)
        order.number = number
        return order


class SynchronizedIterator(Proxy, Iterator, wraps="actual_iterator"):  # type: ignore[misc]  # Chainer has no types
    """Wraps an iterator; everything but the few names below is the wrapped iterator's own."""

    actual_iterator: Any
    communicator: CommunicatorBase

    def __init__(self, actual_iterator: Any, communicator: CommunicatorBase) -> None:
        self.actual_iterator = actual_iterator
        self.communicator = communicator

    def __next__(self) -> Any:
        return next(self.actual_iterator)

    def next(self) -> Any:
        """Return the next batch. Local; the same as ``next(iterator)``."""
        return self.__next__()

    def finalize(self) -> None:
        """End the threads and processes of the iterator. Local."""
        self.actual_iterator.finalize()

    def __del__(self) -> None:
        pass  # the wrapped iterator finalizes itself, and may live on

    def serialize(self, serializer: Any) -> None:
        """Save or load position, order and seed. Local; load it on every rank."""
        sampler = self.actual_iterator.order_sampler
        if isinstance(sampler, SynchronizedSampler):
            order = _chainer.order_of(self.actual_iterator)
            try:
                seed = serializer("synchronized_seed", sampler.seed)
                resets = serializer("synchronized_resets", sampler.resets)
                epochs = serializer("synchronized_epochs", order.number[1])
            except KeyError:
                pass  # Saved by another iterator: its order counts, the next ones are drawn anew.
            else:
                if isinstance(serializer, serializers.Deserializer):
                    # The iterator loads the order into this array, or into a copy of it.
                    sampler.seed, sampler.resets, order.number = seed, resets, (resets, epochs)
        self.actual_iterator.serialize(serializer)


def create_synchronized_iterator(
    actual_iterator: Any, communicator: CommunicatorBase
) -> SynchronizedIterator:
    """Make the iterators of all ranks go through their datasets in the same order. Collective.

    For models that are split over ranks, which need the same samples on each, where every rank has
    the whole dataset. Once created, everything is local: nothing is sent, and all ranks that call
    ``next()`` equally often get the same samples, whatever is prefetched.

    The kind of order stays what it is. Without shuffling it is that of the dataset. Shuffling, and
    any other ``order_sampler`` that draws from ``numpy.random``, draws the same on every rank, from
    a seed that rank 0 takes from ``numpy.random``. A sampler with a random generator of its own
    must have seeded it alike on all ranks. (One for a MultiprocessIterator should: it is called in
    a thread, and what the main thread takes from ``numpy.random`` meanwhile would not be random.)

    ``serialize()`` keeps order and seed, so that a resume goes on with the very same samples.

    For example, with a dataset that all ranks have::

        iterator = chainer.iterators.SerialIterator(train, 100)
        iterator = chainer_dist.iterators.create_synchronized_iterator(iterator, comm)

    Args:
        actual_iterator: A SerialIterator, MultithreadIterator or MultiprocessIterator, made alike
            on every rank. It is reset, and its ``order_sampler`` replaced.
        communicator: Communicator.

    Returns:
        A wrapper, which reads and sets the attributes of ``actual_iterator``.

    Raises:
        ValueError: On every rank, if the iterator has no ``order_sampler``.
        RankMismatchError: On every rank, if the length of the dataset, the batch size, ``repeat``,
            the kind of sampler, or the first order that it draws, differ.
    """
    check_call(
        "create_synchronized_iterator(actual_iterator, communicator)",
        communicator,
        actual_iterator,
    )
    with together(communicator):
        lines = _describe(actual_iterator)
    check_same(communicator, lines)

    # The draw that ChainerMN makes; only rank 0's random state counts and moves on.
    drawn = int(np.random.randint(2**32 - 1, dtype=np.int64)) if communicator.rank == 0 else 0  # noqa: NPY002
    seed: int = communicator.bcast_obj(drawn)
    with together(communicator):
        _reset_with_seed(actual_iterator, seed)
        lines = [
            ("the first order of samples (is its generator seeded alike?)", _first(actual_iterator))
        ]
    check_same(communicator, lines)
    return SynchronizedIterator(actual_iterator, communicator)


def _describe(iterator: Any) -> list[tuple[str, str]]:
    if not (hasattr(iterator, "order_sampler") and hasattr(iterator, "_state")):
        raise ValueError(
            "create_synchronized_iterator needs an iterator with an order_sampler: a "
            "SerialIterator, MultithreadIterator or MultiprocessIterator, got a "
            f"{type(iterator).__name__}"
        )
    sampler = iterator.order_sampler
    return [
        ("the length of the dataset", str(len(iterator.dataset))),
        ("batch_size", str(iterator.batch_size)),
        ("repeat", str(iterator.repeat)),
        ("order_sampler", "None" if sampler is None else f"a {type(sampler).__qualname__}"),
    ]


def _reset_with_seed(iterator: Any, seed: int) -> None:
    sampler = iterator.order_sampler
    if isinstance(sampler, SynchronizedSampler):  # created twice
        sampler = sampler.actual_sampler
    if sampler is not None:
        iterator.order_sampler = SynchronizedSampler(sampler, seed)
        if hasattr(iterator, "_prefetch_loop"):  # MultiprocessIterator
            iterator._prefetch_loop.order_sampler = iterator.order_sampler  # noqa: SLF001 - Chainer's
    iterator.reset()


def _first(iterator: Any) -> str:
    if iterator.order_sampler is None:
        return "that of the dataset"
    order = _chainer.order_of(iterator)
    return f"{order[:8]}... ({hashlib.blake2b(order.tobytes(), digest_size=4).hexdigest()})"
