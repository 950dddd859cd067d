"""Chainer's n-step networks (LSTM, GRU and plain ones, in one or both directions), one function per layer."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer.functions.array import transpose_sequence
from chainer.functions.noise import dropout
from chainer.functions.rnn import n_step_gru, n_step_lstm, n_step_rnn
from chainer.links.rnn.n_step_rnn import NStepRNNBase, argsort_list_descent

from chainer_dist.kernels import layouts
from chainer_dist.kernels.gru import GRULayer
from chainer_dist.kernels.lstm import LSTMLayer
from chainer_dist.kernels.replacements import is_recorded, replaces
from chainer_dist.kernels.rnn import ReLULayer, TanhLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainer_dist.kernels.layouts import Array
    from chainer_dist.kernels.recurrent import Layer

# Layers by the method of Chainer's links that calls Chainer's function; a method of a subclass is not here.
_LAYERS = {
    L.NStepLSTM.rnn: LSTMLayer,
    L.NStepBiLSTM.rnn: LSTMLayer,
    L.NStepGRU.rnn: GRULayer,
    L.NStepBiGRU.rnn: GRULayer,
    L.NStepRNNTanh.rnn: TanhLayer,
    L.NStepBiRNNTanh.rnn: TanhLayer,
    L.NStepRNNReLU.rnn: ReLULayer,
    L.NStepBiRNNReLU.rnn: ReLULayer,
}


def _layer_of(step: Callable[..., Any]) -> type[Layer] | None:
    """Return the layer for one of Chainer's functions of a single step, or None for any other function. Local."""
    if step is n_step_lstm._lstm:
        return LSTMLayer
    if step is n_step_gru._gru:
        return GRULayer
    if getattr(step, "__qualname__", None) == "n_step_rnn_base.<locals>.f":
        activation = inspect.getclosurevars(step).nonlocals["activation"]
        return TanhLayer if activation == "tanh" else ReLULayer
    return None


def _array(variable: Any) -> Any:
    return variable.array if isinstance(variable, chainer.Variable) else variable


class _Network(NamedTuple):
    """The arguments of Chainer's links and functions, without states and sequences.

    Attributes:
        layer: Subclass of :class:`~chainer_dist.kernels.recurrent.Layer`; None for an unknown computation.
        n_layers: Number of layers.
        directions: Number of directions, 1 or 2.
        dropout: Ratio of dropout between layers.
        ws: Weights of each layer and direction, in Chainer's order.
        bs: Biases of each layer and direction, in Chainer's order.
    """

    layer: Any
    n_layers: int
    directions: int
    dropout: float
    ws: Any
    bs: Any

    def can_run(self, states: Sequence[Any], xs: Sequence[Any]) -> bool:
        """Return whether all arrays are float32, and of shapes that Chainer accepts, and no static graph is recorded. Local.

        Args:
            states: Initial states, each of shape ``(layers * directions, batch, units)``; None for zeros.
            xs: Sequences, each of shape ``(length, size)``.
        """
        if self.layer is None or len(states) != self.layer.states or is_recorded():
            return False
        values = [_array(x) for x in xs]
        hs = [_array(state) for state in states if state is not None]
        params = [[_array(param) for param in (*w, *b)] for w, b in zip(self.ws, self.bs)]
        flat = [param for each in params for param in each]
        number = self.n_layers * self.directions
        if (
            not values
            or not flat
            or not layouts.is_suitable(*values, *hs, *flat)
            or not number == len(self.ws) == len(self.bs)
        ):
            return False
        size, units = values[0].shape[-1], len(flat[0])
        state = (number, hs[0].shape[1] if hs and hs[0].ndim > 1 else 0, units)
        return (
            all(x.shape == (len(x), size) for x in values)
            and all(h.shape == state for h in hs)
            and all(
                [param.shape for param in each] == self._shapes(size, units, i)
                for i, each in enumerate(params)
            )
        )

    def _shapes(self, size: int, units: int, number: int) -> list[tuple[int, ...]]:
        width = size if number < self.directions else units * self.directions
        of_x = [(units, width)] * len(self.layer.of_x.weights)
        of_h = [(units, units)] * len(self.layer.of_h.weights)
        return [*of_x, *of_h, *[(units,)] * len(of_x + of_h)]

    def run(
        self, states: Sequence[Any], values: Any, batches: Sequence[int]
    ) -> tuple[list[Any], Any]:
        """Return the last states, each stacked over layers and directions, and the packed outputs. Local.

        Args:
            states: Initial states, each of shape ``(layers * directions, batch, units)``.
            values: Packed inputs; see :mod:`chainer_dist.kernels.recurrent`.
            batches: Number of sequences at each step, in descending order.
        """
        initial = [F.separate(state) for state in states]
        last: list[list[Any]] = [[] for _ in states]
        for i in range(self.n_layers):
            outputs = []
            for direction in range(self.directions):
                # Chainer draws one mask per step. One mask for all steps takes the same random numbers.
                x = values if i == 0 else dropout.dropout(values, ratio=self.dropout)
                number = self.directions * i + direction
                begin = [state[number] for state in initial]
                params = (*self.ws[number], *self.bs[number])
                *end, output = self.layer(batches, direction == 1).apply((x, *begin, *params))
                outputs.append(output)
                for each, state in zip(last, end):
                    each.append(state)
            values = F.concat(outputs, axis=1) if self.directions > 1 else outputs[0]
        return [F.stack(each) for each in last], values


