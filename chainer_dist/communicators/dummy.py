"""The communicator that leaves the communication out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainer_dist.communicators.flat import FlatCommunicator

if TYPE_CHECKING:
    from chainer_dist._typing import Array


class DummyCommunicator(FlatCommunicator):
    """Packs and unpacks gradients like ``flat`` but exchanges nothing.

    For measuring what communication costs. Ranks drift apart under it, so it is not for training.
    """

    name = "dummy"

    def _reduce(self, buffer: Array) -> float:
        del buffer
        return 1.0
