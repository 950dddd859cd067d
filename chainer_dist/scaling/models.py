"""The built-in models that are trained while scaling is measured."""

from __future__ import annotations

from typing import Any

import chainer
import chainer.functions as F
import chainer.links as L

WORDS = 10_000
TIMES = 35  # words of a sequence


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
