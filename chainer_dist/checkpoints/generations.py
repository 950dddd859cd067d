"""Checkpoints on disk: directories that are complete, and known to be whole, or do not count.

One checkpoint of all ranks is a generation: a directory ``<iteration>-<time>`` with a file of what all
ranks share, a file of each rank, and a manifest with the size and SHA-256 of each. It is written as
``<iteration>-<time>.tmp`` and renamed when everything in it is on disk. Nothing here communicates.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import chainer
import numpy as np

from chainer_dist._files import open_regular, read_regular, replacing
from chainer_dist._version import __version__
from chainer_dist.serialization.npz import write_npz

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from chainer_dist._typing import Array

__all__ = [
    "COMMON_FILE",
    "File",
    "Manifest",
    "begin",
    "check_files",
    "commit",
    "complete",
    "rank_file",
    "read_manifest",
    "remove",
    "token_in",
    "unfinished",
    "write_file",
]

COMMON_FILE = "common.npz"

_MANIFEST = "manifest.json"
_FORMAT = 2
_KNOWN_FORMATS = (1, 2)  # the first had None as a pickle, and no description of the saved objects
_LARGEST_MANIFEST = 1 << 27  # bytes; a rank takes about 150
_NAME = re.compile(r"(0|[1-9]\d*)-([0-9a-f]{16})", re.ASCII)
_UNFINISHED = ".tmp"
_CHUNK = 1 << 20  # bytes read at a time


class File(NamedTuple):
    """The size and the checksum of a file, as a manifest has them."""

    size: int  # bytes
    sha256: str


class Manifest(NamedTuple):
    """The manifest of a generation: its iteration, its number of ranks, and its files by name."""

    iteration: int
    ranks: int
    files: dict[str, File]


def rank_file(rank: int) -> str:
    """Return the name of the file of one rank."""
    return f"rank-{rank}.npz"


def complete(folder: Path) -> list[str]:
    """Return the names of complete generations, oldest first. Local."""
    found = [match for match in map(_NAME.fullmatch, _directories(folder)) if match]
    return [match[0] for match in sorted(found, key=lambda match: (int(match[1]), match[2]))]


def unfinished(folder: Path) -> list[str]:
    """Return the names of generations that were never completed, or are being removed. Local."""
    names = (name for name in _directories(folder) if name.endswith(_UNFINISHED))
    return [name for name in names if _NAME.fullmatch(name[: -len(_UNFINISHED)])]


def begin(folder: Path, iteration: int) -> Path:
    """Make the directory of a new generation, and return it. Local."""
    path = folder / f"{iteration}-{time.time_ns():016x}{_UNFINISHED}"
    path.mkdir(parents=True)
    return path


def write_file(path: Path, values: dict[str, Array], *, allow_pickle: bool = False) -> File:
    """Write arrays, and wait until they are on disk. Local."""
    digest = hashlib.sha256()
    size = write_npz(path, values, digest, allow_pickle=allow_pickle)
    return File(size, digest.hexdigest())


def commit(path: Path, manifest: Manifest) -> Path:
    """Complete a generation whose files are all on disk; return its directory. Local."""
    content = {
        "format": _FORMAT,
        "iteration": manifest.iteration,
        "ranks": manifest.ranks,
        "files": {name: file._asdict() for name, file in manifest.files.items()},
        "versions": {
            "chainer_dist": __version__,
            "chainer": chainer.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    text = json.dumps({"content": content, "sha256": _digest(content)}, indent=1)
    with replacing(path / _MANIFEST) as file:
        file.write(text)
    _sync_directory(path)
    final = path.with_name(path.name[: -len(_UNFINISHED)])
    path.rename(final)
    _sync_directory(final.parent)
    return final


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a generation. Local.

    Raises:
        ValueError: If the manifest is damaged, or of a format that is not known.
        OSError: If it cannot be read.
    """
    try:
        outer = json.loads(read_regular(path / _MANIFEST, limit=_LARGEST_MANIFEST))
        content = outer["content"]
        intact = outer["sha256"] == _digest(content)
    except (ValueError, KeyError, TypeError, RecursionError):  # no JSON, or of another structure
        intact = False
    if not intact:
        raise ValueError(f"{_MANIFEST} is damaged")
    if content["format"] not in _KNOWN_FORMATS:
        raise ValueError(
            f"{_MANIFEST} has format {content['format']}, which this version does not know"
        )
    if not path.name.startswith(f"{content['iteration']}-"):
        raise ValueError(f"{_MANIFEST} is of iteration {content['iteration']}")
    ranks = content["ranks"]
    files = {name: File(**file) for name, file in content["files"].items()}
    # The checksum detects damage, and no more: anyone can make a manifest.
    fits = type(ranks) is int and len(files) == ranks + 1
    if not fits or {*files} != {COMMON_FILE, *map(rank_file, range(ranks))}:
        raise ValueError(f"{_MANIFEST} does not list one file of each rank and {COMMON_FILE}")
    return Manifest(content["iteration"], ranks, files)


def check_files(path: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Read files of a generation. Local.

    Raises:
        ValueError: If a file has changed since it was written.
        OSError: If one cannot be read.
    """
    for name in names:
        expected = manifest.files[name]
        digest = hashlib.sha256()
        size = 0
        with open_regular(path / name) as file:
            length = os.fstat(file.fileno()).st_size
            while size < expected.size and (chunk := file.read(_CHUNK)):
                digest.update(chunk)
                size += len(chunk)
        if length != expected.size or size != expected.size:
            raise ValueError(f"{name} has {length} bytes, and {expected.size} were written")
        if digest.hexdigest() != expected.sha256:
            raise ValueError(f"{name} is damaged: its SHA-256 is not that of what was written")


def remove(path: Path) -> None:
    """Remove a generation; one that is only half removed does not count as complete. Local."""
    if not path.name.endswith(_UNFINISHED):
        path = path.rename(path.with_name(f"{path.name}{_UNFINISHED}"))
    shutil.rmtree(path)


@contextlib.contextmanager
def token_in(folder: Path) -> Iterator[Path]:
    """Make a directory if it is missing, and for a while a file in it. Local."""
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / f".token-{secrets.token_hex(8)}"
    token.touch(exist_ok=False)
    try:
        yield token
    finally:
        with contextlib.suppress(OSError):  # left behind it does no harm
            token.unlink()


def _directories(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems without it write names at once
            raise
    finally:
        os.close(descriptor)
