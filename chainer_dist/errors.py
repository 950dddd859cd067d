"""Errors that every rank raises together."""

from __future__ import annotations


class RankMismatchError(ValueError):
    """Ranks that must agree passed different things to one operation.

    Raised on every rank of the communicator with the same text, which names the first rank that
    differs from rank 0 and what differs (the parameter, its shape or dtype, the option).
    """


class NonFiniteGradientError(ValueError):
    """A gradient has NaN or infinity on some rank, before it is averaged.

    Raised in checked mode (``CHAINER_DIST_CHECKED=1``) on every rank with the same text, which names
    the lowest rank that has one, the parameter, and how many values are affected. An average would
    spread them to all ranks.
    """


class FinalizedCommunicatorError(RuntimeError):
    """A communicator was used after its :meth:`finalize`."""
