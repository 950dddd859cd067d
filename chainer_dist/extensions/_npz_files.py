"""Files of a trainer's state: written whole or not at all, checked, and loaded on other ranks."""

from __future__ import annotations

import os
import re
import zipfile
from typing import TYPE_CHECKING, Any

from chainer import serializers

from chainer_dist.iterators.distributed_iterator import DistributedIterator
from chainer_dist.iterators.multi_node_iterator import _MultiNodeIterator
from chainer_dist.iterators.synchronized_iterator import _SynchronizedIterator

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import BinaryIO

# Their state is the same on all ranks, and means the same on any number of ranks.
_RANK_FREE_ITERATORS = (DistributedIterator, _MultiNodeIterator, _SynchronizedIterator)

_ITERATOR_KEY = re.compile(r"(?:^|/)iterator:(?P<iterator>.+?)/(?P<key>[^/]+)$")


def write_npz(path: Path, values: dict[str, Any]) -> None:
    """Write a file that ``numpy.load`` reads. Whatever happens, an older file is not lost. Local.

    Not compressed: weights are hardly smaller compressed, and take many times as long.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            serializers.save_npz(file, values, compression=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
    ignored = _rank_bound_iterator_state(target) if restart_epoch else None
    name = file if hasattr(file, "read") else str(file)
    serializers.load_npz(name, target, ignore_names=ignored)


def _rank_bound_iterator_state(target: Any) -> Callable[[str], bool]:
    """Return a function that tells whether a key is the state of an iterator over one's own part."""
    iterators = getattr(getattr(target, "updater", target), "_iterators", {})
    rank_free = {name for name, it in iterators.items() if isinstance(it, _RANK_FREE_ITERATORS)}

    def is_rank_bound(key: str) -> bool:
        match = _ITERATOR_KEY.search(key)
        return bool(match and match["iterator"] not in rank_free and match["key"] != "epoch")

    return is_rank_bound
