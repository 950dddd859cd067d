"""What becomes of the iterators of a script: each serves this rank's part of the data.

The very objects that the script has are changed, as updaters and loops may hold them anywhere. Each gets a
class derived from its own, and passes on what it is asked to the iterator that serves in its place.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from chainer import iterators
from chainer.dataset import Iterator
from chainer.iterators import ShuffleOrderSampler

from chainer_dist import _chainer
from chainer_dist.collectives.failures import together
from chainer_dist.iterators.distributed_iterator import DistributedIterator
from chainer_dist.iterators.divided import DividedIterator
from chainer_dist.serialization.target import RANK_FREE_ITERATORS
from chainer_dist.training import samples

if TYPE_CHECKING:
    from chainer_dist.communicators import CommunicatorBase

__all__ = ["BATCHES", "KINDS", "SAMPLES_ADVICE", "distribute_iterator", "plain_kind", "rebuild"]

BATCHES = ("rank", "global")

# Chainer's iterators, and the options that they have besides those that all have.
KINDS: dict[type, dict[str, str]] = {
    iterators.SerialIterator: {},
    iterators.MultithreadIterator: {"n_threads": "n_threads"},
    iterators.MultiprocessIterator: {
        "n_processes": "n_processes",
        "n_prefetch": "n_prefetch",
        "shared_mem": "shared_mem",
        "dataset_timeout": "dataset_timeout",
        "maxtasksperchild": "_maxtasksperchild",
    },
}

SAMPLES_ADVICE = (
    "let all ranks have the same data set in the same order, as by numpy.random.seed(0) or an option seed=0 before "
    "it is made, shuffled or split; or give the data to rank 0, and an empty list to the others"
)


def plain_kind(iterator: Any) -> type | None:
    """Return which of Chainer's classes an iterator iterates as, or None if it has a way of its own. Local."""
    own = type(iterator)
    for kind in KINDS:
        if isinstance(iterator, kind):
            same = (getattr(own, name) is getattr(kind, name) for name in _ITERATION)
            return kind if all(same) else None
    return None


_ITERATION = ("__next__", "__iter__", "next", "reset", "serialize", "epoch_detail")


def rebuild(iterator: Any, kind: type, dataset: Any, batch_size: int, **options: Any) -> Iterator:
    """Return a new iterator like another, over another dataset. Local.

    Args:
        iterator: One of ``kind``, or of a class that iterates as that.
        kind: One of :data:`KINDS`.
        dataset: Dataset to iterate over.
        batch_size: Number of samples in a batch.
        options: ``repeat``, and ``shuffle`` or ``order_sampler``.
    """
    return kind(dataset, batch_size, **_options(iterator, kind), **options)


def _options(iterator: Any, kind: type) -> dict[str, Any]:
    return {name: getattr(iterator, attribute) for name, attribute in KINDS[kind].items()}


class _Plan(NamedTuple):
    """What a rank finds out about an iterator, before it is changed."""

    kind: type | None
    sampler: Any
    batch_size: int  # of a rank


def distribute_iterator(
    iterator: Any, comm: CommunicatorBase, batch: str, name: str = "main"
) -> Iterator:
    """Make a training iterator serve this rank's part, in place. Collective.

    Args:
        iterator: It repeats, and nothing was drawn from it.
        comm: Communicator.
        batch: ``"rank"`` or ``"global"``: what its batch size is of.
        name: Name of the iterator in the updater.

    Returns:
        The iterator that serves, for the updater. One that serves ranks together already is returned as it is.

    Raises:
        ValueError: On every rank, if it cannot be done safely; it says what to write.
        RankMismatchError: On every rank, if ranks have other samples, or another iterator.
    """
    who = f"the training iterator {name!r}"
    is_served = hasattr(iterator, "_served_by")
    with together(comm):
        is_done = is_served or isinstance(iterator, RANK_FREE_ITERATORS)
        is_done = is_done or samples.is_scattered(getattr(iterator, "dataset", None))
        lines = [(f"whether {who} serves a part", str(is_done))]
    samples.compare(comm, lines, "let all ranks make it alike")
    if is_done:
        return iterator._served_by if is_served else iterator  # noqa: SLF001 - this module's own
    with together(comm):
        plan = _plan(iterator, comm, batch, who)
    _check_samples(iterator, comm, plan, who)
    if plan.kind is None:
        serving: Iterator = DividedIterator(iterator, comm, fingerprint=samples.fingerprint)
        return _replace(iterator, _Divides, serving)
    shuffles = plan.sampler is not None
    options = _options(iterator, plan.kind)
    if shuffles and type(plan.sampler) is not ShuffleOrderSampler:
        whole = rebuild(
            iterator,
            plan.kind,
            iterator.dataset,
            plan.batch_size * comm.size,
            repeat=True,
            order_sampler=plan.sampler,
        )
        serving = DividedIterator(whole, comm, fingerprint=samples.fingerprint)
    else:
        # The order that the iterator has drawn is what this one's orders are drawn by: the same ones, whenever
        # this is called.
        order = _chainer.order_of(iterator)
        seed = comm.bcast_obj(int(samples.fingerprint(order)[:8], 16)) if shuffles else 0
        serving = DistributedIterator(
            iterator.dataset,
            plan.batch_size,
            comm,
            shuffle=shuffles,
            seed=seed,
            make_iterator=functools.partial(plan.kind, **options) if options else plan.kind,
        )
    iterator.finalize()
    iterator.batch_size = plan.batch_size
    iterator._shared_by = comm.size if isinstance(serving, DividedIterator) else 1  # noqa: SLF001 - this module's own
    return _replace(iterator, _PassesOn, serving)


