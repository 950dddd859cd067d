"""The models of kernel_models.py in torch, with the same names of layers."""

from __future__ import annotations

from typing import Any

import kernel_models
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from chainer_dist.scaling import torch_models, workloads
from chainer_dist.scaling.torch_models import BATCH_EPS


class VGG16(nn.Module):
    """The workload vgg16."""

    LAYERS = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)

    def __init__(self) -> None:
        super().__init__()
        self.net = net = nn.Module()
        inputs = 3
        for block, widths in enumerate(self.LAYERS, 1):
            for number, outputs in enumerate(widths, 1):
                net.add_module(f"conv{block}_{number}", nn.Conv2d(inputs, outputs, 3, padding=1))
                inputs = outputs
        net.fc6 = nn.Linear(7 * 7 * 512, 4096)
        net.fc7 = nn.Linear(4096, 4096)
        net.fc8 = nn.Linear(4096, 1000)

    def forward(self, x: Any, t: Any) -> Any:
        """Return the loss."""
        net = self.net
        for block, widths in enumerate(self.LAYERS, 1):
            for number in range(1, len(widths) + 1):
                x = F.relu(getattr(net, f"conv{block}_{number}")(x))
            x = F.max_pool2d(x, 2)
        x = F.relu(net.fc7(F.relu(net.fc6(x.flatten(1)))))
        return F.cross_entropy(net.fc8(x), t)


class MobileNet(nn.Module):
    """The workload mobilenet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(32, BATCH_EPS)
        self.layers = nn.ModuleList()
        inputs = 32
        for outputs, stride in kernel_models.SEPARABLE:
            layer = nn.Module()
            layer.depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
            layer.norm1 = nn.BatchNorm2d(inputs, BATCH_EPS)
            layer.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
            layer.norm2 = nn.BatchNorm2d(outputs, BATCH_EPS)
            self.layers.append(layer)
            inputs = outputs
        self.decode = nn.Linear(inputs, 1000)

    def forward(self, x: Any, t: Any) -> Any:
        """Return the loss."""
        x = F.relu(self.norm(self.conv(x)))
        for layer in self.layers:
            x = F.relu(layer.norm1(layer.depthwise(x)))
            x = F.relu(layer.norm2(layer.pointwise(x)))
        return F.cross_entropy(self.decode(F.adaptive_avg_pool2d(x, 1).flatten(1)), t)


class UNet(nn.Module):
    """The workload unet."""

    def __init__(self) -> None:
        super().__init__()
        channels = kernel_models.UNET_CHANNELS
        self.down = nn.ModuleList(map(_Pair, (3, *channels), channels))
        self.up, self.merge = nn.ModuleList(), nn.ModuleList()
        for each in channels[-2::-1]:
            self.up.append(nn.ConvTranspose2d(2 * each, each, 2, 2))
            self.merge.append(_Pair(2 * each, each))
        self.decode = nn.Conv2d(channels[0], kernel_models.UNET_CLASSES, 1)

    def forward(self, x: Any, t: Any) -> Any:
        """Return the loss."""
        branches = []
        for number, pair in enumerate(self.down):
            x = pair(F.max_pool2d(x, 2) if number else x)
            branches.append(x)
        for up, pair, branch in zip(self.up, self.merge, branches[-2::-1]):
            x = pair(torch.cat([branch, up(x)], 1))
        return F.cross_entropy(self.decode(x), t)


class _Pair(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs, BATCH_EPS)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs, BATCH_EPS)

    def forward(self, x: Any) -> Any:
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)))


class GRULanguageModel(torch_models.LanguageModel):
    """The workload gru."""

    def __init__(self) -> None:
        super().__init__("gru")


class Tagger(nn.Module):
    """The workload bilstm."""

    def __init__(self) -> None:
        super().__init__()
        units = kernel_models.Tagger.UNITS
        self.embed = nn.Embedding(workloads.WORDS, units)
        self.lstm = nn.LSTM(units, units, 2, bidirectional=True)
        self.decode = nn.Linear(2 * units, kernel_models.TAGS)

    def forward(self, sequences: list[Any], tags: list[Any]) -> Any:
        """Return the loss."""
        words = pack_sequence(sequences, enforce_sorted=False)
        states, _ = self.lstm(words._replace(data=self.embed(words.data)))
        return F.cross_entropy(
            self.decode(states.data), pack_sequence(tags, enforce_sorted=False).data
        )


class StatefulLanguageModel(nn.Module):
    """The workload lstm_steps."""

    def __init__(self) -> None:
        super().__init__()
        units = workloads.LanguageModel.UNITS
        self.embed = nn.Embedding(workloads.WORDS, units)
        self.lstm = nn.Module()
        self.lstm.upward = nn.Linear(units, 4 * units)
        self.lstm.lateral = nn.Linear(units, 4 * units, bias=False)
        self.decode = nn.Linear(units, workloads.WORDS)

    @staticmethod
    def _gates(parameter: Any) -> Any:
        """Return what Chainer has in the order of units, then gates a, i, f and o, in torch's: gates i, f, a and o."""
        a, i, f, o = parameter.unflatten(0, (-1, 4)).unbind(1)
        return torch.cat([i, f, a, o])

    def forward(self, words: Any) -> Any:
        """Return the loss over all words but the first of each sequence."""
        vectors = self.embed(words[:, :-1])
        upward, lateral = self.lstm.upward, self.lstm.lateral
        w, v, b = map(self._gates, (upward.weight, lateral.weight, upward.bias))
        h = c = torch.zeros_like(vectors[:, 0])
        states = []
        for x in vectors.unbind(1):
            h, c = torch.lstm_cell(x, (h, c), w, v, b, torch.zeros_like(b))
            states.append(h)
        return F.cross_entropy(self.decode(torch.cat(states)), words[:, 1:].T.flatten())


class LargeTransformer(torch_models.Transformer):
    """The workload transformer_large."""

    def __init__(self) -> None:
        super().__init__(kernel_models.LargeTransformer)
