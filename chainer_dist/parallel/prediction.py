"""A trained model applied to all samples of a dataset, on all ranks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import operator
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import chainer
import numpy as np
from chainer.dataset import convert

from chainer_dist import _progress
from chainer_dist._files import replacing
from chainer_dist.collectives.agreement import check_same
from chainer_dist.collectives.calls import check_call
from chainer_dist.collectives.failures import raise_together, together
from chainer_dist.datasets.scattered import ScatteredDataset
from chainer_dist.errors import FailedItem, RankMismatchError
from chainer_dist.extensions.allreduce_persistent import _persistents
from chainer_dist.extensions.generic_multi_node_evaluator import call_with
from chainer_dist.iterators.distributed_iterator import _integer
from chainer_dist.parallel import dealing
from chainer_dist.parallel.dealing import Block, Chunk, Dealer, End
from chainer_dist.serialization.npz import write_npz

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from chainer_dist.communicators import CommunicatorBase

INDEX_FILE = "index.json"

_AHEAD = 32  # batches or files a rank, in work or done out of order
_FILES_A_RANK = 8  # at least, so that ranks end at about the same time
_LARGEST_FILE = 1024  # samples


def predict(
    model: Callable[..., Any],
    dataset: Any,
    comm: CommunicatorBase,
    *,
    batchsize: int = 32,
    converter: Callable[..., Any] = convert.concat_examples,
    everywhere: bool = False,
    out: str | os.PathLike[str] | None = None,
    samples_per_file: int | None = None,
    on_error: str = "raise",
    progress: bool = False,
) -> Any:
    """Apply a model to every sample of a dataset, on all ranks. Collective.

    Results come back, or go to files::

        scores = chainer_dist.predict(model, images, comm)  # on rank 0: a list of arrays
        chainer_dist.predict(model, images, comm, out="scores")  # or in files

    Batches of consecutive samples are dealt out to whichever rank has none left, as with
    :func:`~chainer_dist.pmap`. The model runs with ``chainer.config.train`` off and builds no graph.
    If it raises for a batch, the batch is done again one sample at a time, so that only those
    samples are lost that cannot be computed.

    Args:
        model: A link, or any other callable: a method such as ``classifier.predictor``, a lambda. If
            it is a link, all its parameters and persistent values must be the same on every rank, which
            is checked. If only rank 0 has loaded it, ``comm.bcast_data(model)`` makes parameters equal,
            but not persistent values, such as running statistics: load those on every rank.
        dataset: All samples, with ``__len__`` and ``__getitem__(int)``; either on rank 0 alone, which
            then loads and sends them, and None elsewhere; or the same on every rank, and each
            loads those of its batches. Samples are what ``model`` takes: to leave labels out
            use ``chainer.datasets.TransformDataset(dataset, lambda sample: sample[0])``.
        comm: Communicator.
        batchsize: Samples in a batch at most.
        converter: Makes arrays of a list of samples: a tuple or a dict (arguments of the model), or one
            array. Called with the list and ``device=None``.
        everywhere: Whether every rank gets the results.
        out: A folder, to which results are written instead of being returned, by each rank those that it
            has computed: for results that are larger than memory. It is made if it is not there,
            must be empty, and must be reached by every rank under this name.
        samples_per_file: With ``out``; None stands for 1,024, or less if ranks had fewer than eight files
            each. Rounded up to whole batches. Ranks have that many samples in memory.
        on_error: As with :func:`~chainer_dist.pmap`: ``raise`` an error at the end if samples failed,
            or ``return``.
        progress: Whether rank 0 shows a bar, for which tqdm must be installed.

    All options but ``progress`` are the same on every rank; ``model``, ``converter`` and ``out`` had better
    be.

    Returns:
        A list with an entry for each sample in the order of the dataset, on rank 0 or with
        ``everywhere`` on all; None elsewhere. An entry is what the model returns for the sample: if
        that returns an array or Variable of shape ``(batch, ...)``, an array of shape ``(...)`` (a
        scalar for ``(batch,)``); a tuple or dict of these, if it returns such; or a
        :class:`~chainer_dist.errors.FailedItem`. ``numpy.stack`` makes one array of arrays.

        With ``out`` on every rank a list of files in the order of the dataset, for
        ``chainer_dist.datasets.FilesDataset``. Each is an ``.npz`` file of one or several batches, with
        the numbers of its samples as ``index``, int64, and what the model returns for them as
        ``output``, or for tuples and dicts ``output/0``, ``output/name`` and so on. Samples that failed
        are left out. When all are there, ``index.json`` lists them with their first sample and number
        of samples, and the failures. Files are written whole or not at all.

    Raises:
        FailedItemsError: On every rank, with ``on_error="raise"``, if samples failed, of which it has
            the list, and on the ranks that get them all results. Files and index are written anyway. A file
            that cannot be written is a failure of all its samples.
        RankMismatchError: On every rank, if options, datasets' lengths or parameters differ.
        ValueError, TypeError: On every rank, if an option, the dataset or ``out`` is of no use; or if
            a parameter is not initialized.
        ImportError: On every rank, if tqdm is wanted on rank 0 and not installed.
    """
    check_call("predict(model, dataset, comm)", comm, model, dataset)
    prediction = _Prediction(model, dataset, comm, batchsize, converter)
    folder = None if out is None else Path(out)
    per_file = 0

    def describe() -> list[tuple[str, str]]:
        nonlocal per_file
        size = _integer("batchsize", batchsize, 1)
        wanted = 1 if samples_per_file is None else samples_per_file
        per_file = size * -(-_integer("samples_per_file", wanted, 1) // size)
        dealing.check_on_error(on_error)
        prediction.prepare()
        if comm.rank == 0:
            if progress:
                _progress.load_tqdm()
            if folder is not None:
                _make_empty(folder)
        return [
            ("batchsize", str(size)),
            ("everywhere", str(bool(everywhere))),
            ("out", "None" if out is None else "a folder"),
            ("samples_per_file", str(samples_per_file)),
            ("on_error", on_error),
        ]

    dealing.check(comm, describe)
    prediction.compare()
    length = batchsize
    if folder is not None:
        _check_reached(comm, folder)
        if samples_per_file is None:
            n_samples = min(_LARGEST_FILE, prediction.length // (_FILES_A_RANK * comm.size))
            per_file = max(n_samples // batchsize, 1) * batchsize
        length = per_file

    def work(chunk: Chunk) -> Block:
        return prediction.run(chunk) if folder is None else prediction.write(chunk, folder)

    def make_dealer() -> Dealer:
        return Dealer(
            comm,
            prediction.chunks(length),
            work,
            ordered=True,
            ahead=_AHEAD * comm.size,
            bar=_progress.bar(total=prediction.length, unit="sample") if progress else None,
        )

    blocks, end = dealing.collect(comm, make_dealer, work, everywhere=everywhere and folder is None)
    results = None if blocks is None else [*itertools.chain.from_iterable(blocks)]
    if folder is not None:
        results = _finish_files(comm, folder, prediction.length, results, end)
    end.raise_errors(comm, results if folder is None else None, raises=on_error == "raise")
    return results


class _Prediction:
    """A model, and where its samples come from.

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
        """Look at model and dataset. Local."""
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
        """Find out whether the ranks have the same model, and which have the dataset. Collective."""
        comm = self._comm
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
        except dealing.ITEM_ERRORS:
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
                    parts.append(_columns(values))
            if not index:
                return Block(chunk.first, [], failed)
            columns = {key: np.concatenate([each[key] for each in parts]) for key in parts[0]}
            write_npz(folder / name, {"index": np.array(index, np.int64), **columns})
        except Exception as error:  # noqa: BLE001 - batches that do not fit together, a full disk
            known = {each.index for each in failed}
            failed += [
                dealing.failed_item(self._comm, number, error)
                for number in range(chunk.first, last + 1)
                if number not in known
            ]
            return Block(chunk.first, [], failed)
        return Block(chunk.first, [_File(name, chunk.first, len(index))], failed)

    def _load(self, numbers: Sequence[int]) -> list[Any]:
        return [
            dealing.attempt(self._comm, number, operator.getitem, self._dataset, number)
            for number in numbers
        ]

    def _single(self, number: int, sample: Any) -> Any:
        return dealing.attempt(self._comm, number, lambda: self._batch([sample])[0])

    def _batch(self, samples: list[Any]) -> _Rows:
        with chainer.using_config("train", value=False), chainer.no_backprop_mode():
            arrays = convert._call_converter(self._converter, samples, None)
            output = call_with(self._model, arrays)
        if isinstance(output, (dict, tuple, list)) and not output:
            raise ValueError(f"the model returned an empty {type(output).__name__}")
        if isinstance(output, dict):
            return _Rows({key: _rows_of(x, len(samples)) for key, x in output.items()})
        if isinstance(output, (tuple, list)):
            return _Rows(tuple(_rows_of(x, len(samples)) for x in output))
        return _Rows(_rows_of(output, len(samples)))


