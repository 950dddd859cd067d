"""State that objects keep in attributes that nothing serializes: what has changed since training began.

Stateful recurrent links keep hidden states that way, some of Chainer's extensions and triggers their counts
and sums, and optimizers the hyperparameters that schedules change. Constructors make the rest: what is
as the constructor left it is not saved, so that the next process may construct it otherwise. Nothing
here communicates.
"""

from __future__ import annotations

import hashlib
import json
import types
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import chainer
import chainer.links as L
import numpy as np
from chainer import serializer as serializers
from chainer import training
from chainer.training import extension, extensions

from chainer_dist.extensions._plain_values import NotPlainError, pack, unpack
from chainer_dist.extensions.multi_node_early_stopping_trigger import MultiNodeEarlyStoppingTrigger
from chainer_dist.serialization.target import parts

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

    from chainer_dist._typing import Array

__all__ = ["Attributes", "PutOff", "put_off", "serialize_trainer", "trainers", "unwrapped"]

_PREFIX = "+attributes:"

# Nothing of theirs is to be saved: a link's own bookkeeping, what a forward pass writes before it reads
# it, and what Trainer.extend sets.
_BOOKKEEPING = {*vars(chainer.Chain()), *vars(chainer.ChainList())}
_RESULTS = {"y", "loss", "accuracy"}
_EXTENDED = {"name", "trigger", "priority", "default_name"}

# These serialize, but leave out the attributes named here.
_INCOMPLETE = {extensions.PlotReport: ("_summary", "_trigger")}
# This one cannot serialize, if what it adds up are variables.
_UNABLE = (extensions.MicroAverage,)

_DO_NOTHING = (extension.Extension.serialize, chainer.dataset.Iterator.serialize)


class _Holder(NamedTuple):
    """An object with attributes to save."""

    path: str
    owner: Any
    names: list[str]
    is_setting: bool = False  # whether the user may set them otherwise in the next process
    is_reset: bool = False  # whether some extensions set them when training begins


class _Serializable(NamedTuple):
    """An object that serializes itself, of an owner that does not call it."""

    path: str
    owner: Any


class PutOff(NamedTuple):
    """A hyperparameter that is to be set once all extensions of a trainer are initialized."""

    owner: Any
    name: str
    value: Any


