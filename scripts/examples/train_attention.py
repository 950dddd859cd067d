#!/usr/bin/env python
"""Train a small transformer that translates dates as people write them: "3 March 2021" to "2021-03-03".

    python scripts/examples/train_attention.py                  # one process
    mpiexec -n 2 python scripts/examples/train_attention.py     # two

Dates are generated; those of the validation are never trained on. The transformer (Vaswani et al.,
2017) reads the source and writes the target letter by letter: of each it sees all that come before.
"""

from __future__ import annotations

import datetime as dt
import math
from pathlib import Path
from typing import Any

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer.training import extensions
from example import add_reports, make_parser, positive

import chainer_dist

LETTERS = " abcdefghijklmnopqrstuvwxyz0123456789,./->"
N_SOURCE, N_TARGET = 20, 10  # letters; sources are filled up with spaces


class Block(chainer.Chain):
    """Attention of several heads to what comes before, and two linear layers."""

    def __init__(self, n_units: int, n_heads: int) -> None:
        """Create the layers."""
        super().__init__()
        self.n_heads = n_heads
        with self.init_scope():
            self.norm1 = L.LayerNormalization(n_units)
            self.project = L.Linear(n_units, 3 * n_units, nobias=True)
            self.join = L.Linear(n_units, n_units)
            self.norm2 = L.LayerNormalization(n_units)
            self.l1 = L.Linear(n_units, 4 * n_units)
            self.l2 = L.Linear(4 * n_units, n_units)

    def forward(self, h: chainer.Variable, batch: int) -> chainer.Variable:
        """Map (batch * length, units) to the same shape."""
        length, n_units = h.shape[0] // batch, h.shape[1]
        qkv = self.project(self.norm1(h))
        qkv = F.reshape(qkv, (batch, length, 3, self.n_heads, n_units // self.n_heads))
        q, k, v = F.separate(F.transpose(qkv, (2, 0, 3, 1, 4)))  # (batch, heads, length, ...)
        scores = F.matmul(q, k, transb=True) / math.sqrt(q.shape[-1])
        later = np.triu(np.full((length, length), -1e9, np.float32), 1)
        attention = F.softmax(scores + np.broadcast_to(later, scores.shape), axis=3)
        seen = F.transpose(F.matmul(attention, v), (0, 2, 1, 3))
        h = h + self.join(F.reshape(seen, h.shape))
        return h + self.l2(F.relu(self.l1(self.norm2(h))))


class Transformer(chainer.Chain):
    """Maps letters to scores of the next one."""

    def __init__(self, n_layers: int, n_units: int, n_heads: int) -> None:
        """Create the layers."""
        super().__init__()
        with self.init_scope():
            self.letters = L.EmbedID(len(LETTERS), n_units)
            self.positions = L.EmbedID(N_SOURCE + N_TARGET, n_units)
            self.blocks = chainer.ChainList(*[Block(n_units, n_heads) for _ in range(n_layers)])
            self.norm = L.LayerNormalization(n_units)
            self.scores = L.Linear(n_units, len(LETTERS))

    def read(self, x: Any) -> chainer.Variable:
        """Map letters, (batch, length) int32, to scores, (batch, length, letters) float32."""
        batch, length = x.shape
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), x.shape)
        h = F.reshape(self.letters(x) + self.positions(positions), (batch * length, -1))
        for block in self.blocks:
            h = block(h, batch)
        return F.reshape(self.scores(self.norm(h)), (batch, length, len(LETTERS)))

    def forward(self, source: Any, target: Any) -> chainer.Variable:
        """Return the loss of writing the target, given the source."""
        scores = self.read(np.concatenate([source, target[:, :-1]], axis=1))[:, N_SOURCE - 1 :]
        loss = F.softmax_cross_entropy(F.reshape(scores, (-1, len(LETTERS))), target.reshape(-1))
        chainer.report({"loss": loss}, self)
        return loss

    def translate(self, source: Any) -> Any:
        """Return the most likely target, letter by letter: (batch, 10) int32."""
        x = source
        for _ in range(N_TARGET):
            letters = self.read(x).array[:, -1].argmax(axis=1)
            x = np.concatenate([x, letters[:, None].astype(np.int32)], axis=1)
        return x[:, N_SOURCE:]


