"""First values of parameters that get their shape in a forward pass, drawn alike on every rank.

``L.Linear(None, 10)`` draws its weights when it first sees a batch, which is too late to broadcast them:
a gradient is computed from them at once. Ranks cannot communicate in the middle of a forward pass, as
perhaps not every rank uses the layer. So ranks draw the same numbers: while such a parameter is
initialized, ``numpy.random`` continues a sequence that begins at the state of rank 0.

An initializer that takes its numbers from elsewhere may still draw different ones on each rank. Ranks
compare the drawn values before they use a gradient that was computed with them; see
:mod:`~chainer_dist.optimizers.replicas`.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from typing import TYPE_CHECKING, Any, TypeVar, cast

import chainer
import numpy as np
from chainer.links.rnn.lstm import LSTMBase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chainer_dist.communicators import CommunicatorBase

    Method = TypeVar("Method", bound=Callable[..., Any])

__all__ = ["share_draws"]

_DRAWS = "_chainer_dist_draws"  # the attribute of a parameter that draws from a shared sequence


class _Draws:
    """A sequence of random numbers from which all ranks of a communicator draw."""

    def __init__(self) -> None:
        self.state: Any = None

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Let ``numpy.random`` draw from the sequence. Local.

        Afterwards ``numpy.random`` returns to this rank's own state. If that was the state of the sequence,
        it stays at the end of the drawn numbers, as in a single process.
        """
        own: Any = np.random.get_state()  # noqa: NPY002 - what Chainer draws from
        follows = _are_equal(own, self.state)
        np.random.set_state(self.state)  # noqa: NPY002
        try:
            yield
        finally:
            self.state = np.random.get_state()  # noqa: NPY002
            if not follows:
                np.random.set_state(own)  # noqa: NPY002


# One for each communicator, since the models of several optimizers draw in turn.
_sequences: weakref.WeakKeyDictionary[CommunicatorBase, _Draws] = weakref.WeakKeyDictionary()


def share_draws(comm: CommunicatorBase, model: chainer.Link) -> None:
    """Let parameters of a model that wait for their shape draw the same numbers on every rank. Collective.

    The sequence begins at the state of ``numpy.random`` on rank 0. Nothing is done on a single rank, or
    if no parameter waits.

    Args:
        comm: The communicator whose ranks draw the same numbers.
        model: The model, of which the same parameters wait on every rank.
    """
    waiting = [param for _, param in model.namedparams() if param.array is None]
    if comm.size == 1 or not waiting:
        return
    _let_chainer_look()
    draws = _sequences.setdefault(comm, _Draws())
    draws.state = comm.bcast_obj(np.random.get_state())  # noqa: NPY002
    for param in waiting:
        # A copy of the parameter has this attribute as well, but is another object.
        setattr(param, _DRAWS, (weakref.ref(param), draws))


def _draws_of(param: chainer.Parameter) -> contextlib.AbstractContextManager[None]:
    owner, draws = getattr(param, _DRAWS, (lambda: None, None))
    return draws.in_use() if draws is not None and owner() is param else contextlib.nullcontext()


@functools.cache
def _let_chainer_look() -> None:
    """Wrap the two methods of Chainer 7.8.1 that draw first values in a forward pass."""

    def wrap(method: Method, param_of: Callable[[Any], chainer.Parameter]) -> Method:
        @functools.wraps(method)
        def draw(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _draws_of(param_of(self)):
                return method(self, *args, **kwargs)

        return cast("Method", draw)

    chainer.Parameter.initialize = wrap(chainer.Parameter.initialize, lambda param: param)
    # This one draws values again that it has just initialized.
    LSTMBase._initialize_params = wrap(LSTMBase._initialize_params, lambda link: link.upward.W)  # noqa: SLF001 - Chainer's


def _are_equal(one: Any, other: Any) -> bool:
    """Return whether two states of ``numpy.random`` are equal. Local."""
    return one[0] == other[0] and one[2:] == other[2:] and bool(np.array_equal(one[1], other[1]))
