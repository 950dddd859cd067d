"""A chunk of a parameter, updated by Chainer's own update rule."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import chainer

    from chainer_dist._typing import Array

__all__ = ["Chunk", "state_keys"]


class Chunk:
    """Some elements of a parameter, as a parameter with an update rule like the whole one's. Local.

    Args:
        whole: The whole parameter.
        elements: Slice of its elements, in C order.
        state: 1-dimensional arrays that take these elements of the rule's state, by name.

    Attributes:
        whole: The whole parameter.
        param: The elements, as a parameter.
        state: State of the elements, by the names of the rule's arrays, in the shape of ``array``.
        array: Values of the elements, 1-dimensional, or 0-dimensional if the parameter is.
    """

    def __init__(self, whole: chainer.Parameter, elements: slice, state: dict[str, Array]) -> None:
        import chainer

        self.whole = whole
        self._elements = elements
        # NumPy 1 computes 0-dimensional arrays in double precision.
        self._shape = () if whole.array.ndim == 0 else (-1,)
        self.state = {key: value.reshape(self._shape) for key, value in state.items()}
        self._rule = copy.copy(whole.update_rule)
        self.param = chainer.Parameter(name=whole.name)  # hooks may exclude biases by name

    def bind(self, array: Array) -> None:
        """Use these elements of ``array``, which is C-contiguous and has all of the parameter's, from now on."""
        self.array = self._local_slice(array)
        self.param.array = self.array

    def take_grad(self, grad: Array) -> None:
        """Set the gradient of the chunk, a 1-dimensional array."""
        self.param.grad = grad.reshape(self._shape)

    def take_state(self) -> None:
        """Fill the arrays of the chunk's state from the rule's state, or initialize them."""
        rule = self._rule
        if rule is None or not rule.enabled:
            return
        state = rule.state
        if state is None:
            rule._state = state = {}  # noqa: SLF001 - Chainer's
            rule.init_state(self.param)
            for key, array in self.state.items():
                array[...] = state[key]
        else:
            for key, array in self.state.items():
                array[...] = self._local_slice(state[key])

    def read_state(self, key: str, out: Array) -> None:
        """Copy the elements of an array of the state into ``out``, if the rule has an array of that name."""
        if key in self.state:
            out[...] = self.state[key].reshape(-1)

    def _local_slice(self, array: Array) -> Array:
        return array.reshape(-1)[self._elements].reshape(self._shape)

    def prepare(self, hooks: Sequence[Callable[[Any, chainer.Parameter], None]]) -> None:
        """Call hooks of the optimizer that work on one parameter at a time."""
        self.param._loss_scale = self.whole._loss_scale  # noqa: SLF001 - Chainer's
        for hook in hooks:
            hook(self.whole.update_rule, self.param)

    def update(self, hooks: Sequence[Callable[[Any, chainer.Parameter], None]]) -> None:
        """Call hooks of the optimizer, and update the chunk as the whole parameter's rule would."""
        self.prepare(hooks)
        rule = self._rule
        if rule is None:
            return
        vars(rule).update(vars(self.whole.update_rule))  # current hyperparameters, t and hooks
        rule._state = state = dict(self.state)  # noqa: SLF001 - Chainer's
        rule.update(self.param)
        for key, array in self.state.items():
            if state[key] is not array:  # a rule may replace its arrays
                array[...] = state[key]
        if self.param.array is not self.array:
            self.array[...] = self.param.array
            self.param.array = self.array


def state_keys(rule: chainer.UpdateRule | None) -> list[str]:
    """Return the names of the arrays that an enabled rule keeps for a parameter. Local."""
    import chainer

    if rule is None or not rule.enabled:
        return []
    if rule.state is not None:
        return list(rule.state)
    probe = copy.copy(rule)  # UpdateRule.serialize finds the names in the same way
    probe._state = {}  # noqa: SLF001 - Chainer's
    array = np.empty(1, dtype=np.float32)
    probe.init_state(chainer.Variable(array, grad=array))
    return list(probe.state)
