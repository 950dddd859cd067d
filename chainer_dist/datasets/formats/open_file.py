"""A file of any format that a process has open, and the library that opens it."""

from __future__ import annotations

import importlib
import platform
from typing import TYPE_CHECKING, Any, Protocol, Union

import numpy as np

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

__all__ = ["OpenFile", "Paths", "Positions", "require"]


Positions = np.ndarray[Any, np.dtype[np.int64]]
Paths = Union[str, "os.PathLike[str]", "Sequence[str | os.PathLike[str]]"]


class OpenFile(Protocol):
    """A file that this process has open.

    Attributes:
        length: Number of samples.
        schema: What each column has, in words: equal in all files of a dataset.
        index: What makes a later opening quick, such as where samples are; None if nothing does.
    """

    length: int
    schema: dict[str, str]
    index: Any

    def read(self, positions: Positions) -> Sequence[Any]:
        """Return what is stored of some samples.

        Args:
            positions: Ascending, without repetition, within the file; shape ``(k,)``.

        Returns:
            ``k`` samples that nothing else refers to.
        """

    def close(self) -> None:
        """Close the file."""


def require(module: str, dataset: str, extra: str) -> Any:
    """Import the library of a format. Local.

    Args:
        module: What is imported.
        dataset: Name of the class that needs it.
        extra: Which extra of chainer_dist installs it.

    Raises:
        ImportError: If it is not installed; the text has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise ImportError(
            f"{dataset} needs {library}, which cannot be imported on {platform.node()} ({error}): "
            f"pip install 'chainer_dist[{extra}]'"
        ) from error
