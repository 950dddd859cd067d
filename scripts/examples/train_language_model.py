#!/usr/bin/env python
"""Train a language model on real English, and let it write a sentence.

    python scripts/examples/train_language_model.py                  # one process
    mpiexec -n 2 python scripts/examples/train_language_model.py     # two, each reading its part of the text

The text is Python's own documentation as far as it ships with Python, or any file (``--text``). An
LSTM reads it word by word and predicts the next one. Each rank reads its own part of the text, as
several streams side by side; the state of the LSTM is carried from one batch to the next, and
gradients go back to the beginning of the batch (truncated backpropagation through time). Perplexity
is from among how many words, as it were, the model has to guess.
"""

from __future__ import annotations

import collections
import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer.training import extension
from example import add_reports, make_parser, positive

import chainer_dist

UNKNOWN = "<rare>"


class LanguageModel(chainer.Chain):
    """Embedding, LSTM and a score for each word of the vocabulary; keeps the state of the LSTM."""

    def __init__(self, n_words: int, n_units: int) -> None:
        """Create the layers."""
        super().__init__()
        with self.init_scope():
            self.embed = L.EmbedID(n_words, n_units)
            self.lstm = L.NStepLSTM(1, n_units, n_units, 0)
            self.scores = L.Linear(n_units, n_words)
        self.reset_state()

    def reset_state(self) -> None:
        """Begin new streams."""
        self.h = self.c = None

    def read(self, x: Any) -> chainer.Variable:
        """Map words, (streams, length) int32, to scores of the next, (streams * length, words)."""
        inputs = F.separate(F.dropout(self.embed(x), 0.2))
        h, c, outputs = self.lstm(self.h, self.c, inputs)
        self.h, self.c = h.array, c.array  # gradients end here
        return self.scores(F.dropout(F.concat(outputs, axis=0), 0.2))

    def forward(self, x: Any, t: Any) -> chainer.Variable:
        """Return the loss of predicting words ``t`` that follow ``x``."""
        loss = F.softmax_cross_entropy(self.read(x), t.reshape(-1))
        chainer.report({"loss": loss}, self)
        return loss


class Streams(chainer.dataset.Iterator):  # type: ignore[misc]
    """Reads a text as several streams side by side, some words at a time."""

    def __init__(self, words: Any, n_streams: int, length: int) -> None:
        """Cut the text into streams of equal length."""
        self.streams = words[: len(words) // n_streams * n_streams].reshape(n_streams, -1)
        self.length = length
        self.iteration = 0
        self.per_epoch = (self.streams.shape[1] - 1) // length
        if self.per_epoch == 0:
            raise ValueError("the text is too short for so many ranks, streams and words")

    def __next__(self) -> tuple[Any, Any]:
        """Return words and those that follow them, both (streams, length) int32."""
        start = self.iteration % self.per_epoch * self.length
        self.iteration += 1
        x = self.streams[:, start : start + self.length + 1]
        return x[:, :-1], x[:, 1:]

    @property
    def epoch(self) -> int:
        """How often the text was read."""
        return self.iteration // self.per_epoch

    @property
    def epoch_detail(self) -> float:
        """The same, with the part of the present epoch."""
        return self.iteration / self.per_epoch

    @property
    def is_new_epoch(self) -> bool:
        """Whether the last batch was the last of an epoch."""
        return self.iteration % self.per_epoch == 0


def get_words(path: Path | None, n_words: int) -> tuple[Any, list[str]]:
    """Return a text as numbers of words, int32, and the words; all but the most frequent are one."""
    text = path.read_text(encoding="utf-8") if path else "\n".join(map(topics.get, sorted(topics)))
    words = re.findall(r"[a-z]+(?:'[a-z]+)?|[.,;:?!]", text.lower())
    frequent = [word for word, _ in collections.Counter(words).most_common(n_words - 1)]
    numbers = {word: number for number, word in enumerate(frequent, start=1)}
    return np.array([numbers.get(word, 0) for word in words], np.int32), [UNKNOWN, *frequent]


def write(model: LanguageModel, words: list[str], seed: int) -> str:
    """Return a sentence that the model makes up."""
    rng = np.random.RandomState(seed)
    model.reset_state()
    stop = words.index(".") if "." in words else 0
    sentence = [stop]
    while len(sentence) < 40 and (len(sentence) == 1 or sentence[-1] != stop):
        x = np.array([sentence[-1:]], np.int32)
        chances = F.softmax(model.read(x)).array[0].astype(np.float64) ** 1.2
        chances[0] = 0  # no rare words
        if len(sentence) < 10:
            chances[stop] = 0  # not that short
        sentence.append(rng.choice(len(words), p=chances / chances.sum()))
    return re.sub(r" ([.,;:?!])", r"\1", " ".join(words[number] for number in sentence[1:]))


def main() -> None:
    """Train, validate after each epoch, and write a sentence."""
    parser = make_parser(__doc__, epochs=3, batch_size=20, out=Path("result/language_model"))
    parser.add_argument("--text", type=Path, help="file to read; default: Python's documentation")
    parser.add_argument("--words", type=positive, default=4000, help="to know; default: 4000")
    parser.add_argument("--units", type=positive, default=128, help="default: 128")
    parser.add_argument("--length", type=positive, default=20, help="of a batch; default: 20 words")
    args = parser.parse_args()
    comm = chainer_dist.create_communicator()
    np.random.seed(args.seed + comm.rank)  # noqa: NPY002 - what Chainer draws from

    numbers, words = get_words(args.text, args.words)
    n_train = len(numbers) * 9 // 10
    begin, end = chainer_dist.scatter_index(n_train, comm)  # distributed: equal parts of the text
    train = Streams(numbers[begin:end], args.batch_size, args.length)
    validation = numbers[n_train:]

    model = LanguageModel(len(words), args.units)
    optimizer = chainer_dist.create_multi_node_optimizer(
        chainer.optimizers.Adam(5e-3), comm
    )  # distributed
    optimizer.setup(model)
    optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(5))
    updater = chainer.training.updaters.StandardUpdater(
        train, optimizer, converter=lambda batch, _: batch
    )
    trainer = chainer.training.Trainer(updater, (args.epochs, "epoch"), out=str(args.out))

    @extension.make_extension(trigger=(1, "epoch"), priority=extension.PRIORITY_WRITER)
    def validate(_: Any) -> None:
        begin, end = chainer_dist.scatter_index(  # distributed: each rank a part
            len(validation) - 1, comm, force_equal_length=False
        )
        reader = model.copy()
        reader.reset_state()
        losses = []
        with chainer.using_config("train", value=False), chainer.no_backprop_mode():
            for start in range(begin, end, 500):
                x = validation[start : min(start + 500, end) + 1]
                scores = reader.read(x[None, :-1])
                losses.append(F.softmax_cross_entropy(scores, x[1:], reduce="no").array)
        loss = np.concatenate(losses)
        total, count = comm.allreduce_obj(np.array([loss.sum(), loss.size], np.float64))
        chainer.report({"perplexity": float(np.exp(total / count))})
        model.reset_state()  # the text begins again

    trainer.extend(validate)
    log = add_reports(trainer, comm, ["main/loss", "perplexity"], ["perplexity"], args)
    trainer.run()

    if comm.rank == 0:
        with chainer.using_config("train", value=False), chainer.no_backprop_mode():
            print(f"\nThe model writes: {write(model, words, args.seed)}")
        print(f"Perplexity: {log.log[-1]['perplexity']:.1f} of {len(words)} words")
        print(f"Plot: {args.out / 'plot.png'}")


if __name__ == "__main__":
    main()
