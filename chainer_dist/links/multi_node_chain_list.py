"""A model whose links are on several ranks, run one after the other or as a pipeline."""

from __future__ import annotations

import operator
import weakref
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

import chainer

from chainer_dist._counts import checked_count
from chainer_dist.functions import gradient_messages
from chainer_dist.functions._node import Ordered, checked_array, come_after, new_delegate
from chainer_dist.functions.point_to_point_communication import (
    receive,
    send_failure,
    send_soon,
)
from chainer_dist.functions.pseudo_connect import connect
from chainer_dist.links._components import (
    Comparison,
    Component,
    Ranks,
    Table,
    find_problem,
    register,
)
from chainer_dist.links._micro_batches import cut, flat, is_variable, joined, mapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from chainer_dist.communicators import CommunicatorBase


class MultiNodeChainList(chainer.ChainList):  # type: ignore[misc]  # Chainer has no types
    """Links that receive their inputs from other ranks and send their outputs to others.

    Each rank of the communicator adds its own links, the components of the model, and says where
    their inputs come from and where their outputs go. All ranks with components call the model, which
    runs them in the order in which they were added. Backward runs through them in the reverse order,
    on every rank: from the output of the model where it has one, otherwise from the empty variable
    that the call returns. Gradients equal the ones of the whole model in one process. ::

        class FirstHalf(MultiNodeChainList):          # on rank 0
            def __init__(self, comm):
                super().__init__(comm)
                self.add_link(L.Linear(784, 1000), rank_out=1)

        class SecondHalf(MultiNodeChainList):         # on rank 1
            def __init__(self, comm):
                super().__init__(comm)
                self.add_link(L.Linear(1000, 10), rank_in=0)

        model = (FirstHalf if comm.rank == 0 else SecondHalf)(comm)
        y = model(x)                                  # rank 0 passes x, rank 1 anything
        loss = F.softmax_cross_entropy(y, t) if comm.rank == 1 else y
        loss.backward()

    At the first call, and at the first after links were added (between the same calls on all of them),
    the ranks whose components are connected, directly or by other ranks' components, compare these
    connections. If not every output has its input, or if components wait for one another in a circle, each of
    these ranks raises an error that names the rank and the component, and so it does in later calls.
    There is one exception: a rank cannot know of one that it does not name, and that names it. It
    raises in its first call that begins after the other one has called the model, and the calls before
    are right as far as its own components go; the other one waits for that call, and raises then.
    A rank that waits for one that never calls the model is shown by the watchdog (see :doc:`/howto/hang`).
    A component that fails makes the ranks that wait for it raise as well.

    Ranks without components need not call the model, unless they get some later; where they do, it
    returns at once. Where a rank has components of several models of one communicator, it makes them
    all before the first call, so that the number of a model means the same one on every rank.

    With ``n_micro_batches`` the ranks work at the same time (the schedule is that of GPipe, Huang
    et al., arXiv 1811.06965). The batch is cut along the first axis, as evenly as possible, and
    each component takes the pieces one after the other, so that the next one can begin with the
    first piece. The outputs of the model are put together again along the first axis, so the
    caller computes the loss, mean or sum, as of the whole batch, and the gradients are the same.
    What a link computes over its batch it computes over a piece: batch normalization normalizes
    each with its own statistics and updates the running ones once for each. Components get
    variables. Inputs are arrays, variables, or lists (of sequences, for example), of one length on
    all connected ranks that have a component with ``rank_in`` None. A batch with fewer samples is cut
    into as many pieces as it has. These ranks then compare in every call, not only in the first.

    The same as ChainerMN's ``MultiNodeChainList``, which has no micro-batches and checks nothing.

    Args:
        comm: Communicator.
        n_micro_batches: Number of pieces into which the batch is cut, the same on every rank.

    Raises:
        ValueError: If ``n_micro_batches`` is not at least 1.
    """

    def __init__(self, comm: CommunicatorBase, *, n_micro_batches: int = 1) -> None:
        super().__init__()
        self._n_micro_batches = checked_count("n_micro_batches", n_micro_batches, 1)
        self._comm = comm
        self._components: tuple[Component, ...] = ()
        own = weakref.ref(self)
        self._number = register(comm, lambda: None if (it := own()) is None else it._table())  # noqa: SLF001 - of the same class
        self._n_calls = 0
        self._comparison: Comparison | None = None  # None if components are to be compared

    def add_link(
        self,
        link: Any,
        rank_in: int | Sequence[int] | None = None,
        rank_out: int | Sequence[int] | None = None,
    ) -> None:
        """Add a component of this rank. Local.

        Args:
            link: A :class:`chainer.Link`. It is called with one argument for each rank in
                ``rank_in``, a variable or, where several were sent, a tuple of them; or with the
                model's inputs. It returns a variable or a tuple of them.
            rank_in: Rank or ranks that the inputs come from, in this order; may be this rank
                itself. None for the inputs that the model is called with.
            rank_out: Rank or ranks that all get the outputs; may be this rank itself. None for
                the outputs that the call returns, on one component of a rank at most.

        Raises:
            ValueError: If a rank does not exist, a list is empty, or there is an output already.
            TypeError: If a rank is no integer.
        """
        component = Component(
            _ranks(self._comm, rank_in, "rank_in"), _ranks(self._comm, rank_out, "rank_out")
        )
        if component.rank_out is None and any(c.rank_out is None for c in self._components):
            raise ValueError("rank_out is None, but another component of this rank has the output")
        super().add_link(link)
        self._components = (*self._components, component)
        self._comparison = None

    def forward(self, *inputs: Any) -> Any:
        """Run this rank's components. All ranks that have components call the model together.

        Args:
            inputs: Arguments of components with ``rank_in`` None; elsewhere ignored.

        Returns:
            What the component with ``rank_out`` None returned. On a rank without such a component
            an empty float32 variable of shape ``(0,)``, from which backward has to be run.

        Raises:
            ValueError: On every connected rank, if components do not fit together, or if inputs cannot
                be cut into micro-batches.
            RankMismatchError: On every connected rank, if ``n_micro_batches`` or the lengths of batches
                differ.
            Exception: The error of a component here, or on a rank that this one waits for.
        """
        tables, failure = self._compare()
        takes_inputs = any(component.rank_in is None for component in self._components)
        pieces = [inputs]
        if self._n_micro_batches > 1 and self._components:
            pieces = cut(
                self._comm, sorted(tables), inputs if takes_inputs else None, self._n_micro_batches
            )
        # What was sent in earlier calls has a receiver. Nothing waits between here and the end but
        # for messages that come, so that no two ranks can wait for each other.
        gradient_messages.make_room()
        call = _Call(self._comm, self._components, len(pieces), failure)
        return call.run(self.children(), pieces)

    def _table(self) -> Table:
        return Table(self._n_micro_batches, self._components)

    def _compare(self) -> tuple[Mapping[int, Table], Exception | None]:
        """Return the tables of connected ranks, and what is wrong with the tables of others.

        Raises:
            Exception: On every connected rank, if the tables do not fit together. None of them waits for
                another one then.
        """
        self._n_calls += 1
        if self._comparison is None:
            self._comparison = Comparison(self._comm, self._number, self._n_calls, self._table())
        tables, strangers = self._comparison.tables, self._comparison.strangers(self._n_calls)
        if self._comparison.fits:
            return tables, find_problem(tables, strangers) if strangers else None
        problem = find_problem(tables, {})
        assert problem is not None  # noqa: S101 - for the type checker
        raise problem


