"""What of a training is saved, and how it is put back: all that Chainer saves, and what it leaves out.

Chainer's own serialization leaves out the random states, from which dropout and shuffling draw; dynamic
loss scales; the float32 copies of float16 parameters; the orders that iterators with workers have
drawn ahead; gradients that are being accumulated; and what ``attributes.py`` finds. What is written are
arrays that need no pickle. Nothing here communicates.
"""

from __future__ import annotations

import hashlib
import json
import random
from typing import TYPE_CHECKING, Any, NamedTuple

import chainer
import numpy as np
from chainer import iterators
from chainer import serializer as serializers
from chainer.backends import _cpu
from chainer.iterators._statemachine import IteratorState
from chainer.serializers import NpzDeserializer

from chainer_dist.checkpoints.attributes import Attributes, put_off, serialize_trainer, trainers
from chainer_dist.checkpoints.description import compare, describe, without_state
from chainer_dist.iterators.multi_node_iterator import _MultiNodeIterator
from chainer_dist.iterators.synchronized_iterator import _Order, _SynchronizedSampler
from chainer_dist.optimizers.multi_node_optimizer import MultiNodeOptimizer
from chainer_dist.serialization.npz import NONE, ArrayFile, PickleRefusedError, is_none
from chainer_dist.serialization.target import parts, rank_bound

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping, Sequence

    from chainer_dist._typing import Array
    from chainer_dist.communicators import CommunicatorBase

__all__ = ["State", "check_target", "collect", "prepare", "restore"]

# Before the path of what is not in Chainer's own serialization.
_BESIDE = "+"
_RANDOM = f"{_BESIDE}random"
_OWN = f"{_BESIDE}own:"  # and what a rank has alone, though it belongs to something all have alike
_OWN_PARAMETERS = f"{_BESIDE}own_parameters"
_DESCRIPTION = f"{_BESIDE}description"
_SCALARS = f"{_BESIDE}scalars"  # names of what were numbers of Python, not of NumPy

_GENERATOR = "MT19937"


class State(NamedTuple):
    """What one rank writes: what all ranks have alike (rank 0 only), and what is its own."""

    common: dict[str, Array]
    own: dict[str, Array]


def check_target(target: Any) -> None:
    """Raise TypeError if something cannot be saved. Local."""
    if not isinstance(target, dict):
        if not hasattr(target, "serialize"):
            raise TypeError(
                "a checkpoint is of a trainer, a dict of links, optimizers and iterators, or "
                f"anything else with serialize(), got {target!r}"
            )
        return
    for key, value in target.items():
        if not isinstance(key, str) or key.startswith(_BESIDE) or "/" in key or not key:
            raise TypeError(f"the dict to save has the key {key!r}, expected a name without slash")
        if not isinstance(value, dict) and not hasattr(value, "serialize"):
            raise TypeError(f"{key} has no serialize(): {value!r}")
        check_target(value)


def prepare(target: Any) -> None:
    """Let iterators that draw orders ahead draw them from a seed of their own. Local.

    A MultiprocessIterator and a MultithreadIterator draw the next epoch's order when they prefetch
    its first samples: no save can tell whether ``numpy.random`` has seen that draw yet. From then on
    their orders depend on nothing but a seed and the number of the epoch. No sample is lost.
    """
    for _, iterator in _plain_iterators(target):
        prefetches = isinstance(
            iterator, (iterators.MultiprocessIterator, iterators.MultithreadIterator)
        )
        if prefetches and type(iterator.order_sampler) is iterators.ShuffleOrderSampler:
            seed = int(np.random.randint(2**32 - 1, dtype=np.int64))  # noqa: NPY002
            sampler = _SynchronizedSampler(iterator.order_sampler, seed)
            iterator.order_sampler = sampler
            order = iterator._state.order.view(_Order)
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


