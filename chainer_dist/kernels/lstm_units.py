"""The units of LSTM: ``F.lstm``, as cells of one's own call it, and the arithmetic that steps of ``L.LSTM`` share with it.

Chainer reads each gate of each unit from among the other gates, computes it by four passes over memory, and once more in
backward. Here gates are copied to where each lies by itself, are computed at once, and are kept for backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from chainer.functions.rnn.lstm import LSTM, LSTMGrad

from chainer_dist.kernels import layouts
from chainer_dist.kernels.recurrent import HALF, ONE, finish_sigmoid
from chainer_dist.kernels.replacements import replaces

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array


class Known(NamedTuple):
    """Values of a forward pass from which backward follows.

    Attributes:
        gates: Cell's input a and gates i, f and o, ``(4, n, units)``.
        tanh: Hyperbolic tangent of the new state of the cells, ``(n, units)``.
    """

    gates: Array
    tanh: Array


def compute(sums: Array, c: Array) -> tuple[Array, Array, Known]:
    """Return the new states of cells, the output, and what backward needs, all new. Local.

    Args:
        sums: Values before activation, ``(n, 4 * units)``, float32. Those of one unit are next to each other: a, i, f, o.
        c: States of cells, ``(n, units)`` or with more rows, which stay as they are.
    """
    n, units = len(sums), c.shape[1]
    gates = np.empty((4, n, units), np.float32)
    gates[...] = sums.reshape(n, units, 4).transpose(2, 0, 1)
    gates[1:] *= HALF
    np.tanh(gates, out=gates)
    finish_sigmoid(gates[1:])
    a, i, f, o = gates
    c_next = np.empty_like(c)
    c_next[n:] = c[n:]
    new = c_next[:n]
    np.multiply(f, c[:n], out=new)
    tanh = a * i
    np.add(new, tanh, out=new)
    np.tanh(new, out=tanh)
    return c_next, o * tanh, Known(gates, tanh)


def differentiate(
    known: Known, c: Array, gc: Array | None, gh: Array | None
) -> tuple[Array, Array]:
    """Return the gradients with respect to ``c`` and ``sums`` of :func:`compute`, new. Local.

    Args:
        known: What :func:`compute` returned.
        c: What it was given.
        gc: Gradient with respect to the new states, or None for zero.
        gh: Gradient with respect to the output, or None for zero.
    """
    a, i, f, o = known.gates
    tanh, n = known.tanh, len(known.tanh)
    gc_before = np.empty_like(c)
    gc_before[...] = 0 if gc is None else gc
    of_c = gc_before[:n]
    made = np.empty_like(known.gates)
    if gh is None:
        made[3] = 0
    else:
        from_h = tanh * tanh
        np.subtract(ONE, from_h, out=from_h)
        from_h *= o
        from_h *= gh
        of_c += from_h
        np.subtract(ONE, o, out=made[3])
        made[3] *= o
        made[3] *= tanh
        made[3] *= gh
    np.multiply(a, a, out=made[0])
    np.subtract(ONE, made[0], out=made[0])
    made[0] *= i
    np.subtract(ONE, known.gates[1:3], out=made[1:3])
    made[1:3] *= known.gates[1:3]
    made[1] *= a
    made[2] *= c[:n]
    made[:3] *= of_c
    of_c *= f
    return gc_before, made.transpose(1, 2, 0).reshape(n, -1)


@replaces(LSTM, "forward", needs_onednn=False)
def _forward(chainers: Any, self: Any, inputs: tuple[Array, Array]) -> Any:
    c, x = inputs
    self._known = None
    if x.ndim != 2 or not layouts.is_suitable(c, x):  # noqa: PLR2004 - a matrix
        return chainers(self, inputs)
    self.retain_inputs((0, 1))
    self.retain_outputs((0,))
    c_next, h, self._known = compute(x, c)
    return c_next, h


@replaces(LSTM, "backward", needs_onednn=False)
def _backward(_: Any, self: Any, indexes: tuple[int, ...], grads: tuple[Any, Any]) -> Any:
    del indexes
    gradient = LSTMGrad()
    gradient._known = getattr(self, "_known", None)
    return gradient(*self.get_retained_inputs(), *self.get_retained_outputs(), *grads)


@replaces(LSTMGrad, "forward", needs_onednn=False)
def _gradient(chainers: Any, self: Any, inputs: tuple[Any, ...]) -> Any:
    c, _, _, *given = inputs
    known = getattr(self, "_known", None)
    if known is None or not layouts.is_suitable(*(each for each in given if each is not None)):
        return chainers(self, inputs)
    return differentiate(known, c, *given)
