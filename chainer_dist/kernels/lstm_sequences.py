"""Long short-term memory by oneDNN's primitive, which computes all steps of sequences of equal length at once.

Its arithmetic between the products uses all threads, unlike that of NumPy. Its order of gates is Chainer's: i, f, the
cell's input a, and o.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chainer_dist.kernels import memory, onednn
from chainer_dist.kernels.cache import kept
from chainer_dist.kernels.onednn import (
    BACKWARD,
    TRAINING,
    WORKSPACE,
    Description,
    Layout,
    Operation,
)
from chainer_dist.kernels.shared_library import n_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist.kernels.layouts import Array

_GATES = 4

# Arguments of the primitive: sequences, h and c, then parameters, in the order in which it takes them.
_INPUTS, _STATES, _PARAMETERS = (1, 2, 3), (17, 18, 19), (33, 34, 41)
_OF_INPUTS, _OF_STATES, _OF_PARAMETERS = (129, 130, 131), (145, 146, 147), (161, 162, 169)

# Directions of the primitive.
_FIRST_TO_LAST, _LAST_TO_FIRST = 1, 2


class Geometry(NamedTuple):
    """Sizes of a layer: steps, sequences, values of an input, units, and whether the last step comes first."""

    times: int
    batch: int
    size: int
    units: int
    is_reversed: bool

    def data(self, width: int) -> list[Layout]:
        """Return the layouts of sequences of vectors of a width, of h and of c."""
        state = Layout.dense((1, 1, self.batch, self.units))
        return [Layout.dense((self.times, self.batch, width)), state, state]

    def weights(self) -> list[Layout]:
        """Return the layouts of weights as Chainer has them, those of the input first, all gates in one array."""
        units, sizes = self.units, (self.size, self.units)
        return [
            Layout(
                (1, 1, n, _GATES, units), (_GATES * units * n, _GATES * units * n, 1, units * n, n)
            )
            for n in sizes
        ]

    def gradients_of_weights(self) -> list[Layout]:
        """Return the layouts in which the primitive adds up the gradients of weights."""
        return [Layout.dense(each.shape) for each in self.weights()]

    def biases(self) -> Layout:
        """Return the layout of the biases."""
        return Layout.dense((1, 1, _GATES, self.units))

    def forward(self) -> list[Any]:
        """Return the parameters of the descriptor of the forward primitive."""
        direction = _LAST_TO_FIRST if self.is_reversed else _FIRST_TO_LAST
        return [TRAINING, direction, *self._arguments(), ctypes.c_uint(0)]

    def backward(self) -> list[Any]:
        """Return the same of the backward primitive."""
        _, direction, *arguments, flags = self.forward()
        gradients = self._arguments(self.gradients_of_weights())
        hint = Description("lstm_forward", self.forward())
        return [BACKWARD, direction, *arguments, *gradients, flags, hint]

    def _arguments(self, weights: list[Layout] | None = None) -> list[Layout | None]:
        weights = weights or [each.anyhow() for each in self.weights()]
        peephole = projection = None
        parameters = [*weights, peephole, projection, self.biases()]
        return [*self.data(self.size), *parameters, *self.data(self.units)]


@kept
def _forward(geometry: Geometry) -> Operation:
    parameters = [*geometry.weights(), geometry.biases()]
    inputs = [*zip(_INPUTS, geometry.data(geometry.size)), *zip(_PARAMETERS, parameters)]
    outputs = [*zip(_STATES, geometry.data(geometry.units)), (WORKSPACE, None)]
    return Operation("lstm_forward", geometry.forward(), inputs, outputs)


@kept
def _backward(geometry: Geometry) -> Operation:
    of_x, of_y = geometry.data(geometry.size), geometry.data(geometry.units)
    parameters = [*geometry.weights(), geometry.biases()]
    inputs = [*zip(_INPUTS, of_x), *zip(_PARAMETERS, parameters), *zip(_STATES, of_y)]
    gradients = [*geometry.gradients_of_weights(), geometry.biases()]
    outputs = [*zip(_OF_INPUTS, of_x), *zip(_OF_PARAMETERS, gradients)]
    return Operation(
        "lstm_backward",
        geometry.backward(),
        [*inputs, (WORKSPACE, None), *zip(_OF_STATES, of_y)],
        outputs,
    )


class Sequences:
    """A forward pass and what its backward pass needs. Local.

    Args:
        geometry: Sizes of the layer.
        x: Packed inputs, ``(times * batch, size)``, float32.
        states: Initial h and c, each ``(batch, units)``.
        ws: Weights in Chainer's order: four of the input, then four of h.
        bs: Biases likewise.

    Attributes:
        outputs: Last h and c, and the packed h of all steps, all new and C-contiguous.
    """

    def __init__(
        self,
        geometry: Geometry,
        x: Array,
        states: Sequence[Array],
        ws: Sequence[Array],
        bs: Sequence[Array],
    ) -> None:
        self._geometry = geometry
        biases = np.stack(bs[:_GATES])
        biases += np.stack(bs[_GATES:])
        # Stacked matrices of Fortran order have none of the two orders.
        weights = np.stack(ws[:_GATES]), np.stack(ws[_GATES:])
        self._inputs = (*map(np.ascontiguousarray, (x, *states, *weights)), biases)
        self._run()

    def _run(self) -> None:
        self._threads = n_threads()
        geometry = self._geometry
        operation = _forward(geometry)
        rows = geometry.times * geometry.batch
        y, h, c = (memory.empty((n, geometry.units)) for n in (rows, *[geometry.batch] * 2))
        self._workspace = onednn.scratch(operation.size(WORKSPACE))
        operation(*self._inputs, y, h, c, self._workspace)
        self.outputs = h, c, y

    def differentiate(self, gh: Array | None, gc: Array | None, gy: Array | None) -> list[Array]:
        """Return the gradients of x, h, c, the weights and the biases as new arrays, from those of the outputs.

        Args:
            gh: Gradient of the last h; None for zeros, as for the others.
            gc: Gradient of the last c.
            gy: Gradient of the packed h of all steps.
        """
        if self._threads != n_threads():  # the workspace is of an operation for another number
            self._run()
        geometry = self._geometry
        h, c, y = self.outputs
        given = [
            np.zeros_like(value) if g is None else np.ascontiguousarray(g)
            for value, g in ((y, gy), (h, gh), (c, gc))
        ]
        of_data = [memory.empty_like(value) for value in self._inputs[:3]]
        sums = [np.zeros(each.shape[2:], np.float32) for each in geometry.gradients_of_weights()]
        of_biases = np.zeros_like(self._inputs[-1])
        inputs = (*self._inputs, y, h, c, self._workspace, *given)
        _backward(geometry)(*inputs, *of_data, *sums, of_biases)
        of_weights = []
        for each in sums:
            gradients = memory.empty((*each.shape[1:], len(each)))
            onednn.reorder(each, gradients.transpose(2, 0, 1))
            of_weights += list(gradients)
        # Two biases have the same gradient.
        return [*of_data, *of_weights, *of_biases, *of_biases.copy()]
