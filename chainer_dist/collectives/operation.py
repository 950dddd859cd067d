"""What each thread of this rank is doing now: which operation, on which communicator, since when.

Every collective and every blocking message of a communicator is an :class:`Operation` while it runs,
and so are the stages of an update. To know it, read :func:`stacks` from another thread (the
watchdog), be called at the end of each (:data:`observers`), or compare them over
the ranks (:attr:`Log.check`). Nothing of that is here: this costs about a microsecond and a half an
operation, and text is made only when it is asked for.
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

# What the time of an operation is spent on.
FORWARD, BACKWARD, PACKING, EXCHANGE, WAITING, UPDATE = CATEGORIES = (
    "forward",
    "backward",
    "packing",
    "exchange",
    "waiting",
    "update",
)


_RECENT = 16  # operations that a log remembers
_LONGEST_TEXT = 60  # characters of an argument


class Kind(NamedTuple):
    """What all operations of one name have in common.

    Attributes:
        name: For instance that of the method.
        category: What its time is spent on, one of :data:`CATEGORIES`.
        waits: Whether it may wait for other ranks.
        is_collective: Whether all ranks of the communicator do it in the same order.
        same: Names of the arguments that are the same on every rank.
        signature: Of the function, to name its arguments; None if there are no arguments.
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
    """What a communicator's collectives have come to.

    Attributes:
        number: How many were begun; one within another does not count. The same on every rank
            that has come as far.
        recent: Numbers and names of the last ones that ended.
        check: Called within each one, before anything is exchanged; None does nothing.
        identity: The same on every rank, other than that of other communicators. This and what
            follows is set by :mod:`chainer_dist.watch`, so that MPI need not be asked for it.
        rank: This rank.
        peers: How to reach each rank, or None for one that does not listen.
    """

    def __init__(self) -> None:
        self.number = 0
        self.recent: collections.deque[tuple[int, str]] = collections.deque(maxlen=_RECENT)
        self.check: Callable[[Operation], None] | None = None
        self.identity = ""
        self.rank = 0
        self.peers: list[Any] = []


class Logged(Protocol):
    """A communicator, as far as operations have to know it.

    Attributes:
        operation_log: What its collectives have come to.
    """

    operation_log: Log


class Observer:
    """A base class; its objects in :data:`observers` are called at the end of every operation of every thread."""

    def left(self, operation: Operation, end: float) -> None:
        """Note the end of an operation, in the thread that did it.

        Args:
            operation: What was done.
            end: When it ended, by ``time.perf_counter``.
        """


observers: list[Observer] = []

# Called with each new communicator, by all of its ranks.
creation_hooks: list[Callable[[Any], None]] = []


class _Own(threading.local):
    """The operations that a thread is in, outermost first."""

    def __init__(self) -> None:
        self.stack: list[Operation] = []
        _stacks[threading.get_ident()] = self.stack


_stacks: dict[int, list[Operation]] = {}
_own = _Own()


class Operation:
    """Something that this thread is doing, for the time of a ``with`` block.

    Args:
        kind: What it is.
        comm: On which communicator; None for a stage of the computation.
        args: Positional arguments after ``comm``.
        kwargs: Keyword arguments.
        within: What text says besides, such as the name of a parameter.

    Attributes:
        number: Which collective of its communicator it is, from 1; 0 for anything else.
        begun: When it began, by ``time.perf_counter``.
        depth: In how many other operations it is.
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
        """Return the arguments by name, as far as they are known. Local."""
        if self.kind.signature is None:
            return {}
        try:
            bound = self.kind.signature.bind(self.comm, *self.args, **(self.kwargs or {}))
        except TypeError:  # the call itself is about to raise that
            return {}
        bound.apply_defaults()
        return dict(list(bound.arguments.items())[1:])

    def describe(self) -> str:
        """Return what is done in words, such as ``allreduce(x=(3, 4) float32, op='max')``. Local.

        Left out are arguments that have their default, and objects that are no arrays.
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
        name: What the operation is called, by default as the function.
    """
    return functools.partial(_decorated, name=name, is_collective=True, same=same)


def point_to_point(function: Function) -> Function:
    """Make each call of a function an operation of its first argument that one rank does alone."""
    return _decorated(function, name="", is_collective=False, same=())


def stage(category: str) -> Callable[[Function], Function]:
    """Make each call of a function a stage of the computation.

    Args:
        category: What its time is spent on, and its name.
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


def stacks() -> dict[int, list[Operation]]:
    """Return by thread the operations that it is in, outermost first, if it is in any. Local."""
    return {thread: list(stack) for thread, stack in list(_stacks.items()) if stack}


def brief(value: Any) -> str:
    """Return an array's shape and dtype, how many there are of several, a number or a string.

    Of anything else an empty string.
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
