"""Messages between two ranks that gradients flow back through."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import chainer
import numpy as np

from chainer_dist.functions import gradient_messages
from chainer_dist.functions._node import (
    CommunicationNode,
    checked_array,
    is_float,
    new_delegate,
    zeros,
)

if TYPE_CHECKING:
    from chainer_dist.communicators import CommunicatorBase

# Receptions whose gradients are to be sent back, as long as the graph lives. If something fails,
# their senders are sent the error.
_unanswered: weakref.WeakSet[_Recv] = weakref.WeakSet()


class _Send(CommunicationNode):
    """Sends all inputs but the last, a delegate; returns a delegate."""

    def __init__(
        self,
        comm: CommunicatorBase,
        peer_rank: int,
        peer_tag: int,
        *,
        as_tuple: bool | None = None,
    ) -> None:
        self._comm, self._peer, self._tag, self._as_tuple = comm, peer_rank, peer_tag, as_tuple
        self._number: int | None = None

    def __call__(self, *inputs: Any) -> Any:
        """Send all inputs but the last, a delegate, as an object of ChainerMN's class would.

        Returns:
            A delegate.
        """
        gradient_messages.check_peer(self._comm, self._peer, self._tag)
        gradient_messages.make_room()
        (delegate,) = self.apply(inputs)
        return delegate

    @property
    def label(self) -> str:
        """What pictures of the graph say."""
        return f"send to rank {self._peer}"

    def forward(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Send the arrays."""
        xs = inputs[:-1]
        if chainer.config.enable_backprop and any(is_float(x.dtype) for x in xs):
            self._number = gradient_messages.new_number()
        as_tuple = len(xs) > 1 if self._as_tuple is None else self._as_tuple
        data = xs if as_tuple else xs[0]
        gradient_messages.post(self._comm, lambda: data, self._peer, self._tag, self._number)
        return (np.empty(0, dtype=np.float32),)

    def backward(self, indexes: tuple[int, ...], _: tuple[Any, ...]) -> tuple[Any, ...]:
        """Receive their gradients."""
        received: tuple[Any, ...] = ()
        if self._number is not None:
            try:
                gradients = gradient_messages.take_gradient(self._comm, self._peer, self._number)
            except BaseException as error:
                refuse_gradients(self._comm, error)
                raise
            received = _Gradients(gradients).apply((new_delegate(),))
        floats = [i for i, x in enumerate(self.inputs[:-1]) if is_float(x.dtype)]
        found = dict(zip(floats, received))
        found[len(self.inputs) - 1] = zeros((0,), np.float32)
        return tuple(found.get(i) for i in indexes)


class _Gradients(chainer.FunctionNode):  # type: ignore[misc]  # Chainer has no types
    """Gradients from another rank; the graph behind them is there, so it ends here."""

    def __init__(self, gradients: list[Any]) -> None:
        self._gradients = tuple(gradients)

    def forward(self, _: tuple[Any, ...]) -> tuple[Any, ...]:
        gradients, self._gradients = self._gradients, ()
        return gradients

    def backward(self, *_: Any) -> tuple[Any, ...]:
        raise RuntimeError(
            "gradients that came through chainer_dist.functions.send cannot be differentiated "
            "again; the collectives (bcast, gather, scatter, ...) can"
        )


class _Recv(CommunicationNode):
    """Returns what it receives, and a delegate; its one input is a delegate."""

    def __init__(self, comm: CommunicatorBase, peer_rank: int, peer_tag: int) -> None:
        self.comm, self._peer, self._tag = comm, peer_rank, peer_tag
        self._number: int | None = None
        self._outputs: list[tuple[tuple[int, ...], Any]] = []
        self.as_tuple = False

    def __call__(self, *inputs: Any) -> Any:
        """Receive as an object of ChainerMN's class would; backward goes on to an input.

        Returns:
            A variable, or a tuple of them if several were sent.
        """
        gradient_messages.check_peer(self.comm, self._peer, self._tag)
        *ys, _ = self.apply(inputs or (new_delegate(),))
        return tuple(ys) if len(ys) > 1 else ys[0]

    @property
    def label(self) -> str:
        """What pictures of the graph say."""
        return f"recv from rank {self._peer}"

    def forward(self, _: tuple[Any, ...]) -> tuple[Any, ...]:
        """Receive arrays."""
        received, self._number = gradient_messages.take(self.comm, self._peer, self._tag)
        self.as_tuple = isinstance(received, tuple)
        ys = received if self.as_tuple else (received,)
        self._outputs = [(y.shape, y.dtype) for y in ys]
        if chainer.config.enable_backprop:
            _unanswered.add(self)
        else:
            where = f"backprop mode is off on rank {self.comm.rank} where this is received"
            self.refuse(RuntimeError(f"there is no gradient of what was sent: {where}"))
        return (*ys, np.empty(0, dtype=np.float32))

    def backward(self, _: tuple[int, ...], grads: tuple[Any, ...]) -> tuple[Any, ...]:
        """Send their gradients."""
        if self._number is not None:
            arrays = [
                np.zeros(shape, dtype) if grad is None else grad.array
                for grad, (shape, dtype) in zip(grads, self._outputs)
                if is_float(dtype)
            ]
            gradient_messages.post_gradient(self.comm, arrays, self._peer, self._number)
        _unanswered.discard(self)
        return (zeros(self.inputs[0].shape, self.inputs[0].dtype),)

    def refuse(self, error: BaseException) -> None:
        """Send the error to the sender in the place of a gradient."""
        _unanswered.discard(self)
        if self._number is not None:
            gradient_messages.post_gradient(self.comm, (), self._peer, self._number, error)
            self._number = None


