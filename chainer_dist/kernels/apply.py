"""Applying a function to variables that hold NumPy's arrays: what Chainer's method does for these, and no more.

A step of a deep network applies hundreds of functions. Chainer's method also looks for other arrays, devices, layouts,
hooks and the debug mode, several times each; where there are any of these, Chainer's method is called.
"""

from __future__ import annotations

import weakref
from typing import Any

import chainer
import numpy as np

from chainer_dist.kernels.replacements import replaces

_Node = chainer.FunctionNode
_Variable = chainer.Variable
_create = _Variable._init_unchecked


@replaces(_Node, "apply", needs_onednn=False, is_computation=False)
def _apply(chainers: Any, self: Any, inputs: Any) -> Any:
    config, local = chainer.config._global, vars(chainer.config._local)
    if (
        not inputs
        or local.get("debug", config.debug)
        or local.get("schedule_func", config.schedule_func) is not None
        or self._n_local_function_hooks
        or self._is_chainerx_fallback_mode
        or chainer.get_function_hooks()
    ):
        return chainers(self, inputs)
    variables, arrays = [], []
    for given in inputs:
        x = given
        if type(given) is np.ndarray:
            x = _create(given, requires_grad=False, is_chainerx_array=False)
        elif not isinstance(given, _Variable) or given._has_chainerx_array:
            return chainers(self, inputs)
        array = x._data[0]
        if type(array) is not np.ndarray or x._layout is not None:
            return chainers(self, inputs)
        variables.append(x)
        arrays.append(array)
    in_data = tuple(arrays)
    self._input_layouts = (None,) * len(inputs)
    if local.get("type_check", config.type_check):
        self._check_data_type_forward(in_data)
    if getattr(self.check_layout_forward, "__func__", None) is not _Node.check_layout_forward:
        self.check_layout_forward(variables)
    self._input_indexes_to_retain = self._output_indexes_to_retain = None
    outputs = self.forward(in_data)
    if self._output_layouts is not None or not _are_plain(outputs, self.is_elementwise):
        return _apply_to_outputs(chainers, self, inputs, outputs)
    self._output_layouts = (None,) * len(outputs)
    self._output_count = len(outputs)
    requires_grad = any(each._requires_grad for each in variables)
    made = tuple(
        [_create(y, requires_grad=requires_grad, is_chainerx_array=False) for y in outputs]
    )
    if local.get("enable_backprop", config.enable_backprop):
        _grow_graph(self, variables, made, outputs)
        self.lazy_grad_sum = local.get("lazy_grad_sum", config.lazy_grad_sum)
    return made


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
