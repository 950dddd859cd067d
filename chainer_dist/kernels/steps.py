"""Steps of a recurrent network that a script calls one by one. Each step is one function.

All steps of a sequence get their parameters from one function, :class:`Parameters`, to which backward comes after all
steps. So the gradient of a matrix is one product of the values of many steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

from chainer_dist.kernels import memory, replacements
from chainer_dist.kernels.matrices import multiply_into
from chainer_dist.kernels.variables import variable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainer_dist.kernels.layouts import Array


class Factors(NamedTuple):
    """The factors of a parameter's gradient, as indexes of values that each step keeps.

    Attributes:
        gradient: Index of the gradient of the sums to which the parameter belongs, ``(batch, rows of the parameter)``.
        value: Index of the values by which a matrix was multiplied, ``(batch, columns)``; None for a bias.
    """

    gradient: int
    value: int | None = None


# Number of rows from which a product takes no longer per row than with more rows, so that no more are kept.
_ROWS = 1024


class _Sums:
    """Gradients of parameters, summed over steps. Local.

    Args:
        factors: Factors of each parameter's gradient.
        indexes: Indexes of the parameters that need a gradient.
    """

    def __init__(self, factors: Sequence[Factors], indexes: Sequence[int]) -> None:
        self._factors = {i: factors[i] for i in indexes}
        self._gradients: dict[int, Array] = {}
        self._kept: list[Sequence[Array]] = []
        self._rows = 0

    def add(self, values: Sequence[Array]) -> None:
        """Add the values of a step, which no code changes any more."""
        self._kept.append(values)
        self._rows += len(values[0])
        if self._rows >= _ROWS:
            self._multiply()

    def gradients(self) -> dict[int, Array]:
        """Return the gradients by the index of the parameter."""
        if self._kept:
            self._multiply()
        return self._gradients

    def _multiply(self) -> None:
        values = [np.concatenate(each) for each in zip(*self._kept)]
        self._kept, self._rows = [], 0
        for i, factors in self._factors.items():
            of_y = values[factors.gradient].T
            value = np.ones((of_y.shape[1], 1), np.float32)
            if factors.value is not None:
                value = values[factors.value]
            known = self._gradients.get(i)
            gradient = memory.empty((len(of_y), value.shape[1])) if known is None else known
            multiply_into(of_y, value, gradient, adds=known is not None)
            self._gradients[i] = gradient


class _Kept(chainer.Variable):  # type: ignore[misc]  # Chainer has no types
    """A placeholder for a parameter's gradient, until all steps have added to it.

    Args:
        shape: Shape of the parameter.
        sums: Sums that the gradient belongs to.
    """

    def __init__(self, shape: tuple[int, ...], sums: _Sums) -> None:
        super().__init__(np.broadcast_to(np.float32(0), shape))
        self.sums = sums


class Parameters(chainer.FunctionNode):  # type: ignore[misc]
    """The identity of parameters, of which all steps of a sequence take the outputs."""

    def forward(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """Return the parameters themselves. Called by Chainer."""
        return inputs

    def backward(self, indexes: tuple[int, ...], grad_outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the summed gradients, or those of a graph as they are. Called by Chainer."""
        kept = next((each for each in grad_outputs if isinstance(each, _Kept)), None)
        if kept is None:
            return tuple(grad_outputs[i] for i in indexes)
        gradients = kept.sums.gradients()
        shapes = [node.shape for node in self.inputs]
        return tuple(variable(gradients[i].reshape(shapes[i])) for i in indexes)

    def unchain(self) -> None:
        """Stay connected to the parameters for later steps, where a script cuts the graph. Called by Chainer."""