class _Rows(Sequence[Any]):
    """What a model returned for a batch, sample by sample.

    Args:
        output: An array of shape ``(n, ...)``, or a tuple or dict of such.
    """

    def __init__(self, output: Any) -> None:
        self.output = output

    def __len__(self) -> int:
        if isinstance(self.output, dict):
            return len(next(iter(self.output.values())))
        return len(self.output[0] if isinstance(self.output, tuple) else self.output)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(self.output, dict):
            return {key: array[index] for key, array in self.output.items()}
        if isinstance(self.output, tuple):
            return tuple(array[index] for array in self.output)
        return self.output[index]


class _File(NamedTuple):
    """What the index tells of a file.

    Attributes:
        file: Its name.
        first: Number of the first sample that it may have.
        n_samples: How many it has.
    """

    file: str
    first: int
    n_samples: int


def _rows_of(x: Any, length: int) -> Any:
    """Return a model's output as an array, if it has a row for each sample."""
    array = x.array if isinstance(x, chainer.Variable) else x
    shape = getattr(array, "shape", None)
    if shape is None or shape[:1] != (length,):
        got = type(array).__name__ if shape is None else f"shape {shape}"
        raise ValueError(
            f"the model returned {got} for {length} samples, expected arrays of shape ({length}, ...)"
        )
    return array


