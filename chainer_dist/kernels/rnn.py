"""The plain recurrent network, with tanh or ReLU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer.functions as F
import numpy as np

from chainer_dist.kernels import recurrent
from chainer_dist.kernels.recurrent import ONE, Factors

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array


def _tanh(x: Any, h: Any, c: None, w: Any, b: Any) -> tuple[Any, None]:
    return F.tanh(F.linear(x, w[0], b[0]) + F.linear(h, w[1], b[1])), c


def _relu(x: Any, h: Any, c: None, w: Any, b: Any) -> tuple[Any, None]:
    return F.relu(F.linear(x, w[0], b[0]) + F.linear(h, w[1], b[1])), c


class TanhLayer(recurrent.Layer):
    """A layer of the plain recurrent network in one direction, with tanh."""

    _step = staticmethod(_tanh)
    of_x, of_h = Factors((0,), 0), Factors((1,), 0)
    sigmoids = range(0)

    def run(
        self, gates: Array, states: list[Array], by_h: recurrent.Product, h_biases: Array
    ) -> Array:
        """Compute all steps, and return the packed states."""
        del h_biases  # the gates include them
        (last,) = states
        outputs: Array = gates[0]  # the only gate becomes the states in place
        products = np.empty((1, self.rows, last.shape[1]), np.float32)
        for start, end, batch in self.times:
            h, y, product = last[:batch], outputs[start:end], products[:, :batch]
            by_h.of_all(h, product)
            np.add(y, product[0], out=y)
            self._activate(y)
            last[:batch] = y
        return outputs

    def differentiate(
        self, hs: Array, gys: Array | None, grads: list[Array], by_h: recurrent.Product
    ) -> Array:
        """Return the gradients with respect to the products."""
        del hs
        made = self._slope(self.get_retained_outputs()[0].array)[None]
        for start, end, batch in reversed(self.times):
            gh, gate = grads[0][:batch], made[:, start:end]
            if gys is not None:
                np.add(gh, gys[start:end], out=gh)
            np.multiply(gate, gh, out=gate)
            by_h.of_each(gate, gh[None])
        return made

    def _activate(self, y: Array) -> None:
        np.tanh(y, out=y)

    def _slope(self, ys: Array) -> Array:
        made: Array = ONE - ys * ys
        return made


class ReLULayer(TanhLayer):
    """A layer of the plain recurrent network in one direction, with ReLU."""

    _step = staticmethod(_relu)

    def _activate(self, y: Array) -> None:
        np.maximum(y, np.float32(0), out=y)

    def _slope(self, ys: Array) -> Array:
        made: Array = (ys > 0).astype(np.float32)
        return made
