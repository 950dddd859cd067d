"""State that objects keep in attributes that nothing serializes: what has changed since training began.

Constructors make the rest: a value that the constructor has set, and that is as it was, is not saved, so that
the next process may construct it otherwise. Nothing here communicates.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from chainer_dist.checkpoints.attribute_values import (
    are_alike,
    describe_value,
    plain_values,
    read_alike,
    write_values,
)
from chainer_dist.checkpoints.holders import Holder, Serializable, holders
from chainer_dist.checkpoints.settings import PutOff
from chainer_dist.checkpoints.trainers import trainers
from chainer_dist.extensions._plain_values import pack
from chainer_dist.extensions.multi_node_early_stopping_trigger import MultiNodeEarlyStoppingTrigger

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from chainer_dist._typing import Array

__all__ = ["Attributes"]

_PREFIX = "+attributes:"


class Attributes:
    """Saves and loads attributes, as far as they changed since the objects were first seen."""

    def __init__(self) -> None:
        self._first: weakref.WeakKeyDictionary[Any, dict[str, str]] = weakref.WeakKeyDictionary()
        self._late: weakref.WeakSet[Any] = weakref.WeakSet()

    def look(self, target: Any, *, is_late: bool = False) -> None:
        """Note objects that are new in a target. Local.

        Args:
            target: Object to be saved later.
            is_late: Whether extensions may have set hyperparameters already, so that it is not known what
                their constructors made them.
        """
        for holder in holders(target):
            if isinstance(holder, Holder) and self._of(holder) is None:
                try:
                    self._first[holder.owner] = {
                        name: describe_value(value)
                        for name, value in plain_values(vars(holder.owner), holder.names).items()
                    }
                    if is_late:
                        self._late.add(holder.owner)
                except TypeError:
                    continue  # it cannot be a key: then only its arrays are state

    def _of(self, holder: Holder) -> dict[str, str] | None:
        try:
            return self._first.get(holder.owner)
        except TypeError:
            return None

    def save(self, serializer: Any, target: Any) -> None:
        """Save the attributes that have changed. Local.

        Args:
            serializer: Chainer's serializer.
            target: Object to save.
        """
        for holder in holders(target):
            prefix = f"{_PREFIX}{holder.path}"
            if isinstance(holder, Serializable):
                holder.owner.serialize(serializer[prefix])
                continue
            first, changed = self._of(holder), {}
            is_late = first is None or holder.owner in self._late
            for name, value in plain_values(vars(holder.owner), holder.names).items():
                if first is None:
                    is_changed = bool(pack(value)[1])
                else:
                    is_changed = first.get(name) != describe_value(value)
                if is_changed or (holder.is_reset and not is_late):
                    changed[name] = value
            if changed:
                was = (
                    {} if first is None or is_late else {name: first.get(name) for name in changed}
                )
                write_values(serializer[prefix], changed, was)
        for path, trainer in trainers(target):
            # Extensions may save between an update and the stop trigger, which looks at what was observed.
            if not isinstance(trainer.stop_trigger, MultiNodeEarlyStoppingTrigger):
                observed = plain_values(trainer.observation, [*trainer.observation])
                write_values(serializer[f"{_PREFIX}{path}observation/"], observed, {})

    def load(
        self,
        loader: Any,
        target: Any,
        own: Sequence[Mapping[str, Array]],
        skipped: Iterable[str],
    ) -> tuple[list[PutOff], list[str]]:
        """Put attributes back, but for hyperparameters, which are returned. Local.

        Args:
            loader: Chainer's deserializer of the entries of this rank, or of rank 0 if another number of
                ranks has saved.
            target: Object to load into; changed in place.
            own: Entries of this rank, in a list of one; or of each rank, if another number of ranks has
                saved. Then an attribute is put back if it was the same on all of them.
            skipped: Paths of objects that are others now than those that were saved.

        Returns:
            Hyperparameters to set, and notes for the user.
        """
        settings: list[PutOff] = []
        notes: list[str] = []
        for holder in holders(target):
            prefix = f"{_PREFIX}{holder.path}"
            if holder.path.startswith((*skipped,)):
                continue
            if isinstance(holder, Holder):
                self._load(holder, own, settings, notes)
            elif any(key.startswith(prefix) for key in own[0]) and are_alike(own, prefix):
                holder.owner.serialize(loader[prefix])
        for path, trainer in trainers(target):
            prefix = f"{_PREFIX}{path}observation/"
            found = {name: value for name, value, _ in read_alike(own, prefix, {})}
            trainer.observation = found or trainer.observation
        return settings, notes

    def _load(
        self,
        holder: Holder,
        own: Sequence[Mapping[str, Array]],
        settings: list[PutOff],
        notes: list[str],
    ) -> None:
        first = self._of(holder) or {}
        for name, value, was in read_alike(own, f"{_PREFIX}{holder.path}", vars(holder.owner)):
            if not holder.is_setting:
                vars(holder.owner)[name] = value
            elif was in (None, first.get(name)):
                settings.append(PutOff(holder.owner, name, value))
            elif describe_value(value) != was:
                notes.append(
                    f"{name} of {holder.path.rstrip('/')} began with {was}, and training had made it "
                    f"{value!r}; it begins with {first.get(name)} now, and stays so"
                )
