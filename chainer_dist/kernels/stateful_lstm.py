"""Steps of ``L.LSTM`` and ``L.StatelessLSTM``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

from chainer_dist.kernels import layouts, lstm_units
from chainer_dist.kernels.matrices import multiply_into
from chainer_dist.kernels.replacements import replaces
from chainer_dist.kernels.steps import Factors, Step, are_plain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist.kernels.layouts import Array


class LSTMStep(Step):
    """A step of LSTM: from c, h, x and the parameters of the links to c and h.

    As in Chainer, c may have more rows than h and x; the step leaves these as they are. The parameters have the gates
    of each unit next to each other: the cell's input a, then i, f and o.
    """

    factors = Factors(0, 2), Factors(0), Factors(0, 1)

    @staticmethod
    def _step(*inputs: Any) -> Any:
        c, h, x, w, b, v = inputs
        return F.lstm(c, F.linear(x, w, b) + F.linear(h, v))

    def forward(self, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        """Compute the step. Called by Chainer."""
        self.retain_inputs(tuple(range(len(inputs))))
        c, h, x, w, b, v = inputs
        sums = np.empty((len(x), len(b)), np.float32)
        sums[...] = b
        multiply_into(x, w.T, sums, adds=True)
        multiply_into(h, v.T, sums, adds=True)
        c_next, h_next, self._known = lstm_units.compute(sums, c)
        return c_next, h_next

    def differentiate(
        self, inputs: Sequence[Array], gys: Sequence[Any], indexes: Sequence[int]
    ) -> tuple[dict[int, Array], Sequence[Array]]:
        """Return the gradients of c, h and x, and the values from which those of the parameters follow."""
        c, h, x, w, _, v = inputs
        gc_before, of_sums = lstm_units.differentiate(self._known, c, *gys)
        gradients = {0: gc_before}
        for number, value, matrix in ((1, h, v), (2, x, w)):
            if number in indexes:
                gradients[number] = np.empty(value.shape, np.float32)
                multiply_into(of_sums, matrix, gradients[number])
        return gradients, (of_sums, h, x)


def _step(link: Any, c: Any, h: Any, x: Any) -> Any:
    """Return c and h after a step of one of Chainer's links, or None if only Chainer's code can compute it. Local."""
    upward, lateral = link.upward, link.lateral
    if (
        c is None
        or h is None
        or not are_plain(upward, lateral)
        or lateral.b is not None
        or upward.b is None
    ):
        return None
    c, h, x = map(chainer.as_variable, (c, h, x))
    given = (c, h, x, upward.W, upward.b, lateral.W)
    if not layouts.is_suitable(*(each.array for each in given)):
        return None
    n, units = h.shape if h.ndim == 2 else (0, 0)  # noqa: PLR2004 - a matrix
    if (
        x.ndim != 2  # noqa: PLR2004
        or len(x) != n
        or c.shape != (len(c), units)
        or len(c) < n
        or upward.W.shape != (4 * units, x.shape[1])
        or upward.b.shape != (4 * units,)
        or lateral.W.shape != (4 * units, units)
    ):
        return None
    return LSTMStep(given[3:], c).run(c, h, x)


@replaces(L.LSTM, "forward", needs_onednn=False)
def _stateful(chainers: Any, self: Any, x: Any) -> Any:
    batch, h, rest = x.shape[0], self.h, None
    if h is not None and 0 < batch < len(h):
        h, rest = F.split_axis(h, [batch], 0)
    after = _step(self, self.c, h, x)
    if after is None:
        return chainers(self, x)
    self.c, y = after
    self.h = y if rest is None else F.concat([y, rest], 0)
    return y


@replaces(L.StatelessLSTM, "forward", needs_onednn=False)
def _stateless(chainers: Any, self: Any, c: Any, h: Any, x: Any) -> Any:
    return _step(self, c, h, x) or chainers(self, c, h, x)
