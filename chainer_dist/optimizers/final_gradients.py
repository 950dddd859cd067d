"""Backward that reports each parameter's gradient as soon as nothing is added to it any more.

Chainer sets ``param.grad`` when backward is over. Until then gradients are in a table of Chainer's
backward, where each function adds what it contributes. This rests on internals of Chainer
7.8.1, its last version: when a function hook is called, the table, and how nodes are linked.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from typing import TYPE_CHECKING, Any

import chainer
from chainer import _backprop_utils

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from chainer_dist._typing import Array

__all__ = ["FinalGradients"]


class FinalGradients(chainer.FunctionHook):  # type: ignore[misc]  # Chainer has no types
    """Runs backward once and reports final gradients on the way. Local.

    A gradient is final when each function that took the parameter, of all those that the loss comes
    from, has contributed to it. Three kinds are not reported: gradients of parameters that the
    loss does not come from, gradients to which some function contributes nothing (it returns None, or
    backward does not get there), and None.

    Args:
        loss: Variable from which backward starts.
        params: Parameters whose gradients are reported.

    Attributes:
        reached: Which of ``params`` the loss comes from, by number, in ascending order.
    """

    name = "chainer_dist.FinalGradients"

    def __init__(self, loss: chainer.Variable, params: Sequence[chainer.Parameter]) -> None:
        super().__init__()
        self._loss = loss
        self._nodes = [param.node for param in params]
        numbers = {id(node): number for number, node in enumerate(self._nodes)}
        # How many functions have yet to contribute, by parameter; and what each contributes to.
        self._missing: collections.Counter[int] = collections.Counter()
        self._params_of: dict[int, list[int]] = {}
        functions = [] if loss.creator_node is None else [loss.creator_node]
        seen = set(map(id, functions))
        while functions:
            function = functions.pop()
            for node in {id(node): node for node in function.inputs if node.requires_grad}.values():
                number = numbers.get(id(node))
                if number is not None:
                    self._missing[number] += 1
                    self._params_of.setdefault(id(function), []).append(number)
                creator = node.creator_node
                if creator is not None and id(creator) not in seen:
                    seen.add(id(creator))
                    functions.append(creator)
        self.reached = tuple(sorted(self._missing))
        self._table: Any = None
        self._report: Callable[[int, Array], None]
        self._poll: Callable[[], Any]

    @staticmethod
    def can_watch(loss: object) -> bool:
        """Return whether backward of a loss is the one known here: of Chainer's variables with NumPy arrays."""
        return (
            isinstance(loss, chainer.Variable)
            and type(loss).backward is chainer.Variable.backward
            and "backward" not in vars(loss)
            and not loss._has_chainerx_array  # noqa: SLF001 - Chainer's
            and loss.array is not None
        )

    def backward(
        self,
        report: Callable[[int, Array], None],
        poll: Callable[[], Any],
        loss_scale: float | None = None,
    ) -> None:
        """Run backward.

        Args:
            report: Called with the number of each parameter whose gradient is final, and the array
                that will be ``param.grad`` unless other code changes that.
            poll: Called after each function, of forward too where backward calls such.
            loss_scale: See ``chainer.Variable.backward``.
        """
        self._report, self._poll = report, poll
        with self._take_table(), self:
            self._loss.backward(loss_scale=loss_scale)

    def backward_postprocess(self, function: Any, in_data: Any, out_grad: Any) -> None:
        """Report what was final with this function. Called by Chainer."""
        del in_data, out_grad
        for number in self._params_of.pop(id(function), ()):
            self._missing[number] -= 1
            if not self._missing[number]:
                # Added up as Chainer would at the end, so that there is nothing left to add then.
                grad = _backprop_utils._reduce(self._table.grads[self._nodes[number]])  # noqa: SLF001 - Chainer's
                if grad is not None and grad.array is not None:
                    self._report(number, grad.array)
        self._poll()

    def forward_postprocess(self, function: Any, in_data: Any) -> None:
        """Poll. Called by Chainer for functions that backward calls."""
        del function, in_data
        self._poll()

    @contextlib.contextmanager
    def _take_table(self) -> Iterator[None]:
        """Get hold of the table that the next backward of this thread makes."""
        original, thread = _backprop_utils.GradTable, threading.get_ident()

        def make(*args: Any, **kwargs: Any) -> Any:
            table = original(*args, **kwargs)
            if self._table is None and threading.get_ident() == thread:
                self._table = table
                _backprop_utils.GradTable = original
            return table

        _backprop_utils.GradTable = make
        try:
            yield
        finally:
            _backprop_utils.GradTable = original
            self._table = None
