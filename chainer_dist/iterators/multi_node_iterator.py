"""The batches of one rank's iterator on all ranks."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from chainer import serializer as serializers
from chainer.dataset import Iterator
from chainer.iterators import MultithreadIterator

from chainer_dist import _chainer
from chainer_dist._proxy import Proxy
from chainer_dist.collectives.agreement import agreed_rank, shared
from chainer_dist.collectives.calls import check_call

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainer_dist.communicators import CommunicatorBase

# What all ranks know of the master's iterator, as far as it has these.
_ATTRIBUTES = (
    "epoch",
    "current_position",
    "is_new_epoch",
    "epoch_detail",
    "previous_epoch_detail",
    "batch_size",
    "repeat",
)

_NOT_SENT = object()


class MultiNodeIterator(Proxy, Iterator, wraps="actual_iterator"):  # type: ignore[misc]  # Chainer has no types
    """Yields on every rank what the iterator of the master rank yields.

    The position of the master's iterator travels with each batch. So saving and loading need no
    communication, and whatever a rank has loaded, from the next batch on it is where the master is.
    """

    communicator: CommunicatorBase
    rank_master: int
    actual_iterator: Any  # None on all ranks but the master
    _known: dict[str, Any]  # on the other ranks: attributes, "epoch_size", "order"
    _sent_order: Any  # on the master: the order that the others have

    def __init__(
        self, actual_iterator: Any, communicator: CommunicatorBase, rank_master: int
    ) -> None:
        self.communicator = communicator
        self.rank_master = rank_master
        self.actual_iterator = actual_iterator if communicator.rank == rank_master else None
        self._known = {}
        self._sent_order = _NOT_SENT
        self._share(self._check)

    def _check(self) -> None:
        if not hasattr(self.actual_iterator, "__next__"):
            raise TypeError(
                f"create_multi_node_iterator needs an iterator on rank_master {self.rank_master}, "
                f"got {type(self.actual_iterator).__name__}"
            )

    def __next__(self) -> Any:
        return self._share(lambda: next(self.actual_iterator))

    def next(self) -> Any:
        """Return the next batch. Collective; the same as ``next(iterator)``."""
        return self.__next__()

    def reset(self) -> None:
        """Go back to the beginning. Collective."""
        self._share(lambda: self.actual_iterator.reset())  # noqa: PLW0108 - others have none

    def finalize(self) -> None:
        """End the threads and processes of the master's iterator. Local."""
        if self.actual_iterator is not None:
            self.actual_iterator.finalize()

    def __del__(self) -> None:
        pass  # the wrapped iterator finalizes itself, and may live on

    def serialize(self, serializer: Any) -> None:
        """Save or load the position. Local; load it on every rank.

        The master saves what its iterator saves. The others save the same if that is one of
        Chainer's; of any other they know the position only, and the master cannot load that.
        """
        if self.actual_iterator is not None:
            self.actual_iterator.serialize(serializer)
            self._sent_order = _NOT_SENT  # loading may have changed the array in place
            return
        known = self._known
        for name in ("current_position", "epoch", "is_new_epoch"):
            if name in known:
                known[name] = serializer(name, known[name])
        if "order" in known:
            self._serialize_order(serializer, known["order"])
        if "previous_epoch_detail" in known:
            previous = known["previous_epoch_detail"]
            with contextlib.suppress(KeyError):  # ChainerMN's iterator does not save it
                # As in Chainer's iterators, -1 stands for None.
                saved = serializer("previous_epoch_detail", -1.0 if previous is None else previous)
                known["previous_epoch_detail"] = None if saved < 0 else saved
        if isinstance(serializer, serializers.Deserializer) and "epoch_detail" in known:
            size = known["epoch_size"]
            known["epoch_detail"] = (
                None if size is None else known["epoch"] + known["current_position"] / size
            )

    def _serialize_order(self, serializer: Any, order: Any) -> None:
        # Chainer's iterators save it under either name.
        if not isinstance(serializer, serializers.Deserializer):
            serializer(self._known["order_name"], order)
        elif order is not None:
            try:
                serializer("order", order)
            except KeyError:
                serializer("_order", order)

    def _share(self, act: Callable[[], Any]) -> Any:
        """Return on every rank what ``act`` returns, or raise what it raises, on the master."""

        def act_on_master() -> tuple[Any, bool, dict[str, Any]]:
            result, stop = None, False
            try:
                result = act()
            except StopIteration:
                stop = True
            return result, stop, self._state_of_master()

        result, stop, state = shared(self.communicator, self.rank_master, act_on_master)
        if self.communicator.rank == self.rank_master:
            self._sent_order = state.get("order", self._sent_order)
        else:
            self._known.update(state)
        if stop:
            raise StopIteration
        return result

    def _state_of_master(self) -> dict[str, Any]:
        actual = self.actual_iterator
        state = {name: getattr(actual, name) for name in _ATTRIBUTES if hasattr(actual, name)}
        state["epoch_size"] = _epoch_size(actual)
        if hasattr(getattr(actual, "_state", None), "order"):
            order = _chainer.order_of(actual)
            state["order_name"] = "_order" if isinstance(actual, MultithreadIterator) else "order"
            # A sampler may write the next order to the same array.
            if order is not self._sent_order or actual.is_new_epoch:
                state["order"] = order
        return state

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        if own.get("actual_iterator") is not None:
            return super().__getattr__(name)
        if name in _ATTRIBUTES and name in own.get("_known", ()):
            return own["_known"][name]
        if name == "_order" and "order" in own.get("_known", ()):  # as ChainerMN calls it
            return own["_known"]["order"]
        raise AttributeError(
            f"{name} (rank {own['rank_master']} has the actual iterator)"
            if "rank_master" in own
            else name
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._own or self.actual_iterator is not None:
            super().__setattr__(name, value)
        elif name in _ATTRIBUTES:
            self._known[name] = value


def create_multi_node_iterator(
    actual_iterator: Any, communicator: CommunicatorBase, rank_master: int = 0
) -> MultiNodeIterator:
    """Make all ranks iterate over the batches of one rank. Collective.

    For models that are split over ranks, which need the same samples on each. In every step the
    master sends its batch to all others; where every rank can read the dataset,
    :func:`create_synchronized_iterator` sends nothing.

    What is yielded is exactly the master's batch: lists of tuples of any length, dicts, strings,
    arrays of any dtype and shape, or whatever else can be pickled. ``epoch``,
    ``current_position``, ``epoch_detail``, ``previous_epoch_detail``, ``is_new_epoch``,
    ``batch_size`` and ``repeat`` are the master's on all ranks. Anything else the iterator has is
    on the master alone. An attribute that is set, on every rank, is set on the master's iterator.

    ``next()`` and ``reset()`` are collective: all ranks call them in step, as they do with a
    Trainer. ``serialize()`` and ``finalize()`` are local. Any rank can save: in a snapshot of the
    master is what ``actual_iterator`` saves, and that of another rank can take its place if that
    is one of Chainer's iterators. Load on all ranks; they go on as the master does.

    For example, with a dataset that only rank 0 has::

        iterator = chainer.iterators.SerialIterator(train, 100) if comm.rank == 0 else None
        iterator = chainer_dist.iterators.create_multi_node_iterator(iterator, comm)

    Args:
        actual_iterator: On the master any iterator; ignored elsewhere, where it may be None.
        communicator: Communicator.
        rank_master: Rank whose iterator counts, the same on every rank.

    Returns:
        The iterator to use on each rank. ``StopIteration`` is raised on all ranks at once.

    Raises:
        RankMismatchError: On every rank, if ``rank_master`` differs.
        ValueError, TypeError: On every rank, if it is no rank, or there is no iterator on it.
        Exception: Raised by ``next()`` and ``reset()`` on every rank: the error of the master's iterator,
            or of its batch when that is pickled.
    """
    check_call(
        "create_multi_node_iterator(actual_iterator, communicator)", communicator, actual_iterator
    )
    rank_master = agreed_rank(communicator, rank_master, "rank_master")
    return MultiNodeIterator(actual_iterator, communicator, rank_master)


def _epoch_size(iterator: Any) -> int | None:
    for name in ("_epoch_size", "epoch_size"):
        if hasattr(iterator, name):
            size: int = getattr(iterator, name)
            return size
    dataset: Any = getattr(iterator, "dataset", None)
    return len(dataset) if hasattr(dataset, "__len__") else None
