"""What a model returns for a batch, sample by sample, and the columns of a file that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import chainer
import numpy as np

from chainer_dist.errors import FailedItem

__all__ = ["Rows", "columns_of", "rows_of"]


class Rows(Sequence[Any]):
    """What a model returned for a batch, sample by sample.

    Args:
        output: An array of shape ``(n, ...)``, or a tuple or dict of such.
    """

    def __init__(self, output: Any) -> None:
        self.output = output

    def __len__(self) -> int:
        if isinstance(self.output, dict):
            return len(next(iter(self.output.values())))
        return len(self.output[0] if isinstance(self.output, tuple) else self.output)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(self.output, dict):
            return {key: array[index] for key, array in self.output.items()}
        if isinstance(self.output, tuple):
            return tuple(array[index] for array in self.output)
        return self.output[index]


def rows_of(x: Any, length: int) -> Any:
    """Return a model's output as an array, if it has a row for each sample."""
    array = x.array if isinstance(x, chainer.Variable) else x
    shape = getattr(array, "shape", None)
    if shape is None or shape[:1] != (length,):
        got = type(array).__name__ if shape is None else f"shape {shape}"
        raise ValueError(
            f"the model returned {got} for {length} samples, expected arrays of shape ({length}, ...)"
        )
    return array


def columns_of(values: Sequence[Any]) -> dict[str, Any]:
    """Return arrays with a row for each sample that did not fail, by the names they have in a file."""
    if isinstance(values, Rows):
        output = values.output
    else:
        rows = [x for x in values if not isinstance(x, FailedItem)]
        if isinstance(rows[0], dict):
            output = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        elif isinstance(rows[0], tuple):
            output = tuple(np.stack(column) for column in zip(*rows))
        else:
            output = np.stack(rows)
    if isinstance(output, dict):
        return {f"output/{key}": array for key, array in output.items()}
    if isinstance(output, tuple):
        return {f"output/{number}": array for number, array in enumerate(output)}
    return {"output": output}
