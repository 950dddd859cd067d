"""Applying a function to variables that hold NumPy's arrays: what Chainer's method does for these, and no more.

A step of a deep network applies hundreds of functions. Chainer's method also looks for other arrays, devices, layouts and
the debug mode, several times each; where there are any of these, or hooks that it calls before forward, it is called.
"""

from __future__ import annotations

import weakref
from typing import Any

import chainer
import numpy as np

from chainer_dist.kernels.replacements import is_unchanged, replaces
from chainer_dist.kernels.variables import variable

_Node = chainer.FunctionNode
_Hook = chainer.FunctionHook
_Variable = chainer.Variable


@replaces(_Node, "apply", needs_onednn=False, is_computation=False)
def _apply(chainers: Any, self: Any, inputs: Any) -> Any:
    config, local = chainer.config._global, vars(chainer.config._local)
    hooks = chainer.get_function_hooks()
    if (
        not inputs
        or local.get("debug", config.debug)
        or local.get("schedule_func", config.schedule_func) is not None
        or self._n_local_function_hooks
        or self._is_chainerx_fallback_mode
        or not all(map(_is_called_afterwards, hooks.values()))
    ):
        return chainers(self, inputs)
    variables = _variables(inputs)
    if variables is None:
        return chainers(self, inputs)
    in_data = tuple([x._data[0] for x in variables])
    self._input_layouts = (None,) * len(inputs)
    if local.get("type_check", config.type_check):
        self._check_data_type_forward(in_data)
    if not is_unchanged(self.check_layout_forward, _Node.check_layout_forward):
        self.check_layout_forward(variables)
    self._input_indexes_to_retain = self._output_indexes_to_retain = None
    outputs = self.forward(in_data)
    if self._output_layouts is not None or not _are_plain(outputs, self.is_elementwise):
        return _apply_to_outputs(chainers, self, inputs, outputs)
    self._output_layouts = (None,) * len(outputs)
    for hook in hooks.values():
        hook.forward_postprocess(self, in_data)
    self._output_count = len(outputs)
    requires_grad = any(each._requires_grad for each in variables)
    made = tuple([variable(y, requires_grad=requires_grad) for y in outputs])
    if local.get("enable_backprop", config.enable_backprop):
        _grow_graph(self, variables, made, outputs)
        self.lazy_grad_sum = local.get("lazy_grad_sum", config.lazy_grad_sum)
    return made


def _variables(inputs: Any) -> list[Any] | None:
    """Return the inputs of a function as variables, or None if any has no array of NumPy, or a layout. Local."""
    variables = []
    for given in inputs:
        x = given
        if type(given) is np.ndarray:
            x = variable(given)
        elif not isinstance(given, _Variable) or given._has_chainerx_array:
            return None
        if type(x._data[0]) is not np.ndarray or x._layout is not None:
            return None
        variables.append(x)
    return variables


def _is_called_afterwards(hook: Any) -> bool:
    """Return whether a hook of functions has nothing to do before forward. Local."""
    return is_unchanged(hook.forward_preprocess, _Hook.forward_preprocess)


def _are_plain(outputs: Any, is_elementwise: bool) -> bool:
    """Return whether a function returned NumPy's arrays as Chainer wants them. Local."""
    if not isinstance(outputs, tuple):
        return False
    for y in outputs:
        if type(y) is not np.ndarray or (is_elementwise and y.shape != outputs[0].shape):
            return False
    return True


def _apply_to_outputs(chainers: Any, self: Any, inputs: Any, outputs: Any) -> Any:
    """Have Chainer's method go on with what a function has returned, or say what is wrong with it. Local."""
    retained = self._input_indexes_to_retain, self._output_indexes_to_retain
    layouts = self._output_layouts

    def forward(_: Any) -> Any:
        self._input_indexes_to_retain, self._output_indexes_to_retain = retained
        self._output_layouts = layouts
        return outputs

    self.forward = forward
    try:
        return chainers(self, inputs)
    finally:
        del self.forward


def _grow_graph(self: Any, variables: Any, made: Any, outputs: Any) -> None:
    """Connect a function with the variables that it has got and made. Local."""
    nodes = [each._node for each in variables]
    self.rank = max([node._rank for node in nodes])
    for each in made:
        each._node.creator_node = self
    self.inputs = tuple(nodes)
    self.outputs = tuple([weakref.ref(each._node) for each in made])
    for index in self._input_indexes_to_retain or ():
        nodes[index].data = variables[index]._data[0]
    if self._output_indexes_to_retain is not None:
        for index in self._output_indexes_to_retain:
            made[index]._node.data = outputs[index]
        self._retained_output_data = tuple(
            [outputs[index] for index in self._output_indexes_to_retain]
        )