class _Call:
    """One forward pass of this rank's components.

    Once something has failed, here or on a rank that this one receives from, the rest of the
    schedule is still gone through: messages are received, and ranks that wait for an output or a
    gradient of this rank are sent the error. So all ranks end the call, and can make another.
    """

    def __init__(
        self,
        comm: CommunicatorBase,
        components: tuple[Component, ...],
        n_pieces: int,
        failure: Exception | None,
    ) -> None:
        self._comm = comm
        self._components = components
        self._n_pieces = n_pieces
        self._failure: BaseException | None = failure
        self._refusals: list[Callable[[BaseException], None]] = []
        self._delegates: list[Any] = []
        self._own: dict[int, deque[Any]] = {}  # outputs for this rank itself
        self._outputs: list[Any] = []

    def run(self, links: Iterable[Any], pieces: Sequence[tuple[Any, ...]]) -> Any:
        """Run the components with the pieces of the inputs, and return the output."""
        tags_in: Counter[int] = Counter()
        tags_out: Counter[int] = Counter()
        for link, component in zip(links, self._components):
            sources = _tagged(component.rank_in or (), tags_in)
            targets = _tagged(component.rank_out or (), tags_out)
            for piece in pieces:
                xs = piece if component.rank_in is None else self._receive(sources)
                ys = self._attempt(self._compute, link, xs, component)
                if component.rank_out is None:
                    self._outputs.append(ys)
                self._send(ys, targets)
        output = self._attempt(self._output)
        if self._failure is not None:
            for refuse in self._refusals:
                refuse(self._failure)
            raise self._failure
        return output

    def _attempt(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function unless something has failed; take note if it fails."""
        if self._failure is None:
            try:
                return function(*args)
            except BaseException as error:  # noqa: BLE001 - links may raise anything
                self._failure = error
        return None

    def _receive(self, sources: Sequence[tuple[int, int]]) -> tuple[Any, ...]:
        xs = []
        for source, tag in sources:
            if source == self._comm.rank:
                xs.append(self._own[tag].popleft())
                continue
            try:
                (*ys, delegate), refuse = receive(self._comm, source, tag)
            except BaseException as error:  # noqa: BLE001 - what failed there may be anything
                self._failure = self._failure or error
                continue
            self._delegates.append(delegate)
            self._refusals.append(refuse)
            xs.append(tuple(ys) if len(ys) > 1 else ys[0])
        return tuple(xs)

    def _compute(self, link: Any, xs: tuple[Any, ...], component: Component) -> Any:
        if self._n_pieces > 1:
            xs = mapped(lambda x: Ordered().apply((x,))[0] if is_variable(x) else x, xs)
        ys = link(*xs)
        if component.rank_out is not None:
            for y in ys if isinstance(ys, (tuple, list)) else [ys]:
                checked_array(y, f"rank_out={component.rank_out}")
        if not any(map(is_variable, flat(ys))):
            raise TypeError(f"{type(link).__name__} returned {ys!r}, expected variables")
        come_after(flat(ys))
        return ys

    def _send(self, ys: Any, targets: Sequence[tuple[int, int]]) -> None:
        for target, tag in targets:
            if target == self._comm.rank:
                self._own.setdefault(tag, deque()).append(ys)
            elif self._failure is None:
                self._delegates.append(send_soon(ys, self._comm, target, tag))
            else:
                send_failure(self._failure, self._comm, target, tag)

    def _output(self) -> Any:
        """Return the output, from which backward gets to everything that was sent or received."""
        output = joined(self._outputs) if self._outputs else new_delegate()
        if not self._delegates:
            return output
        actual = [y for y in flat(output) if is_variable(y)]
        connected = iter(connect(tuple(self._delegates), tuple(actual)))
        return mapped(lambda y: next(connected) if is_variable(y) else y, output)


def _ranks(comm: CommunicatorBase, ranks: Any, name: str) -> Ranks:
    """Return a tuple of ranks, or None."""
    if ranks is None:
        return None
    listed = tuple(map(operator.index, ranks if isinstance(ranks, (tuple, list)) else [ranks]))
    if not listed:
        raise ValueError(f"{name} is empty, expected None or at least one rank")
    for rank in listed:
        if not 0 <= rank < comm.size:
            raise ValueError(f"{name} has {rank}, expected ranks from 0 to {comm.size - 1}")
    return listed


def _tagged(ranks: Iterable[int], used: Counter[int]) -> list[tuple[int, int]]:
    """Number the connections between two ranks, the same on both: by the order of components.

    The number is the tag of the connection's messages, so that micro-batches on one connection do
    not meet with those on another.
    """
    tagged = []
    for rank in ranks:
        tagged.append((rank, used[rank]))
        used[rank] += 1
    return tagged