def collect(
    target: Any,
    comm: CommunicatorBase,
    attributes: Attributes,
    *,
    copy: bool,
    called: Sequence[str] = (),
    allow_pickle: bool = False,
) -> State:
    """Return the state of a target. Local.

    Args:
        target: What to save.
        comm: Of the ranks that save theirs.
        attributes: That know what the target's objects were at first.
        copy: Whether arrays are copied, so that training can go on while they are written.
        called: Names of a trainer's extensions that were called before training, and are not to be again.
        allow_pickle: Whether arrays of objects may be saved.

    Raises:
        PickleRefusedError: If there are such arrays, though they may not be.
    """
    check_target(target)
    prepare(target)
    collector = _Collector(target, comm, copy=copy, allow_pickle=allow_pickle)
    _serialize_beside(collector, target)
    attributes.save(collector, target)
    _serialize(collector, target, {})
    for path, optimizer in _multi_node_optimizers(target):
        optimizer.serialize_own(collector[f"{_OWN}{path}"])
    collector.own[_RANDOM] = _encode(_random_state())
    collector.own[_OWN_PARAMETERS] = _encode(collector.own_parameters)
    collector.own[_DESCRIPTION] = _encode({**describe(target), "called": [*called]})
    collector.own[_SCALARS] = _encode(collector.scalars)
    return State(collector.common, collector.own)


def restore(
    target: Any,
    common: Mapping[str, Array],
    own: Sequence[Mapping[str, Array]],
    attributes: Attributes,
    new_place: tuple[int, int] | None = None,
) -> list[str]:
    """Put a state back. Local.

    Args:
        target: Of the same kind as what was saved; changed in place.
        common: What all ranks had alike.
        own: What this rank had of its own, alone in a list.
        attributes: That know what the target's objects are before anything is loaded.
        new_place: This rank and the number of ranks, if another number of ranks has saved. Then
            ``own`` is what each of those had; iterators over a rank's part of the data begin the
            epoch again, and random states follow from rank 0's.

    Returns:
        What was left out, for the user to know.

    Raises:
        ValueError, KeyError: If the state does not fit to the target.
        PickleRefusedError: If it has what only pickle can load, and that is not allowed.
    """
    check_target(target)
    prepare(target)
    if new_place is not None:
        _check_own_parameters(own)
    notes: list[str] = []
    saved = [_decode(each[_DESCRIPTION]) for each in own if _DESCRIPTION in each]
    now = describe(target, with_states=False)
    if saved:
        found = compare(saved[0], now)
        notes += found if new_place is None or new_place[0] == 0 else []
    # What rank 0 lacks, as others lack the logs that it writes, may be there on others.
    loader = _Loader([common, *own], ignored=rank_bound(target) if new_place else None)
    skipped = _unknown_pieces(loader, saved, now)
    _serialize_beside(loader, target)
    _begin_without_state(loader, target, saved)
    _serialize(loader, target, skipped)
    for path, optimizer in _multi_node_optimizers(target):
        # Of another number of ranks the first goes on for all that have saved.
        sources = [_Loader([each])[f"{_OWN}{path}"] for each in own]
        optimizer.load_own(sources, takes_over=new_place is None or new_place[0] == 0)
    settings, more = attributes.load(loader, target, own, skipped)
    put_off(settings, target)
    for _, trainer in trainers(target):
        for name in saved[0]["called"] if saved else ():
            if name in trainer._extensions:
                trainer._extensions[name].call_before_training = False
    # At last, as initializing parameters draws numbers.
    if new_place is None:
        _set_random_state(_decode(own[0][_RANDOM]))
    else:
        _derive_random_state(own[0][_RANDOM].tobytes(), *new_place)
    return notes + more


def _begin_without_state(loader: _Loader, target: Any, saved: list[dict[str, Any]]) -> None:
    """Let update rules that had no state yet when they were saved have none."""
    for path, part in parts(target):
        optimizer = getattr(part, "actual_optimizer", part)
        if not isinstance(optimizer, chainer.Optimizer) or optimizer.target is None:
            continue
        for name, param in optimizer.target.namedparams():
            prefix = f"{path}{name.strip('/')}/"
            if saved:
                had_none = without_state(saved[0], path, name)
            else:  # earlier versions do not say so
                had_none = loader.has_nothing_but(prefix, "t") and not loader(f"{prefix}t", 0)
            if had_none and param.update_rule is not None:
                loader.stateless.add(prefix)
                param.update_rule._state = None


def _unknown_pieces(
    loader: _Loader, saved: Sequence[dict[str, Any]], now: dict[str, Any]
) -> set[str]:
    """Return the paths of extensions and triggers that are there now, and have not saved anything."""
    unknown = set()
    for path, pieces in now["trainers"].items():
        for key, kind in pieces.items():
            kinds = {each["trainers"].get(path, {}).get(key) for each in saved}
            if kind not in kinds and (saved or loader.has_nothing_but(f"{path}{key}/", "")):
                unknown.add(f"{path}{key}/")
    return unknown


