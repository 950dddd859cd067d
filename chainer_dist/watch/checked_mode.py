"""Checked mode: ranks compare each collective before they run it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist.collectives.agreement import agree, digest
from chainer_dist.collectives.extremes import raise_elsewhere
from chainer_dist.collectives.operation import brief

if TYPE_CHECKING:
    from chainer_dist.collectives.operation import Operation


def compare(operation: Operation) -> None:
    """Raise on every rank if the ranks have come to different operations. Collective.

    Args:
        operation: The operation that this rank begins. Its number, its name and the arguments that must be
            the same on every rank are compared; of arrays, shapes and dtypes are.

    Raises:
        RankMismatchError: Names the lowest rank that differs from rank 0, and both ranks'
            operations and source lines.
    """
    comm: Any = operation.comm
    if comm.size == 1:
        return
    text = _describe(operation)
    if not all(agree(comm, digest((operation.number, text)))):
        raise_elsewhere(comm, operation.number, text)


def _describe(operation: Operation) -> str:
    arguments = operation.arguments()
    same = [
        f"{name}={_exact(arguments[name])}" for name in operation.kind.same if name in arguments
    ]
    return f"{operation.kind.name}({', '.join(same)})"


def _exact(value: Any) -> str:
    if isinstance(value, (tuple, list)) and all(isinstance(each, np.ndarray) for each in value):
        return f"[{', '.join(map(brief, value))}]"
    return brief(value) or type(value).__name__