def _columns(values: Sequence[Any]) -> dict[str, Any]:
    """Return arrays with a row for each sample that did not fail, by the names they have in a file."""
    if isinstance(values, _Rows):
        output = values.output
    else:
        rows = [x for x in values if not isinstance(x, FailedItem)]
        if isinstance(rows[0], dict):
            output = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        elif isinstance(rows[0], tuple):
            output = tuple(np.stack(column) for column in zip(*rows))
        else:
            output = np.stack(rows)
    if isinstance(output, dict):
        return {f"output/{key}": array for key, array in output.items()}
    if isinstance(output, tuple):
        return {f"output/{number}": array for number, array in enumerate(output)}
    return {"output": output}


def _failed(values: Sequence[Any]) -> list[FailedItem]:
    return [x for x in values if isinstance(x, FailedItem)]


def _checksums(model: chainer.Link) -> list[tuple[str, str]]:
    """Describe parameters and persistent values, so that equal ones have equal descriptions."""
    found = {name: param.array for name, param in model.namedparams()}
    for name, link, key in _persistents(model):
        found[name] = getattr(link, key)
    lines = []
    for name, value in sorted(found.items()):
        described = repr(value)
        if hasattr(value, "dtype"):
            array = np.ascontiguousarray(value)
            described = f"{array.shape} {array.dtype} with checksum {zlib.crc32(array.data):08x}"
        lines.append((name, described))
    return lines


def _make_empty(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"out is {folder}, which is not empty: remove it, or name another")


def _check_reached(comm: CommunicatorBase, folder: Path) -> None:
    """Raise an error on every rank if one cannot see a folder that rank 0 has made. Collective."""
    error = None
    if not folder.is_dir():
        error = FileNotFoundError(f"out is {folder}, which rank 0 has made, but is not there")
    raise_together(comm, error)


def _finish_files(
    comm: CommunicatorBase, folder: Path, length: int, files: list[Any] | None, end: End
) -> list[Path]:
    """Write the index, and return all files on every rank. Collective."""
    names: list[str] = []
    with together(comm):
        if files is not None:
            written = [each for each in files if isinstance(each, _File)]
            names = [each.file for each in written]
            index = {
                "length": length,
                "files": [each._asdict() for each in written],
                "failures": [dataclasses.asdict(each) for each in end.failed],
            }
            with replacing(folder / INDEX_FILE) as file:
                json.dump(index, file, indent=1)
    return [folder / name for name in comm.bcast_obj(names)]
