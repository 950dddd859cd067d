"""A trained model applied to all samples of a dataset, on all ranks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainer.dataset import convert

from chainer_dist import _progress
from chainer_dist._counts import checked_count
from chainer_dist.collectives.calls import check_call
from chainer_dist.parallel import dealing
from chainer_dist.parallel.batch_prediction import BatchPrediction
from chainer_dist.parallel.dealing import Dealer
from chainer_dist.parallel.prediction_files import check_reached, finish_files, make_empty

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from chainer_dist.communicators import CommunicatorBase
    from chainer_dist.parallel.items import Block, Chunk


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
            loads the samples of its batches. Samples are what ``model`` takes: to leave labels out
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
    prediction = BatchPrediction(model, dataset, comm, batchsize, converter)
    folder = None if out is None else Path(out)
    per_file = 0

    def describe() -> list[tuple[str, str]]:
        nonlocal per_file
        size = checked_count("batchsize", batchsize, 1)
        wanted = 1 if samples_per_file is None else samples_per_file
        per_file = size * -(-checked_count("samples_per_file", wanted, 1) // size)
        dealing.check_on_error(on_error)
        prediction.prepare()
        if comm.rank == 0:
            if progress:
                _progress.load_tqdm()
            if folder is not None:
                make_empty(folder)
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
        check_reached(comm, folder)
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
        results = finish_files(comm, folder, prediction.length, results, end.failed)
    end.raise_errors(comm, results if folder is None else None, raises=on_error == "raise")
    return results
