"""A model, and the samples that it is applied to, batch by batch."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import chainer
import numpy as np

from chainer_dist._chainer import call_converter
from chainer_dist.collectives.agreement import check_same
from chainer_dist.collectives.failures import together
from chainer_dist.datasets.scattered import ScatteredDataset
from chainer_dist.errors import FailedItem, RankMismatchError
from chainer_dist.extensions.allreduce_persistent import persistent_values
from chainer_dist.extensions.generic_multi_node_evaluator import call_with
from chainer_dist.optimizers.replicas import checksum
from chainer_dist.parallel.items import ITEM_ERRORS, Block, Chunk, attempt, failed_item
from chainer_dist.parallel.prediction_files import PredictionFile
from chainer_dist.parallel.rows import Rows, columns_of, rows_of
from chainer_dist.serialization.npz import write_npz

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["BatchPrediction"]


class BatchPrediction:
    """A model, and where its samples come from.

    Args:
        model: Link, or any other callable.
        dataset: All samples, or None on ranks that have none.
        comm: Communicator whose ranks predict.
        batchsize: Number of samples in a batch at most.
        converter: Function that makes arrays of a list of samples.

    Attributes:
        length: Samples in all; known after :meth:`compare`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        dataset: Any,
        comm: CommunicatorBase,
        batchsize: int,
        converter: Callable[..., Any],
    ) -> None:
        self._model = model
        self._dataset = dataset
        self._comm = comm
        self._batchsize = batchsize
        self._converter = converter
        self._own_length: int | None = None
        self._is_everywhere = False  # the dataset
        self.length = 0

    def prepare(self) -> None:
        """Check model and dataset. Local.

        Raises:
            ValueError, TypeError: If the dataset is missing on rank 0, or is only a part; or if a parameter is
                not initialized.
        """
        if isinstance(self._dataset, ScatteredDataset):
            raise TypeError(
                "dataset is a rank's part of a dataset, expected all samples: predict shares them "
                "out itself, to whichever rank has none left"
            )
        if self._dataset is not None:
            self._own_length = len(self._dataset)
        elif self._comm.rank == 0:
            raise ValueError("dataset is None, which it may be on other ranks, but not on rank 0")
        if isinstance(self._model, chainer.Link):
            for name, param in self._model.namedparams():
                if param.array is None:
                    raise ValueError(
                        f"{name} is not initialized: load the model, or call it once, before"
                    )

    def compare(self) -> None:
        """Find out whether the ranks have the same model, and which have the dataset. Collective.

        Raises:
            RankMismatchError: On every rank, if parameters or lengths of datasets differ.
        """
        comm = self._comm
        with together(comm):
            lines = _checksums(self._model) if isinstance(self._model, chainer.Link) else []
        check_same(comm, lines)
        lengths = comm.allgather_obj(self._own_length)
        for rank, each in enumerate(lengths):
            if each not in (None, lengths[0]):
                raise RankMismatchError(
                    f"rank {rank}: the length of the dataset is {each}, expected {lengths[0]} as on "
                    "rank 0, or None for the dataset"
                )
        self.length = lengths[0]
        self._is_everywhere = None not in lengths

    def chunks(self, length: int) -> Iterator[Sequence[Any]]:
        """Yield numbers of consecutive samples, or where only rank 0 has them the samples."""
        for first in range(0, self.length, length):
            numbers = range(first, min(first + length, self.length))
            yield numbers if self._is_everywhere else self._load(numbers)

    def run(self, chunk: Chunk) -> Block:
        """Return what the model returns for a batch of samples. Local."""
        samples = chunk.items
        if isinstance(samples, range):
            samples = self._load(samples)
        good = [
            (number, sample)
            for number, sample in enumerate(samples, chunk.first)
            if not isinstance(sample, FailedItem)
        ]
        if not good:
            return Block(chunk.first, samples, list(samples))
        values: Sequence[Any]
        try:
            values = self._batch([sample for _, sample in good])
        except ITEM_ERRORS:
            values = [self._single(number, sample) for number, sample in good]
        if len(good) < len(samples):
            found = iter(values)
            values = [x if isinstance(x, FailedItem) else next(found) for x in samples]
        return Block(chunk.first, values, _failed(values))

    def write(self, chunk: Chunk, folder: Path) -> Block:
        """Write a file with what the model returns for some batches, and return its name. Local."""
        failed: list[FailedItem] = []
        index: list[int] = []
        parts: list[dict[str, Any]] = []
        last = chunk.first + len(chunk.items) - 1
        name = f"samples-{chunk.first:010}-{last:010}.npz"
        try:
            for start in range(0, len(chunk.items), self._batchsize):
                part = chunk.items[start : start + self._batchsize]
                first, values, lost = self.run(Chunk(chunk.first + start, part))
                failed += lost
                numbers = [i for i, x in enumerate(values, first) if not isinstance(x, FailedItem)]
                if numbers:
                    index += numbers
                    parts.append(columns_of(values))
            if not index:
                return Block(chunk.first, [], failed)
            columns = {key: np.concatenate([each[key] for each in parts]) for key in parts[0]}
            write_npz(folder / name, {"index": np.array(index, np.int64), **columns})
        except Exception as error:  # noqa: BLE001 - batches that do not fit together, a full disk
            known = {each.index for each in failed}
            failed += [
                failed_item(self._comm, number, error)
                for number in range(chunk.first, last + 1)
                if number not in known
            ]
            return Block(chunk.first, [], failed)
        return Block(chunk.first, [PredictionFile(name, chunk.first, len(index))], failed)

    def _load(self, numbers: Sequence[int]) -> list[Any]:
        return [
            attempt(self._comm, number, operator.getitem, self._dataset, number)
            for number in numbers
        ]

    def _single(self, number: int, sample: Any) -> Any:
        return attempt(self._comm, number, lambda: self._batch([sample])[0])

    def _batch(self, samples: list[Any]) -> Rows:
        with chainer.using_config("train", value=False), chainer.no_backprop_mode():
            arrays = call_converter(self._converter, samples, None)
            output = call_with(self._model, arrays)
        if isinstance(output, (dict, tuple, list)) and not output:
            raise ValueError(f"the model returned an empty {type(output).__name__}")
        if isinstance(output, dict):
            return Rows({key: rows_of(x, len(samples)) for key, x in output.items()})
        if isinstance(output, (tuple, list)):
            return Rows(tuple(rows_of(x, len(samples)) for x in output))
        return Rows(rows_of(output, len(samples)))


def _failed(values: Sequence[Any]) -> list[FailedItem]:
    return [x for x in values if isinstance(x, FailedItem)]


def _checksums(model: chainer.Link) -> list[tuple[str, str]]:
    """Describe parameters and persistent values, so that equal ones have equal descriptions."""
    found = {name: param.array for name, param in model.namedparams()}
    for name, link, key in persistent_values(model):
        found[name] = getattr(link, key)
    lines = []
    for name, value in sorted(found.items()):
        described = repr(value)
        if hasattr(value, "dtype") and not value.dtype.hasobject:
            array = np.asarray(value)
            described = f"{array.shape} {array.dtype} with checksum {checksum(array):08x}"
        lines.append((name, described))
    return lines
