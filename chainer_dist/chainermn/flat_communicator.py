"""ChainerMN's place for the class of the communicator ``flat``."""

from __future__ import annotations

from chainer_dist.communicators.flat import FlatCommunicator

__all__ = ["FlatCommunicator"]
