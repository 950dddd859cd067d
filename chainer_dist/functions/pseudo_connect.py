"""Making backward pass through a part of the graph that the loss does not depend on."""

from __future__ import annotations

from typing import Any

import chainer

from chainer_dist.functions._node import new_delegate, zeros


class _PseudoConnect(chainer.FunctionNode):  # type: ignore[misc]  # Chainer has no types
    """The identity of the last inputs; the first ``n_delegates`` get zeros as gradients."""

    def __init__(self, n_delegates: int = 1) -> None:
        self._n_delegates = n_delegates

    def forward(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return all inputs but the delegates."""
        return inputs[self._n_delegates :]

    def backward(self, indexes: tuple[int, ...], grads: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the gradients, and zeros for the delegates."""
        all_grads = (*[None] * self._n_delegates, *grads)
        return tuple(self._gradient(i, all_grads[i]) for i in indexes)

    def _gradient(self, i: int, grad: Any) -> Any:
        # Backward may start from a delegate, which then has no gradient, and goes on all the same.
        x = self.inputs[i]
        if i < self._n_delegates or (grad is None and 0 in x.shape):
            return zeros(x.shape, x.dtype)
        return grad


def pseudo_connect(delegate_variable: Any, *actual_variables: Any) -> tuple[Any, ...]:
    """Return variables equal to ``actual_variables`` that backward also reaches a delegate from. Local.

    :func:`~chainer_dist.functions.send` returns a delegate: an empty variable that the loss does
    not depend on. Backward has to reach it all the same, because there the rank receives the
    gradient of what it sent. A rank with a loss of its own connects the two::

        delegate = functions.send(h, comm, rank=1)
        (loss,) = functions.pseudo_connect(delegate, loss)
        loss.backward()

    A rank without a loss calls ``delegate.backward()``. Several delegates are connected one after
    the other. Any variable can be a delegate.

    Args:
        delegate_variable: Variable that gets zeros as its gradient; None connects nothing.
        actual_variables: Variables or arrays of any shape and dtype.

    Returns:
        A tuple of new variables with the same arrays, also if there is only one. Their gradients
        pass through unchanged. The same as ChainerMN's ``pseudo_connect``.
    """
    delegate = new_delegate() if delegate_variable is None else delegate_variable
    return connect((delegate,), actual_variables)


def connect(delegates: tuple[Any, ...], variables: tuple[Any, ...]) -> tuple[Any, ...]:
    """Do what :func:`pseudo_connect` does, with any number of delegates. Local."""
    connected: tuple[Any, ...] = _PseudoConnect(len(delegates)).apply((*delegates, *variables))
    return connected
