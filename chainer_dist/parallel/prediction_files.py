"""The folder of files to which predictions are written, and its index."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from chainer_dist._files import replacing
from chainer_dist.collectives.failures import together

if TYPE_CHECKING:
    from pathlib import Path

    from chainer_dist.communicators import CommunicatorBase
    from chainer_dist.errors import FailedItem

__all__ = ["INDEX_FILE", "PredictionFile", "check_reached", "finish_files", "make_empty"]


INDEX_FILE = "index.json"


class PredictionFile(NamedTuple):
    """The entry of a file in the index.

    Attributes:
        file: Its name.
        first: Number of the first sample that it may have.
        n_samples: Number of samples that it has.
    """

    file: str
    first: int
    n_samples: int


def make_empty(folder: Path) -> None:
    """Make a folder, or raise FileExistsError if it has anything in it. Local."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"out is {folder}, which is not empty: remove it, or name another")


def check_reached(comm: CommunicatorBase, folder: Path) -> None:
    """Raise an error on every rank if one cannot see a folder that rank 0 has made. Collective."""
    with together(comm):
        if not folder.is_dir():
            raise FileNotFoundError(f"out is {folder}, which rank 0 has made, but is not there")


def finish_files(
    comm: CommunicatorBase,
    folder: Path,
    length: int,
    files: list[Any] | None,
    failed: list[FailedItem],
) -> list[Path]:
    """Write the index, and return all files on every rank. Collective.

    Args:
        comm: Communicator whose ranks have written the files.
        folder: Folder of the files.
        length: Number of samples.
        files: On rank 0 a :class:`PredictionFile` for each file, in the order of the samples; None elsewhere.
        failed: Samples that have failed.

    Raises:
        OSError: On every rank, if the index cannot be written.
    """
    names: list[str] = []
    with together(comm):
        if files is not None:
            written = [each for each in files if isinstance(each, PredictionFile)]
            names = [each.file for each in written]
            index = {
                "length": length,
                "files": [each._asdict() for each in written],
                "failures": [dataclasses.asdict(each) for each in failed],
            }
            with replacing(folder / INDEX_FILE) as file:
                json.dump(index, file, indent=1)
    return [folder / name for name in comm.bcast_obj(names)]
