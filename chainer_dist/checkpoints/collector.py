"""Chainer's serializer that saves: it collects the arrays of a rank, and sorts them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer import serializer as serializers
from chainer.backends import _cpu

from chainer_dist.checkpoints.entries import BESIDE, OWN
from chainer_dist.optimizers.multi_node_optimizer import MultiNodeOptimizer
from chainer_dist.serialization.npz import NONE, PickleRefusedError, is_none
from chainer_dist.serialization.target import parts

if TYPE_CHECKING:
    from chainer_dist._typing import Array
    from chainer_dist.communicators import CommunicatorBase

__all__ = ["Collector"]


class Collector(serializers.Serializer):  # type: ignore[misc]  # Chainer has no types
    """Sorts entries into shared ones, which are the same on all ranks, and entries of this rank alone.

    The state of multi-node optimizers over all ranks is the same, and so are the parameters of their
    targets, unless the optimizer averages only now and then. Persistent values of links, such as the
    running mean of an ordinary batch normalization, are not.

    More than ten attributes: four are what was sorted, and the others tell what belongs where.

    Args:
        target: Object that is saved.
        comm: Communicator whose ranks save.
        copy: Whether arrays are copied, so that they can change before they are written.
        allow_pickle: Whether arrays of objects may be saved.

    Attributes:
        common: Entries that are the same on all ranks, by name; empty on other ranks than 0.
        own: Entries of this rank alone, by name.
        own_parameters: Names of the parameters among these.
        scalars: Names of entries that were numbers of Python, not of NumPy.
    """

    def __init__(
        self, target: Any, comm: CommunicatorBase, *, copy: bool, allow_pickle: bool
    ) -> None:
        optimizers: list[tuple[str, Any]] = []
        links: list[chainer.Link] = []
        for path, part in parts(target):
            if isinstance(part, MultiNodeOptimizer):
                if part.alike and part.connected().size == comm.size:
                    optimizers.append((path, part))
            elif isinstance(part, chainer.Link):
                links.append(part)
        # Arrays are known by identity, which lasts as long as their parameters hold them.
        self._common_paths = tuple(
            f"{prefix}{path}" for path, _ in optimizers for prefix in ("", BESIDE)
        )
        self._common_arrays = _arrays(part.target for _, part in optimizers)
        self._arrays = _arrays(links)
        self._writes_common = comm.rank == 0
        self._copy = copy
        self._path = ""
        self.common: dict[str, Array] = {}
        self.own: dict[str, Array] = {}
        self.own_parameters: list[str] = []
        self.scalars: list[str] = []
        self._allow_pickle = allow_pickle

    def __getitem__(self, key: str) -> Collector:
        child = type(self).__new__(type(self))
        child.__dict__.update(self.__dict__)
        child._path = f"{self._path}{key.strip('/')}/"  # noqa: SLF001 - of the same class
        return child

    def __call__(self, key: str, value: Any) -> Any:
        """Collect a value, and return it. Local."""
        key = self._path + key.lstrip("/")
        if type(value) in (bool, int, float, str):
            self.scalars.append(key)
        values = self.own
        if not key.startswith(OWN) and (
            key.startswith(self._common_paths) or id(value) in self._common_arrays
        ):
            if not self._writes_common:
                return value
            values = self.common
        elif id(value) in self._arrays:
            self.own_parameters.append(key)
        array = np.asarray(None if value is None else _cpu._to_cpu(value))  # noqa: SLF001 - Chainer's
        if is_none(array):
            array = NONE
        elif array.dtype.hasobject and not self._allow_pickle:
            raise PickleRefusedError(
                f"{key} is an array of objects, which only pickle can store; allow_pickle=True does so"
            )
        values[key] = array.copy() if self._copy and array is value else array
        return value


def _arrays(links: Any) -> set[int]:
    """Return the identities of the arrays of all parameters."""
    return {id(param.array) for link in links if link is not None for param in link.params()} - {
        id(None)
    }
