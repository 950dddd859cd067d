"""What Chainer leaves out when it serializes optimizers and iterators.

These are dynamic loss scales, the float32 copies of float16 parameters, generators of random numbers, and the
orders that iterators with workers have drawn ahead. Nothing here communicates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer import iterators
from chainer import serializer as serializers
from chainer.iterators._statemachine import IteratorState

from chainer_dist.checkpoints.entries import BESIDE, decode, encode
from chainer_dist.checkpoints.random_states import global_generator
from chainer_dist.iterators.multi_node_iterator import MultiNodeIterator
from chainer_dist.iterators.synchronized_iterator import EpochOrder, SynchronizedSampler
from chainer_dist.optimizers.multi_node_optimizer import MultiNodeOptimizer
from chainer_dist.serialization.target import parts

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["prepare", "serialize_omissions"]


def prepare(target: Any) -> None:
    """Let iterators that draw orders ahead draw them from a seed of their own. Local.

    A MultiprocessIterator and a MultithreadIterator draw the next epoch's order when they prefetch
    its first samples: a save does not know whether ``numpy.random`` has made that draw yet. From then on
    their orders depend only on a seed and the number of the epoch. No sample is lost.
    """
    for _, iterator in _plain_iterators(target):
        prefetches = isinstance(
            iterator, (iterators.MultiprocessIterator, iterators.MultithreadIterator)
        )
        if prefetches and type(iterator.order_sampler) is iterators.ShuffleOrderSampler:
            seed = int(np.random.randint(2**32 - 1, dtype=np.int64))  # noqa: NPY002
            sampler = SynchronizedSampler(iterator.order_sampler, seed)
            iterator.order_sampler = sampler
            order = iterator._state.order.view(EpochOrder)
            order.number = (0, 0)
            state = iterator._state
            if isinstance(iterator, iterators.MultiprocessIterator):
                iterator._prefetch_loop.order_sampler = sampler
                iterator._reset_state(
                    state.current_position, state.epoch, state.is_new_epoch, order
                )
            else:
                iterator._state = IteratorState(
                    state.current_position, state.epoch, state.is_new_epoch, order
                )
                iterator._next = None


def serialize_omissions(serializer: Any, target: Any) -> None:
    """Save or load what Chainer leaves out, but for the global random states."""
    serializer = _Optional(serializer)
    for path, part in parts(target):
        actual = getattr(part, "actual_optimizer", part)
        if isinstance(actual, chainer.Optimizer):
            _serialize_loss_scale(serializer, path, actual)
            _serialize_wide_parameters(serializer, path, actual)
        if isinstance(part, MultiNodeOptimizer):
            state = part.randomness.state
            part.randomness.state = _serialize_generator(serializer, f"{path}random", state)
    for path, iterator in _plain_iterators(target):
        sampler = iterator.order_sampler
        if isinstance(sampler, SynchronizedSampler):
            order = iterator._state.order  # the iterator loads into this array, or into a copy
            number = (sampler.resets, order.number[1])
            sampler.seed = serializer(f"{path}seed", sampler.seed)
            sampler.resets, epochs = (
                serializer(f"{path}{name}", value)
                for name, value in zip(("resets", "epochs"), number)
            )
            order.number = (sampler.resets, epochs)
        else:
            generator = getattr(sampler, "_random", None)
            if isinstance(generator, np.random.RandomState) and generator is not global_generator():
                state = _serialize_generator(serializer, f"{path}random", generator.get_state())
                generator.set_state(state)


def _serialize_loss_scale(serializer: _Optional, path: str, optimizer: chainer.Optimizer) -> None:
    if optimizer._loss_scaling_is_dynamic:
        scale = serializer(f"{path}loss_scale", float(optimizer._loss_scale))
        ever = serializer(f"{path}loss_scaling_isnan_ever", optimizer._loss_scaling_isnan_ever)
        optimizer._loss_scale, optimizer._loss_scaling_isnan_ever = scale, ever


def _serialize_wide_parameters(
    serializer: _Optional, path: str, optimizer: chainer.Optimizer
) -> None:
    """Save or load the float32 copies that ``use_fp32_update`` keeps of float16 parameters."""
    for name, param in optimizer.target.namedparams() if optimizer.target is not None else ():
        rule = param.update_rule
        if rule is not None and rule._use_fp32_update:
            wide = rule._fp32_param
            array = serializer(f"{path}fp32{name}", None if wide is None else wide.array)
            if array is not None and (wide is None or array is not wide.array):
                rule._fp32_param = chainer.Parameter(np.array(array), name=param.name)


def _serialize_generator(serializer: _Optional, key: str, state: Any) -> Any:
    """Save or load the state of a ``RandomState``, or None."""
    if serializer.loads:
        saved = serializer(key, None)
        return state if saved is None else tuple(decode(saved))
    if state is not None:
        serializer(key, encode(state))
    return state


def _plain_iterators(target: Any) -> Iterator[tuple[str, Any]]:
    """Yield Chainer's own iterators that a target has on this rank, with their paths."""
    for path, part in parts(target):
        iterator = part.actual_iterator if isinstance(part, MultiNodeIterator) else part
        if isinstance(
            iterator,
            (
                iterators.SerialIterator,
                iterators.MultithreadIterator,
                iterators.MultiprocessIterator,
            ),
        ):
            yield path, iterator


class _Optional:
    """Loads what is there, and leaves as it is what is not; saves everything."""

    def __init__(self, serializer: Any) -> None:
        self._serializer = serializer
        self.loads = isinstance(serializer, serializers.Deserializer)

    def __call__(self, key: str, value: Any) -> Any:
        try:
            return self._serializer(f"{BESIDE}{key}", value)
        except KeyError:
            return value
