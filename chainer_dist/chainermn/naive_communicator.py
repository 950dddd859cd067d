"""ChainerMN's place for the class of the communicator ``naive``."""

from __future__ import annotations

from chainer_dist.communicators.naive import NaiveCommunicator

__all__ = ["NaiveCommunicator"]
