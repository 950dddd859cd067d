"""A record of the operations that each thread of this rank is in, with communicator and time of begin.

Every collective and every blocking message of a communicator is an :class:`Operation` while it runs,
and so are the stages of an update. The watchdog reads :func:`stacks` from another thread, the timeline is
called at the end of each operation (:data:`observers`), and checked mode compares operations over the ranks
(:attr:`Log.check`). A record costs about a microsecond and a half per operation, and text is made on demand.
"""

from __future__ import annotations

import collections
import functools
import inspect
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from typing_extensions import Self

    Function = TypeVar("Function", bound=Callable[..., Any])

# Categories of the time that operations take.
FORWARD, BACKWARD, PACKING, EXCHANGE, WAITING, UPDATE = CATEGORIES = (
    "forward",
    "backward",
    "packing",
    "exchange",
    "waiting",
    "update",
)


_RECENT = 16  # operations that a log remembers
_LONGEST_TEXT = 60  # most characters of an argument


class Kind(NamedTuple):
    """A kind of operation.

    Attributes:
        name: Name of the kind, such as the name of the method.
        category: Category of its time, one of :data:`CATEGORIES`.
        waits: Whether it may wait for other ranks.
        is_collective: Whether all ranks of the communicator do it in the same order.
        same: Names of the arguments that are the same on every rank.
        signature: Signature of the function, to name its arguments; None if there are no arguments.
    """

    name: str
    category: str
    waits: bool = True
    is_collective: bool = True
    same: tuple[str, ...] = ()
    signature: inspect.Signature | None = None


PACK = Kind("packing", PACKING, waits=False)
UNPACK = Kind("unpacking", PACKING, waits=False)


class Log:
    """The log of a communicator's collectives on this rank.

    :mod:`chainer_dist.watch` sets the last three attributes, so that no thread has to call MPI for them.

    Attributes:
        number: Number of collectives that were begun, without collectives within others. Ranks that have
            come equally far have the same number.
        recent: Numbers and names of the last ones that ended.
        check: Function that is called within each one, before anything is exchanged, or None.
        identity: Text that all ranks of this communicator, and no other communicators, have.
        rank: Number of this rank.
        peers: Addresses of the ranks, with None for a rank that does not listen.
    """

    def __init__(self) -> None:
        self.number = 0
        self.recent: collections.deque[tuple[int, str]] = collections.deque(maxlen=_RECENT)
        self.check: Callable[[Operation], None] | None = None
        self.identity = ""
        self.rank = 0
        self.peers: list[Any] = []


class Logged(Protocol):
    """The part of a communicator that operations use.

    Attributes:
        operation_log: Log of its collectives.
    """

    operation_log: Log


class Observer:
    """A base class; its objects in :data:`observers` are called at the end of every operation of every thread."""

    def left(self, operation: Operation, end: float) -> None:
        """Note the end of an operation, in the thread that did it.

        Args:
            operation: The operation.
            end: Time of its end, by ``time.perf_counter``.
        """


observers: list[Observer] = []

# Functions that all ranks of each new communicator call with it.
creation_hooks: list[Callable[[Any], None]] = []


class _Own(threading.local):
    """The operations that a thread is in, outermost first."""

    def __init__(self) -> None:
        self.stack: list[Operation] = []
        _stacks[threading.get_ident()] = self.stack


_stacks: dict[int, list[Operation]] = {}
_own = _Own()