@replaces(n_step_rnn, "n_step_rnn_impl", needs_onednn=False)
def _n_step_rnn(  # noqa: PLR0917 - Chainer's parameters
    chainers: Any,
    f: Any,
    n_layers: int,
    dropout_ratio: float,
    hx: Any,
    cx: Any,
    ws: Any,
    bs: Any,
    xs: Any,
    use_bi_direction: bool,
) -> Any:
    directions = 2 if use_bi_direction else 1
    network = _Network(_layer_of(f), n_layers, directions, dropout_ratio, ws, bs)
    states = [hx] if cx is None else [hx, cx]
    batches = [len(x) for x in xs]
    if not network.can_run(states, xs) or any(
        before < after for before, after in zip([hx.shape[1], *batches], batches)
    ):
        return chainers(f, n_layers, dropout_ratio, hx, cx, ws, bs, xs, use_bi_direction)
    last, values = network.run(states, F.concat(xs, axis=0), batches)
    ys = F.split_axis(values, np.cumsum(batches)[:-1], 0, force_tuple=True)
    return (*last, ys) if len(last) > 1 else (*last, None, ys)


@replaces(NStepRNNBase, "_call", needs_onednn=False)
def _link(chainers: Any, self: Any, hs: Any, xs: Any, **kwargs: Any) -> Any:
    layer = _LAYERS.get(type(self).rnn)
    network = _Network(layer, self.n_layers, self.direction, self.dropout, self.ws, self.bs)
    if (
        kwargs
        or not isinstance(xs, (list, tuple))
        or not network.can_run(hs, xs)
        or any(h is not None and h.shape[1] != len(xs) for h in hs)
    ):
        return chainers(self, hs, xs, **kwargs)
    indices = argsort_list_descent(xs)
    states = [
        self.init_hx(xs) if h is None else F.permutate(h, indices, axis=1, inv=False) for h in hs
    ]
    # For each packed row, its index among the concatenated sequences: first the rows of the first step.
    lengths = np.array([len(x) for x in xs])
    starts = np.cumsum(lengths) - lengths
    times = np.arange(lengths.max())[:, None]
    are_there = times < lengths[indices]
    rows = (starts[indices] + times)[are_there].astype(np.int32)
    values = F.permutate(F.concat(xs, axis=0), rows, axis=0)
    last, values = network.run(states, values, are_there.sum(axis=1).tolist())
    values = F.permutate(values, rows, axis=0, inv=True)
    ys = F.split_axis(values, starts[1:], 0, force_tuple=True)
    return [F.permutate(h, indices, axis=1, inv=True) for h in last], list(ys)


@replaces(transpose_sequence, "_transpose", needs_onednn=False)
def _transpose(chainers: Any, xs: Sequence[Array], length: int) -> Any:
    if not xs or length == 0 or not all(type(x) is np.ndarray for x in xs):
        return chainers(xs, length)
    ends = np.cumsum(np.sum(np.arange(length)[:, None] < [len(x) for x in xs], axis=1))
    starts = np.concatenate([[0], ends[:-1]])
    packed = np.empty((ends[-1], *xs[0].shape[1:]), xs[0].dtype)
    for i, x in enumerate(xs):
        packed[starts[: len(x)] + i] = x
    return tuple(np.split(packed, ends[:-1]))
