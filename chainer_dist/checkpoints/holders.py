"""The objects of a target whose attributes may be state, and the names of these attributes.

Stateful recurrent links keep hidden states that way, some of Chainer's extensions and triggers their counts
and sums, and optimizers the hyperparameters that schedules change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import chainer
import chainer.links as L
from chainer import training
from chainer.training import extension, extensions

from chainer_dist._chainer import extension_entries, persistent_names
from chainer_dist.checkpoints.trainers import has_attributes, is_unable, trainers, unwrapped
from chainer_dist.serialization.target import parts

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Holder", "Serializable", "holders"]


# Attributes that are not saved: a link's own bookkeeping, what all update rules have and save elsewhere, what a
# forward pass writes before it reads it, and what Trainer.extend sets.
_BOOKKEEPING = {*vars(chainer.Chain()), *vars(chainer.ChainList())}
_OF_ALL_RULES = {*vars(chainer.UpdateRule())} - {"enabled"}
_RESULTS = {"y", "loss", "accuracy"}
_EXTENDED = {"name", "trigger", "priority", "default_name"}

# These classes serialize, but leave out the attributes named here.
_INCOMPLETE = {extensions.PlotReport: ("_summary", "_trigger")}
_DO_NOTHING = (extension.Extension.serialize, chainer.dataset.Iterator.serialize)


class Holder(NamedTuple):
    """An object with attributes to save.

    Attributes:
        path: Its path in the target.
        owner: The object.
        names: Names of the attributes.
        is_setting: Whether the user may set them otherwise in the next process.
        is_reset: Whether some extensions set them when training begins.
    """

    path: str
    owner: Any
    names: list[str]
    is_setting: bool = False
    is_reset: bool = False


class Serializable(NamedTuple):
    """An object that can serialize itself, in an object that does not ask it to.

    Attributes:
        path: Its path in the target.
        owner: The object.
    """

    path: str
    owner: Any


def holders(target: Any) -> Iterator[Holder | Serializable]:
    """Yield all objects of a target whose attributes may be state, each once."""
    seen: set[int] = set()
    for holder in _all_holders(target):
        if id(holder.owner) not in seen:
            seen.add(id(holder.owner))
            yield holder


def _all_holders(target: Any) -> Iterator[Holder | Serializable]:
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
            yield Holder(path, updater, names)
        elif isinstance(part, chainer.dataset.Iterator):
            yield from _of_piece(path, part)
    for path, trainer in trainers(target):
        yield from _of_piece(f"{path}stop_trigger/", unwrapped(trainer.stop_trigger))
        for name, entry in extension_entries(trainer).items():
            yield from _of_piece(f"{path}extensions/{name}/", unwrapped(entry.extension))
            yield from _of_piece(f"{path}extension_triggers/{name}/", unwrapped(entry.trigger))


def _of_link(path: str, link: chainer.Link) -> Holder:
    left_out = {*_BOOKKEEPING, *link._params, *persistent_names(link)}  # noqa: SLF001 - Chainer's
    if isinstance(link, (chainer.Chain, chainer.ChainList)):
        left_out |= {name for name in vars(link) if isinstance(vars(link)[name], chainer.Link)}
    if isinstance(link, L.Classifier):
        left_out |= _RESULTS
    return Holder(path, link, [name for name in vars(link) if name not in left_out])


def _of_optimizer(path: str, optimizer: chainer.Optimizer) -> Iterator[Holder]:
    hyperparam = getattr(optimizer, "hyperparam", None)
    if hyperparam is not None:
        names = [name for name in vars(hyperparam) if name != "_parent"]
        yield Holder(f"{path}hyperparam/", hyperparam, names, is_setting=True, is_reset=True)
    for name, param in optimizer.target.namedparams() if optimizer.target is not None else ():
        rule = param.update_rule
        if rule is not None:
            own = f"{path}{name.strip('/')}/"
            names = [name for name in vars(rule.hyperparam) if name != "_parent"]
            yield Holder(
                f"{own}hyperparam/", rule.hyperparam, names, is_setting=True, is_reset=True
            )
            names = [name for name in vars(rule) if name not in _OF_ALL_RULES]
            yield Holder(f"{own}rule/", rule, names, is_setting=True)


def _of_piece(path: str, piece: Any) -> Iterator[Holder | Serializable]:
    """Yield an extension, a trigger or an iterator if it does not serialize itself, and what it is made of."""
    if not has_attributes(piece) or type(piece).__module__.split(".")[0] == "chainer_dist":
        return
    serialize = getattr(type(piece), "serialize", None)
    if serialize is None or serialize in _DO_NOTHING or is_unable(piece):
        names = [name for name in vars(piece) if name not in _EXTENDED]
    else:
        names = [
            name
            for kind, names in _INCOMPLETE.items()
            if serialize is kind.serialize
            for name in names
        ]
    if names:
        yield Holder(path, piece, names)
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
                yield Serializable(f"{path}{name}/", value)
