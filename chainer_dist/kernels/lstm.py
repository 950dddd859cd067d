"""Long short-term memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer.functions.rnn import n_step_lstm

from chainer_dist.kernels import lstm_sequences, memory, recurrent, replacements
from chainer_dist.kernels.recurrent import ONE, Factors
from chainer_dist.kernels.shared_library import library, n_threads
from chainer_dist.kernels.variables import variable

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array


# Most sequences, and most units, for which oneDNN's primitive is faster than NumPy in one thread without AVX-512. It is
# not for a single sequence, whose products are no slower in NumPy.
_MOST_ROWS, _MOST_UNITS = 32, 512
# With AVX-512 it is for up to so many units, or from so many sequences on.
_FEW_UNITS, _MANY_ROWS = 256, 32


class LSTMLayer(recurrent.Layer):
    """A layer of LSTM in one direction. Its gates are the cell's input a, then i, f and o."""

    states = 2
    _step = staticmethod(n_step_lstm._lstm)
    of_x, of_h = Factors((2, 0, 1, 3), 0), Factors((6, 4, 5, 7), 0)
    sigmoids = range(1, 4)

    def forward(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """Compute all steps, by oneDNN's primitive where it can and is faster. Called by Chainer."""
        self._sequences = None
        sizes = inputs[0].shape[1], inputs[1].shape[1]  # of the sequences and of h
        if not self._is_for_onednn(*sizes):
            return super().forward(inputs)
        self.retain_inputs(tuple(range(len(inputs))))
        x, states, ws, bs = self._take(inputs)
        geometry = lstm_sequences.Geometry(len(self.times), self.rows, *sizes, self._is_reversed)
        self._sequences = lstm_sequences.Sequences(geometry, x, states, ws, bs)
        return self._sequences.outputs

    def _is_for_onednn(self, *sizes: int) -> bool:
        """Return whether oneDNN can compute all steps, and is faster, so that what it keeps pays. Local."""
        if not replacements.uses_onednn() or any(batch != self.rows for _, _, batch in self.times):
            return False
        if n_threads() > 1:
            return True
        units = max(sizes)
        if library().has_avx512():
            return units <= _FEW_UNITS or self.rows >= _MANY_ROWS
        return 1 < self.rows <= _MOST_ROWS and units <= _MOST_UNITS

    def backward(self, indexes: tuple[int, ...], grad_outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Compute the gradients, by what computed the outputs. Called by Chainer."""
        if self._sequences is None or chainer.config.enable_backprop:
            return super().backward(indexes, grad_outputs)
        given = (None if each is None else each.array for each in grad_outputs)
        gradients = self._sequences.differentiate(*given)
        return tuple(variable(gradients[i]) for i in indexes)

    def run(
        self, gates: Array, states: list[Array], by_h: recurrent.Product, h_biases: Array
    ) -> Array:
        """Compute all steps, and return the packed states."""
        del h_biases  # the gates include them
        last_h, last_c = states
        self._gates = gates
        outputs = memory.empty_like(gates[0])
        self._cs = memory.empty_like(outputs)  # c before each step
        self._tanhs = memory.empty_like(outputs)  # tanh of c after each step
        products = np.empty((4, self.rows, len(last_h[0])), np.float32)
        for start, end, batch in self.times:
            h, c = last_h[:batch], last_c[:batch]
            gate, product, tanh = gates[:, start:end], products[:, :batch], self._tanhs[start:end]
            by_h.of_all(h, product)
            np.add(gate, product, out=gate)
            np.tanh(gate, out=gate)
            recurrent.finish_sigmoid(gate[1:])
            a, i, f, o = gate
            self._cs[start:end] = c
            np.multiply(c, f, out=c)
            np.multiply(a, i, out=tanh)
            np.add(c, tanh, out=c)
            np.tanh(c, out=tanh)
            np.multiply(o, tanh, out=h)
            outputs[start:end] = h
        return outputs

    def differentiate(
        self, hs: Array, gys: Array | None, grads: list[Array], by_h: recurrent.Product
    ) -> Array:
        """Return the gradients with respect to the products."""
        a, i, f, o = self._gates
        # Before the loop these are the derivatives of c, and for o the one of h. The loop multiplies them by the
        # gradients of c and h.
        made = memory.empty_like(self._gates)
        np.multiply(a, a, out=made[0])
        np.subtract(ONE, made[0], out=made[0])
        made[0] *= i
        np.subtract(ONE, self._gates[1:], out=made[1:])
        made[1:] *= self._gates[1:]
        made[1] *= a
        made[2] *= self._cs
        made[3] *= self._tanhs
        from_h = self._tanhs * self._tanhs  # derivative of h with respect to c
        np.subtract(ONE, from_h, out=from_h)
        from_h *= o
        products = np.empty((4, self.rows, hs.shape[1]), np.float32)
        for start, end, batch in reversed(self.times):
            gh, gc = (grad[:batch] for grad in grads)
            gate, product, part = made[:, start:end], products[:, :batch], from_h[start:end]
            if gys is not None:
                np.add(gh, gys[start:end], out=gh)
            np.multiply(part, gh, out=part)
            np.add(gc, part, out=gc)
            of_c, of_o = gate[:3], gate[3]
            np.multiply(of_c, gc, out=of_c)
            np.multiply(of_o, gh, out=of_o)
            np.multiply(gc, f[start:end], out=gc)
            by_h.of_each(gate, product)
            np.add.reduce(product, axis=0, out=gh)
        return made
