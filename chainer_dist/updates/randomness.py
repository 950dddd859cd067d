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
    """A state of ``numpy.random`` that is used during updates only.

    Attributes:
        state: State that ``numpy.random.get_state`` returned, equal on all ranks; None before the first update.
    """

    def __init__(self) -> None:
        self.state: Any = None

    @contextlib.contextmanager
    def in_use(self, comm: CommunicatorBase) -> Iterator[None]:
        """Return a context in which all ranks draw the same numbers. Collective at first.

        Without it, a hook such as ``GradientNoise`` would make the ranks' parameters different. Outside of
        updates each rank keeps a random state of its own, for dropout for instance.

        Args:
            comm: The communicator whose ranks draw the same numbers. A single rank keeps its own state.
        """
        if comm.size == 1:
            yield
            return
        own: Any = np.random.get_state()  # noqa: NPY002 - Chainer's source of random numbers
        if self.state is None:
            # It follows from rank 0's state, which is not advanced.
            seed = comm.bcast_obj(np.random.RandomState(own[1]).randint(2**31))
            self.state = np.random.RandomState(seed).get_state()
        np.random.set_state(self.state)  # noqa: NPY002
        try:
            yield
        finally:
            self.state = np.random.get_state()  # noqa: NPY002
            np.random.set_state(own)  # noqa: NPY002
