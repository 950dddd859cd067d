"""Models for bench_kernels.py beside those of ``chainer-dist scale``.

Each function at the end is a workload for it, too: ``chainer-dist scale --workloads scripts/benchmarks/kernel_models.py:unet``.
The torch models are in kernel_models_torch.py.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

from chainer_dist.scaling import workloads

if TYPE_CHECKING:
    from collections.abc import Callable

# Channels that come out of each separable convolution of MobileNet, and its stride.
SEPARABLE = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5]
SEPARABLE += [(1024, 2), (1024, 1)]
UNET_CHANNELS = (32, 64, 128, 256)
UNET_CLASSES = 8
TAGS = 50


class VGG16(chainer.Chain):
    """Chainer's VGG-16 (Simonyan and Zisserman, 2015) without its dropout, so that losses can be compared."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.net = L.VGG16Layers(pretrained_model=None)

    def forward(self, x: Any, t: Any) -> Any:
        """Return the loss."""
        net = self.net
        x = net(x, layers=["pool5"])["pool5"]
        return F.softmax_cross_entropy(net.fc8(F.relu(net.fc7(F.relu(net.fc6(x))))), t)


class MobileNet(chainer.Chain):
    """Depthwise separable convolutions, as in MobileNet (Howard et al., 2017), for images of any size."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv = L.Convolution2D(3, 32, 3, 2, 1, nobias=True)
            self.norm = L.BatchNormalization(32)
            self.layers = chainer.ChainList()
            inputs = 32
            for outputs, stride in SEPARABLE:
                layer = chainer.Chain()
                with layer.init_scope():
                    layer.depthwise = L.Convolution2D(
                        inputs, inputs, 3, stride, 1, nobias=True, groups=inputs
                    )
                    layer.norm1 = L.BatchNormalization(inputs)
                    layer.pointwise = L.Convolution2D(inputs, outputs, 1, nobias=True)
                    layer.norm2 = L.BatchNormalization(outputs)
                self.layers.add_link(layer)
                inputs = outputs
            self.decode = L.Linear(inputs, 1000)

    def forward(self, x: Any, t: Any) -> Any:
        """Return the loss."""
        x = F.relu(self.norm(self.conv(x)))
        for layer in self.layers:
            x = F.relu(layer.norm1(layer.depthwise(x)))
            x = F.relu(layer.norm2(layer.pointwise(x)))
        return F.softmax_cross_entropy(self.decode(F.average(x, axis=(2, 3))), t)


class UNet(chainer.Chain):
    """A class for each pixel: convolutions down, transposed ones up, and branches between (Ronneberger et al., 2015)."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.down = chainer.ChainList()
            inputs = 3
            for channels in UNET_CHANNELS:
                self.down.add_link(self._pair(inputs, channels))
                inputs = channels
            self.up, self.merge = chainer.ChainList(), chainer.ChainList()
            for channels in UNET_CHANNELS[-2::-1]:
                self.up.add_link(L.Deconvolution2D(2 * channels, channels, 2, 2))
                self.merge.add_link(self._pair(2 * channels, channels))
            self.decode = L.Convolution2D(UNET_CHANNELS[0], UNET_CLASSES, 1)

    @staticmethod
    def _pair(inputs: int, outputs: int) -> chainer.Chain:
        pair = chainer.Chain()
        with pair.init_scope():
            pair.conv1 = L.Convolution2D(inputs, outputs, 3, pad=1, nobias=True)
            pair.norm1 = L.BatchNormalization(outputs)
            pair.conv2 = L.Convolution2D(outputs, outputs, 3, pad=1, nobias=True)
            pair.norm2 = L.BatchNormalization(outputs)
        return pair

    @staticmethod
    def _convolve(pair: chainer.Chain, x: Any) -> Any:
        x = F.relu(pair.norm1(pair.conv1(x)))
        return F.relu(pair.norm2(pair.conv2(x)))

    def forward(self, x: Any, t: Any) -> Any:
        """Return the loss."""
        branches = []
        for number, pair in enumerate(self.down):
            x = self._convolve(pair, F.max_pooling_2d(x, 2) if number else x)
            branches.append(x)
        for up, pair, branch in zip(self.up, self.merge, branches[-2::-1]):
            x = self._convolve(pair, F.concat([branch, up(x)]))
        return F.softmax_cross_entropy(self.decode(x), t)