class Attributes:
    """Saves and loads attributes, as far as they changed since the objects were first seen."""

    def __init__(self) -> None:
        self._first: weakref.WeakKeyDictionary[Any, dict[str, str]] = weakref.WeakKeyDictionary()
        self._late: weakref.WeakSet[Any] = weakref.WeakSet()

    def look(self, target: Any, *, is_late: bool = False) -> None:
        """Take notice of what is new in a target. Local.

        Args:
            target: To be saved later.
            is_late: Whether extensions may have set hyperparameters already, so that it is not known what
                their constructors made them.
        """
        for holder in _holders(target):
            if isinstance(holder, _Holder) and self._of(holder) is None:
                try:
                    self._first[holder.owner] = {
                        name: _describe(value) for name, value in _plain(holder).items()
                    }
                    if is_late:
                        self._late.add(holder.owner)
                except TypeError:
                    continue  # it cannot be a key: then only its arrays are state

    def _of(self, holder: _Holder) -> dict[str, str] | None:
        try:
            return self._first.get(holder.owner)
        except TypeError:
            return None

    def save(self, serializer: Any, target: Any) -> None:
        """Save what has changed. Local."""
        for holder in _holders(target):
            prefix = f"{_PREFIX}{holder.path}"
            if isinstance(holder, _Serializable):
                holder.owner.serialize(serializer[prefix])
                continue
            first, changed = self._of(holder), {}
            is_late = first is None or holder.owner in self._late
            for name, value in _plain(holder).items():
                if first is None:
                    is_changed = bool(pack(value)[1])
                else:
                    is_changed = first.get(name) != _describe(value)
                if is_changed or (holder.is_reset and not is_late):
                    changed[name] = value
            if changed:
                was = (
                    {} if first is None or is_late else {name: first.get(name) for name in changed}
                )
                _write(serializer[prefix], changed, was)
        for path, trainer in trainers(target):
            # Extensions may save between an update and the stop trigger, which looks at what was observed.
            if not isinstance(trainer.stop_trigger, MultiNodeEarlyStoppingTrigger):
                observed = _Holder("", None, [*trainer.observation])
                _write(
                    serializer[f"{_PREFIX}{path}observation/"],
                    _plain(observed, trainer.observation),
                    {},
                )

    def load(
        self,
        loader: Any,
        target: Any,
        own: Sequence[Mapping[str, Array]],
        skipped: Iterable[str],
    ) -> tuple[list[PutOff], list[str]]:
        """Put attributes back, but for hyperparameters, which are returned. Local.

        Args:
            loader: Chainer's, of what this rank had, or rank 0 if another number of ranks has saved.
            target: Changed in place.
            own: What this rank had of its own, alone; or what each of another number of ranks had. Then
                what these had alike is put back.
            skipped: Paths of what is another object now than the one that was saved.

        Returns:
            Hyperparameters to set, and what to tell the user.
        """
        settings: list[PutOff] = []
        notes: list[str] = []
        for holder in _holders(target):
            prefix = f"{_PREFIX}{holder.path}"
            if holder.path.startswith((*skipped,)):
                continue
            if isinstance(holder, _Holder):
                self._load(holder, own, settings, notes)
            elif any(key.startswith(prefix) for key in own[0]) and _are_alike(own, prefix):
                holder.owner.serialize(loader[prefix])
        for path, trainer in trainers(target):
            prefix = f"{_PREFIX}{path}observation/"
            found = {name: value for name, value, _ in _read_alike(own, prefix, {})}
            trainer.observation = found or trainer.observation
        return settings, notes

    def _load(
        self,
        holder: _Holder,
        own: Sequence[Mapping[str, Array]],
        settings: list[PutOff],
        notes: list[str],
    ) -> None:
        first = self._of(holder) or {}
        for name, value, was in _read_alike(own, f"{_PREFIX}{holder.path}", vars(holder.owner)):
            if not holder.is_setting:
                vars(holder.owner)[name] = value
            elif was in (None, first.get(name)):
                settings.append(PutOff(holder.owner, name, value))
            elif _describe(value) != was:
                notes.append(
                    f"{name} of {holder.path.rstrip('/')} began with {was}, and training had made it "
                    f"{value!r}; it begins with {first.get(name)} now, and stays so"
                )


def put_off(settings: list[PutOff], target: Any) -> None:
    """Set hyperparameters; in a trainer once all extensions are initialized, as some then set them. Local."""
    found = [trainer for _, trainer in trainers(target)]
    if not found:
        _set(settings)
    elif settings:
        found[0].extend(_Setter(settings), "chainer_dist.hyperparameters", trigger=lambda _: False)


class _Setter(extension.Extension):  # type: ignore[misc]  # Chainer has no types
    """Sets hyperparameters when a trainer begins to run."""

    priority = -(2**31)  # the last one

    def __init__(self, settings: list[PutOff]) -> None:
        self._settings = settings

    def initialize(self, trainer: chainer.training.Trainer) -> None:
        _set(self._settings)
        del trainer._extensions[self.name]  # it has nothing to save


def _set(settings: list[PutOff]) -> None:
    for owner, name, value in settings:
        vars(owner)[name] = value


def trainers(target: Any, path: str = "") -> Iterator[tuple[str, training.Trainer]]:
    """Yield the trainers of a target, with their paths. Local."""
    if isinstance(target, dict):
        for key, value in target.items():
            yield from trainers(value, f"{path}{key}/")
    elif isinstance(target, training.Trainer):
        yield path, target


def unwrapped(trigger: Any) -> Any:
    """Return what a trigger that all ranks agree on wraps, or the trigger. Local."""
    return vars(trigger).get("actual_trigger", trigger) if _has_attributes(trigger) else trigger