def send(x: Any, communicator: CommunicatorBase, rank: int, tag: int = 0) -> Any:
    """Send variables to another rank, and receive their gradients from it in backward.

    Does not wait for the receiver: a copy travels while this rank goes on. Only when more than
    1 GiB of earlier messages has not been received does it wait for them. A rank that ends waits
    up to a minute for its messages to be received.

    Every rank has to run backward, in which the receiver sends the gradient: from the variable
    that this function returns, which :func:`pseudo_connect` can connect to a loss. Where no
    gradient is wanted, send within :func:`chainer.no_backprop_mode`, or the gradients pile up.
    Integers have no gradient and none is sent. Gradients may come in another order than that of
    the messages; each finds its own. They cannot be differentiated again (double backprop).

    For example, for a model whose first half is on rank 0 and whose second half is on rank 1::

        if comm.rank == 0:
            delegate = chainer_dist.functions.send(first(x), comm, rank=1)
            delegate.backward()
        elif comm.rank == 1:
            y = second(chainer_dist.functions.recv(comm, rank=0))
            F.sum(y).backward()

    Args:
        x: Variable or array, or a tuple or list of them, of any shape and dtype.
        communicator: Communicator.
        rank: Receiving rank, which must call :func:`recv`, or ``communicator.recv`` where no
            gradient is wanted.
        tag: Message tag, the same on both ranks.

    Returns:
        A delegate, which is an empty float32 variable of shape ``(0,)`` that backward starts from.

    Raises:
        ValueError: If ``rank`` is this rank or none, the tag is out of range, or ``x`` is empty.
        TypeError: If ``x`` is something else; the receiver then raises as well.
        RuntimeError: Raised in backward, if the receiver has backprop mode off.
    """
    rank, tag = gradient_messages.check_peer(communicator, rank, tag)
    gradient_messages.make_room()
    return send_soon(x, communicator, rank, tag)


def send_soon(x: Any, comm: CommunicatorBase, rank: int, tag: int) -> Any:
    """Do what :func:`send` does, without ever waiting, to a rank and with a tag that are right."""
    as_tuple = isinstance(x, (tuple, list))
    xs = tuple(x) if as_tuple else (x,)
    try:
        if not xs:
            raise ValueError("there is nothing to send: x is empty")  # noqa: TRY301
        for each in xs:
            checked_array(each, "send")
    except (TypeError, ValueError) as error:
        send_failure(error, comm, rank, tag)
        raise
    (delegate,) = _Send(comm, rank, tag, as_tuple=as_tuple).apply((*xs, new_delegate()))
    delegate.name = "delegate_variable"
    return delegate


def send_failure(error: BaseException, comm: CommunicatorBase, rank: int, tag: int) -> None:
    """Make the receiver of a message raise ``error`` instead of receiving it. Local."""

    def fail() -> Any:
        raise error

    try:
        gradient_messages.post(comm, fail, rank, tag)
    except BaseException as raised:
        if raised is not error:
            raise


def recv(
    communicator: CommunicatorBase,
    rank: int,
    delegate_variable: Any = None,
    tag: int = 0,
    force_tuple: bool = False,
) -> Any:
    """Receive variables from another rank, and send their gradients to it in backward.

    Waits until the message is there. In backward this rank sends the gradients, zeros for those
    that its loss does not depend on. If its loss depends on none of them, backward does not come
    here and the sender waits for ever: connect one with :func:`pseudo_connect` then. With
    :func:`chainer.grad`, which goes only where it is asked to, ask for the gradient of
    ``delegate_variable``. Double backprop: see :func:`send`.

    Args:
        communicator: Communicator.
        rank: Sending rank, which must call :func:`send`.
        delegate_variable: Variable that backward goes on to from here, as a rule what
            :func:`send` returned earlier on this rank. It gets zeros as its gradient.
        tag: Message tag, the same on both ranks.
        force_tuple: Whether a single array is returned as a tuple of one.

    Returns:
        A variable, or a tuple of them if several were sent, in new memory.

    Raises:
        ValueError: If ``rank`` is this rank or none, or the tag is out of range.
        Exception: The error because of which the sender could not send it.
    """
    rank, tag = gradient_messages.check_peer(communicator, rank, tag)
    if delegate_variable is not None:
        delegate_variable.name = "delegate_variable"
    (*ys, _), _ = receive(communicator, rank, tag, delegate_variable)
    return tuple(ys) if force_tuple or len(ys) > 1 else ys[0]


def receive(
    comm: CommunicatorBase, rank: int, tag: int, delegate_variable: Any = None
) -> tuple[tuple[Any, ...], Any]:
    """Receive from a rank and with a tag that are right.

    Returns:
        The variables followed by a delegate, from which backward sends their gradients whether
        the loss depends on them or not; and a function that sends the sender an error.
    """
    node = _Recv(comm, rank, tag)
    delegate = new_delegate() if delegate_variable is None else delegate_variable
    return node.apply((delegate,)), node.refuse


def refuse_gradients(comm: CommunicatorBase, error: BaseException) -> None:
    """Send an error to every rank that waits for a gradient from this one. Local."""
    for node in list(_unanswered):
        if node.comm is comm:
            node.refuse(error)
