"""The files of ranks that make up a checkpoint: which there are, which rank reads them, and which belong together."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple, Optional

from chainer_dist._files import open_regular
from chainer_dist.serialization.npz import ArrayFile

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "ORIGIN",
    "FoundFile",
    "Generation",
    "Origin",
    "RankFile",
    "generations_of",
    "origin_of",
    "visible_files",
]


# A file holds this array beside the target's: how many ranks saved it, and a number that is
# another one in each job, so that files of several jobs are not taken for one checkpoint.
ORIGIN = "chainer_dist/origin"
Origin = Optional[tuple[int, int]]  # None: ChainerMN's file, which does not say


class RankFile(NamedTuple):
    """A file by its name.

    Attributes:
        rank: Rank that has saved it.
        iteration: Iteration in which it was saved.
    """

    rank: int
    iteration: int


class FoundFile(NamedTuple):
    """A file as it was found.

    Attributes:
        reader: Rank of this job that reads it.
        origin: Number of ranks that have saved, and number of their job; None if the file does not say it.
    """

    reader: int
    origin: Origin


class Generation(NamedTuple):
    """Files that were saved together.

    Attributes:
        iteration: Iteration in which they were saved.
        n_ranks: Number of ranks that have saved.
        readers: For each rank whose file is there, the rank that reads it.
    """

    iteration: int
    n_ranks: int
    readers: dict[int, int]

    @property
    def is_complete(self) -> bool:
        """Whether the files of all ranks are there."""
        n_ranks = self.n_ranks  # which a damaged file may claim to be any number
        return len(self.readers) >= n_ranks and self.readers.keys() >= {*range(n_ranks)}


def origin_of(path: Path) -> Origin:
    """Return which job has saved a file, and on how many ranks. Local."""
    with open_regular(path) as file:
        arrays = ArrayFile(file)
        if ORIGIN not in arrays:
            return None
        n_ranks, job = arrays[ORIGIN].tolist()
        return n_ranks, job


def visible_files(folder: Path, name: str) -> list[RankFile]:
    """Return the files of a name that this rank sees in a folder, sorted. Local."""
    if not folder.is_dir():
        return []
    pattern = re.compile(re.escape(name) + r"\.(0|[1-9]\d*)\.(0|[1-9]\d*)", re.ASCII)
    matches = (pattern.fullmatch(path.name) for path in folder.iterdir())
    return sorted(RankFile(int(match[1]), int(match[2])) for match in matches if match)


def generations_of(files: dict[RankFile, FoundFile], n_ranks: int) -> list[Generation]:
    """Sort files into generations, the best one last: complete rather than not, then newer. Local.

    Args:
        files: All files, and where they were found.
        n_ranks: Number of ranks that have saved the files that do not say it.
    """
    groups: dict[tuple[int, Origin], dict[int, int]] = {}
    for file, found in files.items():
        groups.setdefault((file.iteration, found.origin), {})[file.rank] = found.reader
    generations = [
        Generation(iteration, n_ranks if origin is None else origin[0], readers)
        for (iteration, origin), readers in groups.items()
    ]
    return sorted(generations, key=lambda each: (each.is_complete, each.iteration))
