"""ChainerMN's place for the class of the communicator ``dummy``."""

from __future__ import annotations

from chainer_dist.communicators.dummy import DummyCommunicator

__all__ = ["DummyCommunicator"]