def encode(text: str, length: int) -> Any:
    """Return the letters of a text as int32 numbers."""
    return np.array([LETTERS.index(letter) for letter in text.ljust(length)], np.int32)


def decode(letters: Any) -> str:
    """Return a text."""
    return "".join(LETTERS[letter] for letter in letters)


def get_dates(n: int, seed: int) -> tuple[Any, Any]:
    """Return ``n`` dates as people write them and as machines do, for training and for validation."""
    rng = np.random.RandomState(seed)
    formats = [
        "{d.day} %B %Y",
        "%b {d.day}, %Y",
        "%a {d.day} %b %Y",
        "{d.day}.{d.month}.%Y",
        "%d/%m/%y",
    ]
    days = 50 * 365  # from 1970 on
    order = rng.permutation(days)
    parts = []
    for numbers, count in ((order[: days * 9 // 10], n), (order[days * 9 // 10 :], n // 10)):
        pairs = []
        for number in rng.choice(numbers, count):
            d = dt.date(1970, 1, 1) + dt.timedelta(int(number))
            source = d.strftime(formats[rng.randint(len(formats))].format(d=d)).lower()
            pairs.append((encode(source + ">", N_SOURCE), encode(d.isoformat(), N_TARGET)))
        parts.append(pairs)
    train, validation = parts
    return train, validation


def main() -> None:
    """Train, translate the validation set after each epoch, and show some translations."""
    parser = make_parser(__doc__, epochs=4, batch_size=64, out=Path("result/attention"))
    parser.add_argument("--samples", type=positive, default=8000, help="default: 8000")
    parser.add_argument("--units", type=positive, default=64, help="default: 64")
    parser.add_argument("--layers", type=positive, default=2, help="default: 2")
    args = parser.parse_args()
    comm = chainer_dist.create_communicator()
    np.random.seed(args.seed + comm.rank)  # noqa: NPY002 - what Chainer draws from

    train, validation = get_dates(args.samples, args.seed) if comm.rank == 0 else (None, None)
    train = chainer_dist.scatter_dataset(train, comm, shuffle=True, seed=args.seed)  # distributed
    validation = chainer_dist.scatter_dataset(  # distributed
        validation, comm, force_equal_length=False
    )

    model = Transformer(args.layers, args.units, n_heads=4)
    optimizer = chainer.optimizers.Adam(2e-3)
    optimizer = chainer_dist.create_multi_node_optimizer(optimizer, comm)  # distributed
    optimizer.setup(model)

    train_iter = chainer.iterators.SerialIterator(train, args.batch_size)
    validation_iter = chainer.iterators.SerialIterator(validation, 200, repeat=False, shuffle=False)
    updater = chainer.training.updaters.StandardUpdater(train_iter, optimizer)
    trainer = chainer.training.Trainer(updater, (args.epochs, "epoch"), out=str(args.out))

    def exact_matches(source: Any, target: Any) -> None:
        right = (model.translate(source) == target).all(axis=1)
        chainer.report({"accuracy": right.mean()}, model)

    evaluator = extensions.Evaluator(validation_iter, model, eval_func=exact_matches)
    evaluator = chainer_dist.create_multi_node_evaluator(evaluator, comm)  # distributed
    trainer.extend(evaluator)
    columns = ["main/loss", "validation/main/accuracy"]
    log = add_reports(trainer, comm, columns, columns[1:], args)
    trainer.run()

    if comm.rank == 0:
        source, _ = chainer.dataset.concat_examples(validation[:5])
        with chainer.using_config("train", value=False), chainer.no_backprop_mode():
            written = model.translate(source)
        print()
        for one, other in zip(source, written):
            print(f"{decode(one).rstrip(' >'):20} {decode(other)}")
        accuracy = log.log[-1]["validation/main/accuracy"]
        print(f"Validation accuracy: {accuracy:.2%} translated without a mistake")
        print(f"Plot: {args.out / 'plot.png'}")


if __name__ == "__main__":
    main()
