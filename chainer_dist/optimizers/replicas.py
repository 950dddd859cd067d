"""Whether the parameters of the ranks are equal, and making them so."""

from __future__ import annotations

import enum
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist import _chainer
from chainer_dist.collectives.agreement import digest
from chainer_dist.collectives.failures import together
from chainer_dist.errors import RankMismatchError
from chainer_dist.optimizers.first_values import share_draws
from chainer_dist.parameters import ParameterSet, are_identical

if TYPE_CHECKING:
    from collections.abc import Container

    import chainer

    from chainer_dist._typing import Array
    from chainer_dist.communicators import CommunicatorBase
    from chainer_dist.parameters import Structure

__all__ = ["Change", "Replicas"]


class Change(enum.IntEnum):
    """How a rank's parameters have changed since they were last equal on all ranks."""

    NONE = 0
    ARRAYS = 1  # there are other parameters, or other arrays
    LOADED = 2  # the optimizer was loaded from a snapshot, and presumably its parameters


class Replicas:
    """Whether this rank's parameters are equal to the other ranks', as far as it knows.

    Changes in place are not noticed, as each update would have to read all values for that.

    Attributes:
        structure: Structure of the parameters when the ranks last compared them; None before.
    """

    def __init__(self) -> None:
        self.structure: Structure | None = None
        self._arrays: list[Array] = []
        self._is_loaded = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_arrays": []}  # a copy has other arrays

    def invalidate(self) -> None:
        """Let all values count as loaded. Local."""
        self._is_loaded = True

    @property
    def is_waiting(self) -> bool:
        """Whether a parameter had no shape yet when the ranks last compared; the same on every rank."""
        return any(spec is None for _, spec in self.structure or ())

    def has_structure_of(self, parameters: ParameterSet) -> bool:
        """Return whether there are the same parameters as when the ranks last compared. Local."""
        return parameters.structure == self.structure

    def _knows(self, name: str, parameters: ParameterSet) -> bool:
        """Return whether a parameter was there, initialized, when the ranks last compared. Local."""
        return (name, dict(parameters.structure)[name]) in (self.structure or ())

    def compare(self, parameters: ParameterSet) -> tuple[Change, int]:
        """Return the change since the ranks last compared, and a digest of the new values. Local.

        Two ranks with equal parameters before, on which nothing is loaded, have equal parameters if their
        structures and digests are equal. Where a parameter has got its shape, the digest is of all
        parameters, as a link may draw the values of others at the same time.
        """
        if self._is_loaded:
            return Change.LOADED, 0
        is_new = not self.has_structure_of(parameters)
        if not is_new and are_identical(self._arrays, parameters.arrays):
            return Change.NONE, 0
        replaced = [
            (name, checksum(array))
            for name, array, before in zip(
                parameters.names,
                parameters.arrays,
                [None] * len(parameters.arrays) if is_new else self._arrays,
            )
            if array is not before
        ]
        return Change.ARRAYS, digest(replaced)

    def keep(self, parameters: ParameterSet) -> None:
        """Note that these parameters are equal on all ranks. Local.

        That includes arrays by which the update of these parameters has replaced others.
        """
        self.structure = parameters.structure
        self._arrays = [param._data[0] for param in parameters.params]  # noqa: SLF001 - the property array, faster
        self._is_loaded = False

    def judge(
        self,
        comm: CommunicatorBase,
        model: chainer.Link,
        change: Change,
        *,
        same_change: bool,
        same_structure: bool,
        same_values: bool,
    ) -> tuple[bool, bool]:
        """Return whether parameters were changed, and whether ranks may differ because of that. Collective.

        Where all ranks have changed theirs alike, that is known from now on.

        Args:
            comm: The communicator whose ranks have compared.
            model: The model whose parameters they have compared.
            change: The first result of :meth:`compare` on this rank.
            same_change: Whether that is the same on all ranks; equal on all of them, as what follows.
            same_structure: Whether the structure of the parameters is the same.
            same_values: Whether the digest, the second result, is the same.
        """
        if change is Change.NONE and same_change and same_structure:
            return False, False
        if not (change is Change.ARRAYS and same_change and same_structure and same_values):
            return True, True
        self.keep(ParameterSet(model))
        share_draws(comm, model)
        return True, False

    def synchronize(
        self,
        comm: CommunicatorBase,
        model: chainer.Link,
        *,
        has_gradients: bool,
        kept: Container[str] = (),
    ) -> None:
        """Make the parameters of all ranks equal to rank 0's. Collective.

        Args:
            comm: The communicator whose ranks become equal.
            model: See :func:`~chainer_dist.exchange.bcast_data`.
            has_gradients: Whether this rank has computed gradients from the values that it has,
                which are of no use if others take their place.
            kept: Names of parameters that stay as they are on each rank.

        Raises:
            RankMismatchError: On every rank, naming the rank and the parameter, if a rank has gradients
                of other values, or if the ranks' parameters are not of the same structure.
        """
        parameters = ParameterSet(model)
        before = {
            name: checksum(array)
            for name, array in zip(parameters.names, parameters.arrays)
            if has_gradients and comm.size > 1 and name not in kept
        }
        comm.bcast_data(model)
        parameters = ParameterSet(model)
        self.keep(parameters)
        share_draws(comm, model)
        with together(comm):
            for name, array in zip(parameters.names, parameters.arrays):
                if name not in before or before[name] == checksum(array):
                    continue
                raise RankMismatchError(
                    f"{name} had other values than on rank 0 when its gradient was computed. It has "
                    "the values of rank 0 now, and nothing was updated. If the layer gets its shape in "
                    "the first forward pass, its initializer must draw from numpy.random, and all "
                    "ranks must come to such layers in the same order; or give the layer its size. "
                    "If parameters were loaded or replaced, do so on every rank, or call "
                    "comm.bcast_data(model) before the loss is computed"
                )

    def synchronize_new(
        self, comm: CommunicatorBase, model: chainer.Link, *, has_gradients: bool, has_updated: bool
    ) -> None:
        """Make parameters equal that were not updated or loaded yet. Collective.

        The others stay as they are on each rank.

        Args:
            comm: See :meth:`synchronize`.
            model: See :meth:`synchronize`.
            has_gradients: See :meth:`synchronize`.
            has_updated: Whether there was an update already.

        Raises:
            RankMismatchError: See :meth:`synchronize`.
        """
        parameters = ParameterSet(model)
        own = [
            (name, param, param.array.copy(), _chainer.float32_copy(param))
            for name, param in zip(parameters.names, parameters.params)
            if self._is_loaded or (has_updated and self._knows(name, parameters))
        ]
        kept = {name for name, *_ in own}
        try:
            self.synchronize(comm, model, has_gradients=has_gradients, kept=kept)
        finally:
            for _, param, array, wide in own:
                np.copyto(param.array, array)
                if param.update_rule is not None:
                    param.update_rule._fp32_param = wide  # noqa: SLF001 - Chainer's


def checksum(array: Array) -> int:
    """Return a number that is the same for equal values of a dtype. Local.

    It is 0 for anything but a NumPy array, which cannot be exchanged.
    """
    if not (isinstance(array, np.ndarray) and array.size):
        return 0
    contiguous = array if array.flags.c_contiguous else array.copy(order="C")
    flat: Any = contiguous.reshape(-1).view(np.uint8)
    return zlib.crc32(flat)
