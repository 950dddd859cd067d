"""The trainers of a target, and how their parts are serialized."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

from chainer import serializer as serializers
from chainer import training
from chainer.training import extensions

from chainer_dist._chainer import extension_entries

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

__all__ = ["has_attributes", "is_unable", "serialize_trainer", "trainers", "unwrapped"]

# It cannot serialize where it adds up variables.
_UNABLE = (extensions.MicroAverage,)


def trainers(target: Any, path: str = "") -> Iterator[tuple[str, training.Trainer]]:
    """Yield the trainers of a target, with their paths. Local."""
    if isinstance(target, dict):
        for key, value in target.items():
            yield from trainers(value, f"{path}{key}/")
    elif isinstance(target, training.Trainer):
        yield path, target


def unwrapped(piece: Any) -> Any:
    """Return the trigger or extension that another one wraps, for all ranks or for rank 0; or itself. Local."""
    own = vars(piece) if has_attributes(piece) else {}
    return own.get("actual_trigger", own.get("actual_extension", piece))


def serialize_trainer(
    serializer: Any, trainer: training.Trainer, path: str, skipped: Container[str]
) -> None:
    """Serialize a trainer as ``Trainer.serialize`` does, without some of its extensions. Local.

    Args:
        serializer: Chainer's serializer or deserializer.
        trainer: Trainer to save, or to load into.
        path: Path of the trainer in the target.
        skipped: Paths of extensions and triggers to leave out.
    """
    if type(trainer).serialize is not training.Trainer.serialize:
        trainer.serialize(serializer)
        return
    trainer.updater.serialize(serializer["updater"])
    pieces = [("stop_trigger", trainer.stop_trigger)]
    for name, entry in extension_entries(trainer).items():
        pieces += [
            (f"extensions/{name}", entry.extension),
            (f"extension_triggers/{name}", entry.trigger),
        ]
    for key, piece in pieces:
        is_skipped = f"{path}{key}/" in skipped or is_unable(piece)
        if hasattr(piece, "serialize") and not is_skipped:
            piece.serialize(serializer[key])
    if isinstance(serializer, serializers.Serializer):
        serializer("_snapshot_elapsed_time", trainer.elapsed_time)
    else:
        trainer._snapshot_elapsed_time = serializer("_snapshot_elapsed_time", 0.0)  # noqa: SLF001 - Chainer's


def is_unable(piece: Any) -> bool:
    """Return whether an extension cannot serialize itself, though it has a method for that. Local."""
    return getattr(type(piece), "serialize", None) in [each.serialize for each in _UNABLE]


def has_attributes(piece: Any) -> bool:
    """Return whether something is an object that may keep state in attributes: no function, module or class. Local."""
    kinds = (types.FunctionType, types.MethodType, types.ModuleType, type)
    return hasattr(piece, "__dict__") and not isinstance(piece, kinds)
