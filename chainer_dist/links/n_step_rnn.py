"""Stacked recurrent networks that hand their states from rank to rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
from chainer.links.rnn.n_step_rnn import NStepRNNBase

from chainer_dist.functions.gradient_messages import check_peer
from chainer_dist.functions.point_to_point_communication import receive, send

if TYPE_CHECKING:
    from chainer_dist.communicators import CommunicatorBase


class _MultiNodeNStepRNN(chainer.Chain):  # type: ignore[misc]  # Chainer has no types
    """An n-step RNN with its first states from one rank and its last states to another."""

    def __init__(
        self, link: Any, communicator: CommunicatorBase, rank_in: int | None, rank_out: int | None
    ) -> None:
        super().__init__(actual_rnn=link)
        self.communicator = communicator
        self.rank_in = rank_in
        self.rank_out = rank_out
        self.n_cells = link.n_cells

    def forward(self, xs: Any) -> tuple[Any, ...]:
        """Return the outputs of the RNN for a list of sequences, and a delegate variable."""
        cells = [None] * self.n_cells if self.rank_in is None else self._receive(self.rank_in)
        outputs = self.actual_rnn(*cells, xs)
        delegate = None
        if self.rank_out is not None:
            delegate = send(outputs[:-1], self.communicator, self.rank_out)
        return (*outputs, delegate)

    def _receive(self, rank: int) -> tuple[Any, ...]:
        (*cells, _), refuse = receive(self.communicator, rank, tag=0)
        if len(cells) != self.n_cells:
            error = ValueError(
                f"rank {self.communicator.rank}: {type(self.actual_rnn).__name__} takes "
                f"{self.n_cells} states, got {len(cells)} from rank {rank}"
            )
            refuse(error)
            raise error
        return tuple(cells)


def create_multi_node_n_step_rnn(
    actual_link: Any,
    communicator: CommunicatorBase,
    rank_in: int | None = None,
    rank_out: int | None = None,
) -> Any:
    """Make a stacked RNN that gets its initial states from another rank, or sends its last ones. Local.

    An encoder on one rank and a decoder on the next, for example. The result is called with a list
    of sequences, as ``actual_link`` without initial states. It waits for the states of ``rank_in``,
    runs ``actual_link``, and sends the states to ``rank_out``, all in one message.

    Every rank has to run backward, from its loss, connected to the delegate where there is one::

        _, ys, delegate = rnn(xs)
        (loss,) = functions.pseudo_connect(delegate, loss_of(ys))    # or delegate alone
        loss.backward()

    Args:
        actual_link: NStepGRU, NStepLSTM, NStepRNNTanh, NStepRNNReLU, or one of the same with Bi;
            becomes the child ``actual_rnn``.
        communicator: Communicator.
        rank_in: Rank that sends the states, None for states of zeros.
        rank_out: Rank that receives the states, None to send none.

    Returns:
        A :class:`chainer.Chain` that returns the outputs of ``actual_link`` and a delegate
        variable, which is None without ``rank_out``: ``(h, ys, delegate)``, and for LSTM ``(h, c,
        ys, delegate)``. States are of shape ``(layers * directions, batch, units)``. The same as
        ChainerMN's ``create_multi_node_n_step_rnn``.

    Raises:
        ValueError: If ``actual_link`` is no such link, or a rank is this rank or none. In a call,
            on both ranks, if the states are not as many as ``actual_link`` takes (LSTM takes two).
    """
    if not isinstance(actual_link, NStepRNNBase):
        raise ValueError(  # noqa: TRY004 - as ChainerMN
            f"actual_link is {type(actual_link).__name__}, expected one of Chainer's NStepRNN links"
        )
    for rank in (rank_in, rank_out):
        if rank is not None:
            check_peer(communicator, rank, 0)
    return _MultiNodeNStepRNN(actual_link, communicator, rank_in, rank_out)
