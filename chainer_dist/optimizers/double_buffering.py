"""The multi-node optimizer of ``double_buffering=True``."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from chainer_dist.optimizers.multi_node_optimizer import MultiNodeOptimizer
from chainer_dist.updates.delayed import Delayed
from chainer_dist.updates.options import Options

if TYPE_CHECKING:
    import chainer

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["DoubleBufferingOptimizer"]


class DoubleBufferingOptimizer(MultiNodeOptimizer):
    """A multi-node optimizer whose gradients are one step old; see :class:`Delayed`.

    Raises:
        ValueError: If MPI was not started for several threads.
    """

    def __init__(
        self,
        actual_optimizer: chainer.Optimizer,
        communicator: CommunicatorBase,
        zero_fill: bool,
        options: Options = Options(),  # noqa: B008 - a tuple
    ) -> None:
        from mpi4py import MPI

        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise ValueError(
                "double_buffering needs MPI started with THREAD_MULTIPLE; leave mpi4py.rc.threads "
                "and mpi4py.rc.thread_level as they are, or use another MPI library"
            )
        options = options._replace(kind=Delayed.name, sharded_update=False, overlap=False)
        super().__init__(actual_optimizer, communicator, zero_fill, options)

    def wait(self) -> None:
        """Wait until the gradients under way are averaged. Local."""
        cast("Delayed", self._step().plan.update).wait()
