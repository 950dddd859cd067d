"""A model whose parts lie on several ranks, run one after the other or as a pipeline."""

from __future__ import annotations

import operator
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import chainer
import chainer.functions as F
import numpy as np

from chainer_dist.communicators.agreement import describe_error, raise_first
from chainer_dist.errors import RankMismatchError
from chainer_dist.functions import _messages
from chainer_dist.functions._node import Ordered, checked_array, come_after, new_delegate
from chainer_dist.functions.point_to_point_communication import (
    receive,
    send_failure,
    send_soon,
)
from chainer_dist.functions.pseudo_connect import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from chainer_dist.communicators import CommunicatorBase

# Ranks that a component receives from or sends to; None for the model's input or output.
Ranks = Optional[tuple[int, ...]]


class _Component(NamedTuple):
    """One link of a rank, and the ranks that it is connected to."""

    rank_in: Ranks
    rank_out: Ranks


class MultiNodeChainList(chainer.ChainList):  # type: ignore[misc]  # Chainer has no types
    """Links that receive their inputs from other ranks and send their outputs to others.

    Each rank of the communicator adds its own links, the components of the model, and says where
    their inputs come from and where their outputs go. All ranks call the model, which runs their
    components in the order in which they were added. Backward runs through them in the reverse order, on every rank: from the output of the
    model where it has one, otherwise from the empty variable that the call returns. Gradients are
    those of the whole model in one process. ::

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

    At the first call, and at the first after another link was added, the ranks compare what they
    were told. If not every output has its input, or if components wait for one another in a
    circle, every rank raises an error that names the rank and the component. A component that
    fails makes the ranks that wait for it raise as well.

    With ``n_micro_batches`` the ranks work at the same time (the schedule is that of GPipe, Huang
    et al., arXiv 1811.06965). The batch is cut along the first axis, as evenly as possible, and
    each component takes the pieces one after the other, so that the next one can begin with the
    first piece. The outputs of the model are put together again along the first axis, so the
    caller computes the loss, mean or sum, as of the whole batch, and the gradients are the same.
    What a link computes over its batch it computes over a piece: batch normalization normalizes
    each with its own statistics and updates the running ones once for each. Components get
    variables. Inputs are arrays, variables, or lists (of sequences, for example), of one length on
    all ranks that have a component with ``rank_in`` None. A batch with fewer samples is cut into
    as many pieces as it has. Every call is collective then, not only the first.

    The same as ChainerMN's ``MultiNodeChainList``, which has no micro-batches and checks nothing.

    Args:
        comm: Communicator.
        n_micro_batches: Pieces that the batch is cut into, the same on every rank.

    Raises:
        ValueError: If ``n_micro_batches`` is not at least 1.
    """

    def __init__(self, comm: CommunicatorBase, *, n_micro_batches: int = 1) -> None:
        super().__init__()
        if operator.index(n_micro_batches) < 1:
            raise ValueError(f"n_micro_batches is {n_micro_batches}, expected 1 or more")
        self._comm = comm
        self._n_micro_batches = operator.index(n_micro_batches)
        self._components: tuple[_Component, ...] = ()
        self._checked = False

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
        component = _Component(
            _ranks(self._comm, rank_in, "rank_in"), _ranks(self._comm, rank_out, "rank_out")
        )
        if component.rank_out is None and any(c.rank_out is None for c in self._components):
            raise ValueError("rank_out is None, but another component of this rank has the output")
        super().add_link(link)
        self._components = (*self._components, component)
        self._checked = False

    def forward(self, *inputs: Any) -> Any:
        """Run this rank's components. All ranks call the model together.

        Args:
            inputs: What components with ``rank_in`` None are called with; elsewhere ignored.

        Returns:
            What the component with ``rank_out`` None returned. On a rank without such a component
            an empty float32 variable of shape ``(0,)``, from which backward has to be run.

        Raises:
            ValueError: On every rank, if components do not fit together, or if inputs cannot be
                cut into micro-batches.
            RankMismatchError: On every rank, if ``n_micro_batches`` differs.
            Exception: What a component raised here, or on a rank that this one waits for.
        """
        if not self._checked:
            _check(self._comm, self._components, self._n_micro_batches)
            self._checked = True
        takes_inputs = any(component.rank_in is None for component in self._components)
        pieces = [inputs]
        if self._n_micro_batches > 1:
            pieces = _cut(self._comm, inputs if takes_inputs else None, self._n_micro_batches)
        # What was sent in earlier calls has a receiver. Nothing waits between here and the end but
        # for messages that come, so that no two ranks can wait for each other.
        _messages.make_room()
        return _Call(self._comm, self._components, len(pieces)).run(self.children(), pieces)


