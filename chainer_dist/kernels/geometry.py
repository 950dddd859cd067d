"""Geometry of convolutions: windows, and the shapes of input, weights and output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from chainer_dist.kernels.onednn import TRAINING, Layout, dimensions

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_DIMENSIONS = 3  # most dimensions beside batch and channels

DIRECT = 1  # the algorithm dnnl_convolution_direct


class Window(NamedTuple):
    """Stride, padding and dilation of a convolution, one number per dimension, and its number of groups."""

    stride: tuple[int, ...]
    pad: tuple[int, ...]
    dilate: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, function: Any) -> Window:
        """Return the window of one of Chainer's functions. Local."""
        if hasattr(function, "sy"):
            stride, pad = (function.sy, function.sx), (function.ph, function.pw)
            return cls(stride, pad, (function.dy, function.dx), function.groups)
        return cls(function.stride, function.pad, function.dilate, function.groups)


def padding_at_end(*sizes: Sequence[int]) -> tuple[int, ...]:
    """Return how far the last windows reach beyond the end, which Chainer does not state. Local.

    Args:
        sizes: Sizes of input, window and output, stride, padding and dilation, each with one number per dimension.
    """
    each = zip(*sizes)
    return tuple(max(0, s * (y - 1) + (k - 1) * d + 1 - x - p) for x, k, y, s, p, d in each)


class Geometry(NamedTuple):
    """Key of the operation of a convolution of ``x`` to ``y`` by ``w``.

    Attributes:
        x: Shape of the input, ``(batch, channels, sizes...)``.
        w: Shape of the weights, ``(channels of y, channels of x / groups, sizes...)``.
        y: Shape of the output, ``(batch, channels, sizes...)``.
        window: Stride, padding, dilation and groups.
        x_is_dense: Whether the input is C-contiguous. Otherwise its channels are last in memory.
    """

    x: tuple[int, ...]
    w: tuple[int, ...]
    y: tuple[int, ...]
    window: Window
    x_is_dense: bool = False

    def padding_at_end(self) -> tuple[int, ...]:
        """Return :func:`padding_at_end` for all sizes. Local."""
        stride, pad, dilate, _ = self.window
        return padding_at_end(self.x[2:], self.w[2:], self.y[2:], stride, pad, dilate)

    def weights(self) -> tuple[int, ...]:
        """Return the shape of the weights for oneDNN: groups first, if there are several. Local."""
        if self.window.groups == 1:
            return self.w
        groups = self.window.groups
        return (groups, self.w[0] // groups, *self.w[1:])

    def sizes(self) -> list[Any]:
        """Return stride, dilation and padding as arguments of oneDNN's functions. Local."""
        stride, pad, dilate, _ = self.window
        between = [d - 1 for d in dilate]
        return [dimensions(each) for each in (stride, between, pad, self.padding_at_end())]

    def forward(self, bias: Layout | None = None, *, any_layouts: bool = False) -> list[Any]:
        """Return the parameters of the forward operation. Local.

        Args:
            bias: Layout of the bias; None if there is none.
            any_layouts: Whether oneDNN may choose the memory order of input and output.
        """
        x, y = Layout.channels_last(self.x), Layout.channels_last(self.y)
        if any_layouts:
            x, y = x.anyhow(), y.anyhow()
        weights = Layout(self.weights(), None)
        return [TRAINING, DIRECT, x, weights, bias, y, *self.sizes()]
