"""An iterator of any kind that gives each rank its share of every batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chainer.dataset import Iterator

from chainer_dist._proxy import Proxy
from chainer_dist.collectives.agreement import agree, digest
from chainer_dist.collectives.failures import describe_error, raise_first

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["DividedIterator"]


class DividedIterator(Proxy, Iterator, wraps="actual_iterator"):  # type: ignore[misc]  # Chainer has no types
    """Draws each batch on all ranks, and yields this rank's share of it.

    For iterators that have an order of their own, such as streams of a text whose states go on from batch
    to batch. Side by side, in the order of rank, the shares are the batch. Epochs and all other
    attributes are the wrapped iterator's, of whose batches all ranks together have one. They can be set, on every rank.

    Args:
        actual_iterator: Yields equal batches on all ranks, each a list.
        comm: Communicator.
        fingerprint: Returns a text of a batch that differs where the batch does.

    Raises:
        ValueError: Raised by ``next()`` on every rank, if a batch cannot be shared out equally, or differs.
    """

    actual_iterator: Any
    is_drawing: bool  # whether the wrapped iterator is being asked
    _comm: CommunicatorBase
    _fingerprint: Callable[[Any], str]

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

    def __next__(self) -> Any:
        """Return this rank's share of the next batch. Collective."""
        comm = self._comm
        batch: Any = []
        error: BaseException | None = None
        self.is_drawing = True
        try:
            batch = next(self.actual_iterator)
            mine = f"{len(batch)} {self._fingerprint(batch)}"
        except StopIteration:
            mine = "the end"
        except BaseException as caught:  # noqa: BLE001 - datasets may raise anything
            error, mine = caught, "error"
        finally:
            self.is_drawing = False
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
        share, rest = divmod(len(batch), comm.size)
        if rest or not share:
            raise ValueError(
                f"a batch of {len(batch)} samples of {self._name()} cannot be divided over {comm.size} ranks: "
                f"make it a multiple of {comm.size}"
            )
        return batch[comm.rank * share : (comm.rank + 1) * share]

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
