"""The built-in workloads written in torch: of equal structure and size, with Chainer's names, and so comparable.

Each is a module that is called with tensors for its loss. Where torch has a faster way to compute the same, it is
taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from chainer.links.rnn.n_step_rnn import NStepRNNBase
from torch import nn

from chainer_dist.scaling import models

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import chainer

__all__ = [
    "CNN",
    "MLP",
    "LanguageModel",
    "ResNet50",
    "Transformer",
    "copy_parameters",
    "named_arrays",
    "tensors",
]

# What Chainer adds to a variance; torch's own defaults are other ones.
BATCH_EPS, LAYER_EPS = 2e-5, 1e-6
_NAMES = {"W": "weight", "b": "bias", "gamma": "weight", "beta": "bias"}


def tensors(arguments: Any, *, channels_last: bool = False) -> Any:
    """Return the arguments of a Chainer model as a torch model takes them. Local.

    Args:
        arguments: Arrays, or tuples or lists of them. Integers become int64, a new array; others stay where they are.
        channels_last: Whether images, arrays of four dimensions, are copied so that the channels of a pixel are
            neighbours in memory.
    """
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(tensors(each, channels_last=channels_last) for each in arguments)
    if arguments.dtype.kind == "i":
        arguments = arguments.astype(np.int64)
    tensor = torch.from_numpy(arguments)
    if channels_last and tensor.dim() == 4:  # noqa: PLR2004 - N, C, H, W
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def copy_parameters(model: chainer.Link, net: nn.Module) -> None:
    """Give a torch model the parameters of the Chainer model with the same names of layers. Local.

    Args:
        model: The Chainer model, with its parameters initialized.
        net: The torch module, which is changed in place.

    Raises:
        ValueError: If their parameters are not the same number, or differ in shape.
    """
    todo = dict(net.named_parameters())
    for name, array in named_arrays(model):
        param = todo.pop(name, None)
        if param is None or tuple(param.shape) != array.shape:
            found = "no such parameter" if param is None else tuple(param.shape)
            raise ValueError(f"{name} is {array.shape} in Chainer, and in torch: {found}")
        with torch.no_grad():
            param.copy_(torch.from_numpy(array))
    if todo:
        raise ValueError(f"parameters in torch alone: {', '.join(todo)}")


def named_arrays(link: chainer.Link, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the parameters of a Chainer model as arrays, with their names in torch. Local.

    Args:
        link: The model, with its parameters initialized, or a part of it.
        place: Prefix of all names.
    """
    if isinstance(link, NStepRNNBase):
        for number, (weights, biases) in enumerate(zip(link.ws, link.bs)):
            layer, backward = divmod(number, link.direction)
            ending = f"l{layer}{'_reverse' * backward}"
            for kind, params in (("weight", weights), ("bias", biases)):
                half = len(params) // 2  # for the input; the others are for the state
                for of, part in (("ih", params[:half]), ("hh", params[half:])):
                    yield (
                        f"{place}{kind}_{of}_{ending}",
                        np.concatenate([each.array for each in part]),
                    )
        return
    for name in sorted(link._params):  # noqa: SLF001 - Chainer's
        yield place + _NAMES.get(name, name), getattr(link, name).array
    for child in link.children():
        yield from named_arrays(child, f"{place}{child.name}.")


class MLP(nn.Sequential):  # type: ignore[misc]  # mypy does not read torch
    """The workload mlp.

    Args:
        widths: Numbers of values, from the input to the output.
    """

    def __init__(self, widths: Sequence[int] = models.MLP.WIDTHS) -> None:
        super().__init__(*[nn.Linear(low, high) for low, high in zip(widths, widths[1:])])

    def forward(self, x: Any, t: Any) -> Any:
        """Return the loss."""
        *hidden, last = self
        for layer in hidden:
            x = F.relu(layer(x))
        return F.cross_entropy(last(x), t)


class CNN(nn.Module):  # type: ignore[misc]
    """The workload cnn."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(32, BATCH_EPS)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1)
        self.fc1 = nn.Linear(4 * 4 * 128, 512)
        self.fc2 = nn.Linear(512, 10)

    def forward(self, x: Any, t: Any) -> Any:
        """Return the loss."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        return F.cross_entropy(self.fc2(F.relu(self.fc1(x.flatten(1)))), t)


