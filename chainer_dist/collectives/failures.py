"""Errors of one rank, raised on all of them.

A rank that raises alone leaves its peers waiting in the next collective. An operation avoids that
with :func:`together` and :func:`raise_together`, and with the functions of
:mod:`chainer_dist.collectives.agreement`: all are collective, and raise an error on every rank.

That includes ``SystemExit``, since code of users may call ``sys.exit``, and ``KeyboardInterrupt``. The rank on
which one of these two was raised ends as it would in a job of one rank.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from chainer_dist.collectives.extremes import extremes
from chainer_dist.collectives.operation import WAITING, Kind, Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from contextlib import AbstractContextManager
    from types import TracebackType

    from chainer_dist.collectives.group import Group


class ErrorClass(NamedTuple):
    """The class of an error, in a form that every rank can receive.

    Attributes:
        name: Name of the class.
        pickles: Pickles of the class and of its base classes, nearest first. Empty bytes stand for a class
            that cannot be pickled; any other may be unknown to another rank.
    """

    name: str
    pickles: list[bytes]


# An error as other ranks receive it: class and text.
Failure = Optional[tuple[ErrorClass, str]]

# Often the first operation of a step, so the ranks wait for the slowest one in it.
AGREE = Kind("agreement", WAITING)
_ERRORS = Kind("comparison of errors", WAITING)

# Classes that do not say what went wrong.
_GENERAL = (Exception, BaseException, object)


def raise_together(comm: Group, error: BaseException | None) -> None:
    """Raise on every rank if any rank has an error. Collective: one small allreduce if none has.

    Args:
        comm: The communicator whose ranks compare.
        error: The error of this rank, or None.

    Raises:
        BaseException: The error that :func:`raise_first` raises, given the errors of all ranks.
    """
    if comm.size == 1:
        if error is not None:
            raise error
        return
    (has_failed,), _ = extremes(comm, _ERRORS, int(error is not None))
    if not has_failed:
        return
    with Operation(_ERRORS, comm):
        failures = comm.mpi_comm.allgather(describe_error(error))
    raise_first(dict(enumerate(failures)), error)


def together(comm: Group) -> AbstractContextManager[None]:
    """Return a context that raises an error of any rank on every rank. Collective at its end.

    Every rank enters it, and no code in it waits for ranks that may have left it::

        with together(comm):
            lines = describe(what_the_user_gave)

    Args:
        comm: The communicator whose ranks do this together.

    Raises:
        BaseException: The error that :func:`raise_first` raises; on a single rank the error itself.
    """
    return _Together(comm)


class _Together:
    # A generator in contextlib.contextmanager could not raise StopIteration.
    def __init__(self, comm: Group) -> None:
        self._comm = comm

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._comm.size > 1:
            raise_together(self._comm, error)


def describe_error(error: BaseException | None) -> Failure:
    """Return an error in a form that other ranks can receive, or None. Local."""
    if error is None:
        return None
    kind = type(error)
    text = in_words(error, str) or in_words(error, repr)
    if isinstance(error, SystemExit) and not isinstance(error.code, str):
        text = f"exit with status {error.code or 0}"
    return ErrorClass(kind.__name__, [_pickled(each) for each in _lineage(kind)]), text


def raise_first(failures: Mapping[int, Failure], error: BaseException | None) -> None:
    """Raise the error of the lowest rank that failed, if any did. Local.

    The error has the same class if that can be unpickled here and takes a message. Otherwise it has the
    nearest such base class, with RuntimeError in the place of Exception, and its text begins with the
    name of the class. A rank whose own error is no Exception, such as SystemExit, raises its own one.

    Args:
        failures: Result of :func:`describe_error` on each rank.
        error: The error of this rank, or None; it becomes the cause.
    """
    if error is not None and not isinstance(error, Exception):
        raise error
    for rank, failure in failures.items():
        if failure is not None:
            (name, pickles), text = failure
            raise _rebuilt(name, map(_unpickled, pickles), text, f"rank {rank}: ") from error


def rebuild_error(kind: type[BaseException], text: str) -> BaseException:
    """Return an error with message ``text``, of the class that :func:`raise_first` would choose. Local."""
    return _rebuilt(kind.__name__, _lineage(kind), text, "")


def _rebuilt(name: str, kinds: Iterable[Any], text: str, where: str) -> BaseException:
    message = where + text
    for kind in kinds:
        try:
            error = kind(message)
            said = str(error)
            if isinstance(error, BaseException) and (message in said or repr(message) in said):
                return error
        except Exception:  # noqa: BLE001, S110 - a class may want any arguments, or refuse in any way
            pass
        message = f"{where}{name}: {text}"
    return RuntimeError(f"{where}{name}: {text}")


def _lineage(kind: type[BaseException]) -> list[type]:
    """Return a class and its base classes, without the most general ones."""
    return [kind, *(each for each in kind.__mro__[1:] if each not in _GENERAL)]


def _pickled(kind: type) -> bytes:
    try:
        return pickle.dumps(kind)
    except Exception:  # noqa: BLE001 - a class may be defined in a function, for instance
        return b""


def _unpickled(data: bytes) -> Any:
    try:
        return pickle.loads(data)
    except Exception:  # noqa: BLE001 - its module may be missing here, or raise anything
        return None


def in_words(value: object, way: Callable[[object], str]) -> str:
    """Return an object as text, by ``str`` or ``repr``, or a note that this raises an error. Local."""
    try:
        return str.__str__(way(value))  # a derived class of str might not be picklable
    except Exception as error:  # noqa: BLE001 - methods of users may raise anything
        return f"(no text: its __{way.__name__}__ raises {type(error).__name__})"
