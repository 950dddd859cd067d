"""One layer of a recurrent network as one function of whole sequences: the base of LSTM, GRU and the plain network.

Sequences are packed in one array of shape ``(rows of all steps, units)``: the batch of the first step, then that of the
second, and so on. As in Chainer, a batch never grows from one step to the next. Gates have the shape ``(gates, rows of
all steps, units)``, so that each gate, and adjacent gates together, are contiguous for each step.

The products by the weights of the input are computed for all steps at once, and so are the gradients of all weights.
Only the products by the weights of the state, and the gates, are computed step by step, in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import chainer
import chainer.functions as F
import numpy as np
from chainer.functions.rnn import n_step_rnn

from chainer_dist.kernels import memory, replacements
from chainer_dist.kernels.matrices import multiply_into, multiply_matrices, sum_of_rows
from chainer_dist.kernels.shared_library import n_threads
from chainer_dist.kernels.variables import variable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainer_dist.kernels.layouts import Array

HALF, ONE = np.float32(0.5), np.float32(1)

_SMALL = 10**6  # number of multiplications up to which OpenBLAS does not copy the matrices first

_NARROWEST = 32  # fewest columns of a block; narrower blocks are slower than the copies


class Product:
    """Products of few rows by matrices of equal shape, to be computed many times. Local.

    With several threads oneDNN computes them: after a product, OpenBLAS's threads would keep the cores from oneDNN's for
    a while. In one thread, and for a single row, OpenBLAS is faster in small blocks of columns. It copies larger matrices
    before it multiplies, which takes several times as long as a product of few rows.

    Args:
        matrices: Matrices of shape ``(values, columns)``, float32.
        rows: Largest number of rows by which they are multiplied.
        halved: Slice of the matrices that are multiplied by a half.
    """

    def __init__(self, matrices: Sequence[Array], rows: int, halved: slice = slice(0)) -> None:
        size, columns = matrices[0].shape
        self._by_onednn = rows > 1 and replacements.uses_onednn() and n_threads() > 1
        self._width = columns
        if not self._by_onednn:
            widths = range(min(columns, _SMALL // (rows * size)), _NARROWEST - 1, -1)
            self._width = next((width for width in widths if columns % width == 0), columns)
        self._blocks = np.empty(
            (len(matrices), columns // self._width, size, self._width), np.float32
        )
        for blocks, matrix in zip(self._blocks, matrices):
            blocks[...] = self._cut(matrix)
        self._blocks[halved] *= HALF

    def of_all(self, rows: Array, out: Array) -> None:
        """Multiply the same rows by each matrix.

        Args:
            rows: Array of shape ``(rows, values)``.
            out: Array of shape ``(matrices, rows, columns)`` that takes the products.
        """
        if self._by_onednn:
            self.of_each(np.broadcast_to(rows, (len(out), *rows.shape)), out)
        else:
            np.matmul(rows, self._blocks, out=self._cut(out))

    def of_each(self, rows: Array, out: Array) -> None:
        """Multiply rows of its own by each matrix.

        Args:
            rows: Array of shape ``(matrices, rows, values)``.
            out: Array of shape ``(matrices, rows, columns)`` that takes the products.
        """
        if not self._by_onednn:
            np.matmul(rows[:, None], self._blocks, out=self._cut(out))
            return
        for own, (matrix,), product in zip(rows, self._blocks, out):
            multiply_matrices(own, matrix, product)

    def _cut(self, matrix: Array) -> Any:
        return matrix.reshape(*matrix.shape[:-1], -1, self._width).swapaxes(-2, -3)


class Factors(NamedTuple):
    """The weights by which inputs, or states, are multiplied.

    Attributes:
        weights: Indexes of the weights in Chainer's order.
        first: Index of the first gradient of their products among the gradients that ``differentiate`` returns.
    """

    weights: tuple[int, ...]
    first: int

    @property
    def places(self) -> slice:
        """Slice of the gradients of their products."""
        return slice(self.first, self.first + len(self.weights))

    def take(self, params: Sequence[Array]) -> list[Array]:
        """Return these weights, or their biases, in order. Local."""
        return [params[i] for i in self.weights]


class Layer(chainer.FunctionNode):  # type: ignore[misc]  # Chainer has no types
    """A layer in one direction.

    Inputs are the packed sequences, the initial states, each of shape ``(batch, units)``, and the weights and biases in
    Chainer's order. Outputs are the last states, each of shape ``(batch, units)``, and the packed states of all steps.

    Args:
        batches: Number of sequences at each step, in descending order.
        is_reversed: Whether the last step comes first.

    Attributes:
        states: Number of states: 2 for LSTM, otherwise 1.
        of_x: Weights by which inputs are multiplied.
        of_h: Weights by which states are multiplied.
        sigmoids: Indexes of the gates whose activation is the sigmoid, among the gradients of the products.
        times: Begin, end and number of the rows of each step, in the order of computation.
        rows: Largest number of rows of a step.
    """

    states: ClassVar[int] = 1
    _step: ClassVar[Callable[..., Any]]  # Chainer's function of a single step
    of_x: ClassVar[Factors]
    of_h: ClassVar[Factors]
    sigmoids: ClassVar[range]

    def __init__(self, batches: Sequence[int], is_reversed: bool) -> None:
        super().__init__()
        self._is_reversed = is_reversed
        ends = np.cumsum(batches).tolist()
        self._sections = ends[:-1]
        self.times = list(zip([0, *ends[:-1]], ends, batches))
        if is_reversed:
            self.times.reverse()
        self.rows = max(batches)

    # To be overridden

    def run(self, gates: Array, states: list[Array], by_h: Product, h_biases: Array) -> Array:
        """Compute all steps, and return the packed states. Local.

        Args:
            gates: Products of the inputs, with all biases that are added to them, of shape ``(gates, rows, units)``.
                Gates with the sigmoid as activation are multiplied by a half. They are changed in place.
            states: Initial states, which become the last ones in place.
            by_h: Product by the weights of the state, multiplied by a half likewise.
            h_biases: Biases of the state, of shape ``(products, units)``.
        """
        raise NotImplementedError

    def differentiate(
        self, hs: Array, gys: Array | None, grads: list[Array], by_h: Product
    ) -> Array:
        """Return the gradients with respect to the products by the weights, ``(products, rows, units)``. Local.

        Args:
            hs: States before each step, packed.
            gys: Gradients of the packed states; None for zeros.
            grads: Gradients of the last states, which become the gradients of the initial ones in place.
            by_h: Product by the weights of the state, for gradients.
        """
        raise NotImplementedError

    # The same for all layers

    def _take(self, inputs: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
        x, states, params = inputs[0], inputs[1 : 1 + self.states], inputs[1 + self.states :]
        return x, states, params[: len(params) // 2], params[len(params) // 2 :]

    def forward(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """Compute all steps. Called by Chainer."""
        self.retain_inputs(tuple(range(len(inputs))))
        x, states, ws, bs = self._take(inputs)
        states = [state.copy() for state in states]
        units = states[0].shape[1]
        gates = memory.empty((len(self.of_x.weights), len(x), units))
        for gate, w in zip(gates, self.of_x.take(ws)):
            multiply_into(x, w.T, gate)
        # One array has the biases at the indexes of the gradients of their products.
        biases = np.zeros((max(self.of_x.places.stop, self.of_h.places.stop), units), np.float32)
        biases[self.of_x.places] = self.of_x.take(bs)
        h_biases = np.stack(self.of_h.take(bs))
        biases[self.of_h.places] += h_biases
        gates += biases[self.of_x.places, None]
        gates[self._sigmoids(self.of_x)] *= HALF
        matrices = [w.T for w in self.of_h.take(ws)]
        by_h = Product(matrices, self.rows, self._sigmoids(self.of_h))
        self.retain_outputs((self.states,))
        return (*states, self.run(gates, states, by_h, h_biases))

    def _sigmoids(self, factors: Factors) -> slice:
        return slice(self.sigmoids.start - factors.first, self.sigmoids.stop - factors.first)

    def backward(self, indexes: tuple[int, ...], grad_outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Compute the gradients, by Chainer's own functions if they need gradients too. Called by Chainer."""
        if chainer.config.enable_backprop:
            return self._backward_of_chainer(indexes, grad_outputs)
        *gs, gys = (None if each is None else each.array for each in grad_outputs)
        inputs = [each.array for each in self.get_retained_inputs()]
        x, states, ws, _ = self._take(inputs)
        hs = self._previous(states[0], self.get_retained_outputs()[0].array)
        grads = [np.zeros_like(s) if g is None else g.copy() for s, g in zip(states, gs)]
        by_h = Product(self.of_h.take(ws), self.rows)
        products = self.differentiate(hs, gys, grads, by_h)
        made: dict[int, Any] = {1 + i: grad for i, grad in enumerate(grads)}
        if 0 in indexes:
            made[0] = _sum_of_products(products[self.of_x.places], self.of_x.take(ws))
        of_biases = [sum_of_rows(product) for product in products]
        for factors, values in ((self.of_x, x), (self.of_h, hs)):
            for i, product, bias in zip(
                factors.weights, products[factors.places], of_biases[factors.places]
            ):
                of_w, of_b = 1 + self.states + i, 1 + self.states + len(ws) + i
                if of_w in indexes:
                    made[of_w] = memory.empty((product.shape[1], values.shape[1]))
                    multiply_into(product.T, values, made[of_w])
                made[of_b] = bias.copy()  # two biases may have the same gradient
        return tuple(variable(made[i]) for i in indexes)

    def _backward_of_chainer(
        self, indexes: tuple[int, ...], grad_outputs: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        # Copies in the graph give each input a gradient of its own, even if inputs depend on each other, or are one.
        inputs = [F.identity(each) for each in self.get_retained_inputs()]
        x, states, ws, bs = self._take(inputs)
        xs = F.split_axis(x, self._sections, 0, force_tuple=True)
        xs = xs[::-1] if self._is_reversed else xs
        h, c, hs = n_step_rnn._one_directional_loop(
            type(self)._step, xs, states[0], states[1] if self.states > 1 else None, ws, bs
        )
        hs = F.concat(hs[::-1] if self._is_reversed else hs, axis=0)
        outputs = (h, c, hs) if self.states > 1 else (h, hs)
        known = [(y, g) for y, g in zip(outputs, grad_outputs) if g is not None]
        ys, gs = zip(*known)
        return tuple(
            chainer.grad(ys, [inputs[i] for i in indexes], gs, enable_double_backprop=True)
        )

    def _previous(self, initial: Array, values: Array) -> Array:
        """Return the packed states before each step, from the packed states after each step."""
        previous = memory.empty_like(values)
        before = initial
        for start, end, batch in self.times:
            shared = min(batch, len(before))
            previous[start : start + shared] = before[:shared]
            previous[start + shared : end] = initial[shared:batch]
            before = values[start:end]
        return previous


def sigmoid_of_halves(values: Array) -> None:
    """Replace halves of numbers by the sigmoid of the numbers, as Chainer computes it, in place. Local."""
    np.tanh(values, out=values)
    finish_sigmoid(values)


def finish_sigmoid(values: Array) -> None:
    """Replace the hyperbolic tangent of halves of numbers by the sigmoid of the numbers, in place. Local."""
    np.multiply(values, HALF, out=values)
    np.add(values, HALF, out=values)


def _sum_of_products(products: Array, matrices: Sequence[Array]) -> Array:
    total = memory.empty((products.shape[1], matrices[0].shape[1]))
    for i, matrix in enumerate(matrices):
        multiply_into(products[i], matrix, total, adds=i > 0)
    return total
