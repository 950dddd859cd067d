"""What a checkpoint is of: so that it is not loaded into something else that happens to have fitting names.

Compared is what decides what a saved number means: the structure of models, the kind of optimizers and of
their update rules, the classes of extensions and triggers. Values, such as learning rates, are the user's.
Nothing here communicates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer

from chainer_dist import _chainer
from chainer_dist.checkpoints.trainers import trainers, unwrapped
from chainer_dist.optimizers.multi_node_optimizer import MultiNodeOptimizer
from chainer_dist.serialization.target import parts

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["compare", "describe", "without_state"]

_MOST_NAMED = 5
_STATELESS = ("function", "method", "Checkpoint", "_Average")  # kinds of extensions


def describe(target: Any, *, with_states: bool = True) -> dict[str, Any]:
    """Return what a target is, as JSON has it. Local.

    Args:
        target: The object that is saved, or into which is loaded.
        with_states: Whether to say which update rules have a state.
    """
    models: dict[str, Any] = {}
    optimizers: dict[str, Any] = {}
    for path, part in parts(target):
        optimizer = getattr(part, "actual_optimizer", part)
        if isinstance(part, chainer.Link):
            models[path] = _describe_link(part)
        elif isinstance(optimizer, chainer.Optimizer) and optimizer.target is not None:
            optimizers[path] = _describe_optimizer(optimizer, with_states=with_states)
            if isinstance(part, MultiNodeOptimizer):
                compression = part.options.compression
                kind = None if compression is None else type(compression).__name__
                optimizers[path]["compression"] = kind
    return {
        "models": models,
        "optimizers": optimizers,
        "trainers": {path: _describe_trainer(trainer) for path, trainer in trainers(target)},
    }


def compare(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Compare what was saved with what it is to be loaded into. Local.

    Returns:
        Messages for the user: one for each value that is not loaded, or that begins anew.

    Raises:
        ValueError: If they do not belong together.
    """
    notes = []
    for kind, differences in (("models", _model), ("optimizers", _optimizer)):
        for path, before in saved[kind].items():
            if path not in now[kind]:
                notes.append(f"{_name(path)} was saved, and is not there now")
                continue
            found = list(differences(path, before, now[kind][path]))
            if found:
                more = len(found) - _MOST_NAMED
                text = "; ".join(found[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
                raise ValueError(text)
    for path, before in saved["models"].items():
        here = now["models"].get(path, before)["persistents"]
        notes += [
            f"{path + name.strip('/')} was saved, and the model has none of that name now"
            for name in sorted({*before["persistents"]} - {*here})
        ]
    for path, before in saved["optimizers"].items():
        after = now["optimizers"].get(path, before)
        kinds = [each.get("compression", "") for each in (before, after)]
        if kinds[0] != kinds[1] and "" not in kinds:
            notes.append(
                f"the compression of {_name(path)} was {kinds[0]} and is {kinds[1]} now: it begins anew"
            )
    for path, before in saved["trainers"].items():
        notes += _trainer(before, now["trainers"].get(path, {}))
    return notes


def without_state(saved: dict[str, Any], path: str, name: str) -> bool:
    """Return whether the update rule of a parameter had no state yet when it was saved. Local."""
    rules = saved["optimizers"].get(path, {}).get("rules", {})
    return name in rules and rules[name]["state"] is None


def _describe_link(link: chainer.Link) -> dict[str, Any]:
    return {
        "params": {
            name: None if param.array is None else [list(param.shape), param.dtype.str]
            for name, param in sorted(link.namedparams())
        },
        "persistents": sorted(
            f"{path.rstrip('/')}/{name}"
            for path, below in link.namedlinks()
            for name in _chainer.persistent_names(below)
        ),
    }


def _describe_optimizer(optimizer: chainer.Optimizer, *, with_states: bool) -> dict[str, Any]:
    hyperparam = getattr(optimizer, "hyperparam", None)
    return {
        "class": type(optimizer).__name__,
        "hyperparameters": [] if hyperparam is None else sorted(hyperparam.get_dict()),
        "rules": {
            name: {
                "class": type(param.update_rule).__name__,
                "state": _keys(param.update_rule.state) if with_states else None,
            }
            for name, param in sorted(optimizer.target.namedparams())
            if param.update_rule is not None
        },
    }


def _keys(state: Any) -> list[str] | None:
    return None if state is None else sorted(state)


def _describe_trainer(trainer: chainer.training.Trainer) -> dict[str, str]:
    found = {"stop_trigger": type(unwrapped(trainer.stop_trigger)).__name__}
    for name, entry in _chainer.extension_entries(trainer).items():
        # distribute() and on_rank_zero() wrap some extensions when the trainer runs, after a resume.
        found[f"extensions/{name}"] = type(unwrapped(entry.extension)).__name__
        found[f"extension_triggers/{name}"] = type(unwrapped(entry.trigger)).__name__
    return found


def _model(path: str, saved: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    params, own = saved["params"], now["params"]
    for name in sorted({*params, *own}):
        full = path + name.strip("/")
        if name not in own:
            yield f"the parameter {full} was saved, and the model has none of that name now"
        elif name not in params:
            yield f"it has no parameter {full}, and the model has one now"
        elif params[name] is not None and own[name] is not None and params[name] != own[name]:
            (shape, dtype), (own_shape, own_dtype) = params[name], own[name]
            if shape != own_shape:
                yield f"{full} was saved as {tuple(shape)}, and is {tuple(own_shape)} now"
            else:
                yield f"{full} was saved as {dtype}, and is {own_dtype} now"
    for name in sorted({*now["persistents"]} - {*saved["persistents"]}):
        yield f"it has no {path + name.strip('/')}, and the model has it now"


def _optimizer(path: str, saved: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    if saved["class"] != now["class"]:
        yield f"{_name(path)} was {saved['class']}, and is {now['class']} now"
        return
    if saved["hyperparameters"] != now["hyperparameters"]:
        yield (
            f"{_name(path)} had the hyperparameters {', '.join(saved['hyperparameters'])}, and has "
            f"{', '.join(now['hyperparameters'])} now"
        )
    for name, rule in saved["rules"].items():
        kind = now["rules"].get(name, rule)["class"]
        if kind != rule["class"]:
            yield f"the update rule of {name} was {rule['class']}, and is {kind} now"


def _trainer(saved: dict[str, str], now: dict[str, str]) -> Iterator[str]:
    for key in sorted({*saved, *now}):
        if key.startswith("extension_triggers/") and f"extensions{key[18:]}" not in {*saved} & {
            *now
        }:
            continue  # the message on the extension covers it
        before, after = saved.get(key), now.get(key)
        if {before, after} <= {None, *_STATELESS}:
            continue
        if before is None:
            yield f"{key} ({after}) was not saved, and begins anew"
        elif after is None:
            yield f"{key} ({before}) was saved, and is not there now"
        elif before != after:
            yield f"{key} was {before} and is {after} now: it begins anew"


def _name(path: str) -> str:
    return path.rstrip("/") or "it"
