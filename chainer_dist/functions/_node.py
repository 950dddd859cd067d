"""What all functions that communicate have in common: their order in backward, and delegates.

Chainer's backward visits functions by their ``rank``, the highest first. (That is a depth in the
graph and has nothing to do with MPI ranks.) Two functions that do not depend on one another may
get any ranks, so that one process would come to the gradient of a first message first and its peer
to that of a second: they would wait for each other, or mix the two up. A
:class:`CommunicationNode` therefore ranks above every other one that came before it in the same
process. Backward is then the exact mirror image of forward on each process, and if forward could
not get stuck, neither can backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import chainer
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable


class CommunicationNode(chainer.FunctionNode):  # type: ignore[misc]  # Chainer has no types
    """A Chainer function that backward visits in the reverse of the order of forward calls."""

    next_rank: ClassVar[int] = 0

    def apply(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Compute the outputs, and put the function after all earlier ones. Local."""
        outputs: tuple[Any, ...] = super().apply(inputs)
        if self.inputs is not None:  # otherwise there will be no backward
            self.rank: int = max(self.rank, CommunicationNode.next_rank)
            for output in outputs:
                output.creator_node = self  # takes over the rank
            CommunicationNode.next_rank = self.rank + 1
        return outputs


class Ordered(CommunicationNode):
    """Returns its inputs; what is computed from them comes earlier in backward than before."""

    def forward(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the inputs."""
        return inputs

    def backward(self, indexes: tuple[int, ...], grads: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the gradients of the inputs that need one."""
        return tuple(grads[i] for i in indexes)


def come_after(variables: Iterable[Any]) -> None:
    """Put functions that communicate from now on after those that made ``variables``. Local."""
    ranks = (each.rank for each in variables if isinstance(each, chainer.Variable))
    CommunicationNode.next_rank = max(CommunicationNode.next_rank, *ranks, 0)


def new_delegate() -> Any:
    """Return an empty variable that needs a gradient.

    As an input it makes backward reach a function whose other inputs need no gradient, or that
    has none; as an output it makes backward reach a function that has nothing else to return.
    """
    return chainer.Variable(np.empty(0, dtype=np.float32))


def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return a variable of zeros, as a gradient."""
    return chainer.Variable(np.zeros(shape, dtype=dtype))


def checked_array(x: Any, operation: str) -> Any:
    """Return the array in ``x``, a Variable or NumPy array of bools or numbers.

    Raises:
        TypeError: If that is not what ``x`` is.
    """
    array = x.array if isinstance(x, chainer.Variable) else x
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufc":
        got = f"an array of {array.dtype}" if hasattr(array, "dtype") else type(array).__name__
        if array is not x:
            got = f"a Variable with {got}"
        raise TypeError(f"{operation} takes Variables or NumPy arrays of numbers, got {got}")
    return array


def is_float(dtype: Any) -> bool:
    """Whether arrays of this dtype have gradients."""
    return bool(np.dtype(dtype).kind == "f")
