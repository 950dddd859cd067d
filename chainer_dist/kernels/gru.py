"""Gated recurrent units."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from chainer.functions.rnn import n_step_gru

from chainer_dist.kernels import memory, recurrent
from chainer_dist.kernels.recurrent import ONE, Factors

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array


class GRULayer(recurrent.Layer):
    """A layer of gated recurrent units in one direction.

    The gates are r, z and the candidate a. The state is multiplied by three matrices: two products are added to r and
    z, and the third, u, is multiplied by r and added to a. So there are gradients of u, r, z and a, in this order.
    """

    _step = staticmethod(n_step_gru._gru)
    of_x, of_h = Factors((0, 1, 2), 1), Factors((5, 3, 4), 0)
    sigmoids = range(1, 3)

    def run(
        self, gates: Array, states: list[Array], by_h: recurrent.Product, h_biases: Array
    ) -> Array:
        """Compute all steps, and return the packed states."""
        (last,) = states
        self._gates = gates
        outputs = memory.empty_like(gates[0])
        self._us = np.empty_like(outputs)
        products = np.empty((3, self.rows, last.shape[1]), np.float32)
        for start, end, batch in self.times:
            h, gate, product = last[:batch], gates[:, start:end], products[:, :batch]
            u, y = self._us[start:end], outputs[start:end]
            by_h.of_all(h, product)
            np.add(product[0], h_biases[0], out=u)
            both = gate[:2]
            np.add(both, product[1:], out=both)
            np.tanh(both, out=both)
            recurrent.finish_sigmoid(both)
            r, z, a = gate
            np.multiply(r, u, out=y)
            np.add(a, y, out=a)
            np.tanh(a, out=a)
            np.subtract(h, a, out=y)
            np.multiply(y, z, out=y)
            np.add(y, a, out=y)
            last[:batch] = y
        return outputs

    def differentiate(
        self, hs: Array, gys: Array | None, grads: list[Array], by_h: recurrent.Product
    ) -> Array:
        """Return the gradients with respect to the products."""
        r, z, a = self._gates
        # Before the loop these are the derivatives of h. The loop multiplies them by the gradient of h.
        made = memory.empty((4, *hs.shape))
        of_u, of_r, of_z, of_a = made
        np.multiply(a, a, out=of_a)
        np.subtract(ONE, of_a, out=of_a)
        np.subtract(ONE, z, out=of_z)
        of_a *= of_z
        np.multiply(of_a, r, out=of_u)
        np.subtract(ONE, r, out=of_r)
        of_r *= of_u
        of_r *= self._us
        of_z *= z
        of_z *= hs - a
        products = np.empty((3, self.rows, hs.shape[1]), np.float32)
        for start, end, batch in reversed(self.times):
            gh = grads[0][:batch]
            gate, product = made[:, start:end], products[:, :batch]
            if gys is not None:
                np.add(gh, gys[start:end], out=gh)
            np.multiply(gate, gh, out=gate)
            by_h.of_each(gate[:3], product)
            np.multiply(gh, z[start:end], out=gh)
            for each in product:
                np.add(gh, each, out=gh)
        return made
