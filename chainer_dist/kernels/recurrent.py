"""One layer of a recurrent network for a whole sequence, as one function: what LSTM, GRU and the plain network share.

Sequences lie packed in one array of (values of all times, units): the batch of the first time, then that of the
second, and so on; a batch never grows from one time to the next, as Chainer has it. Gates lie in one array of (gates,
values of all times, units), so that each gate, and several next to each other, are one piece of memory at each time.
The products by the weights of the input are computed for all times at once, and so are the gradients of all weights;
from time to time go only the product by the weights of the state and the gates, in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import chainer
import chainer.functions as F
import numpy as np
from chainer.functions.rnn import n_step_rnn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainer_dist.kernels.layouts import Array

HALF, ONE = np.float32(0.5), np.float32(1)

_SMALL = 10**6  # multiplications up to which OpenBLAS does not copy the matrices first

_NARROWEST = 32  # columns of a block; narrower ones are slower than the copies


class Product:
    """The products of few rows by some matrices of equal shape, which are computed often. Local.

    OpenBLAS copies both matrices before it multiplies, unless they are small. The copies take several times as long
    as the product of some rows, so the matrices are cut into blocks of columns that are small.

    Args:
        matrices: Matrices of (values, columns).
        rows: Most rows that they are multiplied with.
        halved: Which of them are halved.
    """

    def __init__(self, matrices: Sequence[Array], rows: int, halved: slice = slice(0)) -> None:
        size, columns = matrices[0].shape
        widths = range(min(columns, _SMALL // (rows * size)), _NARROWEST - 1, -1)
        self._width = next((width for width in widths if columns % width == 0), columns)
        self._blocks = np.empty(
            (len(matrices), columns // self._width, size, self._width), np.float32
        )
        for blocks, matrix in zip(self._blocks, matrices):
            blocks[...] = self._cut(matrix)
        self._blocks[halved] *= HALF

    def of_all(self, rows: Array, out: Array) -> None:
        """Write the product of (rows, values) by each matrix into ``out``, (matrices, rows, columns)."""
        np.matmul(rows, self._blocks, out=self._cut(out))

    def of_each(self, rows: Array, out: Array) -> None:
        """Write the product of the rows of each matrix, (matrices, rows, values), likewise."""
        np.matmul(rows[:, None], self._blocks, out=self._cut(out))

    def _cut(self, matrix: Array) -> Any:
        return matrix.reshape(*matrix.shape[:-1], -1, self._width).swapaxes(-2, -3)


class Factors(NamedTuple):
    """What the inputs, or the states, are multiplied by.

    Attributes:
        weights: Numbers of the weights.
        first: Where the gradients of the products begin among those that ``differentiate`` returns.
    """

    weights: tuple[int, ...]
    first: int

    @property
    def places(self) -> slice:
        """Where these gradients lie."""
        return slice(self.first, self.first + len(self.weights))

    def take(self, params: Sequence[Array]) -> list[Array]:
        """Return the weights, or the biases, in order."""
        return [params[i] for i in self.weights]


class Layer(chainer.FunctionNode):  # type: ignore[misc]  # Chainer has no types
    """A layer in one direction.

    Inputs are the packed sequences, the initial states, each of (batch, units), the weights and the biases in Chainer's
    order. Outputs are the last states, each of (batch, units), and the packed states of all times.

    Args:
        batches: How many sequences there are at each time, in descending order.
        is_reversed: Whether the last time comes first.
    """

    states: ClassVar[int] = 1
    _step: ClassVar[Callable[..., Any]]  # one time, of Chainer's functions, as Chainer has it
    of_x: ClassVar[Factors]
    of_h: ClassVar[Factors]
    sigmoids: ClassVar[range]  # of which the sigmoid is taken, counted as the gradients are

    def __init__(self, batches: Sequence[int], is_reversed: bool) -> None:
        super().__init__()
        self._is_reversed = is_reversed
        ends = np.cumsum(batches).tolist()
        self._sections = ends[:-1]
        # From where to where the values of each time lie, and how many they are, in the order of computing.
        self.times = list(zip([0, *ends[:-1]], ends, batches))
        if is_reversed:
            self.times.reverse()
        self.rows = max(batches)

    # What a kind of network has of its own.

    def run(self, gates: Array, states: list[Array], by_h: Product, h_biases: Array) -> Array:
        """Compute all times, and return the packed states.

        Args:
            gates: Products of the inputs and all biases that are added to them, (gates, values, units); halves where
                the sigmoid is taken; changed in place.
            states: Initial states, which become the last ones, in place.
            by_h: Product by the weights of the state, halves likewise.
            h_biases: Biases of the state, (products, units).
        """
        raise NotImplementedError

    def differentiate(
        self, hs: Array, gys: Array | None, grads: list[Array], by_h: Product
    ) -> Array:
        """Return the gradients of the products by the weights, (products, values, units), new.

        Args:
            hs: States before each time, packed.
            gys: Gradients of the packed states, or None.
            grads: Gradients of the last states, which become those of the initial ones, in place.
            by_h: Product of the gradients of the state's products by the weights.
        """
        raise NotImplementedError

    # What all have.

    def _take(self, inputs: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
        x, states, params = inputs[0], inputs[1 : 1 + self.states], inputs[1 + self.states :]
        return x, states, params[: len(params) // 2], params[len(params) // 2 :]

    def forward(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """Compute all times. Called by Chainer."""
        self.retain_inputs(tuple(range(len(inputs))))
        x, states, ws, bs = self._take(inputs)
        states = [state.copy() for state in states]
        units = states[0].shape[1]
        gates = np.empty((len(self.of_x.weights), len(x), units), np.float32)
        for gate, w in zip(gates, self.of_x.take(ws)):
            np.dot(x, w.T, out=gate)
        # Views of one array have the biases where the gradients of the products are.
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
        """Compute the gradients, by Chainer's own functions where they shall have gradients too. Called by Chainer."""
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
        of_biases = np.matmul(np.ones(len(x), np.float32), products)
        for factors, values in ((self.of_x, x), (self.of_h, hs)):
            for i, product, bias in zip(
                factors.weights, products[factors.places], of_biases[factors.places]
            ):
                of_w, of_b = 1 + self.states + i, 1 + self.states + len(ws) + i
                if of_w in indexes:
                    made[of_w] = product.T.dot(values)
                made[of_b] = bias.copy()  # as two biases may have this gradient
        return tuple(chainer.as_variable(made[i]) for i in indexes)

    def _backward_of_chainer(
        self, indexes: tuple[int, ...], grad_outputs: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        # Inputs that depend on each other, or are one, have a gradient each: hence the copies in the graph.
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
        """Return what a state was before each time, packed, from what it was after each."""
        previous = np.empty_like(values)
        before = initial
        for start, end, batch in self.times:
            shared = min(batch, len(before))
            previous[start : start + shared] = before[:shared]
            previous[start + shared : end] = initial[shared:batch]
            before = values[start:end]
        return previous


def sigmoid_of_halves(values: Array) -> None:
    """Compute the sigmoid of the doubles of values, as Chainer does, in place. Local."""
    np.tanh(values, out=values)
    finish_sigmoid(values)


def finish_sigmoid(values: Array) -> None:
    """Make the sigmoid from the hyperbolic tangent of the halves, in place. Local."""
    np.multiply(values, HALF, out=values)
    np.add(values, HALF, out=values)


def _sum_of_products(products: Array, matrices: Sequence[Array]) -> Array:
    total: Array = products[0].dot(matrices[0])
    for product, matrix in zip(products[1:], matrices[1:]):
        total += product.dot(matrix)
    return total
