"""Files of a trainer's state: written whole or not at all, checked, and loaded on other ranks."""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer import serializers

from chainer_dist._files import replacing
from chainer_dist.iterators.distributed_iterator import DistributedIterator
from chainer_dist.iterators.multi_node_iterator import _MultiNodeIterator
from chainer_dist.iterators.synchronized_iterator import _SynchronizedIterator
from chainer_dist.optimizers.multi_node_optimizer import MultiNodeOptimizer

if TYPE_CHECKING:
    import hashlib
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import IO, BinaryIO

# Their state is the same on all ranks, and means the same on any number of ranks.
RANK_FREE_ITERATORS = (DistributedIterator, _MultiNodeIterator, _SynchronizedIterator)


def write_npz(path: Path, values: dict[str, Any], digest: hashlib._Hash | None = None) -> int:
    """Write a file that ``numpy.load`` reads. Whatever happens, an older file is not lost. Local.

    Not compressed: weights are hardly smaller compressed, and take many times as long.

    Args:
        path: Of the file.
        values: Arrays by name.
        digest: Updated with what is written, if given.

    Returns:
        The size in bytes.
    """
    with replacing(path, text=False) as file:
        stream = _Stream(file, digest)
        np.savez(stream, **values)
    return stream.size


class _Stream(io.RawIOBase):
    """A file that is written from beginning to end, as a digest must see it, or up to an error.

    After that zipfile writes on, to close what it has opened: at once, or when NumPy before 2.0 leaves
    that to the collection of garbage, by which time this and the file may be closed.
    """

    def __init__(self, file: IO[Any], digest: hashlib._Hash | None) -> None:
        self._file = file
        self._digest = digest
        self._failed = False
        self.size = 0

    def write(self, data: Any) -> int:
        """Write bytes; after an error, do as if."""
        size = len(data)
        if self._failed or self._file.closed:
            return size
        try:
            self._file.write(data)
        except BaseException:
            self._failed = True
            raise
        if self._digest is not None:
            self._digest.update(data)
        self.size += size
        return size

    def flush(self) -> None:
        """Do nothing: nothing is kept here."""


def check_npz(file: Path | BinaryIO) -> None:
    """Raise an error if the file is not the whole of what was written. Local; reads all of it."""
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} is damaged")


def load_npz(file: Path | BinaryIO, target: Any, *, restart_epoch: bool) -> None:
    """Load a file into a trainer, an updater, or whatever else it was saved from. Local.

    Args:
        file: To read from.
        target: To load into, in place.
        restart_epoch: Whether iterators over a part of the data go back to the beginning of the
            epoch, in an order of their own, because the parts are not those that they were.
    """
    ignored = rank_bound(target) if restart_epoch else None
    name = file if hasattr(file, "read") else str(file)
    serializers.load_npz(name, target, ignore_names=ignored)


def parts(target: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what a trainer, an updater or a dict is made of, each with the path of its keys. Local.

    That is iterators, optimizers, links and whatever else is in a dict; an updater too, and before
    its own parts.
    """
    if isinstance(target, dict):
        for key, value in target.items():
            yield from parts(value, f"{path}{key}/")
    elif isinstance(target, chainer.training.Trainer):
        yield from parts(target.updater, f"{path}updater/")
    else:
        yield path, target
        if hasattr(target, "get_all_optimizers"):
            for name, iterator in getattr(target, "_iterators", {}).items():
                yield f"{path}iterator:{name}/", iterator
            for name, optimizer in target.get_all_optimizers().items():
                yield f"{path}optimizer:{name}/", optimizer
                yield f"{path}model:{name}/", optimizer.target


def consolidate(target: Any) -> None:
    """Let each rank save the state of a target's optimizers, wherever that is. Collective."""
    for _, part in parts(target):
        if isinstance(part, MultiNodeOptimizer):
            part.consolidate()


def rank_bound(target: Any) -> Callable[[str], bool]:
    """Return a function that tells whether a key is of a state that no other rank can go on from.

    That is the position of an iterator over a rank's own part, and that of a multi-node updater
    whose ranks have parts of different lengths.
    """
    iterators = [
        path
        for path, part in parts(target)
        if isinstance(part, chainer.dataset.Iterator) and not isinstance(part, RANK_FREE_ITERATORS)
    ]

    def is_rank_bound(key: str) -> bool:
        if key.endswith(("multi_node/is_done", "multi_node/fraction")):
            return bool(iterators)
        path, _, name = key.rpartition("/")
        return name != "epoch" and f"{path}/" in iterators

    return is_rank_bound
