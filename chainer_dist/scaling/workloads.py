"""What is trained while scaling is measured: built-in models with generated data, or the user's own."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    # Given examples a rank and the rank, return a model and what it is called with for its loss.
    Make = Callable[[int, int], tuple[chainer.Link, tuple[Any, ...]]]

__all__ = ["WORKLOADS", "Workload", "draw_images", "draw_words", "load"]

WORDS = 10_000
TIMES = 35  # words of a sequence


class Workload(NamedTuple):
    """Something to train.

    Attributes:
        make: Given the number of examples of a batch and the rank, returns a model whose parameters may be of
            any value, and the arguments with which ``model(*arguments)`` is the loss of that rank's batch.
        batch: How many examples a rank has by default.
        text: What it is.
        torch: Returns the same model as a torch module, called with tensors for its loss; None where there is
            none, so that torch cannot be measured.
        images: Whether it takes arrays of four dimensions (N, C, H, W), which torch may keep channels last.
    """

    make: Make
    batch: int
    text: str
    torch: Callable[[], Any] | None = None
    images: bool = False


class MLP(chainer.ChainList):  # type: ignore[misc]  # Chainer has no types
    """A multilayer perceptron and its loss."""

    WIDTHS = (784, *[2048] * 6, 10)

    def __init__(self) -> None:
        super().__init__(*[L.Linear(low, high) for low, high in zip(self.WIDTHS, self.WIDTHS[1:])])

    def forward(self, x: Any, t: Any) -> Any:
        """Return the loss."""
        *hidden, last = self
        for layer in hidden:
            x = F.relu(layer(x))
        return F.softmax_cross_entropy(last(x), t)


class CNN(chainer.Chain):  # type: ignore[misc]
    """Three convolutions, batch normalization and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(3, 32, 3, pad=1)
            self.bn1 = L.BatchNormalization(32)
            self.conv2 = L.Convolution2D(32, 64, 3, pad=1)
            self.conv3 = L.Convolution2D(64, 128, 3, pad=1)
            self.fc1 = L.Linear(4 * 4 * 128, 512)
            self.fc2 = L.Linear(512, 10)

    def forward(self, x: Any, t: Any) -> Any:
        """Return the loss."""
        x = F.max_pooling_2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pooling_2d(F.relu(self.conv2(x)), 2)
        x = F.max_pooling_2d(F.relu(self.conv3(x)), 2)
        return F.softmax_cross_entropy(self.fc2(F.relu(self.fc1(x))), t)


