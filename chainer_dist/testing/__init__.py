"""Helpers for tests of distributed code, under ChainerMN's names."""

from __future__ import annotations

from chainer_dist.testing.device import get_device

__all__ = ["get_device"]