def _plan(iterator: Any, comm: CommunicatorBase, batch: str, who: str) -> _Plan:
    """Find out what to do with an iterator, or say why it cannot be. Local."""
    kind = plain_kind(iterator)
    own = type(iterator)
    if kind is None:
        if not isinstance(iterator, Iterator) or own.__iter__ is not Iterator.__iter__:
            raise ValueError(
                f"{who} is a {own.__qualname__}, which is no iterator of Chainer's: each rank would draw the same "
                f"batches; write chainer_dist.iterators.DistributedIterator(dataset, {_size(iterator)}, comm) "
                "in its place"
            )
        return _Plan(None, None, 0)
    if not iterator.repeat:
        raise ValueError(
            f"{who} ends after an epoch: make it with repeat=True, and let the trainer end"
        )
    if iterator.epoch or iterator.current_position:
        raise ValueError(
            f"{who} has begun already, at epoch {iterator.epoch_detail:.3g}: call distribute() before anything "
            "is drawn from it, and before a snapshot is loaded"
        )
    share, rest = divmod(iterator.batch_size, comm.size)
    if batch == "rank":
        share, rest = iterator.batch_size, 0
    if rest or not share:
        raise ValueError(
            f'{who} has batches of {iterator.batch_size} samples, which batch="global" cannot divide over '
            f"{comm.size} ranks: make it a multiple of {comm.size}"
        )
    return _Plan(kind, iterator.order_sampler, share)


def _size(iterator: Any) -> Any:
    return getattr(iterator, "batch_size", "batch_size")


def _check_samples(iterator: Any, comm: CommunicatorBase, plan: _Plan, who: str) -> None:
    """Let all ranks have the same samples, or raise on every rank. Collective."""
    dataset = getattr(iterator, "dataset", None)
    kind = plan.kind and plan.kind.__name__
    sampler = type(plan.sampler).__name__
    lines = [
        (f"the class of {who}", kind or type(iterator).__qualname__),
        (f"the batch size of {who}", str(_size(iterator))),
        (f"the order_sampler of {who}", sampler),
    ]
    samples.compare(comm, lines, "let all ranks make it alike")
    if plan.kind is not None and samples.is_on_rank_zero_only(comm, dataset):
        iterator.dataset = samples.share(comm, dataset)
        return
    subject = f"the data set of {who}"
    with together(comm):
        lines = samples.describe(dataset, subject)
        if plan.kind is not None and (dataset is None or len(dataset) == 0):
            raise ValueError(f"{subject} is empty; {SAMPLES_ADVICE}")
    samples.compare(comm, lines, SAMPLES_ADVICE)


def _replace(iterator: Any, way: type, serving: Iterator) -> Iterator:
    own: Any = type(iterator)
    iterator._served_by = serving  # noqa: SLF001 - this module's own
    iterator.__class__ = _derived(own, way)
    return serving


@functools.cache
def _derived(own: type, way: type) -> type:
    return type(
        own.__name__, (way, own), {"__module__": own.__module__, "__qualname__": own.__qualname__}
    )


def _passed_on(name: str) -> property:
    return property(
        lambda self: getattr(self._served_by, name), doc="As the iterator that serves has it."
    )


class _PassesOn:
    """What an iterator of Chainer's becomes."""

    _served_by: Any
    _shared_by: int  # how many ranks share a batch of the iterator that serves

    @property
    def batch_size(self) -> int:
        """Number of samples in a batch of a rank."""
        size: int = vars(self)["batch_size"]
        return size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        self._served_by.batch_size = batch_size * self._shared_by
        vars(self)["batch_size"] = batch_size

    @property
    def dataset(self) -> Any:
        """The whole dataset."""
        return vars(self)["dataset"]

    @dataset.setter
    def dataset(self, dataset: Any) -> None:
        self._served_by.dataset = dataset
        vars(self)["dataset"] = dataset

    current_position = _passed_on("current_position")
    epoch = _passed_on("epoch")
    epoch_detail = _passed_on("epoch_detail")
    previous_epoch_detail = _passed_on("previous_epoch_detail")
    is_new_epoch = _passed_on("is_new_epoch")

    def __next__(self) -> Any:
        return next(self._served_by)

    def next(self) -> Any:
        return next(self._served_by)

    def reset(self) -> None:
        self._served_by.reset()

    def finalize(self) -> None:
        self._served_by.finalize()

    def serialize(self, serializer: Any) -> None:
        self._served_by.serialize(serializer)

    def __del__(self) -> None:
        pass  # the updater may go on with the iterator that serves


class _Divides:
    """What an iterator of any other class becomes: all but its batches is as it was."""

    _served_by: Any

    def __next__(self) -> Any:
        serving = self._served_by
        return super().__next__() if serving.is_drawing else next(serving)  # type: ignore[misc]

    def next(self) -> Any:
        return self.__next__()