class GRULanguageModel(chainer.Chain):
    """The workload lstm with gated recurrent units."""

    def __init__(self) -> None:
        super().__init__()
        units = workloads.LanguageModel.UNITS
        with self.init_scope():
            self.embed = L.EmbedID(workloads.WORDS, units)
            self.gru = L.NStepGRU(2, units, units, dropout=0.0)
            self.decode = L.Linear(units, workloads.WORDS)

    def forward(self, words: Any) -> Any:
        """Return the loss over all words but the first of each sequence."""
        vectors = self.embed(words[:, :-1])
        _, states = self.gru(None, [vectors[i] for i in range(len(words))])
        return F.softmax_cross_entropy(self.decode(F.concat(states, axis=0)), words[:, 1:].ravel())


class Tagger(chainer.Chain):
    """A tag for each word of sequences of different lengths, by two layers of LSTM in both directions."""

    UNITS = 256

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.embed = L.EmbedID(workloads.WORDS, self.UNITS)
            self.lstm = L.NStepBiLSTM(2, self.UNITS, self.UNITS, dropout=0.0)
            self.decode = L.Linear(2 * self.UNITS, TAGS)

    def forward(self, sequences: list[Any], tags: list[Any]) -> Any:
        """Return the loss."""
        ends = np.cumsum([len(each) for each in sequences])[:-1]
        vectors = F.split_axis(self.embed(np.concatenate(sequences)), ends, 0)
        _, _, states = self.lstm(None, None, vectors)
        return F.softmax_cross_entropy(self.decode(F.concat(states, axis=0)), np.concatenate(tags))


class StatefulLanguageModel(chainer.Chain):
    """A layer of LSTM that is called word by word, and keeps its own state."""

    def __init__(self) -> None:
        super().__init__()
        units = workloads.LanguageModel.UNITS
        with self.init_scope():
            self.embed = L.EmbedID(workloads.WORDS, units)
            self.lstm = L.LSTM(units, units)
            self.decode = L.Linear(units, workloads.WORDS)

    def forward(self, words: Any) -> Any:
        """Return the loss over all words but the first of each sequence."""
        self.lstm.reset_state()
        vectors = self.embed(words[:, :-1])
        states = [self.lstm(vectors[:, time]) for time in range(vectors.shape[1])]
        return F.softmax_cross_entropy(
            self.decode(F.concat(states, axis=0)), words[:, 1:].T.ravel()
        )


class LargeTransformer(workloads.Transformer):
    """The workload transformer, with six layers, 512 wide, and sequences of 128."""

    TIMES = 128
    UNITS, HEADS, LAYERS = 512, 8, 6


def _pixels(batch: int, rank: int) -> tuple[Any, Any]:
    rng = np.random.RandomState(rank)
    x = rng.standard_normal((batch, 3, 128, 128)).astype(np.float32)
    return x, rng.randint(0, UNET_CLASSES, (batch, 128, 128)).astype(np.int32)


def _sequences(batch: int, rank: int) -> tuple[list[Any], list[Any]]:
    rng = np.random.RandomState(rank)
    lengths = rng.randint(5, 61, batch)
    return (
        [rng.randint(0, workloads.WORDS, each).astype(np.int32) for each in lengths],
        [rng.randint(0, TAGS, each).astype(np.int32) for each in lengths],
    )


def _workload(
    model: type[chainer.Link],
    draw: Callable[[int, int], tuple[Any, ...]],
    batch: int,
    *,
    images: bool = False,
) -> Any:
    """Return a function that chainer-dist scale takes as a workload."""

    def make(batch: int, rank: int) -> tuple[chainer.Link, tuple[Any, ...]]:
        return model(), draw(batch, rank)

    def twin() -> Any:
        return getattr(importlib.import_module("kernel_models_torch"), model.__name__)()

    make.batch, make.torch, make.images = batch, twin, images
    return make


vgg16 = _workload(VGG16, workloads.draw_images(3, 224, 224, classes=1000), 4, images=True)
mobilenet = _workload(MobileNet, workloads.draw_images(3, 128, 128, classes=1000), 16, images=True)
unet = _workload(UNet, _pixels, 4, images=True)
gru = _workload(
    GRULanguageModel, workloads.draw_words(workloads.WORDS, workloads.TIMES + 1, None), 8
)
lstm_steps = _workload(
    StatefulLanguageModel, workloads.draw_words(workloads.WORDS, workloads.TIMES + 1, None), 8
)
bilstm = _workload(Tagger, _sequences, 32)
transformer_large = _workload(LargeTransformer, workloads.draw_words(1000, 128, 10), 8)
