"""Which elements of the parameters each rank updates."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

__all__ = ["positions"]


def positions(indices: Sequence[int], chosen: Container[int]) -> frozenset[int]:
    """Return the positions in ``indices`` at which there is one of ``chosen``. Local."""
    return frozenset([position for position, index in enumerate(indices) if index in chosen])
