"""A group of ranks: their numbers and nodes, its configuration, and how it is finalized."""

from __future__ import annotations

import array
import contextlib
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from chainer_dist.collectives import operation
from chainer_dist.errors import FinalizedCommunicatorError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from mpi4py import MPI
    from typing_extensions import Self

Made = TypeVar("Made")

_FINALIZE = operation.Kind("finalize", operation.EXCHANGE)

# How many numbers ranks may compare at a time. A comparison of fewer numbers takes as many, so that ranks that have come
# to different ones understand one another.
ROOM = 16


class Group:
    """Ranks, nodes, configuration and lifetime of a communicator.

    Creating one is collective over ``mpi_comm``, which is duplicated: messages of this
    communicator never meet messages of user code, and errors are raised rather than fatal.

    More than fifteen methods: nearly all are properties that ChainerMN's communicators have, and special methods.

    Args:
        mpi_comm: mpi4py intracommunicator.
    """

    name: ClassVar[str] = "group"
    _own_settings: ClassVar[frozenset[str]] = frozenset({"batched_copy"})

    def __init__(self, mpi_comm: MPI.Intracomm) -> None:
        self._adopt(mpi_comm.Dup())

    def _adopt(self, mpi_comm: MPI.Intracomm) -> None:
        """Take over a communicator that has no other user, and find its nodes. Collective."""
        from mpi4py import MPI
        from mpi4py.util import pkl5

        self._configs: dict[str, Any] = {"batched_copy": True}
        self._within_config_scope = False
        self.operation_log = operation.Log()
        self._derived: dict[str, tuple[Any, Callable[[Any], object]]] = {}
        self._mpi_comm: MPI.Intracomm | None = mpi_comm
        mpi_comm.Set_errhandler(MPI.ERRORS_RETURN)
        # Host names mislead in containers; a node is the ranks that can share memory.
        self._node_comm = cast(
            "MPI.Intracomm", mpi_comm.Split_type(MPI.COMM_TYPE_SHARED, key=mpi_comm.rank)
        )
        # A node is numbered by its lowest rank, so that node 0 is the one rank 0 is on.
        leader = self._node_comm.bcast(mpi_comm.rank)
        # The first allgather of pkl5 duplicates the communicator. No thread of this process can run while that
        # waits for other ranks, so it is done here, where all ranks come at the same time.
        leaders = sorted(set(pkl5.Intracomm(mpi_comm).allgather(leader)))
        self._inter_rank = leaders.index(leader)
        self._inter_size = len(leaders)
        for hook in operation.creation_hooks:
            hook(self)

    @property
    def mpi_comm(self) -> MPI.Intracomm:
        """The private mpi4py communicator of this group."""
        if self._mpi_comm is None:
            raise FinalizedCommunicatorError(
                f"this {self.name} communicator was finalized; create a new one"
            )
        return self._mpi_comm

    @property
    def is_finalized(self) -> bool:
        """Whether :meth:`finalize` has been called."""
        return self._mpi_comm is None

    @property
    def node_comm(self) -> MPI.Intracomm:
        """The private mpi4py communicator of the ranks on this node, in the order of rank."""
        self.mpi_comm  # noqa: B018 - raises after finalize
        return self._node_comm

    @property
    def rank(self) -> int:
        """This process's number in the group, from 0."""
        return self.mpi_comm.rank

    @property
    def size(self) -> int:
        """Number of ranks of the group."""
        return self.mpi_comm.size

    @property
    def intra_rank(self) -> int:
        """This process's number among the ranks of its node, from 0."""
        return self.node_comm.rank

    @property
    def intra_size(self) -> int:
        """Number of ranks of the group on this node."""
        return self.node_comm.size

    @property
    def inter_rank(self) -> int:
        """This node's number, from 0, in the order of the nodes' lowest ranks."""
        return self._inter_rank

    @property
    def inter_size(self) -> int:
        """Number of nodes that the group spans."""
        return self._inter_size

    def extremes(self, numbers: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """Return the largest and the smallest of each number over the ranks. Collective.

        Code that compares calls ``chainer_dist.collectives.extremes.extremes``, which finds out as well whether ranks
        have come to the same comparison. Here they may pass different counts: numbers that some ranks
        have not passed are arbitrary in the result.

        Args:
            numbers: Integers above ``-2**63``, at most 16.
        """
        from mpi4py import MPI

        count = len(numbers)
        padding = [0] * (ROOM - count)
        values = array.array("q", [*numbers, *padding, *[-each for each in numbers], *padding])
        self.mpi_comm.Allreduce(MPI.IN_PLACE, [values, MPI.INT64_T], MPI.MAX)
        return list(values[:count]), [-each for each in values[ROOM : ROOM + count]]

    @property
    def compares_freely(self) -> bool:
        """Whether :meth:`extremes` sends no message; the same on every rank."""
        return False

    def derived(self, name: str, make: Callable[[], Made], free: Callable[[Made], object]) -> Made:
        """Return an object that belongs to this group, and is made by the first call. Collective at first.

        It is for code that needs another communicator over these ranks. MPI has only some thousand
        communicators, and all ranks must free one together, which garbage collectors do not do. So every
        caller gets the same object, which is freed with this group.

        Args:
            name: Name of the object, the same on every rank.
            make: Function that makes it; all ranks call it, once.
            free: Function that :meth:`finalize` calls with the object on all ranks.
        """
        if name not in self._derived:
            self._derived[name] = make(), free
        made: Made = self._derived[name][0]
        return made

    def set_config(self, name: str, value: Any = True, **kwargs: Any) -> None:
        """Set a configuration value on this rank. Local.

        Args:
            name: ``batched_copy`` (accepted for ChainerMN scripts; packing is always batched), or
                a name that was set before within :meth:`config_scope`.
            value: Any object.
            kwargs: Not used; ChainerMN's parameter.

        Raises:
            ValueError: If the name is not known, or ``kwargs`` are given.
        """
        if name not in self._configs or kwargs:
            unknown = name if name not in self._configs else ", ".join(kwargs)
            raise ValueError(f"unknown config {unknown!r}; known: {', '.join(self._configs)}")
        self._configs[name] = value
        if name not in self._own_settings:
            setattr(self, name, value)

    def get_config(self, name: str | None = None) -> Any:
        """Return a configuration value, or all of them as a dict if no name is given. Local.

        Raises:
            KeyError: If the name is not known.
        """
        return dict(self._configs) if name is None else self._configs[name]

    @property
    def within_config_scope(self) -> bool:
        """Whether attributes that are set now become configuration values."""
        return self._within_config_scope

    @contextlib.contextmanager
    def config_scope(self) -> Iterator[None]:
        """Return a context in which attributes set on the communicator become configuration values. Local."""
        outer = self._within_config_scope
        before = dict(vars(self))
        self._within_config_scope = True
        try:
            yield
        finally:
            self._within_config_scope = outer
            for key, value in vars(self).items():
                if not key.startswith("_") and (key not in before or before[key] is not value):
                    self._configs[key] = value

    def finalize(self) -> None:
        """Give the MPI communicators back. Collective; a second call does nothing."""
        from mpi4py import MPI

        if self._mpi_comm is None:
            return
        if not MPI.Is_finalized():
            with operation.Operation(_FINALIZE, self):
                while self._derived:
                    _, (made, free) = self._derived.popitem()  # the last one first
                    free(made)
                self._node_comm.Free()
                self._mpi_comm.Free()
        self._mpi_comm = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Freeing is collective: a rank that leaves by an exception must not wait for the others.
        if error is None:
            self.finalize()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Copies of an optimizer or an updater go on using the same communicator.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a communicator is a connection between running processes and cannot be pickled; "
            "create one in the process that needs it"
        )

    def __repr__(self) -> str:
        if self.is_finalized:
            return f"<{self.name} communicator, finalized>"
        return (
            f"<{self.name} communicator, rank {self.rank} of {self.size}, "
            f"node {self.inter_rank} of {self.inter_size}>"
        )
