"""Checked mode: ranks compare each collective before they run it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist.collectives.agreement import agree, digest
from chainer_dist.collectives.frames import user_line
from chainer_dist.collectives.operation import brief
from chainer_dist.errors import RankMismatchError

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
    if all(agree(comm, digest((operation.number, text)))):
        return
    line = user_line(sys._getframe())  # noqa: SLF001 - Python's
    everyone = comm.allgather_obj((operation.number, text, line))
    number, expected, expected_line = everyone[0]
    for rank, (its_number, its_text, its_line) in enumerate(everyone):
        if (its_number, its_text) != (number, expected):
            raise RankMismatchError(
                f"rank {rank}: operation {its_number} is {its_text}, at {its_line}; "
                f"expected {expected}, at {expected_line}, operation {number} as on rank 0"
            )


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