class _Call:
    """One forward pass of this rank's components.

    Once something has failed, here or on a rank that this one receives from, the rest of the
    schedule is still gone through: what comes is received, and whoever waits for an output or a
    gradient of this rank is told. So all ranks end the call, and can make another.
    """

    def __init__(
        self, comm: CommunicatorBase, components: tuple[_Component, ...], n_pieces: int
    ) -> None:
        self._comm = comm
        self._components = components
        self._n_pieces = n_pieces
        self._failure: Exception | None = None
        self._refusals: list[Callable[[Exception], None]] = []
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
            except Exception as error:  # noqa: BLE001 - links may raise anything
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
            except Exception as error:  # noqa: BLE001 - what failed there may be anything
                self._failure = self._failure or error
                continue
            self._delegates.append(delegate)
            self._refusals.append(refuse)
            xs.append(tuple(ys) if len(ys) > 1 else ys[0])
        return tuple(xs)

    def _compute(self, link: Any, xs: tuple[Any, ...], component: _Component) -> Any:
        if self._n_pieces > 1:
            xs = _mapped(lambda x: Ordered().apply((x,))[0] if _is_variable(x) else x, xs)
        ys = link(*xs)
        if component.rank_out is not None:
            for y in ys if isinstance(ys, (tuple, list)) else [ys]:
                checked_array(y, f"rank_out={component.rank_out}")
        if not any(map(_is_variable, _flat(ys))):
            raise TypeError(f"{type(link).__name__} returned {ys!r}, expected variables")
        come_after(_flat(ys))
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
        output = _joined(self._outputs) if self._outputs else new_delegate()
        if not self._delegates:
            return output
        actual = [y for y in _flat(output) if _is_variable(y)]
        connected = iter(connect(tuple(self._delegates), tuple(actual)))
        return _mapped(lambda y: next(connected) if _is_variable(y) else y, output)


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


def _check(comm: CommunicatorBase, components: tuple[_Component, ...], n_pieces: int) -> None:
    """Raise on every rank if the ranks' components do not fit together. Collective."""
    everyone = comm.allgather_obj((n_pieces, components))
    for rank, (n, _) in enumerate(everyone):
        if n != everyone[0][0]:
            raise RankMismatchError(
                f"rank {rank}: n_micro_batches is {n}, expected {everyone[0][0]} as on rank 0"
            )
    parts = [each for _, each in everyone]
    problem = _unmatched(parts) or _circle(parts)
    if problem is not None:
        raise ValueError(problem)


def _unmatched(parts: Sequence[Sequence[_Component]]) -> str | None:
    """Say which component sends what nobody receives, or the other way round."""
    senders: dict[tuple[int, int], list[int]] = {}
    receivers: dict[tuple[int, int], list[int]] = {}
    for rank, components in enumerate(parts):
        for i, component in enumerate(components):
            for target in component.rank_out or ():
                senders.setdefault((rank, target), []).append(i)
            for source in component.rank_in or ():
                receivers.setdefault((source, rank), []).append(i)
    for source, target in sorted({*senders, *receivers}):
        sending = senders.get((source, target), [])
        receiving = receivers.get((source, target), [])
        if len(sending) > len(receiving):
            return (
                f"rank {source}: component {sending[len(receiving)]} sends to rank {target}, where "
                f"{_count(receiving)} with rank_in={source}, for {_count(sending)} here that send"
            )
        if len(sending) < len(receiving):
            return (
                f"rank {target}: component {receiving[len(sending)]} receives from rank {source}, "
                f"where {_count(sending)} with rank_out={target}, for {_count(receiving)} here "
                "that receive"
            )
    return None


def _count(components: Sequence[int]) -> str:
    n = len(components)
    return f"there {'is' if n == 1 else 'are'} {n or 'no'} component{'s' * (n != 1)}"


