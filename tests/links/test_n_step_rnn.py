"""Recurrent networks on several ranks, against the same network in one process."""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from chainer_dist import functions
from chainer_dist.links import create_multi_node_n_step_rnn

KINDS = [
    L.NStepGRU,
    L.NStepBiGRU,
    L.NStepLSTM,
    L.NStepBiLSTM,
    L.NStepRNNTanh,
    L.NStepBiRNNTanh,
    L.NStepRNNReLU,
    L.NStepBiRNNReLU,
]


def rnn(kind, seed):
    """Return a network whose parameters are known to every rank."""
    link = kind(2, 3, 4, 0.0)
    rng = np.random.RandomState(seed)
    for _, param in sorted(link.namedparams()):
        param.array[...] = rng.uniform(-0.5, 0.5, param.shape)
    link.cleargrads()  # they are NaN at first, and NaN equals NaN to assert_allclose
    return link


def sequences(seed):
    """Return sequences of different lengths."""
    rng = np.random.RandomState(seed)
    return [rng.uniform(-1, 1, (n, 3)).astype(np.float32) for n in (3, 1, 4)]


def loss_of(outputs, rank):
    """Return a rank's loss of its states and outputs."""
    *states, ys = outputs
    return (sum(F.sum(s**2) for s in states) + sum(F.sum(y**2) for y in ys)) * (rank + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_of_all_ranks(comm, kind):
    """Each rank goes on from the states of the one before; outputs and gradients are the same."""
    links = [rnn(kind, rank) for rank in range(comm.size)]
    states, total, want = (), 0, None
    for rank, link in enumerate(links):
        outputs = link(*(states or [None] * link.n_cells), sequences(rank))
        total += loss_of(outputs, rank)
        states = outputs[:-1]
        want = outputs if rank == comm.rank else want
    total.backward()

    model = create_multi_node_n_step_rnn(
        rnn(kind, comm.rank),
        comm,
        rank_in=comm.rank - 1 if comm.rank > 0 else None,
        rank_out=comm.rank + 1 if comm.rank < comm.size - 1 else None,
    )
    *outputs, delegate = model(sequences(comm.rank))
    assert len(outputs) == len(want) == model.n_cells + 1
    for mine, theirs in zip([*outputs[:-1], *outputs[-1]], [*want[:-1], *want[-1]]):
        np.testing.assert_allclose(mine.array, theirs.array, rtol=1e-5, atol=1e-7)
    assert (delegate is None) == (comm.rank == comm.size - 1)
    (loss,) = functions.pseudo_connect(delegate, loss_of(outputs, comm.rank))
    loss.backward()
    for mine, theirs in zip(model.actual_rnn.params(), links[comm.rank].params()):
        np.testing.assert_allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_an_encoder_without_a_loss(comm):
    """Backward from the delegate alone trains the encoder with the decoder's gradients."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    encoder, decoder = rnn(L.NStepLSTM, 0), rnn(L.NStepLSTM, 1)
    if comm.rank == 0:
        model = create_multi_node_n_step_rnn(encoder, comm, rank_out=1)
        *_, delegate = model(sequences(0))
        delegate.backward()
        want_encoder, want_decoder = rnn(L.NStepLSTM, 0), rnn(L.NStepLSTM, 1)
        h, c, _ = want_encoder(None, None, sequences(0))
        loss_of(want_decoder(h, c, sequences(1)), 1).backward()
        for mine, theirs in zip(encoder.params(), want_encoder.params()):
            np.testing.assert_allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    elif comm.rank == 1:
        model = create_multi_node_n_step_rnn(decoder, comm, rank_in=0)
        *outputs, delegate = model(sequences(1))
        assert delegate is None
        loss_of(outputs, 1).backward()


def test_states_that_do_not_fit(comm):
    """A GRU's one state for an LSTM, which takes two, is an error on both ranks."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    message = "rank 1: NStepLSTM takes 2 states, got 1 from rank 0"
    if comm.rank == 0:
        model = create_multi_node_n_step_rnn(rnn(L.NStepGRU, 0), comm, rank_out=1)
        *_, delegate = model(sequences(0))
        with pytest.raises(ValueError, match=message):
            delegate.backward()
    elif comm.rank == 1:
        model = create_multi_node_n_step_rnn(rnn(L.NStepLSTM, 0), comm, rank_in=0)
        with pytest.raises(ValueError, match=message):
            model(sequences(0))


def test_what_is_no_rnn(comm):
    """Other links, and ranks that cannot be peers, are refused."""
    with pytest.raises(
        ValueError, match="actual_link is Linear, expected one of Chainer's NStepRNN"
    ):
        create_multi_node_n_step_rnn(L.Linear(2, 2), comm)
    for rank in (comm.rank, comm.size):
        with pytest.raises(ValueError, match=f"rank is {rank}"):
            create_multi_node_n_step_rnn(rnn(L.NStepGRU, 0), comm, rank_in=rank)
        with pytest.raises(ValueError, match=f"rank is {rank}"):
            create_multi_node_n_step_rnn(rnn(L.NStepGRU, 0), comm, rank_out=rank)


def test_the_same_names_as_chainermn(comm):
    """Parameters have ChainerMN's names, so that its saved models load."""
    links = pytest.importorskip("chainermn.links")
    with pytest.warns(FutureWarning):
        theirs = links.create_multi_node_n_step_rnn(rnn(L.NStepGRU, 0), comm)
    ours = create_multi_node_n_step_rnn(rnn(L.NStepGRU, 0), comm)
    assert [n for n, _ in ours.namedparams()] == [n for n, _ in theirs.namedparams()]
    assert isinstance(ours, chainer.Chain)
