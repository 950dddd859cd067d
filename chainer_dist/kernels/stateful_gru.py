"""Steps of ``L.GRU``, ``L.StatefulGRU`` and ``L.StatelessGRU``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

from chainer_dist.kernels import layouts
from chainer_dist.kernels.matrices import multiply_into
from chainer_dist.kernels.recurrent import HALF, ONE, finish_sigmoid
from chainer_dist.kernels.replacements import replaces
from chainer_dist.kernels.steps import Factors, Step, are_plain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist.kernels.layouts import Array

# Names of the linear layers of a link, each of which has a matrix and a bias.
_LINKS = ("W_r", "U_r", "W_z", "U_z", "W", "U")


class GRUStep(Step):
    """A step of gated recurrent units: from h, x and the parameters of the links to h."""

    # Indexes of the values that are kept: the gradients of r, z and a before their activations, then h, x and r * h.
    factors = tuple(
        each
        for gradient, of_h in ((0, 3), (1, 3), (2, 5))
        for each in (
            Factors(gradient, 4),
            Factors(gradient),
            Factors(gradient, of_h),
            Factors(gradient),
        )
    )

    @staticmethod
    def _step(h: Any, x: Any, *params: Any) -> Any:
        of_r, of_z, of_a = params[:4], params[4:8], params[8:]
        r = F.sigmoid(F.linear(x, *of_r[:2]) + F.linear(h, *of_r[2:]))
        z = F.sigmoid(F.linear(x, *of_z[:2]) + F.linear(h, *of_z[2:]))
        a = F.tanh(F.linear(x, *of_a[:2]) + F.linear(r * h, *of_a[2:]))
        return (F.linear_interpolate(z, a, h),)

    def forward(self, inputs: tuple[Array, ...]) -> tuple[Array]:
        """Compute the step. Called by Chainer."""
        self.retain_inputs(tuple(range(len(inputs))))
        h, x, *params = inputs
        matrices, biases = params[::2], params[1::2]
        gates = np.empty((3, *h.shape), np.float32)
        for gate, w, b, c in zip(gates, matrices[::2], biases[::2], biases[1::2]):
            np.add(b, c, out=gate[:1])
            gate[1:] = gate[:1]
            multiply_into(x, w.T, gate, adds=True)
        for gate, u in zip(gates[:2], matrices[1::2]):
            multiply_into(h, u.T, gate, adds=True)
        gates[:2] *= HALF
        np.tanh(gates[:2], out=gates[:2])
        finish_sigmoid(gates[:2])
        r, z, a = self._gates = gates
        self._r_h = r * h
        multiply_into(self._r_h, matrices[-1].T, a, adds=True)
        np.tanh(a, out=a)
        y = ONE - z
        y *= h
        y += z * a
        return (y,)

    def differentiate(
        self, inputs: Sequence[Array], gys: Sequence[Any], indexes: Sequence[int]
    ) -> tuple[dict[int, Array], Sequence[Array]]:
        """Return the gradients of h and x, and the values from which those of the parameters follow."""
        h, x, *params = inputs
        w_r, u_r, w_z, u_z, w, u = params[::2]
        (gy,) = gys
        r, z, a = self._gates
        gh = ONE - z
        of_z = a - h
        of_z *= z
        of_z *= gh
        of_z *= gy
        gh *= gy
        of_a = a * a
        np.subtract(ONE, of_a, out=of_a)
        of_a *= z
        of_a *= gy
        of_r_h = np.empty_like(of_a)
        multiply_into(of_a, u, of_r_h)
        of_r = ONE - r
        of_r *= self._r_h
        of_r *= of_r_h
        of_r_h *= r
        gh += of_r_h
        gradients = {0: gh}
        multiply_into(of_r, u_r, gh, adds=True)
        multiply_into(of_z, u_z, gh, adds=True)
        if 1 in indexes:
            gx = gradients[1] = np.zeros(x.shape, np.float32)
            for made, matrix in ((of_r, w_r), (of_z, w_z), (of_a, w)):
                multiply_into(made, matrix, gx, adds=True)
        return gradients, (of_r, of_z, of_a, h, x, self._r_h)


def _step(link: Any, h: Any, x: Any) -> Any:
    """Return h after a step of one of Chainer's links, or None if only Chainer's own code can compute it. Local."""
    links = [getattr(link, name) for name in _LINKS]
    if h is None or not are_plain(*links) or any(each.b is None for each in links):
        return None
    h, x = chainer.as_variable(h), chainer.as_variable(x)
    params = [param for each in links for param in (each.W, each.b)]
    if not layouts.is_suitable(*(each.array for each in (h, x, *params))):
        return None
    if h.ndim != 2 or x.ndim != 2 or len(h) != len(x):  # noqa: PLR2004 - matrices
        return None
    units = h.shape[1]
    shapes = [(units, x.shape[1]), (units,), (units, units), (units,)] * 3
    if [param.shape for param in params] != shapes:
        return None
    (y,) = GRUStep(params, h).run(h, x)
    return y


@replaces(L.StatefulGRU, "forward", needs_onednn=False)
def _stateful(chainers: Any, self: Any, x: Any) -> Any:
    y = _step(self, self.h, x)
    if y is None:
        return chainers(self, x)
    self.h = y
    return y


@replaces(L.StatelessGRU, "forward", needs_onednn=False)
def _stateless(chainers: Any, self: Any, h: Any, x: Any) -> Any:
    y = _step(self, h, x)
    return chainers(self, h, x) if y is None else y
