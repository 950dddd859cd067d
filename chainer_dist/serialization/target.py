"""What a trainer's state is made of, and how it is loaded from a file of arrays."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import chainer
import numpy as np
from chainer.serializers import NpzDeserializer

from chainer_dist._files import open_regular
from chainer_dist.iterators.distributed_iterator import DistributedIterator
from chainer_dist.iterators.divided import DividedIterator
from chainer_dist.iterators.multi_node_iterator import MultiNodeIterator
from chainer_dist.iterators.synchronized_iterator import SynchronizedIterator
from chainer_dist.optimizers.multi_node_optimizer import MultiNodeOptimizer
from chainer_dist.serialization.npz import ArrayFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# Their state is the same on all ranks, and means the same on any number of ranks.
RANK_FREE_ITERATORS = (
    DistributedIterator,
    DividedIterator,
    MultiNodeIterator,
    SynchronizedIterator,
)


def load_npz(
    file: Path | BinaryIO, target: Any, *, restart_epoch: bool, allow_pickle: bool = False
) -> None:
    """Load a file into a trainer, an updater, or whatever else it was saved from. Local.

    Args:
        file: File to read from.
        target: Object into which is loaded, in place.
        restart_epoch: Whether iterators over a part of the data go back to the beginning of the
            epoch, in an order of their own, because the parts have changed.
        allow_pickle: Whether objects are loaded that need pickle, which can run any code.

    Raises:
        PickleRefusedError: If there are such objects where it is not allowed.
    """
    ignored = rank_bound(target) if restart_epoch else None
    with contextlib.ExitStack() as stack:
        if isinstance(file, Path):
            file = stack.enter_context(open_regular(file))
        arrays = ArrayFile(file, allow_pickle=allow_pickle)
        _Loader(arrays, ignore_names=ignored).load(target)


class _Loader(NpzDeserializer):  # type: ignore[misc]  # Chainer has no types
    """Chainer's, that reads no array which is larger than the place for it."""

    def __getitem__(self, key: str) -> _Loader:
        return _Loader(self.npz, f"{self.path}{key.strip('/')}/", self.strict, self.ignore_names)

    def __call__(self, key: str, value: Any) -> Any:
        name = self.path + key.lstrip("/")
        if callable(self.ignore_names) and self.ignore_names(name):
            return value
        if value is not None and name in self.npz:
            shape = self.npz.shape(name)
            if math.prod(shape) > np.size(value):
                raise ValueError(
                    f"could not broadcast {name} of shape {shape} into {np.shape(value)}"
                )
        return super().__call__(key, value)


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
    """Return a function that returns whether a key is of a state that no other rank can go on from.

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