class Operation:
    """An operation of this thread, for the time of a ``with`` block.

    Args:
        kind: Kind of the operation.
        comm: Communicator of the operation; None for a stage of the computation.
        args: Positional arguments after ``comm``.
        kwargs: Keyword arguments.
        within: Text that :meth:`describe` adds, such as the name of a parameter.

    Attributes:
        number: Number of the collective on its communicator, from 1; 0 for any other operation.
        begun: Time of its begin, by ``time.perf_counter``.
        depth: Number of operations that it is within.
    """

    __slots__ = ("args", "begun", "comm", "depth", "kind", "kwargs", "number", "within")

    def __init__(
        self,
        kind: Kind,
        comm: Logged | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        within: str = "",
    ) -> None:
        self.kind = kind
        self.comm = comm
        self.args = args
        self.kwargs = kwargs
        self.within = within
        self.number = 0

    def __enter__(self) -> Self:
        stack = _own.stack
        comm = self.comm
        self.depth = len(stack)
        check = None
        if comm is not None and self.kind.is_collective:
            for outer in stack:
                if outer.comm is comm:
                    break
            else:
                log = comm.operation_log
                log.number = self.number = log.number + 1
                check = log.check
        self.begun = time.perf_counter()
        stack.append(self)
        if check is not None:
            try:
                check(self)
            except BaseException:
                stack.pop()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _own.stack.pop()
        if self.number and self.comm is not None:
            self.comm.operation_log.recent.append((self.number, self.kind.name))
        if observers:
            end = time.perf_counter()
            for each in observers:
                each.left(self, end)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments by name; none if there is no signature, or it does not match. Local."""
        if self.kind.signature is None:
            return {}
        try:
            bound = self.kind.signature.bind(self.comm, *self.args, **(self.kwargs or {}))
        except TypeError:  # the call itself is about to raise that
            return {}
        bound.apply_defaults()
        return dict(list(bound.arguments.items())[1:])

    def describe(self) -> str:
        """Return a description in words, such as ``allreduce(x=(3, 4) float32, op='max')``. Local.

        It leaves out arguments that have their default, and objects that are no arrays.
        """
        text, signature = self.kind.name, self.kind.signature
        described = {
            name: brief(value)
            for name, value in self.arguments().items()
            if signature is None or value is not signature.parameters[name].default
        }
        arguments = [f"{name}={words}" for name, words in described.items() if words]
        if arguments:
            text += f"({', '.join(arguments)})"
        return f"{text} {self.within}" if self.within else text


def collective(*same: str, name: str = "") -> Callable[[Function], Function]:
    """Make each call of a function a collective operation of its first argument, a communicator.

    Args:
        same: Names of the parameters that are the same on every rank.
        name: Name of the operation, by default the name of the function.
    """
    return functools.partial(_decorated, name=name, is_collective=True, same=same)


def point_to_point(function: Function) -> Function:
    """Make each call of a function an operation of its first argument that one rank does alone."""
    return _decorated(function, name="", is_collective=False, same=())


def stage(category: str) -> Callable[[Function], Function]:
    """Make each call of a function a stage of the computation.

    Args:
        category: Category of its time, which is also its name.
    """
    kind = Kind(category, category, waits=False)

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def operate(*args: Any, **kwargs: Any) -> Any:
            with Operation(kind):
                return function(*args, **kwargs)

        return cast("Function", operate)

    return decorate


def _decorated(
    function: Function, *, name: str, is_collective: bool, same: tuple[str, ...]
) -> Function:
    signature = inspect.signature(function)
    kind = Kind(
        name or function.__name__,
        EXCHANGE,
        is_collective=is_collective,
        same=same,
        signature=signature,
    )

    @functools.wraps(function)
    def operate(comm: Logged, *args: Any, **kwargs: Any) -> Any:
        with Operation(kind, comm, args, kwargs):
            return function(comm, *args, **kwargs)

    return cast("Function", operate)


def innermost() -> Operation | None:
    """Return the innermost operation that this thread is in. Local."""
    stack = _own.stack
    return stack[-1] if stack else None


def outermost(comm: Logged) -> Operation:
    """Return the outermost operation on a communicator that this thread is in; there is one. Local."""
    return next(each for each in _own.stack if each.comm is comm)


def stacks() -> dict[int, list[Operation]]:
    """Return for each thread that is in operations a list of these, outermost first. Local."""
    return {thread: list(stack) for thread, stack in list(_stacks.items()) if stack}


def brief(value: Any) -> str:
    """Return a short description of an argument, or an empty string for an object without one. Local.

    An array has its shape and dtype, a tuple or list its length, a number or string its value.
    """
    if isinstance(value, (np.ndarray, np.generic)):
        return f"{value.shape} {value.dtype}"
    if isinstance(value, (tuple, list)):
        arrays = all(isinstance(each, np.ndarray) for each in value)
        return f"{len(value)} {'arrays' if arrays else 'objects'}"
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
        return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."
    return ""
