"""Whether ranks have the same samples, and how they all get those that only rank 0 has."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
from chainer import datasets

from chainer_dist import _chainer
from chainer_dist.collectives.agreement import agree, digest, raise_mismatch
from chainer_dist.datasets.node_shared import scatter_parts
from chainer_dist.datasets.pickled_parts import Common
from chainer_dist.datasets.scattered import ScatteredDataset
from chainer_dist.errors import RankMismatchError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["compare", "describe", "fingerprint", "is_on_rank_zero_only", "is_scattered", "share"]

_LOOKED_AT = 64  # of the samples of an array or a list
_ELEMENTS = 1024  # of each of them


def fingerprint(value: Any) -> str:
    """Return a text that is the same on all ranks for equal numbers, arrays, texts and lists of these. Local."""
    found = hashlib.blake2b(digest_size=8)
    for piece in _pieces(value):
        found.update(piece)
    return found.hexdigest()


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield f"{value.dtype} {value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, dict):
        for key, each in value.items():
            yield repr(key).encode()
            yield from _pieces(each)
    elif isinstance(value, (list, tuple, np.ndarray)):
        yield f"{len(value)}".encode()
        for each in value:
            yield from _pieces(each)
    elif isinstance(value, (bool, int, float, complex, str, bytes, np.generic, type(None))):
        yield repr(value).encode()
    else:  # what it has in it is its own affair
        yield type(value).__qualname__.encode()


def describe(dataset: Any, subject: str) -> list[tuple[str, str]]:
    """Describe which samples a dataset has, and in which order, as far as can be seen from outside. Local.

    No sample is loaded: a dataset may make each anew, at random.

    Args:
        dataset: Any.
        subject: Name of the dataset in errors.
    """
    length = len(dataset) if hasattr(dataset, "__len__") else -1
    lines = [(f"the length of {subject}", str(length))]
    return [*lines, *((f"{subject}{where}", text) for where, text in _parts(dataset, ""))]


def _parts(dataset: Any, where: str) -> Iterator[tuple[str, str]]:
    kind = type(dataset).__qualname__
    yield f"{where} (kind)", kind
    if isinstance(dataset, datasets.SubDataset):
        _, start, finish, order = _chainer.selected(dataset)
        order = order if order is None else np.asarray(order)
        yield f"{where} (order of samples)", fingerprint([start, finish, order])
    inner = getattr(dataset, "_datasets", getattr(dataset, "_dataset", None))
    if isinstance(inner, dict):
        inner = [*inner.values()]
    if isinstance(dataset, (np.ndarray, list, tuple)):
        n = len(dataset)
        looked_at = sorted({i * (n - 1) // _LOOKED_AT for i in range(_LOOKED_AT + 1)}) if n else []
        yield f"{where} (samples)", fingerprint([_beginning(dataset[i]) for i in looked_at])
    elif isinstance(inner, (list, tuple)) and type(dataset).__module__.startswith("chainer"):
        for number, each in enumerate(inner):
            yield from _parts(each, f"{where}[{number}]")
    elif inner is not None:
        yield from _parts(inner, f"{where}.dataset")


def _beginning(sample: Any) -> Any:
    return sample.ravel()[:_ELEMENTS] if isinstance(sample, np.ndarray) else sample


def compare(comm: CommunicatorBase, lines: Sequence[tuple[str, str]], advice: str) -> None:
    """Raise on every rank if ranks describe what they have differently. Collective.

    Args:
        comm: Communicator.
        lines: This rank's subjects and descriptions.
        advice: End of the error message: what to do.

    Raises:
        RankMismatchError: If one differs.
    """
    if all(agree(comm, digest(lines))):
        return
    try:
        raise_mismatch(comm, lines)
    except RankMismatchError as error:
        raise RankMismatchError(f"{error}; {advice}") from None


def is_on_rank_zero_only(comm: CommunicatorBase, dataset: Any) -> bool:
    """Return whether rank 0 has samples, and no other rank has any. Collective."""
    here = dataset is not None and (not hasattr(dataset, "__len__") or len(dataset) > 0)
    first, *others = comm.allgather_obj(here)
    return bool(others) and first and not any(others)


def share(comm: CommunicatorBase, dataset: Any) -> Any:
    """Return rank 0's dataset on every rank, of which each node keeps one copy. Collective.

    Args:
        comm: Communicator.
        dataset: Rank 0's counts.

    Raises:
        Exception: On every rank, if it cannot be pickled, or a node has no room for it.
    """
    received = scatter_parts(comm, 0, lambda _: Common(dataset))
    return dataset if comm.rank == 0 else received.value


def is_scattered(dataset: Any) -> bool:
    """Return whether a dataset is already this rank's part of :func:`~chainer_dist.scatter_dataset`. Local."""
    if isinstance(dataset, ScatteredDataset):
        return True
    inner = getattr(dataset, "_datasets", getattr(dataset, "_dataset", None))
    if isinstance(inner, dict):
        inner = [*inner.values()]
    each = inner if isinstance(inner, (list, tuple)) else [inner]
    return any(is_scattered(part) for part in each if part is not None and part is not dataset)
