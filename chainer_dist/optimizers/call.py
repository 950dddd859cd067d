"""What a call of ``update`` is given, in one object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Call"]


class Call(NamedTuple):
    """One call of ``update`` on this rank.

    Attributes:
        ranks: Number of ranks whose gradients count in it, the same on every rank.
        lossfun: Function that returns the loss; None if the gradients are there already, or this rank
            stands by without a batch to repeat.
        args: Positional arguments of ``lossfun``.
        kwds: Keyword arguments of ``lossfun``.
        stands_by: Whether this rank's gradients do not count; see :class:`~chainer_dist.Join`.
        postponed: Whether to accumulate only, the same on every rank.
    """

    ranks: int
    lossfun: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwds: dict[str, Any] = {}  # noqa: RUF012 - never changed
    stands_by: bool = False
    postponed: bool = False

    @property
    def has_gradients(self) -> bool:
        """Whether gradients that count were computed before the call."""
        return self.lossfun is None and not self.stands_by