class ResNet50(chainer.Chain):  # type: ignore[misc]
    """Chainer's ResNet-50 (He et al., 2016), not trained before."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.net = L.ResNet50Layers(pretrained_model=None)

    def forward(self, x: Any, t: Any) -> Any:
        """Return the loss."""
        return F.softmax_cross_entropy(self.net(x, layers=["fc6"])["fc6"], t)


class LanguageModel(chainer.Chain):  # type: ignore[misc]
    """An embedding, two layers of LSTM, and a guess at each next word."""

    UNITS = 256

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.embed = L.EmbedID(WORDS, self.UNITS)
            self.lstm = L.NStepLSTM(2, self.UNITS, self.UNITS, dropout=0.0)
            self.decode = L.Linear(self.UNITS, WORDS)

    def forward(self, words: Any) -> Any:
        """Return the loss over all words but the first of each sequence."""
        vectors = self.embed(words[:, :-1])
        _, _, states = self.lstm(None, None, [vectors[i] for i in range(len(words))])
        return F.softmax_cross_entropy(self.decode(F.concat(states, axis=0)), words[:, 1:].ravel())


class Transformer(chainer.Chain):  # type: ignore[misc]
    """A classifier of sequences by attention (Vaswani et al., 2017): two encoder layers."""

    WORDS, TIMES = 1000, TIMES
    UNITS, HEADS, LAYERS = 128, 4, 2

    def __init__(self) -> None:
        super().__init__()
        units = self.UNITS
        with self.init_scope():
            self.embed = L.EmbedID(self.WORDS, units)
            self.position = chainer.Parameter(
                chainer.initializers.Normal(0.02), (self.TIMES, units)
            )
            self.layers = chainer.ChainList()
            for _ in range(self.LAYERS):
                layer = chainer.Chain()
                with layer.init_scope():
                    layer.norm1, layer.norm2 = (L.LayerNormalization(units) for _ in range(2))
                    layer.qkv, layer.out = L.Linear(units, 3 * units), L.Linear(units, units)
                    layer.up, layer.down = (
                        L.Linear(units, 4 * units),
                        L.Linear(4 * units, units),
                    )
                self.layers.add_link(layer)
            self.decode = L.Linear(units, 10)

    def forward(self, words: Any, t: Any) -> Any:
        """Return the loss."""
        batch, times = words.shape
        x = self.embed(words) + F.broadcast_to(self.position, (batch, times, self.UNITS))
        x = x.reshape(batch * times, self.UNITS)
        for layer in self.layers:
            x += layer.out(self._attend(layer.qkv(layer.norm1(x)), batch, times))
            x += layer.down(F.relu(layer.up(layer.norm2(x))))
        mean = F.average(x.reshape(batch, times, self.UNITS), axis=1)
        return F.softmax_cross_entropy(self.decode(mean), t)

    def _attend(self, qkv: Any, batch: int, times: int) -> Any:
        """Let each position look at the others of its sequence."""
        width = self.UNITS // self.HEADS
        heads = F.transpose(qkv.reshape(batch, times, 3, self.HEADS, width), (2, 0, 3, 1, 4))
        query, key, value = (
            each.reshape(batch * self.HEADS, times, width) for each in F.separate(heads, axis=0)
        )
        weights = F.softmax(F.matmul(query, key, transb=True) * width**-0.5, axis=2)
        seen = F.matmul(weights, value).reshape(batch, self.HEADS, times, width)
        return F.transpose(seen, (0, 2, 1, 3)).reshape(batch * times, self.UNITS)


def draw_images(*shape: int, classes: int) -> Callable[[int, int], tuple[Any, ...]]:
    """Return what draws a rank's batch of arrays and of their classes, given its size and the rank. Local.

    Args:
        *shape: Of one array, float32.
        classes: How many there are.
    """

    def draw(batch: int, rank: int) -> tuple[Any, ...]:
        rng = np.random.RandomState(rank)
        x = rng.standard_normal((batch, *shape)).astype(np.float32)
        return x, rng.randint(0, classes, batch).astype(np.int32)

    return draw


def draw_words(
    n_words: int, times: int, classes: int | None
) -> Callable[[int, int], tuple[Any, ...]]:
    """Return what draws a rank's batch of sequences, given its size and the rank. Local.

    Args:
        n_words: How many different words there are.
        times: Words of a sequence.
        classes: How many classes of sequences there are, whose numbers are drawn, too; None for no classes.
    """

    def draw(batch: int, rank: int) -> tuple[Any, ...]:
        rng = np.random.RandomState(rank)
        words = rng.randint(0, n_words, (batch, times)).astype(np.int32)
        return (
            (words,)
            if classes is None
            else (words, rng.randint(0, classes, batch).astype(np.int32))
        )

    return draw


def _built_in(
    model: type[chainer.Link],
    draw: Callable[[int, int], tuple[Any, ...]],
    batch: int,
    text: str,
    *,
    images: bool = False,
) -> Workload:
    """Return a workload whose torch model has the name of Chainer's."""

    def twin() -> Any:
        from chainer_dist.scaling import torch_models

        return getattr(torch_models, model.__name__)()

    return Workload(lambda batch, rank: (model(), draw(batch, rank)), batch, text, twin, images)


WORKLOADS = {
    "mlp": _built_in(
        MLP,
        draw_images(784, classes=10),
        64,
        "perceptron of 22.6 million parameters (784, 6 x 2048, 10)",
    ),
    "cnn": _built_in(
        CNN,
        draw_images(3, 32, 32, classes=10),
        64,
        "three convolutions, images of 32 x 32",
        images=True,
    ),
    "resnet50": _built_in(
        ResNet50,
        draw_images(3, 224, 224, classes=1000),
        4,
        "ResNet-50, generated images of 224 x 224",
        images=True,
    ),
    "lstm": _built_in(
        LanguageModel,
        draw_words(WORDS, TIMES + 1, None),
        8,
        f"language model, 2 layers of LSTM, {WORDS:,} words, sequences of {TIMES}",
    ),
    "transformer": _built_in(
        Transformer, draw_words(1000, TIMES, 10), 32, f"2 encoder layers, sequences of {TIMES}"
    ),
}


@functools.cache
def load(name: str) -> Workload:
    """Return a built-in workload, or the user's own. Local.

    Args:
        name: One of :data:`WORKLOADS`, or ``file.py:function``, where the function is a
            :attr:`Workload.make`. It may have the attributes ``batch``, by default 32, ``torch`` and ``images``.

    Raises:
        ValueError: If there is none of this name.
    """
    if name in WORKLOADS:
        return WORKLOADS[name]
    path, colon, function = name.rpartition(":")
    if not colon:
        raise ValueError(
            f"there is no workload {name!r}: give one of {', '.join(WORKLOADS)}, or file.py:function"
        )
    if not Path(path).is_file():
        raise ValueError(f"workload {name!r}: there is no file {path!r}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"workload {name!r}: {path!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    sys.path.insert(0, str(Path(path).resolve().parent))
    spec.loader.exec_module(module)
    make = getattr(module, function, None)
    if make is None:
        raise ValueError(f"workload {name!r}: {path!r} has no function {function!r}")
    return Workload(
        make,
        getattr(make, "batch", 32),
        name,
        getattr(make, "torch", None),
        getattr(make, "images", False),
    )
