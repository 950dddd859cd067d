"""Random numbers of hooks and update rules, the same on every rank."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["Randomness"]


class Randomness:
    """A state of ``numpy.random`` that is in use during updates only.

    Attributes:
        state: State that ``numpy.random.get_state`` returned, equal on all ranks; None before the first update.
    """

    def __init__(self) -> None:
        self.state: Any = None

    @contextlib.contextmanager
    def in_use(self, comm: CommunicatorBase) -> Iterator[None]:
        """Let hooks and update rules draw the same numbers on every rank. Collective at first.

        A hook such as ``GradientNoise`` would otherwise move the ranks' parameters apart. Outside
        of updates the ranks' random states stay their own (for dropout, say).

        Args:
            comm: The communicator whose ranks draw the same numbers; nothing changes on a single rank.
        """
        if comm.size == 1:
            yield
            return
        own: Any = np.random.get_state()  # noqa: NPY002 - what Chainer draws from
        if self.state is None:
            # From rank 0's seed, but without drawing from it.
            seed = comm.bcast_obj(np.random.RandomState(own[1]).randint(2**31))
            self.state = np.random.RandomState(seed).get_state()
        np.random.set_state(self.state)  # noqa: NPY002
        try:
            yield
        finally:
            self.state = np.random.get_state()  # noqa: NPY002
            np.random.set_state(own)  # noqa: NPY002
