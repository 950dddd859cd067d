"""Evaluating a model on all ranks together."""

from __future__ import annotations

import copy
import types
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from chainer import backend, function, iterators, reporter, variable
from chainer.training.extensions import Evaluator
from chainer.training.extensions.evaluator import _IteratorProgressBar

from chainer_dist import _chainer
from chainer_dist.collectives.calls import check_call
from chainer_dist.collectives.failures import together
from chainer_dist.datasets.scattered import hides_duplicates, own_samples
from chainer_dist.extensions.generic_multi_node_evaluator import (
    GenericMultiNodeEvaluator,
    call_with,
    has_no_samples,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["GenericMultiNodeEvaluator", "create_multi_node_evaluator"]

# Iterators that yield the samples in the order that they hold in their state.
_ORDERED_ITERATORS = (
    iterators.SerialIterator,
    iterators.MultithreadIterator,
    iterators.MultiprocessIterator,
)


class _WeightedMeans:
    """Weighted means of named values, over batches and then over ranks, in float64."""

    def __init__(self) -> None:
        self._totals: dict[str, tuple[Any, Any]] = {}

    def add(self, name: str, value: Any, weight: Any) -> None:
        """Add a value that stands for ``weight`` samples."""
        self._add(name, _float64(value) * weight, weight)

    def over_ranks(self, comm: CommunicatorBase) -> dict[str, Any]:
        """Return the means over all ranks. Collective: the same bits on every rank."""
        everywhere = _WeightedMeans()
        for totals in comm.allgather_obj(self._totals):
            for name, (total, weight) in totals.items():
                everywhere._add(name, total, weight)
        return {name: total / weight for name, (total, weight) in everywhere._totals.items()}

    def _add(self, name: str, total: Any, weight: Any) -> None:
        if name in self._totals:
            total, weight = self._totals[name][0] + total, self._totals[name][1] + weight
        self._totals[name] = (total, weight)


def create_multi_node_evaluator(
    actual_evaluator: Evaluator, communicator: CommunicatorBase
) -> Evaluator:
    """Make an evaluator evaluate the union of all ranks' datasets. Local.

    The result is that of evaluating every sample of the whole set once, however unevenly the
    ranks share it: each batch counts by its number of samples (plain Chainer's Evaluator counts a
    short last batch like a full one), and samples that ``scatter_dataset`` gave to two ranks to
    make parts equally long count once. A rank may have no samples at all. Values reported with a
    weight of their own, as ``(value, weight)``, keep it. All sums are in float64 and in the order
    of rank, so that all ranks get the same bits.

    Two cases are less exact. A class that overrides ``evaluate()`` has its local means weighted
    by the local number of samples, duplicates taken into its means. With an iterator that is none
    of Chainer's, or a dataset class of your own around the scattered one, duplicates are not
    recognized, and count twice, after a warning; scatter with ``force_equal_length=False`` then.

    Every evaluation is collective: all ranks call the evaluator at the same time, which an
    extension of a Trainer does. A progress bar is shown on rank 0 only.

    For example, with a test set that rank 0 has::

        test = chainer_dist.scatter_dataset(test if comm.rank == 0 else None, comm)
        iterator = chainer.iterators.SerialIterator(test, 100, repeat=False, shuffle=False)
        evaluator = chainer.training.extensions.Evaluator(iterator, model)
        trainer.extend(chainer_dist.create_multi_node_evaluator(evaluator, comm))

    Args:
        actual_evaluator: An Evaluator, of which ``evaluate()`` is replaced in place.
        communicator: Communicator.

    Returns:
        ``actual_evaluator`` itself. Its result is a dict of float64 scalars, the same on every
        rank, with each name that any rank reported. If evaluation raises on one rank, all raise.
        The same as ChainerMN's ``create_multi_node_evaluator``, which averages ranks unweighted.
    """
    check_call(
        "create_multi_node_evaluator(actual_evaluator, communicator)",
        communicator,
        actual_evaluator,
        needs="evaluate",
    )
    if not hasattr(actual_evaluator, "_mn_original_evaluate"):
        actual_evaluator._mn_original_evaluate = actual_evaluator.evaluate  # noqa: SLF001 - ChainerMN's name
    actual_evaluator._mn_communicator = communicator  # noqa: SLF001 - ChainerMN's name
    actual_evaluator.evaluate = types.MethodType(_evaluate, actual_evaluator)
    if communicator.rank != 0:
        actual_evaluator._progress_bar = False  # noqa: SLF001 - Chainer's
    return actual_evaluator


def _evaluate(evaluator: Evaluator) -> dict[str, Any]:
    """Evaluate on all ranks; this replaces ``evaluator.evaluate``. Collective."""
    comm = evaluator._mn_communicator  # noqa: SLF001 - ChainerMN's name
    means = _WeightedMeans()
    with together(comm):
        original = evaluator._mn_original_evaluate  # noqa: SLF001 - ChainerMN's name
        if getattr(original, "__func__", None) is Evaluator.evaluate:
            _evaluate_batches(evaluator, means)
        else:
            _evaluate_by(original, evaluator, means)
    return means.over_ranks(comm)


def _evaluate_batches(evaluator: Evaluator, means: _WeightedMeans) -> None:
    """Do what ``Evaluator.evaluate`` does, weighing batches and leaving duplicates out. Local."""
    iterator = evaluator._iterators["main"]  # noqa: SLF001 - Chainer's
    eval_func = evaluator.eval_func or evaluator._targets["main"]  # noqa: SLF001 - Chainer's

    if evaluator.eval_hook:
        evaluator.eval_hook(evaluator)

    if hasattr(iterator, "reset"):
        iterator.reset()
    else:
        warnings.warn(
            "This iterator does not have the reset method. Evaluator copies the iterator instead "
            "of resetting. This behavior is deprecated. Please implement the reset method.",
            DeprecationWarning,
            stacklevel=2,
        )
        iterator = copy.copy(iterator)
    if has_no_samples(iterator):
        return

    bar = _IteratorProgressBar(iterator=iterator) if evaluator._progress_bar else None  # noqa: SLF001 - Chainer's
    for batch, n_own in _own_batches(iterator, evaluator):
        observation: dict[str, Any] = {}
        with reporter.report_scope(observation):
            arrays = _chainer.call_converter(evaluator.converter, batch, evaluator.device)
            with function.no_backprop_mode():
                call_with(eval_func, arrays)
        if n_own:
            _add_observation(means, observation, n_own)
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.close()


def _own_batches(iterator: Any, evaluator: Evaluator) -> Iterator[tuple[Any, int]]:
    """Yield batches without duplicates of other ranks' samples, and how many samples count."""
    dataset = getattr(iterator, "dataset", None)
    own = own_samples(dataset)
    if own is not None and not _keeps_order(iterator):
        own = None
        _warn_of_duplicates(evaluator, iterator)
    elif hides_duplicates(dataset):
        _warn_of_duplicates(evaluator, dataset)
    if own is not None and _chainer.order_of(iterator) is not None:
        own = own[_chainer.order_of(iterator)]
    done = 0
    for batch in iterator:
        flags = None if own is None else own[done : done + len(batch)]
        done += len(batch)
        if flags is None or flags.all():
            yield batch, len(batch)
        elif flags.any():
            yield [sample for sample, counts in zip(batch, flags) if counts], int(flags.sum())
        else:
            # Evaluated all the same, not counted: a model split over ranks needs each of them
            # to make the same number of calls.
            yield batch, 0


def _keeps_order(iterator: Any) -> bool:
    own = type(iterator)
    return any(
        isinstance(iterator, cls)
        and own.__next__ is cls.__next__
        and own.__iter__ is cls.__iter__
        and own.reset is cls.reset
        for cls in _ORDERED_ITERATORS
    )


def _warn_of_duplicates(evaluator: Evaluator, source: Any) -> None:
    if getattr(evaluator, "_mn_warned_of_duplicates", False):
        return
    evaluator._mn_warned_of_duplicates = True  # noqa: SLF001 - this module's own
    warnings.warn(
        f"the order of samples in a {type(source).__qualname__} is not known, so samples that "
        "scatter_dataset gave to two ranks count twice; scatter the evaluation set with "
        "force_equal_length=False",
        UserWarning,
        stacklevel=2,
    )


def _evaluate_by(original: Any, evaluator: Evaluator, means: _WeightedMeans) -> None:
    """Let a class that overrides ``evaluate`` do it. Local."""
    iterator = getattr(evaluator, "_iterators", {}).get("main")
    if has_no_samples(iterator):
        return  # Chainer's iterators cannot iterate over nothing
    dataset: Any = getattr(iterator, "dataset", None)
    own = own_samples(dataset)
    n_samples = len(dataset) if hasattr(dataset, "__len__") else 1
    n_own = n_samples if own is None else int(own.sum())
    for name, value in original().items():
        if n_own:
            means.add(name, value, n_own)


def _add_observation(means: _WeightedMeans, observation: dict[str, Any], n_samples: int) -> None:
    """Add what Chainer's ``DictSummary`` would: scalars, alone or as ``(value, weight)``."""
    for name, reported in observation.items():
        value, weight = reported, n_samples
        if isinstance(reported, tuple):
            value, weight = reported
            if not _is_scalar(weight):
                raise ValueError(f"the weight reported with {name} is not a scalar: {weight!r}")
            weight = _float64(weight)
        if _is_scalar(value):
            means.add(name, value, weight)


def _is_scalar(value: Any) -> bool:
    return bool(np.isscalar(value)) or getattr(value, "ndim", -1) == 0


def _float64(value: Any) -> Any:
    """Return a value of any kind that Chainer computes with in NumPy's double precision."""
    array = value.array if isinstance(value, variable.Variable) else value
    array = np.asarray(backend.CpuDevice().send(array))
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)[()]
