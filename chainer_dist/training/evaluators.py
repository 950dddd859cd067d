"""What becomes of the evaluators of a trainer: each gives the score of the whole set, on every rank."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

from chainer.iterators import ShuffleOrderSampler
from chainer.training.extensions import Evaluator

from chainer_dist.collectives.failures import together
from chainer_dist.datasets.intervals import split_evenly
from chainer_dist.datasets.scattered import ScatteredDataset
from chainer_dist.extensions import create_multi_node_evaluator
from chainer_dist.serialization.target import RANK_FREE_ITERATORS
from chainer_dist.training import samples
from chainer_dist.training.iterators import SAMPLES_ADVICE, plain_kind, rebuild

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["distribute_evaluator"]


def distribute_evaluator(
    evaluator: Evaluator, comm: CommunicatorBase, before: Callable[[], None] = lambda: None
) -> None:
    """Make an evaluator evaluate the whole set, of which each rank has a part, in place. Collective.

    Where batches of the set do not stand alone, every rank evaluates all of it, as one process would: with an
    ``evaluate`` or an iterator of the script's own, an ``eval_hook``, or a model that keeps a state from batch
    to batch.

    Args:
        evaluator: One of a trainer. One that ``create_multi_node_evaluator`` made is left as it is.
        comm: Communicator.
        before: Called before each evaluation.

    Raises:
        RankMismatchError: On every rank, if ranks have other samples.
    """
    _distribute(evaluator, comm)
    evaluate = evaluator.evaluate

    def prepare_and_evaluate(_: Evaluator) -> Any:
        before()
        return evaluate()

    evaluator.evaluate = types.MethodType(prepare_and_evaluate, evaluator)


def _distribute(evaluator: Evaluator, comm: CommunicatorBase) -> None:
    is_done = hasattr(evaluator, "_mn_communicator")
    own = getattr(evaluator, "_iterators", {})
    is_part = any(_is_part(iterator) for iterator in own.values())
    name = evaluator.name or "validation"
    lines = [
        (f"the evaluator {name!r}", f"{type(evaluator).__qualname__} of {[*own]}"),
        (f"whether the evaluator {name!r} has a part", f"{is_done} {is_part}"),
    ]
    samples.compare(comm, lines, "let all ranks make it alike")
    if is_done:
        return
    if is_part:
        create_multi_node_evaluator(evaluator, comm)
        return
    for key, iterator in own.items():
        _share_samples(iterator, comm, f"the data set {key!r} of the evaluator {name!r}")
    if not _stands_alone(evaluator):
        _evaluate_everywhere(evaluator, comm)
        return
    iterator = own["main"]
    kind = plain_kind(iterator)
    assert kind is not None  # noqa: S101 - it stands alone
    parts = split_evenly(len(iterator.dataset), comm.size, force_equal_length=False)
    part = parts[comm.rank]
    dataset = ScatteredDataset(iterator.dataset, part.begin, part.end)
    own["main"] = rebuild(iterator, kind, dataset, iterator.batch_size, repeat=False, shuffle=False)
    create_multi_node_evaluator(evaluator, comm)


def _is_part(iterator: Any) -> bool:
    dataset = getattr(iterator, "dataset", None)
    return isinstance(iterator, RANK_FREE_ITERATORS) or samples.is_scattered(dataset)


def _share_samples(iterator: Any, comm: CommunicatorBase, subject: str) -> None:
    dataset = getattr(iterator, "dataset", None)
    if samples.is_on_rank_zero_only(comm, dataset):
        iterator.dataset = samples.share(comm, dataset)
        if plain_kind(iterator) is not None and comm.rank != 0:
            iterator.reset()  # it has an order of nothing
        return
    with together(comm):
        lines = samples.describe(dataset, subject)
    samples.compare(comm, lines, SAMPLES_ADVICE)


def _stands_alone(evaluator: Evaluator) -> bool:
    """Return whether the score is a mean over samples, each of which counts for itself. Local."""
    own = evaluator._iterators  # noqa: SLF001 - Chainer's
    iterator = own.get("main")
    if getattr(evaluator.evaluate, "__func__", None) is not Evaluator.evaluate:
        return False
    if len(own) != 1 or plain_kind(iterator) is None or iterator.repeat:
        return False
    if type(iterator.order_sampler) not in (type(None), ShuffleOrderSampler):
        return False
    if evaluator.eval_hook is not None:
        return False
    links = [link for target in evaluator._targets.values() for link in target.links()]  # noqa: SLF001 - Chainer's
    return not any(hasattr(link, "reset_state") for link in links)


def _evaluate_everywhere(evaluator: Evaluator, comm: CommunicatorBase) -> None:
    """Let all ranks evaluate all, and take the score of rank 0, for what is drawn at random. Local."""
    original = evaluator.evaluate

    def evaluate(_: Evaluator) -> Any:
        with together(comm):
            result = original()
        return comm.bcast_obj({name: _plain(value) for name, value in result.items()})

    evaluator.evaluate = types.MethodType(evaluate, evaluator)
    evaluator._mn_communicator = comm  # noqa: SLF001 - ChainerMN's name
    if comm.rank != 0:
        evaluator._progress_bar = False  # noqa: SLF001 - Chainer's


def _plain(value: Any) -> Any:
    array = getattr(value, "array", value)
    return array.item() if getattr(array, "ndim", None) == 0 else array
