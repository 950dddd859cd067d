"""Concatenated channels of images, and their parts, with channels last in memory and without gaps.

NumPy's parts are views with gaps, which the functions after them would copy one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chainer.functions.array.concat import Concat
from chainer.functions.array.split_axis import SplitAxis

from chainer_dist.kernels import layouts
from chainer_dist.kernels.replacements import replaces

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array


def _are_images(axis: int, *arrays: Array) -> bool:
    """Return whether arrays have channels last in memory, and an axis is that of the channels. Local."""
    return (
        layouts.is_suitable(*arrays)
        and len({(x.shape[0], x.shape[2:]) for x in arrays}) == 1
        and arrays[0].ndim > 2  # noqa: PLR2004 - batch and channels
        and axis % arrays[0].ndim == 1
        and all(map(layouts.is_channels_last, arrays))
    )


@replaces(Concat, "forward")
def _concat(chainers: Any, self: Any, xs: tuple[Array, ...]) -> Any:
    if not _are_images(self.axis, *xs):
        return chainers(self, xs)
    n, _, *sizes = xs[0].shape
    y = layouts.empty((n, sum(x.shape[1] for x in xs), *sizes))
    begin = 0
    for x in xs:
        end = begin + x.shape[1]
        layouts.copy_channels(x, y[:, begin:end])
        begin = end
    return (y,)


@replaces(SplitAxis, "forward")
def _split(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    parts = chainers(self, inputs)
    if not _are_images(self.axis, *inputs):
        return parts
    return tuple(map(layouts.channels_last, parts))
