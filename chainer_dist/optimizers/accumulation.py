"""Gradients of several batches, summed up before they are exchanged."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from chainer_dist.collectives.reduction import wire_dtype
from chainer_dist.compression.compression import Kept
from chainer_dist.parameters import ParameterSet, private_grads

if TYPE_CHECKING:
    from collections.abc import Sequence

    import chainer

__all__ = ["Accumulation"]


class Accumulation:
    """Gradients of the batches since the last update. Nothing here communicates.

    float16 gradients are summed in float32.

    Attributes:
        calls: Number of calls of ``update`` that have added to it, the same on every rank.
        batches: Number of batches of all ranks in these calls; fewer than ``calls`` times the number
            of ranks if some ranks stood by.
        own: Number of batches of this rank.
    """

    def __init__(self) -> None:
        self.calls = self.batches = self.own = 0
        self._sums = Kept()
        self._scales: dict[str, float | None] = {}  # loss scales with which the sums were computed

    def has_grad(self, parameters: ParameterSet, *, stands_by: bool) -> list[bool]:
        """Return for each parameter whether this batch or an earlier one gave it a gradient. Local.

        Args:
            parameters: This rank's parameters, with the gradients of this batch.
            stands_by: Whether the gradients of this batch do not count.
        """
        return [
            (has and not stands_by) or self._sums.get(name, array.shape) is not None
            for has, name, array in zip(parameters.has_grad, parameters.names, parameters.arrays)
        ]

    def add(self, parameters: ParameterSet, ranks: int, *, stands_by: bool) -> None:
        """Take over the gradients of a batch; the parameters have none then.

        Args:
            parameters: This rank's parameters.
            ranks: Number of ranks that have computed gradients.
            stands_by: Whether this one has not, so that its gradients do not count.
        """
        self.calls += 1
        self.batches += ranks
        if stands_by:
            return
        self.own += 1
        private_grads(parameters)
        for name, param, grad in zip(parameters.names, parameters.params, parameters.grads):
            if grad is None:
                continue
            total = self._sums.get(name, grad.shape)
            if total is None:
                self._sums.keep(name, grad.astype(wire_dtype(grad.dtype), copy=False))
            else:
                np.add(total, grad, out=total)
            self._scales[name] = param._loss_scale  # noqa: SLF001 - Chainer's
            param.grad = None

    def finish(self, parameters: ParameterSet, size: int) -> None:
        """Set the sums as gradients, scaled so that their mean over the ranks is the mean over all batches.

        Args:
            parameters: Parameters that get the gradients; None where no batch had one on this rank.
            size: Number of ranks.
        """
        scale = size / self.batches
        for name, param, array in zip(parameters.names, parameters.params, parameters.arrays):
            total = self._sums.get(name, array.shape)
            if total is None:
                param.grad = None
                continue
            np.multiply(total, scale, out=total)
            param.grad = total.astype(array.dtype, copy=False)
            if name in self._scales:  # the parameter may be new, and not in the last batch
                param._loss_scale = self._scales[name]  # noqa: SLF001 - Chainer's
        parameters.look_at_grads()

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Save it, unless it is empty."""
        if self.calls:
            for name in ("calls", "batches", "own"):
                serializer(name, getattr(self, name))
            self._sums.serialize(serializer["sums"])
            scales = [self._scales.get(name) for name in self._sums.arrays]
            serializer("loss_scales", np.array(scales, np.float64))  # NaN for none

    def load(self, sources: Sequence[chainer.AbstractSerializer], *, takes_sums: bool) -> None:
        """Replace the sums by the ones that ranks have saved.

        Args:
            sources: Serializers, one for each rank in whose place this one goes on.
            takes_sums: Whether this rank goes on with the sums of these ranks, added up.
        """
        self.__init__()  # type: ignore[misc]  # begins anew
        for source in sources:
            with contextlib.suppress(KeyError):  # nothing was under way
                self.calls, self.batches = (
                    int(source(name, None)) for name in ("calls", "batches")
                )
                if not takes_sums:
                    return
                self.own += int(source("own", None))
                sums = Kept()
                sums.serialize(source["sums"])
                for name, array in sums.arrays.items():
                    known = self._sums.get(name, array.shape)
                    self._sums.keep(name, array if known is None else known + array)
                # Earlier versions saved none.
                for name, scale in zip(sums.arrays, source("loss_scales", None)):
                    self._scales[name] = None if np.isnan(scale) else float(scale)