def serialize_trainer(
    serializer: Any, trainer: training.Trainer, path: str, skipped: Container[str]
) -> None:
    """Do what ``Trainer.serialize`` does, but for some extensions. Local.

    Args:
        serializer: Chainer's.
        trainer: To save, or to load into.
        path: Of the trainer.
        skipped: Paths of extensions and triggers to leave out.
    """
    if type(trainer).serialize is not training.Trainer.serialize:
        trainer.serialize(serializer)
        return
    trainer.updater.serialize(serializer["updater"])
    pieces = [("stop_trigger", trainer.stop_trigger)]
    for name, entry in trainer._extensions.items():
        pieces += [
            (f"extensions/{name}", entry.extension),
            (f"extension_triggers/{name}", entry.trigger),
        ]
    for key, piece in pieces:
        is_skipped = f"{path}{key}/" in skipped or _is_unable(piece)
        if hasattr(piece, "serialize") and not is_skipped:
            piece.serialize(serializer[key])
    if isinstance(serializer, serializers.Serializer):
        serializer("_snapshot_elapsed_time", trainer.elapsed_time)
    else:
        trainer._snapshot_elapsed_time = serializer("_snapshot_elapsed_time", 0.0)


def _is_unable(piece: Any) -> bool:
    return getattr(type(piece), "serialize", None) in [each.serialize for each in _UNABLE]


def _has_attributes(piece: Any) -> bool:
    kinds = (types.FunctionType, types.MethodType, types.ModuleType, type)
    return hasattr(piece, "__dict__") and not isinstance(piece, kinds)


def _holders(target: Any) -> Iterator[_Holder | _Serializable]:
    """Yield all objects of a target whose attributes may be state, each once."""
    seen: set[int] = set()
    for holder in _all_holders(target):
        if id(holder.owner) not in seen:
            seen.add(id(holder.owner))
            yield holder


def _all_holders(target: Any) -> Iterator[_Holder | _Serializable]:
    for path, part in parts(target):
        optimizer = getattr(part, "actual_optimizer", part)
        updater = getattr(part, "actual_updater", part)
        if isinstance(part, chainer.Link):
            for name, link in part.namedlinks():
                yield _of_link(f"{path}{name.strip('/')}/", link)
        elif isinstance(optimizer, chainer.Optimizer):
            yield from _of_optimizer(path, optimizer)
        elif isinstance(updater, training.Updater):
            names = [name for name in vars(updater) if name != "iteration"]
            yield _Holder(path, updater, names)
        elif isinstance(part, chainer.dataset.Iterator):
            yield from _of_piece(path, part)
    for path, trainer in trainers(target):
        yield from _of_piece(f"{path}stop_trigger/", trainer.stop_trigger)
        for name, entry in trainer._extensions.items():
            yield from _of_piece(f"{path}extensions/{name}/", entry.extension)
            yield from _of_piece(f"{path}extension_triggers/{name}/", unwrapped(entry.trigger))


def _of_link(path: str, link: chainer.Link) -> _Holder:
    left_out = _BOOKKEEPING | link._params | link._persistent
    if isinstance(link, (chainer.Chain, chainer.ChainList)):
        left_out |= {name for name in vars(link) if isinstance(vars(link)[name], chainer.Link)}
    if isinstance(link, L.Classifier):
        left_out |= _RESULTS
    return _Holder(path, link, [name for name in vars(link) if name not in left_out])


def _of_optimizer(path: str, optimizer: chainer.Optimizer) -> Iterator[_Holder]:
    hyperparam = getattr(optimizer, "hyperparam", None)
    if hyperparam is not None:
        names = [name for name in vars(hyperparam) if name != "_parent"]
        yield _Holder(f"{path}hyperparam/", hyperparam, names, is_setting=True, is_reset=True)
    for name, param in optimizer.target.namedparams() if optimizer.target is not None else ():
        rule = param.update_rule
        if rule is not None:
            own = f"{path}{name.strip('/')}/"
            names = [name for name in vars(rule.hyperparam) if name != "_parent"]
            yield _Holder(
                f"{own}hyperparam/", rule.hyperparam, names, is_setting=True, is_reset=True
            )
            yield _Holder(f"{own}rule/", rule, ["enabled"], is_setting=True)


