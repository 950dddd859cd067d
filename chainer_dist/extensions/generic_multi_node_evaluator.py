"""Evaluating on all ranks what is no mean: one rank gets all results."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from chainer import backend, configuration, function
from chainer.dataset import convert
from chainer.training import extension

from chainer_dist import _chainer
from chainer_dist.collectives.agreement import check_same
from chainer_dist.collectives.calls import check_call
from chainer_dist.collectives.failures import together
from chainer_dist.iterators.multi_node_iterator import MultiNodeIterator

if TYPE_CHECKING:
    from collections.abc import Callable

    import chainer

    from chainer_dist.communicators import CommunicatorBase


class GenericMultiNodeEvaluator(extension.Extension):  # type: ignore[misc]  # Chainer has no types
    """Evaluates batches on all ranks, and aggregates the results of all of them on one.

    For scores that are no mean over samples, such as BLEU or an area under a curve. The same as
    ChainerMN's class: override :meth:`calc_local` and :meth:`aggregate`. Nothing is reported by
    itself; ``aggregate`` may call :func:`chainer.report` with ``trainer.reporter`` at work.

    Ranks may have any number of samples, or none. Results are sent once, after the last batch.

    For example, for the median of the loss over batches, where ``iterator`` ends after an epoch::

        class MedianLoss(chainer_dist.extensions.GenericMultiNodeEvaluator):
            def calc_local(self, x, t):
                return float(model(x, t).array)

            def aggregate(self, results):  # on root
                chainer.report({"median": np.median(results)})

        trainer.extend(MedianLoss(comm, iterator, model))

    Args:
        comm: Communicator, or None to evaluate in this process alone.
        iterator: Iterator over this rank's samples that ends after an epoch. It is reset before each
            evaluation, or copied if it cannot be reset.
        target: Called with the arrays of a batch, unless ``calc_local`` is overridden.
        device: Given to the converter.
        converter: Makes arrays of a batch: a tuple, a dict, or one array.
        root: Rank that aggregates, the same on every rank.
        progress_hook: Called on root with each of its batches, after it was evaluated.

    Raises:
        ValueError: If ``root`` is no rank.
    """

    trigger = 1, "epoch"
    default_name = "validation"
    priority = extension.PRIORITY_WRITER
    name = None

    def __init__(  # noqa: PLR0917 - ChainerMN's positional parameters
        self,
        comm: CommunicatorBase | None,
        iterator: Any,
        target: Callable[..., Any],
        device: Any = None,
        converter: Callable[..., Any] = convert.concat_examples,
        root: int = 0,
        *,
        progress_hook: Callable[[Any], Any] | None = None,
    ) -> None:
        if comm is not None:
            call = "GenericMultiNodeEvaluator(comm, iterator, target)"
            check_call(call, comm, iterator, target)
        size = 1 if comm is None else comm.size
        if not 0 <= root < size:
            raise ValueError(f"root is {root}, expected a rank: 0 to {size - 1}")
        self.comm = comm
        self.iterator = iterator
        self._targets = {"main": target}
        self.converter = converter
        self.device = None if device is None else backend.get_device(device)
        self._progress_hook = progress_hook
        self.root = root

    def __call__(self, trainer: chainer.training.Trainer | None = None) -> Any:
        """Evaluate. Collective.

        Batches are evaluated with ``chainer.config.train`` off and without building graphs.

        Returns:
            What :meth:`aggregate` returns on root, None elsewhere.

        Raises:
            Exception: On every rank, whatever is raised on any of them.
            RankMismatchError: On every rank, if ``root`` differs.
        """
        del trainer
        comm = self.comm
        if comm is None:
            return self.aggregate(self._evaluate_local())
        check_same(comm, [("root", str(self.root))])
        total = None
        with together(comm):
            own = self._evaluate_local()
        with together(comm):
            everyone = comm.gather_obj(own, root=self.root)
            if everyone is not None:
                total = self.aggregate(_by_round(everyone))
        return total

    def calc_local(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of one batch. Local; override it to compute something else.

        Args:
            args: Arrays of the batch, if the converter returns a tuple or one array.
            kwargs: Arrays of the batch, if the converter returns a dict.

        Returns:
            A picklable object. None is left out of the results.
        """
        return self._targets["main"](*args, **kwargs)

    def aggregate(self, results: list[Any]) -> Any:
        """Return the result of the evaluation. Called once, on root; override it.

        Args:
            results: Results of ``calc_local`` for each batch of each rank: for the first batches of all ranks
                in the order of rank, then for the second ones, and so on.

        Returns:
            Anything; by default the results themselves.
        """
        return results

    def _evaluate_local(self) -> list[Any]:
        iterator = self.iterator
        if getattr(iterator, "repeat", False):
            raise ValueError("the iterator of an evaluator must end: make it with repeat=False")
        if hasattr(iterator, "reset"):
            iterator.reset()
        else:
            iterator = copy.copy(iterator)
        if has_no_samples(iterator):
            return []
        is_root = self.comm is None or self.comm.rank == self.root
        results = []
        for batch in iterator:
            arrays = _chainer.call_converter(self.converter, batch, self.device)
            with configuration.using_config("train", value=False), function.no_backprop_mode():
                results.append(call_with(self.calc_local, arrays))
            if is_root and self._progress_hook is not None:
                self._progress_hook(batch)
        return results


def call_with(called: Callable[..., Any], arrays: Any) -> Any:
    """Call a function with what a converter made of a batch, as Chainer's updaters do. Local."""
    if isinstance(arrays, tuple):
        return called(*arrays)
    if isinstance(arrays, dict):
        return called(**arrays)
    return called(arrays)


def has_no_samples(iterator: Any) -> bool:
    """Return whether an iterator's dataset is empty, over which Chainer's iterators cannot iterate. Local."""
    if isinstance(iterator, MultiNodeIterator):
        return False  # only its master has the dataset, and all ranks must go on alike
    dataset: Any = getattr(iterator, "dataset", None)
    return hasattr(dataset, "__len__") and len(dataset) == 0


def _by_round(everyone: list[list[Any]]) -> list[Any]:
    """Return all results but None, batch by batch, and for each in the order of rank."""
    n_rounds = max(map(len, everyone))
    rounds = [results[i] for i in range(n_rounds) for results in everyone if i < len(results)]
    return [result for result in rounds if result is not None]
