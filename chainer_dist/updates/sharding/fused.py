"""Small chunks that follow one another in a slice, updated by one call of the rule that they have in common.

Chainer calls a rule once for each parameter. For a bias, or a layer of a few thousand elements, the call takes
far longer than its arithmetic. Rules that are sharded compute each element by itself, so that one call on
several parameters, one behind the other, comes to the same bits.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist import _chainer
from chainer_dist.updates.sharding.chunk import Chunk
from chainer_dist.updates.sharding.eligibility import is_uniform

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import chainer

    from chainer_dist._typing import Array

__all__ = ["FusedChunks", "fuse"]

# Copying larger chunks to and fro takes as long as calling their rule.
_SMALL_BYTES = 1 << 15
_FUSED_BYTES = 1 << 17
_N_ATTRIBUTES = 7  # of a rule of Chainer's


class FusedChunks:
    """Chunks of several parameters that are updated together as long as their rules do the same.

    Args:
        chunks: Two or more chunks, one behind the other, whose states have the same names.
        grad: Array of their gradients, one behind the other; None if each chunk gets a new one each time.
    """

    def __init__(self, chunks: Sequence[Chunk], grad: Array | None) -> None:
        self._chunks = chunks
        self._gathers_grads = grad is None
        ends = list(itertools.accumulate(chunk.array.size for chunk in chunks))
        self._array = np.empty(ends[-1], chunks[0].array.dtype)
        self._views = np.split(self._array, ends[:-1])
        self._grad = np.empty_like(self._array) if grad is None else grad
        self._grads = np.split(self._grad, ends[:-1])
        state = {key: np.empty_like(self._array) for key in chunks[0].state}
        self._states = [
            (array, np.split(array, ends[:-1]), [chunk.state[key] for chunk in chunks])
            for key, array in state.items()
        ]
        self._whole = Chunk(chunks[0].whole, slice(None), state)
        self._whole.bind(self._array)
        self._whole.take_grad(self._grad)

    def update(self, hooks: Sequence[Callable[[Any, chainer.Parameter], None]]) -> None:
        """Call hooks of the optimizer, and update the chunks as the rules of their parameters would."""
        if not (self._do_the_same() and all(map(is_uniform, hooks))):
            for chunk in self._chunks:
                chunk.update(hooks)
            return
        np.concatenate([chunk.array for chunk in self._chunks], out=self._array)
        for array, _, owns in self._states:
            np.concatenate(owns, out=array)
        if self._gathers_grads:
            np.concatenate([chunk.param.grad for chunk in self._chunks], out=self._grad)
        self._whole.update(hooks)
        for chunk, view in zip(self._chunks, self._views):
            chunk.array[...] = view
        for _, views, owns in self._states:
            for own, view in zip(owns, views):
                own[...] = view
        if self._gathers_grads and hooks:
            for chunk, view in zip(self._chunks, self._grads):
                chunk.param.grad[...] = view

    def _do_the_same(self) -> bool:
        """Return whether the rules of all chunks would do the same to an element. Local.

        As long as the chunks are valid, their rules are of one class, enabled and without hooks.
        """
        first, *others = [chunk.whole for chunk in self._chunks]
        rule, scale = first.update_rule, first._loss_scale  # noqa: SLF001 - Chainer's
        t, own = rule.t, vars(rule.hyperparam)
        # A rule with more attributes may have a method of its own among them.
        if len(vars(rule)) > _N_ATTRIBUTES:
            return False
        for other in others:
            peer = other.update_rule
            if (
                peer.t != t
                or other._loss_scale != scale  # noqa: SLF001 - Chainer's
                or vars(peer.hyperparam) != own
                or len(vars(peer)) > _N_ATTRIBUTES
            ):
                return False
        return True


def fuse(chunks: Sequence[Chunk], mean: Array | None) -> list[Chunk | FusedChunks]:
    """Return chunks in order, small ones that follow one another as one. Local.

    Args:
        chunks: Chunks of one dtype, one behind the other.
        mean: Array of their gradients; None if each chunk gets a new one each time.
    """
    fused: list[Chunk | FusedChunks] = []
    ends = list(itertools.accumulate(chunk.array.size for chunk in chunks))
    for _, group in itertools.groupby(zip(chunks, ends), _kind):
        members, stops = zip(*group)
        if len(members) == 1:
            fused += members
            continue
        begin = stops[0] - members[0].array.size
        fused.append(FusedChunks(members, None if mean is None else mean[begin : stops[-1]]))
    return fused


def _kind(place: tuple[Chunk, int]) -> Any:
    """Return what chunks have in common that may be fused, or the place of one that may not."""
    chunk, end = place
    rule, array = chunk.whole.update_rule, chunk.array
    if rule is None or not rule.enabled or array.nbytes > _SMALL_BYTES or not array.ndim:
        return end
    before, _ = _chainer.hooks_of(rule)
    if before:
        return end
    return type(rule), list(chunk.state), end * array.itemsize // _FUSED_BYTES
