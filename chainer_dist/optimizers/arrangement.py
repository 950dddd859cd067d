"""What decides, together with the other ranks, when an optimizer makes its updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from chainer_dist.optimizers.call import Call

__all__ = ["Arrangement"]


class Arrangement(Protocol):
    """Arranges the updates of an optimizer with the other ranks, as :class:`~chainer_dist.Join` does."""

    def update(self, optimizer: Any, call: Call) -> None:
        """Make the update of a call. Collective.

        Args:
            optimizer: The multi-node optimizer that was called.
            call: What it was called with.
        """