def _circle(parts: Sequence[Sequence[_Component]]) -> str | None:
    """Go through the schedule of all ranks; say who waits for whom if it does not end."""
    sent: Counter[tuple[int, int]] = Counter()
    done = [0] * len(parts)

    def waits_for(rank: int) -> int | None:
        needed: Counter[int] = Counter()
        for source in parts[rank][done[rank]].rank_in or ():
            needed[source] += 1
            if sent[source, rank] < needed[source]:
                return source
        return None

    waiting: dict[int, int] = {}
    moved = True
    while moved:
        moved = False
        waiting.clear()
        for rank, components in enumerate(parts):
            while done[rank] < len(components):
                source = waits_for(rank)
                if source is not None:
                    waiting[rank] = source
                    break
                component = components[done[rank]]
                sent.subtract((source, rank) for source in component.rank_in or ())
                sent.update((rank, target) for target in component.rank_out or ())
                done[rank] += 1
                moved = True
    if not waiting:
        return None
    circle = [min(waiting)]
    while waiting[circle[-1]] not in circle:
        circle.append(waiting[circle[-1]])
    circle = circle[circle.index(waiting[circle[-1]]) :]
    return "components wait for one another: " + ", ".join(
        f"rank {rank}: component {done[rank]} waits for rank {waiting[rank]}" for rank in circle
    )


def _cut(comm: CommunicatorBase, inputs: Any, n_pieces: int) -> list[tuple[Any, ...]]:
    """Cut the inputs into pieces, as many on every rank. Collective.

    Args:
        comm: Communicator.
        inputs: Tuple of inputs, None on ranks that take none.
        n_pieces: Pieces to make, if there are as many samples.
    """
    error, length = None, None
    try:
        if inputs is not None:
            length = _common_length(inputs)
    except (TypeError, ValueError) as caught:
        error = caught
    everyone = comm.allgather_obj((length, describe_error(error)))
    raise_first({rank: failure for rank, (_, failure) in enumerate(everyone)}, error)
    lengths = {rank: n for rank, (n, _) in enumerate(everyone) if n is not None}
    first = min(lengths)
    for rank, n in lengths.items():
        if n != lengths[first]:
            raise RankMismatchError(
                f"rank {rank}: the batch has {n} samples, expected {lengths[first]} as on "
                f"rank {first}"
            )
    n_pieces = max(1, min(n_pieces, lengths[first]))
    if length is None:
        return [()] * n_pieces
    bounds = [length * i // n_pieces for i in range(n_pieces + 1)]
    return list(zip(*(_slices(x, bounds) for x in inputs)))


def _common_length(inputs: tuple[Any, ...]) -> int:
    """Return the number of samples in the inputs."""
    lengths = []
    for x in inputs:
        if not (isinstance(x, list) or (_is_variable(x) and x.ndim > 0)):
            raise TypeError(
                f"an input is {type(x).__name__}, expected an array, a variable or a list, to be "
                "cut into micro-batches"
            )
        lengths.append(len(x))
    if len(set(lengths)) != 1:
        raise ValueError(
            f"inputs have lengths {lengths}, expected one length, to be cut into micro-batches"
        )
    return lengths[0]


def _slices(x: Any, bounds: Sequence[int]) -> Sequence[Any]:
    if isinstance(x, chainer.Variable):
        pieces: Sequence[Any] = F.split_axis(x, bounds[1:-1], axis=0, force_tuple=True)
        return pieces
    return [x[begin:end] for begin, end in zip(bounds, bounds[1:])]


def _joined(pieces: Sequence[Any]) -> Any:
    """Put the outputs of all pieces of the batch together."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if isinstance(first, tuple):
        return tuple(map(_joined, zip(*pieces)))
    if isinstance(first, list):
        return [y for piece in pieces for y in piece]
    if not _is_variable(first):
        raise TypeError(f"an output is {first!r}, expected variables, to be put together")
    if first.ndim == 0:
        raise ValueError(
            "an output is 0-dimensional (a loss?), and cannot be put together from micro-batches: "
            "return one value for each sample, and compute the loss from what the model returns"
        )
    return F.concat(pieces, axis=0)


def _is_variable(x: Any) -> bool:
    return isinstance(x, (chainer.Variable, np.ndarray))


def _flat(xs: Any) -> list[Any]:
    """Return the elements of a tuple or list, or the one thing that ``xs`` is."""
    return [y for x in xs for y in _flat(x)] if isinstance(xs, (tuple, list)) else [xs]


def _mapped(function: Callable[[Any], Any], xs: Any) -> Any:
    """Return a tuple or list, as ``xs`` is one, of the function's results, or its one result."""
    if not isinstance(xs, (tuple, list)):
        return function(xs)
    results = [_mapped(function, x) for x in xs]
    return tuple(results) if isinstance(xs, tuple) else results
