"""The update of double buffering, by the gradients of the step before, which are averaged during this step."""

from __future__ import annotations

import concurrent.futures
from typing import TYPE_CHECKING, NamedTuple

from chainer_dist import exchange
from chainer_dist.parameters import private_grads
from chainer_dist.updates.base import Update

if TYPE_CHECKING:
    import chainer

    from chainer_dist._typing import Array
    from chainer_dist.communicators import CommunicatorBase
    from chainer_dist.updates.base import Context, Gradients

__all__ = ["Delayed"]


class Delayed(Update):
    """The update of double buffering: its gradients are one step old.

    A second thread, on a second communicator, averages the gradients of one step while the main thread
    computes the gradients of the next. All optimizers of a communicator share this thread and the second
    communicator, until the first one is finalized. ChainerMN has ``double_buffering=True`` on GPUs only.
    """

    name = "delayed"
    updates_late = 1

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._pending: _Pending | None = None

    def wait(self) -> None:
        """Wait until the pending gradients are averaged. Local."""
        if self._pending is not None:
            self._pending.done.result()

    def apply(self, gradients: Gradients) -> None:
        """Begin to average the gradients of this step, and update by the means of the step before. Collective."""
        comm, optimizer, _, randomness = self.context
        parameters = gradients.parameters
        if not gradients.are_matched:
            parameters.fill_zeros()
        grads = private_grads(parameters)
        having = [param for param, has in zip(parameters.params, parameters.has_grad) if has]
        self.wait()
        done = background(comm).start(grads)
        scales = [param._loss_scale for param in having]  # noqa: SLF001 - Chainer's
        before, self._pending = self._pending, _Pending(having, grads, scales, done)
        if before is None:
            return
        means = dict(zip(map(id, before.params), zip(before.grads, before.scales)))
        for param in parameters.params:
            # The rules divide a gradient by the loss scale with which it was computed.
            param.grad, param._loss_scale = means.get(id(param), (None, param._loss_scale))  # noqa: SLF001 - Chainer's
        exchange.check_means(parameters)
        with randomness.in_use(comm):
            optimizer.update(None)

    def discard(self) -> None:
        """Wait for the pending gradients, and discard them. Local."""
        self.wait()
        self._pending = None


class _Pending(NamedTuple):
    """Gradients that are being averaged, and their parameters."""

    params: list[chainer.Parameter]
    grads: list[Array]
    scales: list[float | None]  # loss scales with which they were computed
    done: concurrent.futures.Future[None]


class _Background:
    """A thread that averages arrays on a communicator of its own. Creating one is collective."""

    def __init__(self, comm: CommunicatorBase) -> None:
        self.comm = comm.background()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "chainer_dist exchange")

    def start(self, arrays: list[Array]) -> concurrent.futures.Future[None]:
        """Begin to average arrays in place. Collective: all ranks make the same calls in the same order."""
        return self._thread.submit(self.comm.mean_arrays, arrays)

    def finalize(self) -> None:
        """Wait for all means, then end the thread and finalize the communicator. Collective."""
        self._thread.shutdown()
        self.comm.finalize()


def background(comm: CommunicatorBase) -> _Background:
    """Return the thread that averages arrays over the ranks of a communicator. Collective at first."""
    return comm.derived("background", lambda: _Background(comm), _Background.finalize)