def _of_piece(path: str, piece: Any) -> Iterator[_Holder | _Serializable]:
    """Yield an extension, a trigger or an iterator if it does not serialize itself, and what it is made of."""
    if not _has_attributes(piece) or type(piece).__module__.split(".")[0] == "chainer_dist":
        return
    serialize = getattr(type(piece), "serialize", None)
    if serialize is None or serialize in _DO_NOTHING or _is_unable(piece):
        names = [name for name in vars(piece) if name not in _EXTENDED]
    else:
        names = [
            name
            for kind, names in _INCOMPLETE.items()
            if serialize is kind.serialize
            for name in names
        ]
    if names:
        yield _Holder(path, piece, names)
    for name in names:
        value = vars(piece).get(name)
        if type(value).__module__.startswith(("chainer.training.", "chainer.reporter")):
            if isinstance(value, (training.Trainer, training.Updater)) or "ProgressBar" in (
                type(value).__name__
            ):
                continue
            if getattr(type(value), "serialize", None) is None:
                yield from _of_piece(f"{path}{name}/", value)
            elif getattr(type(value), "serialize", None) not in _DO_NOTHING:
                yield _Serializable(f"{path}{name}/", value)


def _plain(holder: _Holder, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return those attributes that are plain values."""
    found = {}
    for name in holder.names:
        value = (vars(holder.owner) if values is None else values).get(name)
        try:
            pack(value, is_small=True)
        except NotPlainError:
            continue
        found[name] = value
    return found


def _describe(value: Any) -> str:
    """Return a text that is the same for the same value only."""
    packed, arrays = pack(value)
    text = json.dumps(packed)
    for array in arrays:
        content = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        text += f" {array.dtype.str} {array.shape} {content}"
    return text


def _write(serializer: Any, values: dict[str, Any], was: dict[str, str | None]) -> None:
    packed, arrays = pack(values)
    text = json.dumps({"values": [pair["tuple"] for pair in packed["dict"]], "was": was})
    serializer("values", np.frombuffer(text.encode(), dtype=np.uint8))
    for number, array in enumerate(arrays):
        serializer(str(number), array)


class _Numbered:
    """Arrays by number."""

    def __init__(self, source: Mapping[str, Array], prefix: str) -> None:
        self._source = source
        self._prefix = prefix

    def __getitem__(self, number: int) -> Array:
        return self._source[f"{self._prefix}{number}"]


def _read(
    source: Mapping[str, Array], prefix: str, current: Mapping[str, Any]
) -> Iterator[tuple[str, Any, str | None]]:
    """Yield names, values, and what they were at first."""
    if f"{prefix}values" not in source:
        return
    content = json.loads(source[f"{prefix}values"].tobytes())
    arrays: Any = _Numbered(source, prefix)
    for name, packed in content["values"]:
        yield name, unpack(packed, arrays, current.get(name)), content["was"].get(name)


def _read_alike(
    own: Sequence[Mapping[str, Array]], prefix: str, current: Mapping[str, Any]
) -> Iterator[tuple[str, Any, str | None]]:
    """Do what :func:`_read` does, for what all ranks have saved alike."""
    if len(own) == 1:
        yield from _read(own[0], prefix, current)
        return
    known = [
        {name: (_describe(value), was) for name, value, was in _read(source, prefix, {})}
        for source in own
    ]
    for name, value, was in _read(own[0], prefix, {}):
        if all(theirs.get(name) == known[0][name] for theirs in known):
            yield name, value, was


def _are_alike(own: Sequence[Mapping[str, Array]], prefix: str) -> bool:
    """Tell whether all ranks have saved the same below a prefix."""
    if len(own) == 1:
        return True
    keys = [{key for key in source if key.startswith(prefix)} for source in own]
    return all(
        theirs == keys[0] and all(np.array_equal(source[key], own[0][key]) for key in theirs)
        for source, theirs in zip(own, keys)
    )
