"""The state of a training, saved and put back: all that Chainer saves, and all that it leaves out.

Chainer's own serialization leaves out the random states of a process, what :mod:`~chainer_dist.checkpoints.omissions`
has, gradients that are being accumulated, and what :mod:`~chainer_dist.checkpoints.attributes` finds. What
is written are arrays that need no pickle. Nothing here communicates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import chainer
import numpy as np

from chainer_dist._chainer import extension_entries
from chainer_dist.checkpoints.collector import Collector
from chainer_dist.checkpoints.description import compare, describe, without_state
from chainer_dist.checkpoints.entries import (
    BESIDE,
    DESCRIPTION,
    OWN,
    OWN_PARAMETERS,
    RANDOM,
    SCALARS,
    decode,
    encode,
)
from chainer_dist.checkpoints.loader import Loader
from chainer_dist.checkpoints.omissions import prepare, serialize_omissions
from chainer_dist.checkpoints.random_states import (
    derive_random_state,
    random_state,
    set_random_state,
)
from chainer_dist.checkpoints.settings import put_off
from chainer_dist.checkpoints.trainers import serialize_trainer, trainers
from chainer_dist.optimizers.multi_node_optimizer import MultiNodeOptimizer
from chainer_dist.serialization.target import parts, rank_bound

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping, Sequence

    from chainer_dist._typing import Array
    from chainer_dist.checkpoints.attributes import Attributes
    from chainer_dist.communicators import CommunicatorBase

__all__ = ["State", "check_target", "collect", "restore"]


class State(NamedTuple):
    """The entries that one rank writes.

    Attributes:
        common: Entries that are the same on all ranks; empty on other ranks than 0.
        own: Entries of this rank alone.
    """

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
        if not isinstance(key, str) or key.startswith(BESIDE) or "/" in key or not key:
            raise TypeError(f"the dict to save has the key {key!r}, expected a name without slash")
        if not isinstance(value, dict) and not hasattr(value, "serialize"):
            raise TypeError(f"{key} has no serialize(): {value!r}")
        check_target(value)


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
        target: Object to save.
        comm: Communicator whose ranks save.
        attributes: Attributes that the target's objects were made with.
        copy: Whether arrays are copied, so that training can go on while they are written.
        called: Names of a trainer's extensions that were called before training, and are not to be called again.
        allow_pickle: Whether arrays of objects may be saved.

    Raises:
        PickleRefusedError: If there are such arrays, though they may not be.
    """
    check_target(target)
    prepare(target)
    collector = Collector(target, comm, copy=copy, allow_pickle=allow_pickle)
    serialize_omissions(collector, target)
    attributes.save(collector, target)
    _serialize(collector, target, {})
    for path, optimizer in _multi_node_optimizers(target):
        optimizer.serialize_own(collector[f"{OWN}{path}"])
    collector.own[RANDOM] = encode(random_state())
    collector.own[OWN_PARAMETERS] = encode(collector.own_parameters)
    collector.own[DESCRIPTION] = encode({**describe(target), "called": [*called]})
    collector.own[SCALARS] = encode(collector.scalars)
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
        target: Object of the same kind as the one that was saved; changed in place.
        common: Entries that were the same on all ranks.
        own: Entries of this rank alone, in a list of one.
        attributes: Attributes that the target's objects were made with.
        new_place: This rank and the number of ranks, if another number of ranks has saved. Then
            ``own`` has the entries of each rank that has saved; iterators over a rank's part of the data
            begin the epoch again, and random states follow from rank 0's.

    Returns:
        Notes for the user on everything that was left out.

    Raises:
        ValueError, KeyError: If the state does not fit to the target.
        PickleRefusedError: If it has what only pickle can load, and that is not allowed.
    """
    check_target(target)
    prepare(target)
    if new_place is not None:
        _check_own_parameters(own)
    notes: list[str] = []
    saved = [decode(each[DESCRIPTION]) for each in own if DESCRIPTION in each]
    now = describe(target, with_states=False)
    if saved:
        found = compare(saved[0], now)
        notes += found if new_place is None or new_place[0] == 0 else []
    # An entry that rank 0 lacks may be there on another rank, as rank 0 alone has the logs that it writes.
    loader = Loader([common, *own], ignored=rank_bound(target) if new_place else None)
    skipped = _unknown_pieces(loader, saved, now)
    serialize_omissions(loader, target)
    _begin_without_state(loader, target, saved)
    _serialize(loader, target, skipped)
    for path, optimizer in _multi_node_optimizers(target):
        # Of another number of ranks the first goes on for all that have saved.
        sources = [Loader([each])[f"{OWN}{path}"] for each in own]
        optimizer.load_own(sources, takes_over=new_place is None or new_place[0] == 0)
    settings, more = attributes.load(loader, target, own, skipped)
    put_off(settings, target)
    for _, trainer in trainers(target):
        for name in saved[0]["called"] if saved else ():
            if name in extension_entries(trainer):
                extension_entries(trainer)[name].call_before_training = False
    # At last, as initializing parameters draws numbers.
    if new_place is None:
        set_random_state(decode(own[0][RANDOM]))
    else:
        derive_random_state(own[0][RANDOM].tobytes(), *new_place)
    return notes + more


def _begin_without_state(loader: Loader, target: Any, saved: list[dict[str, Any]]) -> None:
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
                param.update_rule._state = None  # noqa: SLF001 - Chainer's


def _unknown_pieces(
    loader: Loader, saved: Sequence[dict[str, Any]], now: dict[str, Any]
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


def _multi_node_optimizers(target: Any) -> Iterator[tuple[str, MultiNodeOptimizer]]:
    for path, part in parts(target):
        if isinstance(part, MultiNodeOptimizer):
            yield path, part


def _check_own_parameters(own: Sequence[Mapping[str, Array]]) -> None:
    """Raise ValueError if ranks have parameters of their own, which no other number of ranks has."""
    for key in decode(own[0][OWN_PARAMETERS]):
        for rank, source in enumerate(own):
            if key not in source or not np.array_equal(source[key], own[0][key], equal_nan=True):
                raise ValueError(
                    f"{key} was another one on rank {rank} than on rank 0, as the parts of a model "
                    "that spans ranks are, and between two averagings those of a local SGD optimizer: "
                    f"it can be resumed on {len(own)} ranks only"
                )
