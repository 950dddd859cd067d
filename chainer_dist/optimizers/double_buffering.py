"""Updates from the gradients of the step before, which are exchanged while this one computes."""

from __future__ import annotations

import concurrent.futures
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from chainer_dist import exchange
from chainer_dist.optimizers.multi_node_optimizer import MultiNodeOptimizer
from chainer_dist.parameters import ParameterSet, private_grads

if TYPE_CHECKING:
    import chainer

    from chainer_dist._typing import Array
    from chainer_dist.communicators import CommunicatorBase

__all__ = ["DoubleBufferingOptimizer"]


class DoubleBufferingOptimizer(MultiNodeOptimizer):
    """A multi-node optimizer whose gradients are one step old.

    A second thread, on a second communicator, averages the gradients of one step while the main thread
    computes those of the next. All optimizers of a communicator have both in common, until that is
    finalized. ChainerMN's ``double_buffering=True``, there with GPUs.
    """

    _OWN = MultiNodeOptimizer._OWN | {"_pending"}
    _FRESH: ClassVar[dict[str, Any]] = {**MultiNodeOptimizer._FRESH, "_pending": None}

    def __init__(self, *args: Any) -> None:
        from mpi4py import MPI

        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise ValueError(
                "double_buffering needs MPI started with THREAD_MULTIPLE; leave mpi4py.rc.threads "
                "and mpi4py.rc.thread_level as they are, or use another MPI library"
            )
        self._pending: _Pending | None = None
        super().__init__(*args)

    def wait(self) -> None:
        """Wait until the gradients under way are averaged. Local."""
        if self._pending is not None:
            self._pending.done.result()

    def _step(self, parameters: ParameterSet, *, same_grads: bool) -> None:
        if not same_grads:
            parameters.fill_zeros()
        grads = private_grads(parameters)
        having = [param for param, has in zip(parameters.params, parameters.has_grad) if has]
        self.wait()
        done = background(self._connected()).start(grads)
        scales = [param._loss_scale for param in having]
        stale, self._pending = self._pending, _Pending(having, grads, scales, done)
        if stale is None:
            return
        means = dict(zip(map(id, stale.params), zip(stale.grads, stale.scales)))
        for param in parameters.params:
            # The rules divide a gradient by the scale that it was computed with.
            param.grad, param._loss_scale = means.get(id(param), (None, param._loss_scale))
        exchange.check_means(parameters)
        with self._equal_randomness():
            self.actual_optimizer.update(None)

    def _make_equal(self, *, has_gradients: bool, kept: frozenset[str] = frozenset()) -> None:
        self.wait()
        self._pending = None  # of parameters that are no more
        super()._make_equal(has_gradients=has_gradients, kept=kept)


class _Pending(NamedTuple):
    """Gradients that are being averaged, and what they are the gradients of."""

    params: list[chainer.Parameter]
    grads: list[Array]
    scales: list[float | None]  # what the loss was multiplied by
    done: concurrent.futures.Future[None]


class _Background:
    """A thread that averages arrays over ranks of its own. Creating one is collective."""

    def __init__(self, comm: CommunicatorBase) -> None:
        self.comm = comm.background()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "chainer_dist exchange")

    def start(self, arrays: list[Array]) -> concurrent.futures.Future[None]:
        """Begin to average arrays in place. Collective: as often, and in the same order, everywhere."""
        return self._thread.submit(self.comm.mean_arrays, arrays)

    def finalize(self) -> None:
        """Give thread and communicator back, when all is averaged. Collective."""
        self._thread.shutdown()
        self.comm.finalize()


def background(comm: CommunicatorBase) -> _Background:
    """Return what averages arrays in the background of a communicator. Collective at first."""
    return comm.derived("background", lambda: _Background(comm), _Background.finalize)
