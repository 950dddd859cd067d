"""The conditions under which the sharded update provably has the same result as the optimizer's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist import _chainer
from chainer_dist.parameters import are_identical

if TYPE_CHECKING:
    import chainer

    from chainer_dist.parameters import ParameterSet

__all__ = ["Signature", "is_elementwise", "is_uniform", "modes", "obstacle", "obstacle_in_arrays"]

# Chainer's rules that compute each element from the gradient and state of that element alone, and have no
# state but the named arrays and `t`.
_RULES = frozenset(
    {
        "AdaDeltaRule",
        "AdaGradRule",
        "AdamRule",
        "CorrectedMomentumSGDRule",
        "MomentumSGDRule",
        "NesterovAGRule",
        "RMSpropGravesRule",
        "RMSpropRule",
        "SGDRule",
        "SMORMS3Rule",
    }
)
# Methods that GradientMethod.update calls. The sharded update replaces them, unless they are overridden.
_METHODS = frozenset(
    {
        "update",
        "call_hook",
        "call_hooks",
        "reallocate_cleared_grads",
        "check_nan_in_grads",
        "is_safe_to_update",
        "update_loss_scale",
    }
)


def obstacle(optimizer: chainer.Optimizer, parameters: ParameterSet) -> str | None:
    """Return the reason why a sharded update might not equal the optimizer's own, or None. Local.

    Args:
        optimizer: A Chainer optimizer that is set up.
        parameters: The parameters of its target.
    """
    return (
        _obstacle_in_optimizer(optimizer)
        or obstacle_in_arrays(parameters)
        or next(filter(None, map(_obstacle_in_param, parameters.names, parameters.params)), None)
    )


def _obstacle_in_optimizer(optimizer: chainer.Optimizer) -> str | None:
    import chainer

    kind = type(optimizer)
    for name in _METHODS:
        if name in vars(optimizer) or (
            getattr(kind, name, None) is not getattr(chainer.GradientMethod, name)
        ):
            return f"{kind.__name__} has its own {name}()"
    if optimizer._loss_scaling_is_dynamic:  # noqa: SLF001 - Chainer's
        return "dynamic loss scaling looks at all gradients before the update"
    if chainer.is_debug():
        return "Chainer's debug mode looks at all averages before the update"
    return (
        _obstacle_in_hooks(optimizer)
        or _obstacle_in_target(optimizer.target)
        or next(iter(_arrays_in("the optimizer", optimizer)), None)
    )


def _obstacle_in_hooks(optimizer: chainer.Optimizer) -> str | None:
    import chainer

    before, after = _chainer.hooks_of(optimizer)
    for name in after:
        return f"the hook {name} runs after the update"
    for name, hook in before.items():
        known = is_elementwise(hook) and getattr(hook, "call_for_each_param", False)
        if not (known or _behaves_as(hook, chainer.optimizer_hooks.GradientClipping)):
            return f"the hook {name} may look at whole parameters"
    return None


def _obstacle_in_target(target: chainer.Link) -> str | None:
    params = list(target.params())
    if len(params) != len({id(param) for param in params}):
        return "a parameter is registered twice, and so updated twice"
    return None


def obstacle_in_arrays(parameters: ParameterSet) -> str | None:
    """Return the reason why an array cannot be updated in slices, in words, or None. Local."""
    if parameters.unsupported:
        return parameters.unsupported
    end = 0
    extents = [
        (array.ctypes.data, array.nbytes, name)
        for name, array in zip(parameters.names, parameters.arrays)
        if array.size
    ]
    for name, array in zip(parameters.names, parameters.arrays):
        if not (array.flags.c_contiguous and array.flags.writeable):
            return f"{name} is not a writable array in C order"
    for begin, nbytes, name in sorted(extents):
        if begin < end:
            return f"{name} shares memory with another parameter"
        end = begin + nbytes
    return None


def _obstacle_in_param(name: str, param: chainer.Parameter) -> str | None:
    import chainer

    rule = param.update_rule
    if rule is None:
        return None
    if type(param).update is not chainer.Parameter.update or "update" in vars(param):
        return f"{name} has its own update()"
    if "update" in vars(rule) or "update_core" in vars(rule):
        return f"the update rule of {name} has its own update()"
    kind = type(rule)
    if not (kind.__module__.startswith("chainer.optimizers.") and kind.__name__ in _RULES):
        return f"nothing is known of the update rule {kind.__name__} of {name}"
    if rule._use_fp32_update and param.dtype == np.float16:  # noqa: SLF001 - Chainer's
        return f"{name} is updated in float32 (use_fp32_update)"
    return _obstacle_in_rule_hooks(name, rule) or _obstacle_in_state(name, param)


def _obstacle_in_rule_hooks(name: str, rule: chainer.UpdateRule) -> str | None:
    before, after = _chainer.hooks_of(rule)
    for hook_name in after:
        return f"the hook {hook_name} runs after the update of {name}"
    for hook_name, hook in before.items():
        if not is_elementwise(hook):
            return f"the hook {hook_name} of {name} may look at the whole parameter"
    return next(iter(_arrays_in(name, rule)), None)


def _arrays_in(owner: str, hooked: Any) -> list[str]:
    """Say which numbers of an optimizer or a rule are arrays, whose elements belong to those of whole parameters. Local.

    Numbers are hyperparameters and what Chainer's hooks multiply or compare with.
    """
    numbers = {name: value for name, value in _hyperparameters(hooked).items() if name != "_parent"}
    for name, hook in _chainer.hooks_of(hooked)[0].items():
        if is_uniform(hook):
            numbers.update({f"{key} of the hook {name}": it for key, it in vars(hook).items()})
    return [f"{name} of {owner} is an array" for name, value in numbers.items() if np.ndim(value)]


def _hyperparameters(hooked: Any) -> dict[str, Any]:
    """Return an optimizer's hyperparameters, or those of a rule that are not the optimizer's, and its parent."""
    hyperparam = getattr(hooked, "hyperparam", None)
    return {} if hyperparam is None else vars(hyperparam)


def _obstacle_in_state(name: str, param: chainer.Parameter) -> str | None:
    array = param.array
    for key, value in (param.update_rule.state or {}).items():
        like = isinstance(value, np.ndarray) and value.dtype == array.dtype
        if not (like and value.shape == array.shape):
            return f"the state {key} of {name} is not an array like the parameter"
    return None


def is_elementwise(hook: Any) -> bool:
    """Return whether a hook changes each gradient's element by that and its parameter's element alone. Local.

    Some of Chainer's hooks are known to do so, and so are classes derived from them without overriding their
    methods. Any other hook can declare it by a true attribute ``is_elementwise``.
    """
    return bool(getattr(hook, "is_elementwise", False)) or is_uniform(hook)


def is_uniform(hook: Any) -> bool:
    """Return whether a hook is elementwise and does the same to every parameter, whatever its name. Local."""
    from chainer import optimizer_hooks

    known = (
        optimizer_hooks.GradientHardClipping,
        optimizer_hooks.Lasso,
        optimizer_hooks.WeightDecay,
    )
    return any(_behaves_as(hook, kind) for kind in known)


def _behaves_as(hook: Any, kind: type) -> bool:
    """Return whether a hook's class is ``kind``, or derived from it without overriding its methods. Local."""
    return isinstance(hook, kind) and all(
        getattr(type(hook), name, None) is getattr(kind, name, None)
        for name in ("__call__", "__getattribute__", "call_for_each_param")
    )


