"""Open files in a dataset, which other processes cannot have: where they are, and what to do."""

from __future__ import annotations

import copyreg
import functools
import io
import itertools
import multiprocessing
import sys
import tarfile
import warnings
import zipfile
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from chainer import iterators

from chainer_dist.datasets.formats import StoredDataset

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_files", "check_workers", "refuse_handles"]

# Classes by module, which is looked for among those that are imported already, and what to use instead.
_HANDLES: list[tuple[str, tuple[str, ...], str]] = [
    ("h5py", ("Dataset", "Group"), "HDF5Dataset(path, columns)"),
    ("lmdb", ("Environment", "Transaction", "Cursor"), "LMDBDataset(path, decode)"),
    ("zarr", ("Array", "Group"), "ZarrDataset(path, columns)"),
    ("pyarrow.parquet", ("ParquetFile",), "ParquetDataset(path, columns)"),
]
_FILES = (io.IOBase, tarfile.TarFile, zipfile.ZipFile)
_TAR = "TarDataset(path, columns)"

# These pickle as their paths, and can be read after a fork.
_SENDABLE = "zarr"

_LEAVES = (str, bytes, bytearray, int, float, complex, np.ndarray, np.generic, type, ModuleType)
_MOST_ELEMENTS = 16  # of a list that are looked at: those of a long one are alike
_MOST_OBJECTS = 1000


class _Handle(NamedTuple):
    """An open file in a dataset."""

    where: str
    kind: str
    advice: str
    can_be_sent: bool


def refuse_handles(dataset: Any) -> None:
    """Raise if a dataset cannot be sent to other processes because of an open file in it. Local.

    Args:
        dataset: Any object. What has a way of its own to be pickled is not looked into.

    Raises:
        TypeError: Says where the file is and what to do.
    """
    found = _find(dataset, pickled=True)
    is_dataset = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if found is not None and not (found.can_be_sent and is_dataset):
        raise TypeError(f"{_say(found)}, which other processes cannot have: {found.advice}")


def check_workers(iterator: Any) -> None:
    """Look for open files in what a MultiprocessIterator gives its worker processes. Local.

    Args:
        iterator: Any iterator; other ones start no processes.

    Raises:
        TypeError: If the workers are to be spawned, and the dataset has an open file; where they are
            forked there is a RuntimeWarning.
    """
    if not isinstance(iterator, iterators.MultiprocessIterator):
        return
    if multiprocessing.get_context().get_start_method() != "fork":
        refuse_handles(iterator.dataset)
        return
    found = _find(iterator.dataset, pickled=False)
    if found is not None and not found.can_be_sent:
        warnings.warn(
            f"{_say(found)}, which worker processes that are forked would share with this one, and "
            f"may read wrong data or wait for ever: {found.advice}",
            RuntimeWarning,
            stacklevel=3,
        )


def check_files(dataset: Any) -> None:
    """Let the stored datasets within a dataset look whether their files are the ones described. Local.

    Raises:
        Exception: Naming the file, if one is not there or another one.
    """
    for _, each in _walk(dataset, pickled=False):
        if isinstance(each, StoredDataset):
            each.check()


def _say(found: _Handle) -> str:
    return f"{found.where} is an open {found.kind}"


def _find(dataset: Any, *, pickled: bool) -> _Handle | None:
    for where, value in _walk(dataset, pickled=pickled):
        found = _handle(where, value)
        if found is not None:
            return found
    return None


def _handle(where: str, value: Any) -> _Handle | None:
    kind = f"{type(value).__module__.partition('.')[0]}.{type(value).__qualname__}"
    for module, names, instead in _HANDLES:
        classes = tuple(
            each
            for name in names
            if isinstance(each := getattr(sys.modules.get(module), name, None), type)
        )
        if isinstance(value, classes):
            return _Handle(where, kind, _advice(instead), module == _SENDABLE)
    if isinstance(value, tarfile.TarFile):
        return _Handle(where, kind, _advice(_TAR), can_be_sent=False)
    # What is in memory is no file.
    if isinstance(value, _FILES) and not isinstance(value, (io.BytesIO, io.StringIO)):
        return _Handle(where, kind, "keep the path, and open the file where it is read", False)  # noqa: FBT003
    return None


def _advice(instead: str) -> str:
    return (
        f"make chainer_dist.datasets.{instead} in its place, which each process opens by itself; or keep "
        "the path, and open the file where it is read"
    )


def _walk(dataset: Any, *, pickled: bool) -> Iterator[tuple[str, Any]]:
    """Yield what a dataset holds, each with an expression for where it is.

    Args:
        dataset: Any object.
        pickled: Whether to leave out what objects that have a way of their own to be pickled hold.
    """
    pending = [("the dataset", dataset)]
    seen: dict[int, Any] = {}
    while pending and len(seen) < _MOST_OBJECTS:
        where, value = pending.pop()
        if value is None or isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen[id(value)] = value
        yield where, value
        if isinstance(value, StoredDataset) or _handle(where, value) is not None:
            continue
        pending += _held(value, where, pickled=pickled)


@functools.singledispatch
def _held(value: Any, where: str, *, pickled: bool) -> list[tuple[str, Any]]:
    """Return what an object refers to, each with an expression for where it is."""
    if pickled and _pickles_by_itself(type(value)):
        return []
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict):
        return []
    return [(f"{where}.{name}", each) for name, each in attributes.items()]


@_held.register(dict)
def _(value: dict[Any, Any], where: str, *, pickled: bool) -> list[tuple[str, Any]]:
    del pickled
    some = itertools.islice(dict.items(value), _MOST_ELEMENTS)
    return [(f"{where}[{key!r}]", each) for key, each in some]


@_held.register(list)
@_held.register(tuple)
def _(value: Any, where: str, *, pickled: bool) -> list[tuple[str, Any]]:
    del pickled
    # A derived class may have any indexing of its own.
    elements = (list if isinstance(value, list) else tuple).__iter__(value)
    some = itertools.islice(elements, _MOST_ELEMENTS)
    return [(f"{where}[{i}]", each) for i, each in enumerate(some)]


@_held.register(functools.partial)
def _(value: Any, where: str, *, pickled: bool) -> list[tuple[str, Any]]:
    del pickled
    parts = [value.func, *value.args, *value.keywords.values()]
    return [(f"an argument of {where}", each) for each in parts]


@_held.register(MethodType)
def _(value: MethodType, where: str, *, pickled: bool) -> list[tuple[str, Any]]:
    del pickled
    return [(f"{where}.__self__", value.__self__)]


@_held.register(FunctionType)
def _(value: FunctionType, where: str, *, pickled: bool) -> list[tuple[str, Any]]:
    del pickled
    cells = zip(value.__code__.co_freevars, value.__closure__ or ())
    return [(f"{name} in {where}", _content(cell)) for name, cell in cells]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _pickles_by_itself(kind: type) -> bool:
    names = ("__reduce__", "__reduce_ex__", "__getstate__")
    return kind in copyreg.dispatch_table or any(
        getattr(kind, name, None) is not getattr(object, name, None) for name in names
    )
