"""Backward through a graph of variables that hold NumPy's arrays: what Chainer's loop does for these, and no more.

Chainer's loop also sets a device for each function and looks for arrays of other libraries, several times each. Where
there may be such, or in the debug mode, Chainer's loop is called.
"""

from __future__ import annotations

import heapq
from typing import Any

import chainer
import numpy as np
from chainer import _backprop, _backprop_utils
from chainer.backends import cuda
from chainer.variable import _check_grad_type

from chainer_dist.kernels.replacements import replaces


@replaces(_backprop, "_backprop_to_all", needs_onednn=False, is_computation=False)
def _backward(chainers: Any, outputs: Any, retain_grad: bool, loss_scale: float | None) -> None:
    if chainer.is_debug() or cuda.available or chainer.chainerx.is_available():
        chainers(outputs, retain_grad, loss_scale)
        return
    # Looked up in its module, as whoever wants to see gradients puts another there.
    table = _backprop_utils.GradTable(accumulate_grad_inputs=True)
    candidates: list[tuple[int, int, Any]] = []
    seen: set[Any] = set()
    leaves: set[Any] = set()

    def reach(node: Any) -> None:
        """Note that a node has got a gradient."""
        function = node._creator_node
        if function is None:
            leaves.add(node)
        elif function not in seen:
            # The first is the one of highest rank, then the one that was found first.
            heapq.heappush(candidates, (-function.rank, len(seen), function))
            seen.add(function)

    for node, gradient in outputs:
        table.accumulate(node, gradient)
        reach(node)
    while candidates:
        function = heapq.heappop(candidates)[2]
        for node in _step(function, table, retain_grad):
            reach(node)
    for node in leaves:
        variable, gradient = node.get_variable_or_none(), table.pop(node)
        if variable is not None:
            variable._set_grad_var_without_check(gradient)
            variable._loss_scale = loss_scale
    table.assert_no_grads()


def _step(function: Any, table: Any, retain_grad: bool) -> list[Any]:
    """Add the gradients with respect to the inputs of a function to a table, and return the nodes that got any. Local."""
    inputs = function.inputs
    targets = tuple([i for i, node in enumerate(inputs) if node._requires_grad])
    nodes = [reference() for reference in function.outputs]
    gys = tuple(
        [None if node is None or node._creator_node is None else table.pop(node) for node in nodes]
    )
    if not targets:
        return []
    gxs = {node: table.get_as_list(node) for node in dict.fromkeys(inputs[i] for i in targets)}
    hooks = chainer.get_function_hooks()
    if function._n_local_function_hooks:
        hooks = {**hooks, **function.local_function_hooks}
    for hook in hooks.values():
        hook.backward_preprocess(function, *_arrays(inputs, gys))
    _backprop_utils.backprop_step(function, targets, gys, gxs, is_debug=False)
    for hook in hooks.values():
        hook.backward_postprocess(function, *_arrays(inputs, gys))
    if retain_grad:
        for node, gy in zip(nodes, gys):
            if node is not None:
                node._set_grad_var_if_available(gy)
    for node, gradients in gxs.items():
        _check(function, node, gradients)
    return [node for node, gradients in gxs.items() if gradients]


def _arrays(inputs: Any, gys: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the data of inputs and the gradients of outputs as hooks get them. Local."""
    return (
        tuple([node.data for node in inputs]),
        tuple([None if gy is None else gy.raw_array for gy in gys]),
    )


def _check(function: Any, node: Any, gradients: Any) -> None:
    """Refuse gradients that do not fit their variable, as Chainer does. Local."""
    for gradient in gradients:
        array = gradient.raw_array
        if (
            type(array) is not np.ndarray
            or array.shape != node.shape
            or array.dtype != node.dtype
            or node._layout is not None
        ):
            _check_grad_type(function, node, is_node_x=True, gx=array)