def modes(optimizer: chainer.Optimizer) -> tuple[bool, frozenset[str]]:
    """Return whether Chainer is in debug mode, and which methods the optimizer itself has been given. Local."""
    import chainer

    return chainer.is_debug(), _METHODS.intersection(vars(optimizer))


class Signature:
    """All facts that decide between a sharded and a replicated update, in a form that is fast to compare. Local.

    Args:
        optimizer: A Chainer optimizer that is set up.
        parameters: The parameters of its target.
    """

    def __init__(self, optimizer: chainer.Optimizer, parameters: ParameterSet) -> None:
        rules = [param.update_rule for param in parameters.params]
        actual = [rule for rule in rules if rule is not None]
        self._objects: list[Any] = [*parameters.params, *rules]
        arrays: list[str] = []
        for hooked in (optimizer, *actual):
            before, after = _chainer.hooks_of(hooked)
            if before or after:
                self._objects += [*before.values(), None, *after.values(), None]
            if before or len(_hyperparameters(hooked)) > 1:  # more than the parent
                arrays += _arrays_in("", hooked)
        self._values = (
            arrays,
            [(rule.enabled, rule._use_fp32_update) for rule in actual],  # noqa: SLF001 - Chainer's
            optimizer._loss_scaling_is_dynamic,  # noqa: SLF001 - Chainer's
            modes(optimizer),
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Signature)
            and are_identical(self._objects, other._objects)
            and self._values == other._values
        )

    __hash__ = None  # type: ignore[assignment]
