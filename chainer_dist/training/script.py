"""An unmodified script made data-parallel, as ``chainer-dist run --distribute`` asks for it.

Chainer's classes are changed before the script has seen them, by ``chainer_dist.pth`` or by the script's own
import of chainer_dist. Iterators that repeat are distributed when they are made. A trainer is distributed when it
is run, and an optimizer in a loop of the script's own at its first update: models draw their first values as they
do in one process.
"""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import os
import random
import sys
from typing import TYPE_CHECKING, Any

import chainer
import numpy as np

from chainer_dist import _environment
from chainer_dist.collectives.failures import together
from chainer_dist.communicators import create_communicator
from chainer_dist.extensions import AllreducePersistent
from chainer_dist.training import trainers
from chainer_dist.training.iterators import BATCHES, KINDS, distribute_iterator
from chainer_dist.training.optimizers import distribute_when_it_updates, is_distributed

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["install"]


def install() -> None:
    """Change Chainer's classes if the environment asks for it. Local.

    ``CHAINER_DIST_DISTRIBUTE`` is ``1``, ``rank`` or ``global``, and perhaps a comma and a seed. What this process
    starts is no part of the training, and does not find the variable.

    Raises:
        ValueError: If the variable is something else.
    """
    words = os.environ.pop(_environment.DISTRIBUTE, "0") or "0"
    if words == "0" or multiprocessing.parent_process() is not None:
        return
    batch, _, seed = words.partition(",")
    batch = "rank" if batch == "1" else batch
    if batch not in BATCHES or not (seed or "0").isdecimal():
        raise ValueError(
            f"{_environment.DISTRIBUTE} is {words!r}, expected 1, rank or global, and perhaps a comma and a seed"
        )
    # Models, orders and parts of the data are drawn alike on all ranks, until training begins.
    np.random.seed(int(seed or 0) % 2**32)  # noqa: NPY002 - what Chainer draws from
    random.seed(int(seed or 0))
    _Script(batch).change_chainer()


class _Script:
    """The script of this process."""

    def __init__(self, batch: str) -> None:
        self._batch = batch
        self._made: CommunicatorBase | None = None
        self._has_iterator = False
        self._has_begun = False  # a loop of its own
        self._trains = 0  # how many trainers are running
        self._saves = False
        self._depth = 0  # of calls of setup

    @property
    def _comm(self) -> CommunicatorBase:
        if self._made is None:
            self._made = create_communicator()
        return self._made

    def change_chainer(self) -> None:
        """Let what the script makes from now on be distributed. Local."""
        for kind in KINDS:
            _wrap(kind, "__init__", self._make_iterator)
        for kind in (chainer.Optimizer, chainer.GradientMethod):
            _wrap(kind, "setup", self._set_up)
        _wrap(chainer.training.Trainer, "run", self._run)
        for name, module in _SAVERS.items():
            save = functools.partial(self._save, getattr(module, name))
            setattr(module, name, save)
            setattr(chainer.serializers, name, save)
        for name in _SPLITS:
            split = _seeded(getattr(chainer.datasets, name))
            setattr(chainer.datasets, name, split)
            setattr(chainer.datasets.sub_dataset, name, split)
        public: Any = sys.modules["chainer_dist"]
        public.create_communicator = _refuse_communicator
        if sys.modules.get("chainermn", public) is not public:
            _refuse_communicator()

    def _make_iterator(
        self, original: Callable[..., Any], iterator: Any, *args: Any, **options: Any
    ) -> None:
        original(iterator, *args, **options)
        sampler = type(iterator.order_sampler).__module__
        # Of other classes they are not complete yet: a trainer has them later.
        if type(iterator) in KINDS and iterator.repeat and not sampler.startswith("chainer_dist."):
            distribute_iterator(iterator, self._comm, self._batch, "of the script")
            self._has_iterator = True

    def _set_up(self, original: Callable[..., Any], optimizer: Any, link: Any) -> Any:
        self._depth += 1
        try:
            result = original(optimizer, link)
        finally:
            self._depth -= 1
        if not self._depth and not is_distributed(optimizer):
            distribute_when_it_updates(optimizer, self._begin)
        return result

    def _begin(self) -> CommunicatorBase:
        """Look at what a loop of the script's own is made of, before its first update."""
        if self._trains or self._has_begun:
            return self._comm
        self._has_begun = True
        if not self._has_iterator:
            raise RuntimeError(
                "this script has a loop of its own that does not draw from an iterator of Chainer's, so that every "
                "rank would train on the same samples: let it draw from "
                "chainer.iterators.SerialIterator(dataset, batch_size), or write "
                "dataset = chainer_dist.scatter_dataset(dataset, comm, shuffle=True) and "
                "optimizer = chainer_dist.create_multi_node_optimizer(optimizer, comm), and start it without "
                "--distribute"
            )
        trainers.separate_random_numbers(self._comm)
        return self._comm

    def _run(self, original: Callable[..., Any], trainer: Any, *args: Any, **options: Any) -> Any:
        self._trains += 1
        try:
            if trainers.is_distributed(trainer):
                return original(trainer, *args, **options)
            trainers.distribute(trainer, self._comm, batch=self._batch)  # type: ignore[arg-type]
            return trainer.run(*args, **options)
        finally:
            self._trains -= 1

    def _save(self, original: Callable[..., Any], *args: Any, **options: Any) -> None:
        """Save as Chainer does, on rank 0; no rank goes on before the file is whole."""
        if self._trains or self._saves or self._made is None:
            original(*args, **options)
            return
        file, obj, *_ = inspect.signature(original).bind(*args, **options).args
        if isinstance(obj, chainer.Link):
            AllreducePersistent(obj, self._comm)()
        self._saves = True  # Chainer's function calls this one for a file that it has opened
        try:
            with together(self._comm):
                # What is open already, or in memory, is each rank's own.
                if self._comm.rank == 0 or not isinstance(file, (str, bytes, os.PathLike)):
                    original(*args, **options)
        finally:
            self._saves = False


_SAVERS = {"save_npz": chainer.serializers.npz, "save_hdf5": chainer.serializers.hdf5}

# They draw from a seed of their own, another one in each process.
_SPLITS = (
    "split_dataset_random",
    "split_dataset_n_random",
    "get_cross_validation_datasets_random",
)


def _seeded(split: Callable[..., Any]) -> Callable[..., Any]:
    """Let parts of a data set be drawn alike on all ranks, where the script leaves it to chance."""

    @functools.wraps(split)
    def wrapper(dataset: Any, number: int, seed: Any = None, **options: Any) -> Any:
        if seed is None:
            seed = np.random.randint(2**31)  # noqa: NPY002 - what Chainer draws from
        return split(dataset, number, seed=seed, **options)

    return wrapper


def _wrap(kind: Any, name: str, call: Callable[..., Any]) -> None:
    original = vars(kind)[name]

    @functools.wraps(original)
    def wrapper(*args: Any, **options: Any) -> Any:
        return call(original, *args, **options)

    setattr(kind, name, wrapper)


def _refuse_communicator(*_: Any, **__: Any) -> Any:
    raise RuntimeError(
        "this script makes a communicator, so it is distributed by itself: start it without --distribute"
    )