class Step(chainer.FunctionNode):  # type: ignore[misc]
    """One step. Its inputs are states and values of this step, then the parameters; its outputs begin with the state.

    Args:
        parameters: Parameters of Chainer's links, as variables.
        before: State after the step before, whose outputs of :class:`Parameters` are used again if possible.

    Attributes:
        factors: Factors of each parameter's gradient.
    """

    factors: ClassVar[Sequence[Factors]]
    _step: ClassVar[Callable[..., Any]]  # the step by Chainer's functions of Variables

    def __init__(self, parameters: Sequence[Any], before: Any) -> None:
        super().__init__()
        known = before.creator_node
        if not chainer.config.enable_backprop:
            self._parameters = parameters
        elif type(known) is type(self) and known._has(parameters):
            self._parameters = known._parameters
        else:
            self._parameters = Parameters().apply(parameters)

    def _has(self, parameters: Sequence[Any]) -> bool:
        creator = self._parameters[0].creator_node
        return creator is not None and all(
            mine.array is given.array and node is given.node
            for mine, node, given in zip(self._parameters, creator.inputs, parameters)
        )

    def run(self, *values: Any) -> Any:
        """Return the outputs of the step, given its inputs without the parameters, as Variables."""
        return self.apply((*values, *self._parameters))

    def differentiate(
        self, inputs: Sequence[Array], gys: Sequence[Any], indexes: Sequence[int]
    ) -> tuple[dict[int, Array], Sequence[Array]]:
        """Return the gradients of all inputs but the parameters, and the values that are kept for the parameters.

        Args:
            inputs: Inputs of forward.
            gys: Gradients of the outputs. If there are several, None stands for zeros.
            indexes: Indexes of the inputs that need a gradient.

        Returns:
            New arrays by the index of the input, and arrays to which :attr:`factors` has the indexes.
        """
        raise NotImplementedError

    def backward_accumulate(
        self,
        indexes: tuple[int, ...],
        grad_outputs: tuple[Any, ...],
        grad_inputs: tuple[Any, ...],
    ) -> tuple[Any, ...]:
        """Add the gradients of inputs, and keep the values that those of parameters need. Called by Chainer."""
        if chainer.config.enable_backprop:
            accumulated: tuple[Any, ...] = super().backward_accumulate(
                indexes, grad_outputs, grad_inputs
            )
            return accumulated
        inputs = [each.array for each in self.get_retained_inputs()]
        gys = [None if each is None else each.array for each in grad_outputs]
        gradients, values = self.differentiate(inputs, gys, indexes)
        changing = len(inputs) - len(self.factors)
        of_parameters = [(i - changing, g) for i, g in zip(indexes, grad_inputs) if i >= changing]
        kept = next((g for _, g in of_parameters if g is not None), None)
        sums = _Sums(self.factors, [i for i, _ in of_parameters]) if kept is None else kept.sums
        sums.add(values)

        def add(i: int, before: Any) -> Any:
            if i >= changing:
                return _Kept(inputs[i].shape, sums) if before is None else before
            gradient = gradients[i]
            if before is not None:
                gradient += before.array
            return variable(gradient)

        return tuple(map(add, indexes, grad_inputs))

    def backward(self, indexes: tuple[int, ...], grad_outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Compute gradients by Chainer's own functions, as a graph. Called by Chainer."""
        retained = self.get_retained_inputs()
        # Gradients of gradients bypass the function Parameters, and belong to the parameters themselves.
        nodes = self._parameters[0].creator_node.inputs
        changing = retained[: len(retained) - len(nodes)]
        # Copies in the graph give each input a gradient of its own, even if inputs depend on each other, or are one.
        inputs = [F.identity(each) for each in (*changing, *(n.get_variable() for n in nodes))]
        known = [(y, g) for y, g in zip(type(self)._step(*inputs), grad_outputs) if g is not None]
        ys, gs = zip(*known)
        return tuple(
            chainer.grad(ys, [inputs[i] for i in indexes], gs, enable_double_backprop=True)
        )


def are_plain(*links: Any) -> bool:
    """Return whether links are linear layers without hooks, and no static graph is recorded. Local."""
    return (
        all(type(link) is L.Linear and not link._n_local_link_hooks for link in links)
        and not chainer._get_link_hooks()
        and not replacements.is_recorded()
    )
