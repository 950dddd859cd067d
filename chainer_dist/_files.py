"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, *, text: bool = True) -> Iterator[IO[Any]]:
    """Open a file for writing that takes its place at the end, once it is on disk. Local.

    Whatever happens, an older file of this name is not lost, and nobody sees a part of the new one. There
    is one writer at a time.

    Args:
        path: Where it is to be.
        text: Whether it is of text, in UTF-8, or of bytes.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w" if text else "wb", encoding="utf-8" if text else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