class ResNet50(nn.Module):  # type: ignore[misc]
    """The workload resnet50, with a bias of the first convolution and strides in the 1 x 1 convolutions, as in Chainer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net = nn.Module()
        net.conv1 = nn.Conv2d(3, 64, 7, 2, 3)
        net.bn1 = nn.BatchNorm2d(64, BATCH_EPS)
        net.res2 = _block(3, 64, 64, 256, 1)
        net.res3 = _block(4, 256, 128, 512, 2)
        net.res4 = _block(6, 512, 256, 1024, 2)
        net.res5 = _block(3, 1024, 512, 2048, 2)
        net.fc6 = nn.Linear(2048, 1000)

    def forward(self, x: Any, t: Any) -> Any:
        """Return the loss."""
        net = self.net
        x = F.max_pool2d(F.relu(net.bn1(net.conv1(x))), 3, 2, ceil_mode=True)
        x = net.res5(net.res4(net.res3(net.res2(x))))
        return F.cross_entropy(net.fc6(F.adaptive_avg_pool2d(x, 1).flatten(1)), t)


def _block(layers: int, inputs: int, width: int, outputs: int, stride: int) -> nn.Module:
    block = nn.Sequential()
    block.add_module("a", _Bottleneck(inputs, width, outputs, stride))
    for number in range(1, layers):
        block.add_module(f"b{number}", _Bottleneck(outputs, width, outputs, 1))
    return block


class _Bottleneck(nn.Module):  # type: ignore[misc]
    def __init__(self, inputs: int, width: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width, BATCH_EPS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, BATCH_EPS)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs, BATCH_EPS)
        self.projects = inputs != outputs
        if self.projects:
            self.conv4 = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.bn4 = nn.BatchNorm2d(outputs, BATCH_EPS)

    def forward(self, x: Any) -> Any:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (self.bn4(self.conv4(x)) if self.projects else x))


class LanguageModel(nn.Module):  # type: ignore[misc]
    """The workload lstm, of whatever recurrent layers the Chainer model has.

    Args:
        kind: Name of a recurrent layer, here and in the model: ``lstm`` or ``gru``.
    """

    def __init__(self, kind: str = "lstm") -> None:
        super().__init__()
        units = models.LanguageModel.UNITS
        self.kind = kind
        self.embed = nn.Embedding(models.WORDS, units)
        self.add_module(kind, getattr(nn, kind.upper())(units, units, 2, batch_first=True))
        self.decode = nn.Linear(units, models.WORDS)

    def forward(self, words: Any) -> Any:
        """Return the loss over all words but the first of each sequence."""
        states, _ = getattr(self, self.kind)(self.embed(words[:, :-1]))
        return F.cross_entropy(self.decode(states).flatten(0, 1), words[:, 1:].flatten())


class Transformer(nn.Module):  # type: ignore[misc]
    """The workload transformer.

    Args:
        like: The Chainer model whose sizes it has.
    """

    def __init__(self, like: type[models.Transformer] = models.Transformer) -> None:
        super().__init__()
        units = like.UNITS
        self.heads = like.HEADS
        self.embed = nn.Embedding(like.WORDS, units)
        self.position = nn.Parameter(torch.empty(like.TIMES, units).normal_(std=0.02))
        self.layers = nn.ModuleList()
        for _ in range(like.LAYERS):
            layer = nn.Module()
            layer.norm1, layer.norm2 = (nn.LayerNorm(units, LAYER_EPS) for _ in range(2))
            layer.qkv, layer.out = nn.Linear(units, 3 * units), nn.Linear(units, units)
            layer.up, layer.down = nn.Linear(units, 4 * units), nn.Linear(4 * units, units)
            self.layers.append(layer)
        self.decode = nn.Linear(units, 10)

    def forward(self, words: Any, t: Any) -> Any:
        """Return the loss."""
        x = self.embed(words) + self.position
        for layer in self.layers:
            x = x + layer.out(self._attend(layer.qkv(layer.norm1(x))))
            x = x + layer.down(F.relu(layer.up(layer.norm2(x))))
        return F.cross_entropy(self.decode(x.mean(1)), t)

    def _attend(self, qkv: Any) -> Any:
        """Let each position look at the others of its sequence."""
        qkv = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