def _serialize(serializer: Any, target: Any, skipped: Container[str], path: str = "") -> None:
    if isinstance(target, dict):
        for key, value in target.items():
            _serialize(serializer[key], value, skipped, f"{path}{key}/")
    elif isinstance(target, chainer.training.Trainer):
        serialize_trainer(serializer, target, path, skipped)
    else:
        target.serialize(serializer)


def _serialize_beside(serializer: Any, target: Any) -> None:
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
        if isinstance(sampler, _SynchronizedSampler):
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
            if isinstance(generator, np.random.RandomState) and generator is not _global():
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
        return state if saved is None else tuple(_decode(saved))
    if state is not None:
        serializer(key, _encode(state))
    return state


def _multi_node_optimizers(target: Any) -> Iterator[tuple[str, MultiNodeOptimizer]]:
    for path, part in parts(target):
        if isinstance(part, MultiNodeOptimizer):
            yield path, part


def _plain_iterators(target: Any) -> Iterator[tuple[str, Any]]:
    """Yield Chainer's own iterators that a target has on this rank, with their paths."""
    for path, part in parts(target):
        iterator = part.actual_iterator if isinstance(part, _MultiNodeIterator) else part
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
            return self._serializer(f"{_BESIDE}{key}", value)
        except KeyError:
            return value


class _Collector(serializers.Serializer):  # type: ignore[misc]  # Chainer has no types
    """Sorts what is serialized into what all ranks have alike, and what is a rank's own.

    Alike are the state of multi-node optimizers over all ranks, and the parameters of their targets,
    but for those that average now and then.
    Persistent values of links, such as the running mean of an ordinary batch normalization, are not.
    """

    def __init__(
        self, target: Any, comm: CommunicatorBase, *, copy: bool, allow_pickle: bool
    ) -> None:
        optimizers: list[tuple[str, Any]] = []
        links: list[chainer.Link] = []
        for path, part in parts(target):
            if isinstance(part, MultiNodeOptimizer):
                if part.alike and part._connected().size == comm.size:
                    optimizers.append((path, part))
            elif isinstance(part, chainer.Link):
                links.append(part)
        # Arrays are known by identity, which lasts as long as their parameters hold them.
        self._common_paths = tuple(
            f"{prefix}{path}" for path, _ in optimizers for prefix in ("", _BESIDE)
        )
        self._common_arrays = _arrays(part.target for _, part in optimizers)
        self._arrays = _arrays(links)
        self._writes_common = comm.rank == 0
        self._copy = copy
        self._path = ""
        self.common: dict[str, Array] = {}
        self.own: dict[str, Array] = {}
        self.own_parameters: list[str] = []
        self.scalars: list[str] = []  # what is a number of Python, not of NumPy
        self._allow_pickle = allow_pickle

    def __getitem__(self, key: str) -> _Collector:
        child = type(self).__new__(type(self))
        child.__dict__.update(self.__dict__)
        child._path = f"{self._path}{key.strip('/')}/"
        return child

    def __call__(self, key: str, value: Any) -> Any:
        key = self._path + key.lstrip("/")
        if type(value) in (bool, int, float, str):
            self.scalars.append(key)
        values = self.own
        if not key.startswith(_OWN) and (
            key.startswith(self._common_paths) or id(value) in self._common_arrays
        ):
            if not self._writes_common:
                return value
            values = self.common
        elif id(value) in self._arrays:
            self.own_parameters.append(key)
        array = np.asarray(None if value is None else _cpu._to_cpu(value))
        if is_none(array):
            array = NONE
        elif array.dtype.hasobject and not self._allow_pickle:
            raise PickleRefusedError(
                f"{key} is an array of objects, which only pickle can store; allow_pickle=True does so"
            )
        values[key] = array.copy() if self._copy and array is value else array
        return value


def _arrays(links: Any) -> set[int]:
    """Return the identities of all parameters' arrays."""
    return {id(param.array) for link in links if link is not None for param in link.params()} - {
        id(None)
    }


