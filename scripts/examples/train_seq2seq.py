#!/usr/bin/env python
"""Train a sequence-to-sequence model whose encoder and decoder are on different ranks.

    mpiexec -n 2 python scripts/examples/train_seq2seq.py     # one model, on two ranks
    mpiexec -n 4 python scripts/examples/train_seq2seq.py     # two replicas of it, with a batch each

It learns to turn generated sequences of letters round. The LSTM of the encoder hands its state to
that of the decoder, and gets gradients back the same way. With more than two ranks, encoders
average their gradients with encoders and decoders with decoders.
"""

from __future__ import annotations

import argparse
from typing import Any

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

import chainer_dist

N_LETTERS, END = 10, 10  # letters are 0 to 9


class Encoder(chainer.Chain):
    """Reads a sequence, and sends the state it ends in."""

    def __init__(self, comm: chainer_dist.CommunicatorBase, n_units: int) -> None:
        """Create the layers."""
        super().__init__()
        with self.init_scope():
            self.embed = L.EmbedID(N_LETTERS, n_units)
            self.rnn = chainer_dist.links.create_multi_node_n_step_rnn(
                L.NStepLSTM(1, n_units, n_units, 0), comm, rank_out=1
            )

    def forward(self, sources: list[Any], targets: list[Any]) -> chainer.Variable:
        """Encode, and return what backward starts from."""
        del targets
        *_, delegate = self.rnn([self.embed(x) for x in sources])
        return delegate


class Decoder(chainer.Chain):
    """Writes a sequence, starting from the state that it receives."""

    def __init__(self, comm: chainer_dist.CommunicatorBase, n_units: int) -> None:
        """Create the layers."""
        super().__init__()
        with self.init_scope():
            self.embed = L.EmbedID(N_LETTERS + 1, n_units)
            self.rnn = chainer_dist.links.create_multi_node_n_step_rnn(
                L.NStepLSTM(1, n_units, n_units, 0), comm, rank_in=0
            )
            self.scores = L.Linear(n_units, N_LETTERS + 1)

    def forward(self, sources: list[Any], targets: list[Any]) -> chainer.Variable:
        """Return the loss of predicting each letter from those before it."""
        del sources
        given = [np.concatenate([[END], x]).astype(np.int32) for x in targets]
        wanted = np.concatenate([[*x, END] for x in targets]).astype(np.int32)
        _, _, hs, _ = self.rnn([self.embed(x) for x in given])
        loss = F.softmax_cross_entropy(self.scores(F.concat(hs, axis=0)), wanted)
        self.loss = float(loss.array)
        return loss

    def write(self, n: int, longest: int) -> list[list[int]]:
        """Return the most likely sequences for the ``n`` states that it receives."""
        letters = np.full(n, END, np.int32)
        written: list[list[int]] = [[] for _ in range(n)]
        h, c, hs, _ = self.rnn(F.separate(F.expand_dims(self.embed(letters), 1)))
        for _ in range(longest + 1):
            letters = self.scores(F.concat(hs, axis=0)).array.argmax(axis=1).astype(np.int32)
            for letter, sequence in zip(letters, written):
                if END not in sequence:
                    sequence.append(int(letter))
            h, c, hs = self.rnn.actual_rnn(h, c, F.separate(F.expand_dims(self.embed(letters), 1)))
        return written


def draw_batch(rng: np.random.RandomState, n: int, longest: int) -> tuple[list[Any], list[Any]]:
    """Return sequences of letters, int32 arrays of different lengths, and the same turned round."""
    lengths = rng.randint(2, longest + 1, n)
    sources = [rng.randint(0, N_LETTERS, length).astype(np.int32) for length in lengths]
    return sources, [x[::-1] for x in sources]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=1000, help="default: 1000")
    parser.add_argument("--batch-size", type=int, default=64, help="a replica; default: 64")
    parser.add_argument("--longest", type=int, default=6, help="letters; default: 6")
    parser.add_argument("--units", type=int, default=128, help="default: 128")
    return parser.parse_args()


def main() -> None:
    """Train, and say how many new sequences are turned round without a mistake."""
    args = parse_args()
    comm = chainer_dist.create_communicator()
    if comm.size % 2:
        raise SystemExit("run it on an even number of ranks, e.g. mpiexec -n 2")
    replica, part = divmod(comm.rank, 2)
    model_comm = comm.split(replica, comm.rank)  # an encoder and its decoder
    data_comm = comm.split(part, comm.rank)  # all encoders, or all decoders

    model = (Decoder if part else Encoder)(model_comm, args.units)
    optimizer = chainer.optimizers.Adam()
    optimizer = chainer_dist.create_multi_node_optimizer(optimizer, data_comm).setup(model)
    # Both ranks of a replica draw the same sequences, which no other replica draws.
    rng = np.random.RandomState(replica)
    for update in range(1, args.updates + 1):
        optimizer.update(model, *draw_batch(rng, args.batch_size, args.longest))
        if update % 100 == 0 and comm.rank == 1:
            print(f"update {update}: loss {model.loss:.3f}", flush=True)

    sources, targets = draw_batch(np.random.RandomState(12345), 200, args.longest)
    with chainer.using_config("train", value=False), chainer.no_backprop_mode():
        if part == 0:
            model(sources, targets)
        else:
            written = model.write(len(targets), args.longest)
            right = [sequence[:-1] == list(x) for sequence, x in zip(written, targets)]
            if replica == 0:
                print(f"\nTurned round without a mistake: {np.mean(right):.1%} of 200 sequences")


if __name__ == "__main__":
    main()