class _Loader(NpzDeserializer):  # type: ignore[misc]  # Chainer has no types
    """Loads from several files, only into arrays of the shape that was saved, and numbers of the same type.

    Chainer's own would broadcast one number into a whole array, and makes Python's numbers of NumPy's: sums
    of these would be rounded otherwise.
    """

    def __init__(self, sources: Any, path: str = "", ignored: Any = None) -> None:
        super().__init__(sources, path)
        self._ignored = ignored
        # The paths of update rules that had no state.
        self.stateless: set[str] = set()
        # None where an earlier version has saved, which did not tell.
        self._scalars: set[str] | None = None
        for source in sources:
            if _SCALARS in source:
                self._scalars = (self._scalars or set()) | {*_decode(source[_SCALARS])}

    def __getitem__(self, key: str) -> _Loader:
        child = type(self).__new__(type(self))
        child.__dict__.update(self.__dict__)
        child.path = f"{self.path}{key.strip('/')}/"
        return child

    def __call__(self, key: str, value: Any) -> Any:
        key = self.path + key.lstrip("/")
        if self._ignored is not None and self._ignored(key[key.startswith(_BESIDE) :]):
            return value
        for source in self.npz:
            if key in source:
                return self._load(source, key, value)
        if self.path in self.stateless:
            return None
        raise KeyError(key)

    def _load(self, source: Mapping[str, Array], key: str, value: Any) -> Any:
        if isinstance(value, np.ndarray) and isinstance(source, ArrayFile):
            self._check(key, source.shape(key), value, may_be_none=True)
        saved = source[key]
        if is_none(saved):
            return None
        if isinstance(value, np.ndarray):
            self._check(key, saved.shape, value)
        if self._scalars is not None and type(value) in (bool, int, float, str):
            return saved.item() if key in self._scalars else saved[()]
        return NpzDeserializer({key: saved})(key, value)

    @staticmethod
    def _check(
        key: str, shape: tuple[int, ...], value: Array, *, may_be_none: bool = False
    ) -> None:
        if shape != value.shape and (shape or not may_be_none):
            raise ValueError(f"{key} was saved as {shape}, and is {value.shape} now")

    def has_nothing_but(self, prefix: str, name: str) -> bool:
        """Tell whether of all that begins in one way at most one thing was saved. Local."""
        return not any(
            key.startswith(prefix) and key != f"{prefix}{name}"
            for source in self.npz
            for key in source
        )


def _check_own_parameters(own: Sequence[Mapping[str, Array]]) -> None:
    """Raise ValueError if ranks have parameters of their own, which no other number of ranks has."""
    for key in _decode(own[0][_OWN_PARAMETERS]):
        for rank, source in enumerate(own):
            if key not in source or not np.array_equal(source[key], own[0][key], equal_nan=True):
                raise ValueError(
                    f"{key} was another one on rank {rank} than on rank 0, as the parts of a model "
                    "that spans ranks are, and between two averagings those of a local SGD optimizer: "
                    f"it can be resumed on {len(own)} ranks only"
                )


def _encode(value: Any) -> Array:
    """Return something as an array that needs no pickle."""
    return np.frombuffer(json.dumps(value, default=np.ndarray.tolist).encode(), dtype=np.uint8)


def _decode(array: Array) -> Any:
    return json.loads(array.tobytes())


def _global() -> np.random.RandomState:
    """Return the generator behind the functions of ``numpy.random``."""
    generator: np.random.RandomState = np.random.random.__self__  # type: ignore[attr-defined]
    return generator


def _random_state() -> dict[str, Any]:
    own: Any = np.random.get_state()  # noqa: NPY002 - what Chainer draws from
    if not isinstance(own, tuple) or own[0] != _GENERATOR:
        raise ValueError(
            f"numpy.random uses another generator than {_GENERATOR}, which cannot be saved"
        )
    return {"numpy": own, "python": random.getstate()}


def _set_random_state(state: dict[str, Any]) -> None:
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002 - what Chainer draws from
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _derive_random_state(saved: bytes, rank: int, size: int) -> None:
    """Give each rank a random state of its own that rank 0's saved one determines."""
    seed = hashlib.sha256(saved + f" on rank {rank} of {size}".encode()).digest()
    np.random.seed(np.frombuffer(seed, dtype=np.uint32))  # noqa: NPY002 - what Chainer draws from
    random.seed(seed)
